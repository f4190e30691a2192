"""Minting answers in both published shapes and hands out no more than the key has."""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_ledger.store.identity import ApiKeyRecord
from behest_proxy.errors import Forbidden, InvalidRequest, RequestTooLarge
from behest_proxy.identity.keys import KeySet, SigningKey
from behest_proxy.identity.mint import MintAnswer, MintRequest, mint, parse_mint
from behest_proxy.identity.tokens import TokenVerifier

NOW_S = 1_800_000_000.75
KEY = SigningKey.generate()


def api_key(role: str = "user") -> ApiKeyRecord:
    return ApiKeyRecord(
        tenant_id="acme",
        project_id="demo/shop",
        key_id="key_1",
        sha256=b"",
        argon2="",
        role=role,
        name="",
        last_four="0000",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def ids() -> Callable[[], str]:
    numbers = count(1)
    return lambda: f"id-{next(numbers)}"


def minted(key_role: str = "user", key: SigningKey = KEY, **members: Any) -> MintAnswer:
    request = parse_mint(json.dumps({"user_id": "u_1", **members}).encode())
    return mint(request, api_key(key_role), signing_key=key, issuer="behest", now_s=NOW_S, new_id=ids())


def claims_of(answer: MintAnswer) -> dict[str, Any]:
    payload = answer.jwt.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=="))
    return claims


def refused(body: object) -> str | None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(InvalidRequest) as caught:
        parse_mint(data)
    if caught.value.param is not None:
        assert caught.value.param in caught.value.message
    return caught.value.param


def test_the_answer_is_the_union_of_both_published_shapes() -> None:
    body = json.loads(minted(session_id="s_1", ttl=60).body())
    token = body.pop("jwt")
    assert body == {
        "access_token": token,
        "token_type": "Bearer",
        "project_id": "demo/shop",
        "ttl": 60,
        "expires_in": 60,
        "expires_at": "2027-01-15T08:01:00Z",
        "session_id": "s_1",
    }
    assert type(body["ttl"]) is int


def test_the_claims_are_the_published_ones_in_the_published_order() -> None:
    claims = claims_of(minted(session_id="s_1", tier=2))
    assert list(claims.items()) == [
        ("tid", "acme"),
        ("pid", "demo/shop"),
        ("uid", "u_1"),
        ("role", "user"),
        ("scp", []),
        ("iss", "behest"),
        ("aud", "behest"),
        ("iat", 1_800_000_000),
        ("nbf", 1_800_000_000),
        ("exp", 1_800_003_600),
        ("jti", "id-1"),
        ("sid", "s_1"),
        ("tier", 2),
    ]


def test_without_a_session_one_is_made_and_without_a_tier_none_is_claimed() -> None:
    answer = minted()
    claims = claims_of(answer)
    assert "tier" not in claims
    assert answer.session_id == claims["sid"]
    assert claims["sid"] != claims["jti"]


def test_what_is_minted_verifies() -> None:
    answer = minted("admin", role="admin", tier="pro", session_id="s_1")
    caller = TokenVerifier(KeySet([KEY.verification_key()])).verify(answer.access_token, NOW_S)
    assert (caller.tenant_id, caller.project_id, caller.user_id) == ("acme", "demo/shop", "u_1")
    assert (caller.role, caller.session_id, caller.tier) == ("admin", "s_1", "pro")


@pytest.mark.parametrize(
    ("asked", "key_role", "got"),
    [
        ("user", "user", "user"),
        ("admin", "user", "user"),
        ("dashboard-service", "user", "user"),
        ("admin", "dashboard-service", "dashboard-service"),
        ("user", "admin", "user"),
        ("admin", "admin", "admin"),
        ("owner", "admin", "user"),
        ("admin", "unknown", "user"),
        ("Admin", "admin", "user"),
    ],
)
def test_the_role_is_capped_at_the_keys_role(asked: str, key_role: str, got: str) -> None:
    request = parse_mint(json.dumps({"user_id": "u_1", "role": asked}).encode())
    answer = mint(request, api_key(key_role), signing_key=KEY, issuer="behest", now_s=NOW_S, new_id=ids())
    assert claims_of(answer)["role"] == got


def test_the_published_clients_body_is_accepted() -> None:
    body = b'{"user_id":"default","role":"user","ttl":900,"session_id":"a3","tier":1,"extra":{"x":[1]}}'
    assert parse_mint(body) == MintRequest(user_id="default", role="user", ttl_s=900, session_id="a3", tier=1)


def test_everything_but_the_user_has_a_default_and_null_means_absent() -> None:
    expected = MintRequest(user_id="u", role="user", ttl_s=3600, session_id=None, tier=None)
    assert parse_mint(b'{"user_id":"u"}') == expected
    body = b'{"user_id":"u","role":null,"ttl":null,"session_id":null,"tier":null}'
    assert parse_mint(body) == expected


@pytest.mark.parametrize("user_id", ["admin", "system", "dashboard-service", "sys:", "sys:x"])
def test_reserved_user_ids_are_refused(user_id: str) -> None:
    assert refused({"user_id": user_id}) == "user_id"


@pytest.mark.parametrize("user_id", ["default", "administrator", "sys", "u", "x" * 255, "ü" * 255, "名"])
def test_other_user_ids_of_1_to_255_characters_are_accepted(user_id: str) -> None:
    assert parse_mint(json.dumps({"user_id": user_id}).encode()).user_id == user_id


@pytest.mark.parametrize("user_id", [None, "", "x" * 256, 1, True, [], {}, "a\x00", "a\nb", "\ud800"])
def test_a_user_id_of_another_kind_is_refused_by_name(user_id: object) -> None:
    assert refused({"user_id": user_id}) == "user_id"
    assert refused({}) == "user_id"


@pytest.mark.parametrize("ttl", [59, 86_401, 0, -1, True, False, 60.0, 3600.5, "3600", [], {}, 10**30])
def test_a_ttl_that_is_no_int_in_range_is_refused_by_name(ttl: object) -> None:
    assert refused({"user_id": "u", "ttl": ttl}) == "ttl"


@pytest.mark.parametrize("ttl", [60, 3600, 86_400])
def test_a_ttl_in_range_is_accepted(ttl: int) -> None:
    answer = minted(ttl=ttl)
    claims = claims_of(answer)
    assert claims["exp"] - claims["iat"] == answer.ttl == answer.expires_in == ttl


@pytest.mark.parametrize("session_id", ["", "a b", "é", "x" * 256, "a\n", 1, True, [], {}])
def test_a_session_id_that_no_header_could_name_is_refused_by_name(session_id: object) -> None:
    assert refused({"user_id": "u", "session_id": session_id}) == "session_id"


@pytest.mark.parametrize("tier", [True, False, -1, 1.5, "", "a b", "x" * 64, [], {}, 10**9])
def test_a_tier_that_is_neither_number_nor_name_is_refused_by_name(tier: object) -> None:
    assert refused({"user_id": "u", "tier": tier}) == "tier"


@pytest.mark.parametrize("role", ["", 1, True, [], {}, "a\x00", "x" * 256])
def test_a_role_that_is_no_text_is_refused_by_name(role: object) -> None:
    assert refused({"user_id": "u", "role": role}) == "role"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"u"',
        b"{",
        b'{"user_id":"u"} x',
        b'{"user_id":"u","user_id":"admin"}',
        rb'{"user_id":"u","user_\u0069d":"v"}',
        b'{"user_id":"u","ttl":NaN}',
        b'{"user_id":"\xff"}',
        b"[" * 16_000,
        b"user_id=u",
    ],
)
def test_a_body_that_is_not_one_strict_json_object_is_refused(body: bytes) -> None:
    assert refused(body) is None


def test_a_body_over_16_kib_is_too_large() -> None:
    with pytest.raises(RequestTooLarge):
        parse_mint(b" " * 16_385)


def test_a_key_of_another_tenant_is_not_served_by_a_bound_signing_key() -> None:
    bound = SigningKey.load(KEY.private_pem(), tenant_id="other")
    with pytest.raises(Forbidden):
        minted(key=bound)
    assert minted(key=SigningKey.load(KEY.private_pem(), tenant_id="acme")).jwt


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=200))
def test_no_bytes_whatever_raise_anything_but_a_shown_refusal(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_mint(body)


MEMBER = st.sampled_from(["user_id", "role", "ttl", "session_id", "tier", "other"])
VALUE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300) | st.lists(st.none())


@settings(max_examples=300, deadline=None)
@given(members=st.dictionaries(MEMBER, VALUE))
def test_whatever_is_accepted_mints_a_token_that_verifies(members: dict[str, Any]) -> None:
    try:
        request = parse_mint(json.dumps(members).encode())
    except (InvalidRequest, RequestTooLarge):
        return
    answer = mint(request, api_key(), signing_key=KEY, issuer="behest", now_s=NOW_S, new_id=ids())
    caller = TokenVerifier(KeySet([KEY.verification_key()])).verify(answer.jwt, NOW_S)
    assert (caller.user_id, caller.role) == (request.user_id, "user")
    assert caller.session_id == answer.session_id
