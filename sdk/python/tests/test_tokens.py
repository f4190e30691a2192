"""Tokens: which are kept and for how long, and what a signed one says."""

import base64

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from behest import BehestConfigError, BehestServerError
from behest.settings import resolve
from behest.tokens import Identity, Signer, Token, TokenCache, mint_body, minted

ANN, BOB = Identity(user_id="ann"), Identity(user_id="bob")
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def pem_of(key: PrivateKeyTypes, form: PrivateFormat = PrivateFormat.PKCS8) -> str:
    return key.private_bytes(Encoding.PEM, form, NoEncryption()).decode()


def cache(size: int = 10) -> TokenCache:
    names = iter(f"s{number}" for number in range(100))
    return TokenCache(size=size, new_session_id=lambda: next(names))


def token(expires_at_s: float, *, ttl_s: int = 3600, session_id: str = "s", value: str = "v") -> Token:
    return Token(value=value, session_id=session_id, ttl_s=ttl_s, expires_at_s=expires_at_s)


def test_a_token_is_replaced_a_minute_before_its_end() -> None:
    kept = cache()
    kept.put(ANN, token(5000))
    assert kept.get(ANN, 4939.9) is not None
    assert kept.get(ANN, 4940) is None
    assert kept.get(BOB, 0) is None


def test_a_short_token_serves_for_half_of_its_life() -> None:
    kept = cache()
    kept.put(ANN, token(60, ttl_s=60))
    assert kept.get(ANN, 29) is not None
    assert kept.get(ANN, 31) is None


def test_who_was_served_longest_ago_leaves_a_full_cache() -> None:
    kept = cache(2)
    kept.put(ANN, token(5000))
    kept.put(BOB, token(5000))
    kept.get(ANN, 0)
    kept.put(Identity(user_id="cid"), token(5000))
    assert len(kept) == 2
    assert kept.get(ANN, 0) is not None
    assert kept.get(BOB, 0) is None


@pytest.mark.parametrize("other", [{"session_id": "s2"}, {"role": "admin"}, {"tier": 2}, {"ttl_s": 60}])
def test_tokens_of_other_sessions_roles_and_tiers_are_others(other: dict[str, int]) -> None:
    kept = cache()
    kept.put(ANN, token(5000))
    assert kept.get(Identity(**{"user_id": "ann", **other}), 0) is None  # type: ignore[arg-type]


def test_a_session_that_was_made_outlives_its_token() -> None:
    kept = cache()
    assert kept.session_for(ANN) == "s0"
    kept.put(ANN, token(100, session_id="s0"))
    assert kept.get(ANN, 200) is None
    assert kept.session_for(ANN) == "s0"
    kept.refuse(ANN, "v")
    assert kept.session_for(ANN) == "s0"
    assert kept.session_for(Identity(user_id="ann", session_id="given")) == "given"


def test_a_token_that_was_not_believed_is_not_used_again_but_its_successor_is() -> None:
    kept = cache()
    kept.put(ANN, token(5000, value="new"))
    kept.refuse(ANN, "old")
    assert kept.get(ANN, 0) is not None
    kept.refuse(ANN, "new")
    assert kept.get(ANN, 0) is None


def test_the_end_of_a_minted_token_counts_from_before_the_question() -> None:
    found = minted({"jwt": "j", "ttl": 600}, session_id="s", ttl_s=3600, now_s=1000)
    assert (found.value, found.expires_at_s, found.ttl_s) == ("j", 1600, 600)
    assert minted({"access_token": "a"}, session_id="s", ttl_s=60, now_s=0).value == "a"
    nothings: list[object] = [{}, [], None, {"jwt": 7}]
    for nothing in nothings:
        with pytest.raises(BehestServerError):
            minted(nothing, session_id="s", ttl_s=60, now_s=0)


def test_a_mint_names_only_what_was_said() -> None:
    assert mint_body(ANN, "s") == {"user_id": "ann", "ttl": 3600, "session_id": "s"}
    full = Identity(user_id="ann", role="admin", tier="pro", ttl_s=60)
    assert mint_body(full, "s")["tier"] == "pro"
    assert mint_body(full, "s")["role"] == "admin"


@pytest.mark.parametrize(
    "key",
    [RSA, ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()],
    ids=lambda key: type(key).__name__,
)
def test_a_signed_token_says_who_in_the_published_order(key: rsa.RSAPrivateKey) -> None:
    settings = resolve(key=pem_of(key), kid="sk_1", tenant_id="t", project_id="t/p", environment={})
    identity = Identity(user_id="ann", tier=2, ttl_s=600)
    signed = Signer(settings).sign(identity, session_id="s", token_id="j", now_s=1000.5)
    claims = jwt.decode(
        signed.value,
        key.public_key(),
        ["RS256", "ES256", "EdDSA"],
        audience="behest",
        options={"verify_exp": False, "verify_iat": False},
    )
    assert list(claims) == ["tid", "pid", "uid", "role", "scp", "iss", "aud", "iat", "nbf", "exp", "jti", "sid", "tier"]
    assert claims["exp"] - claims["iat"] == 600
    assert (claims["tid"], claims["pid"], claims["uid"], claims["sid"], claims["role"]) == (
        "t",
        "t/p",
        "ann",
        "s",
        "user",
    )
    assert jwt.get_unverified_header(signed.value)["kid"] == "sk_1"


def test_keys_come_in_all_published_forms() -> None:
    for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
        pem = pem_of(RSA, form)
        for key in (pem, "behest_pk_" + pem, base64.b64encode(pem.encode()).decode(), f"  {pem}\n"):
            settings = resolve(key=key, kid="k", tenant_id="t", project_id="p", environment={})
            assert (settings.mode, settings.key.strip()) == ("signing", pem.strip())
            assert pem[40:60] not in repr(settings)
        Signer(settings)


def test_a_key_that_the_gateway_would_not_believe_is_told_at_once() -> None:
    for key in (ec.generate_private_key(ec.SECP384R1()),):
        settings = resolve(key=pem_of(key), kid="k", tenant_id="t", project_id="p", environment={})
        with pytest.raises(BehestConfigError):
            Signer(settings)
    broken = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"
    with pytest.raises(BehestConfigError) as refused:
        Signer(resolve(key=broken, kid="k", tenant_id="t", project_id="p", environment={}))
    assert "AAAA" not in str(refused.value)
