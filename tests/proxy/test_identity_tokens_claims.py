"""What a token may say: claims, times and tenants, each one that is believed and each that is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_proxy.errors import Forbidden, InvalidToken
from behest_proxy.identity.caller import Caller
from behest_proxy.identity.keys import SigningKey
from behest_proxy.identity.tokens import TokenVerifier
from proxy.token_makers import (
    ACME,
    BOUND,
    CLAIMS,
    CURVE,
    EVIL,
    HEADER,
    KEYS,
    LEGACY,
    NOW_S,
    OWN,
    raw,
    refusal,
    signed,
    verifier,
    without,
)

# ---- what is accepted


def test_every_claim_of_our_own_token_is_believed() -> None:
    assert verifier().verify(OWN.sign(CLAIMS), NOW_S) == Caller(
        tenant_id="acme",
        project_id="demo/shop",
        user_id="u_1",
        role="admin",
        scopes=("chat",),
        session_id="s_1",
        tier=2,
        token_id="t_1",
        kid=OWN.kid,
        expires_at=NOW_S + 3600,
    )


def test_a_legacy_token_without_the_newer_claims_is_a_plain_user() -> None:
    caller = verifier().verify(signed({**LEGACY, "iss": "behest"}, key=ACME), NOW_S)
    assert (caller.role, caller.scopes, caller.session_id, caller.tier, caller.token_id) == (
        "user",
        (),
        None,
        None,
        None,
    )


@pytest.mark.parametrize("key", [OWN, CURVE, BOUND], ids=lambda key: key.algorithm)
def test_each_algorithm_is_verified_with_the_key_that_has_it(key: SigningKey) -> None:
    assert verifier().verify(signed(key=key), NOW_S).kid == key.kid


@pytest.mark.parametrize("issuer", ["https://api.behest.ai", "https://api.behest.app", "behest"])
def test_the_published_issuers_are_accepted(issuer: str) -> None:
    assert verifier().verify(signed({**CLAIMS, "iss": issuer}), NOW_S)


def test_the_audience_may_stand_in_a_list() -> None:
    assert verifier().verify(signed({**CLAIMS, "aud": ["other", "behest"]}), NOW_S)


def test_scopes_may_be_one_string() -> None:
    assert verifier().verify(signed({**CLAIMS, "scp": "chat usage"}), NOW_S).scopes == ("chat", "usage")


def test_a_role_we_do_not_know_may_do_the_least() -> None:
    assert verifier().verify(signed({**CLAIMS, "role": "owner"}), NOW_S).role == "user"


def test_a_tier_may_be_a_name() -> None:
    assert verifier().verify(signed({**CLAIMS, "tier": "pro"}), NOW_S).tier == "pro"


# ---- claims


@pytest.mark.parametrize("issuer", ["https://evil.example", "BEHEST", "behest ", "https://api.behest.ai/"])
def test_a_wrong_issuer_is_refused(issuer: str) -> None:
    assert "iss" in refusal(signed({**CLAIMS, "iss": issuer}))


@pytest.mark.parametrize("audience", ["other", "Behest", "behest,other", "", ["other"], []])
def test_a_wrong_audience_is_refused(audience: object) -> None:
    assert "aud" in refusal(signed({**CLAIMS, "aud": audience}))


@pytest.mark.parametrize("audience", [None, 1, True, {"behest": 1}, ["behest", 1], [["behest"]]])
def test_an_audience_of_the_wrong_type_is_refused(audience: object) -> None:
    assert "aud" in refusal(signed({**CLAIMS, "aud": audience}))


@pytest.mark.parametrize("name", ["tid", "pid", "uid", "iss", "aud", "exp"])
def test_a_token_without_a_required_claim_is_refused_by_its_name(name: str) -> None:
    assert name in refusal(signed(without(name)))
    assert name in refusal(signed({**CLAIMS, name: None}))


@pytest.mark.parametrize("name", ["role", "scp", "jti", "sid", "tier", "nbf", "iat"])
def test_every_other_claim_may_be_absent_or_null(name: str) -> None:
    assert verifier().verify(signed(without(name)), NOW_S)
    assert verifier().verify(signed({**CLAIMS, name: None}), NOW_S)


@pytest.mark.parametrize("name", ["tid", "pid", "uid", "iss", "role", "jti", "sid"])
@pytest.mark.parametrize(
    "value",
    [1, 1.5, True, [], ["acme"], {}, "", "x" * 256, "a\x00b", "a\nb", "a\x7f", "a\x9fb", "\ud800"],
)
def test_a_text_claim_of_another_type_or_with_unclean_text_is_refused(name: str, value: object) -> None:
    assert name in refusal(signed({**CLAIMS, name: value}))


@pytest.mark.parametrize("user_id", ["u", "x" * 255, "ü" * 255, "名前", "a b", "😀", "default"])
def test_a_user_id_has_1_to_255_characters_of_any_script(user_id: str) -> None:
    assert verifier().verify(signed({**CLAIMS, "uid": user_id}), NOW_S).user_id == user_id


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
@pytest.mark.parametrize("value", ["1900000000", True, [], {}, -1, 10**400, 1e15])
def test_a_time_that_is_no_time_is_refused(name: str, value: object) -> None:
    assert name in refusal(signed({**CLAIMS, name: value}))


def test_an_overflowing_time_is_refused() -> None:
    payload = json.dumps(without("exp")).encode()[:-1] + b',"exp":1e999}'
    assert "exp" in refusal(raw(HEADER, payload))


@pytest.mark.parametrize("sid", ["a b", "é", "x" * 256])
def test_a_session_that_no_header_could_name_is_refused(sid: str) -> None:
    assert "sid" in refusal(signed({**CLAIMS, "sid": sid}))


@pytest.mark.parametrize("tier", [True, -1, 1.5, "", "a b", "x" * 64, [], {}, 10**9])
def test_a_tier_that_is_neither_number_nor_name_is_refused(tier: object) -> None:
    assert "tier" in refusal(signed({**CLAIMS, "tier": tier}))


@pytest.mark.parametrize("scopes", [1, True, {}, [1], ["a", None], ["a\n"], ["x"] * 65, [["a"]]])
def test_scopes_of_the_wrong_type_are_refused(scopes: object) -> None:
    assert "scp" in refusal(signed({**CLAIMS, "scp": scopes}))


# ---- time


def test_a_token_is_good_until_its_end_and_30_seconds_more() -> None:
    token = OWN.sign(CLAIMS)
    assert verifier().verify(token, NOW_S + 3600 + 29.9)
    assert "expired" in refusal(token, NOW_S + 3600 + 30)


@pytest.mark.parametrize("name", ["nbf", "iat"])
def test_a_token_from_the_future_is_refused_beyond_30_seconds(name: str) -> None:
    assert verifier().verify(signed({**CLAIMS, name: NOW_S + 30}), NOW_S)
    assert "not valid yet" in refusal(signed({**CLAIMS, name: NOW_S + 31}))


# ---- tenants


@pytest.mark.parametrize("role", ["admin", "dashboard-service", "owner", "user"])
def test_a_tenants_key_makes_users_whatever_it_claims(role: str) -> None:
    caller = verifier().verify(signed({**CLAIMS, "role": role}, key=ACME), NOW_S)
    assert (caller.role, caller.scopes) == ("user", ())
    assert not caller.sees_every_user


@pytest.mark.parametrize("user_id", ["admin", "system", "dashboard-service", "sys:keeper"])
def test_a_tenants_key_cannot_name_reserved_users(user_id: str) -> None:
    assert "uid" in refusal(signed({**LEGACY, "uid": user_id}, key=ACME))
    assert verifier().verify(signed({**LEGACY, "uid": user_id}), NOW_S).user_id == user_id


@pytest.mark.parametrize("key", [EVIL, BOUND], ids=["a tenant's", "our own, bound"])
def test_a_bound_key_cannot_speak_for_another_tenant(key: SigningKey) -> None:
    victim = "acme" if key is EVIL else "evil"
    # A tenant's kid means nothing under another tenant's name; our own is known, and bound.
    assert ("kid" if key is EVIL else "tid") in refusal(signed({**LEGACY, "tid": victim}, key=key))


@pytest.mark.parametrize("key", [ACME, BOUND], ids=["a tenant's", "our own, bound"])
@pytest.mark.parametrize("project_id", ["evil/lair", "demo/unknown", "demo/shop/", "DEMO/SHOP"])
def test_a_bound_key_cannot_name_another_tenants_project(key: SigningKey, project_id: str) -> None:
    judge = verifier()
    with pytest.raises(Forbidden):
        judge.verify(signed({**LEGACY, "pid": project_id}, key=key), NOW_S)
    assert judge.cached_count == 0


def test_without_knowledge_of_projects_bound_keys_are_refused() -> None:
    judge = TokenVerifier(KEYS)
    with pytest.raises(Forbidden):
        judge.verify(signed(LEGACY, key=ACME), NOW_S)
    assert judge.verify(signed(LEGACY), NOW_S)


# ---- properties

VERIFIER = verifier()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(CLAIMS)), value=JSON)
def test_no_value_of_any_claim_raises_anything_but_a_shown_refusal(name: str, value: object) -> None:
    token = signed({**CLAIMS, name: value}, key=BOUND)
    try:
        caller = VERIFIER.verify(token, NOW_S)
    except (InvalidToken, Forbidden):
        return
    assert caller.tenant_id == "acme"
    assert caller.role in ("user", "dashboard-service", "admin")
