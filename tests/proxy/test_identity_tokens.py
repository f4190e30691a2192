"""Every way we know to be somebody else, tried on the token verifier."""

import base64
import functools
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_proxy.errors import Forbidden, InvalidToken
from behest_proxy.identity.caller import Caller
from behest_proxy.identity.keys import KeySet, SigningKey, VerificationKey
from behest_proxy.identity.tokens import TOKEN_BYTES_MAX, TokenVerifier, is_token_shaped

NOW_S = 1_800_000_000
OWN = SigningKey.generate()
ACME = SigningKey(rsa.generate_private_key(public_exponent=65537, key_size=2048), kid="sk_acme")
EVIL = SigningKey(rsa.generate_private_key(public_exponent=65537, key_size=2048), kid="sk_evil")
BOUND = SigningKey(ed25519.Ed25519PrivateKey.generate(), tenant_id="acme")
CURVE = SigningKey(ec.generate_private_key(ec.SECP256R1()))

CLAIMS: dict[str, Any] = {
    "tid": "acme",
    "pid": "demo/shop",
    "uid": "u_1",
    "role": "admin",
    "scp": ["chat"],
    "iss": "https://api.behest.ai",
    "aud": "behest",
    "iat": NOW_S,
    "nbf": NOW_S,
    "exp": NOW_S + 3600,
    "jti": "t_1",
    "sid": "s_1",
    "tier": 2,
}
LEGACY = {name: CLAIMS[name] for name in ("tid", "pid", "uid", "iss", "aud", "iat", "nbf", "exp")}
PROJECTS = {"demo/shop": "acme", "evil/lair": "evil"}


def tenant_key(key: SigningKey, tenant_id: str) -> VerificationKey:
    return VerificationKey(
        kid=key.kid,
        tenant_id=tenant_id,
        kind="tenant",
        algorithm=key.algorithm,
        public_key=key.public_key,
    )


KEYS = KeySet(
    [
        OWN.verification_key(),
        BOUND.verification_key(),
        CURVE.verification_key(),
        tenant_key(ACME, "acme"),
        tenant_key(EVIL, "evil"),
    ]
)


def verifier(keys: KeySet = KEYS, cache_size: int = 4096) -> TokenVerifier:
    return TokenVerifier(
        keys,
        cache_size=cache_size,
        project_belongs=lambda tenant_id, project_id: PROJECTS.get(project_id) == tenant_id,
    )


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def raw(header: bytes, payload: bytes, key: SigningKey = OWN) -> str:
    """A token of exactly these bytes, signed properly."""
    signing_input = f"{b64(header)}.{b64(payload)}"
    algorithm = jwt.get_algorithm_by_name(key.algorithm)
    signature = algorithm.sign(signing_input.encode(), jwt_private(key))
    return f"{signing_input}.{b64(signature)}"


@functools.cache
def jwt_private(key: SigningKey) -> Any:
    return jwt.get_algorithm_by_name(key.algorithm).prepare_key(key.private_pem())


def signed(
    claims: Mapping[str, Any] = CLAIMS, *, key: SigningKey = OWN, header: Mapping[str, Any] | None = None
) -> str:
    members: dict[str, Any] = {"typ": "JWT", "alg": key.algorithm, "kid": key.kid, **(header or {})}
    return raw(json.dumps(members).encode(), json.dumps(dict(claims)).encode(), key)


def without(name: str) -> dict[str, Any]:
    return {member: value for member, value in CLAIMS.items() if member != name}


def refusal(token: str, now_s: float = NOW_S, *, by: TokenVerifier | None = None) -> str:
    """The message with which a token is refused, which must not give any of it away."""
    judge = by or verifier()
    with pytest.raises(InvalidToken) as caught:
        judge.verify(token, now_s)
    message = caught.value.message
    for part in token.split("."):
        assert len(part) < 8 or part not in message
    assert judge.cached_count == 0
    return message


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


# ---- keys and algorithms


def test_an_api_key_is_refused_with_the_way_to_mint() -> None:
    message = refusal("behest_sk_live_" + "0" * 32)
    assert message == "An API key is not a bearer token here: exchange it for one at POST /v1/auth/mint."


@pytest.mark.parametrize("alg", ["none", "None", "nOnE", ""])
def test_alg_none_is_refused_with_and_without_a_signature(alg: str) -> None:
    header = b64(json.dumps({"alg": alg, "kid": OWN.kid}).encode())
    payload = b64(json.dumps(CLAIMS).encode())
    assert "not a JWT" in refusal(f"{header}.{payload}.")
    assert "alg" in refusal(f"{header}.{payload}.AAAA")


def test_hs256_with_the_public_key_as_secret_is_refused() -> None:
    for secret in (OWN.public_pem().encode(), OWN.public_pem().strip().encode(), KEYS.jwks()):
        for alg in ("HS256", OWN.algorithm):
            header = b64(json.dumps({"alg": alg, "kid": OWN.kid}).encode())
            signing_input = f"{header}.{b64(json.dumps(CLAIMS).encode())}"
            signature = hmac.new(secret, signing_input.encode(), hashlib.sha256).digest()
            assert refusal(f"{signing_input}.{b64(signature)}")


@pytest.mark.parametrize("signer", [OWN, CURVE, BOUND], ids=lambda key: key.algorithm)
@pytest.mark.parametrize("named", [OWN, CURVE, BOUND], ids=lambda key: key.algorithm)
def test_a_key_verifies_only_with_its_own_algorithm(signer: SigningKey, named: SigningKey) -> None:
    if signer is named:
        return
    # The header tells the signer's algorithm, the kid names another key; then the other way round.
    assert "alg" in refusal(signed(key=signer, header={"kid": named.kid}))
    assert refusal(signed(key=signer, header={"kid": named.kid, "alg": named.algorithm}))


@pytest.mark.parametrize("alg", ["RS384", "RS512", "PS256", "rs256", "RS256 ", None, 256, ["RS256"], {}])
def test_another_alg_than_the_keys_is_refused_even_if_the_signature_is_good(alg: object) -> None:
    assert "alg" in refusal(signed(header={"alg": alg}))


def test_a_token_without_kid_is_refused() -> None:
    header = json.dumps({"typ": "JWT", "alg": "RS256"}).encode()
    assert "kid" in refusal(raw(header, json.dumps(CLAIMS).encode()))


@pytest.mark.parametrize(
    "kid",
    [
        "",
        "../../../../dev/null",
        "..",
        "./" + OWN.kid,
        "/etc/passwd",
        "file:///dev/null",
        OWN.kid + "\x00",
        OWN.kid + "\n",
        " " + OWN.kid,
        "' OR 1=1 --",
        "$(id)",
        "k" * 129,
        "k" * 5000,
        "кид",
        "\ud800",
        None,
        1,
        True,
        [OWN.kid],
        {"kid": OWN.kid},
    ],
    ids=range(20),  # our key's kid, which is in some of them, is another one in every process
)
def test_a_kid_that_no_key_can_have_is_refused(kid: object) -> None:
    assert "kid" in refusal(signed(header={"kid": kid}))


def test_an_unknown_kid_is_refused() -> None:
    assert "kid" in refusal(signed(header={"kid": "sk_unknown"}))
    assert "kid" in refusal(signed(), by=verifier(KeySet()))


def test_a_kid_differing_in_case_is_another_kid() -> None:
    assert "kid" in refusal(signed(key=ACME, header={"kid": "SK_ACME"}))


def test_a_good_signature_under_another_tenants_kid_is_refused() -> None:
    assert "signature" in refusal(signed({**LEGACY, "tid": "evil"}, key=ACME, header={"kid": "sk_evil"}))


@pytest.mark.parametrize("members", ["jwk", "jku", "x5u", "x5c"])
def test_a_key_brought_along_in_the_header_is_ignored(members: str) -> None:
    thief = SigningKey(thiefs_private_key())
    offer: dict[str, Any] = {
        "jwk": json.loads(KeySet([thief.verification_key()]).jwks())["keys"][0],
        "jku": "http://127.0.0.1:1/jwks.json",
        "x5u": "http://127.0.0.1:1/cert.pem",
        "x5c": [base64.b64encode(thief.public_pem().encode()).decode()],
    }
    header = {members: offer[members]}
    assert "signature" in refusal(signed(key=thief, header={**header, "kid": OWN.kid}))
    assert "kid" in refusal(signed(key=thief, header=header))
    # And it does not harm a token that is good.
    assert verifier().verify(signed(header=header), NOW_S).user_id == "u_1"


@functools.cache
def thiefs_private_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.mark.parametrize("crit", [["exp"], ["b64"], [], "b64", None, ["http://example.com/x"]])
def test_a_critical_extension_is_refused(crit: object) -> None:
    assert "crit" in refusal(signed(header={"crit": crit, "b64": False, "exp": 1}))


# ---- tampering and form


def test_a_tampered_payload_is_refused() -> None:
    header, _payload, signature = OWN.sign(CLAIMS).split(".")
    forged = b64(json.dumps({**CLAIMS, "tid": "other"}).encode())
    assert "signature" in refusal(f"{header}.{forged}.{signature}")


def test_a_tampered_header_is_refused() -> None:
    _header, payload, signature = OWN.sign(CLAIMS).split(".")
    header = b64(json.dumps({"alg": "RS256", "kid": OWN.kid, "typ": "x"}).encode())
    assert "signature" in refusal(f"{header}.{payload}.{signature}")


def test_a_signature_of_another_token_is_refused() -> None:
    one, other = OWN.sign(CLAIMS), OWN.sign({**CLAIMS, "uid": "u_2"})
    assert "signature" in refusal(one.rpartition(".")[0] + "." + other.rpartition(".")[2])


@pytest.mark.parametrize("key", [OWN, CURVE, BOUND], ids=lambda key: key.algorithm)
@pytest.mark.parametrize("signature", [b"\x00", b"\x00" * 63, b"\x00" * 64, b"\x00" * 256, b"\xff" * 300])
def test_an_empty_or_odd_signature_is_refused(key: SigningKey, signature: bytes) -> None:
    # 64 zero bytes are the "psychic signature" of ECDSA.
    assert "signature" in refusal(signed(key=key).rpartition(".")[0] + "." + b64(signature))


SPOILERS: list[Callable[[str], str]] = [
    lambda token: token + ".",
    lambda token: token + ".x",
    lambda token: token + "=",
    lambda token: token + "==",
    lambda token: token + "\n",
    lambda token: token + " ",
    lambda token: token + "\x00",
    lambda token: " " + token,
    lambda token: "Bearer " + token,
    lambda token: "." + token,
    lambda token: token.replace(".", ".."),
    lambda token: token.rpartition(".")[0],
    lambda token: token.rpartition(".")[0] + ".",
    lambda token: token + "é",
    lambda token: token.replace("e", "е"),
    lambda token: token.replace(".", "．"),
    lambda token: token + "\ud800",
]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_good_token_with_anything_about_it_is_refused(spoil: Callable[[str], str]) -> None:
    assert refusal(spoil(OWN.sign(CLAIMS)))


@pytest.mark.parametrize(
    "token", ["", ".", "..", "a.b.c", "a.b.c.d.e", "sk-proj-abcdef", "behest-pod", "é.é.é", "\ud800"]
)
def test_what_is_not_exactly_a_compact_jws_is_refused(token: str) -> None:
    assert refusal(token)


def test_standard_base64_in_place_of_base64url_is_refused() -> None:
    token = signed({**CLAIMS, "uid": "???>>>~~~"})
    assert "_" in token or "-" in token
    assert "not a JWT" in refusal(token.replace("_", "/").replace("-", "+"))


def test_spare_bits_in_the_last_character_are_refused() -> None:
    token = OWN.sign(CLAIMS)
    # 256 bytes end in a character of which four bits are spare.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = alphabet[alphabet.index(token[-1]) + 1]
    assert base64.urlsafe_b64decode(token.rpartition(".")[2] + "==") == base64.urlsafe_b64decode(
        token.rpartition(".")[2][:-1] + other + "=="
    )
    assert "base64url" in refusal(token[:-1] + other)


def test_a_token_over_8_kib_is_refused_before_it_is_looked_at() -> None:
    assert str(TOKEN_BYTES_MAX) in refusal(signed({**CLAIMS, "pad": "x" * TOKEN_BYTES_MAX}))
    assert str(TOKEN_BYTES_MAX) in refusal("a" * 10_000_000)


def test_a_token_of_just_under_8_kib_is_accepted() -> None:
    assert len(token := signed({**CLAIMS, "pad": "x" * 5300})) > 7500
    assert verifier().verify(token, NOW_S)


HEADER = json.dumps({"alg": "RS256", "kid": OWN.kid}).encode()


@pytest.mark.parametrize(
    "payload",
    [
        json.dumps(CLAIMS).encode()[:-1] + b',"tid":"evil"}',
        b'{"tid":"evil",' + json.dumps(CLAIMS).encode()[1:],
        json.dumps(CLAIMS).encode()[:-1] + rb',"\u0074id":"evil"}',
        json.dumps(CLAIMS).encode()[:-1] + b',"x":{"a":1,"a":2}}',
        json.dumps(CLAIMS).encode()[:-1] + b',"x":NaN}',
        json.dumps(CLAIMS).encode()[:-1] + b',"x":Infinity}',
        json.dumps(CLAIMS).encode() + b"{}",
        json.dumps(CLAIMS).encode() + b"\x00",
        b"\xef\xbb\xbf" + json.dumps(CLAIMS).encode(),
        json.dumps(CLAIMS).encode("utf-16"),
        json.dumps(CLAIMS).encode().replace(b"u_1", b"\xff\xfe"),
        b"[" * 2500,
        b'{"a":' * 900,
        b"[]",
        b'"text"',
        b"null",
        b"1",
    ],
)
def test_a_payload_that_is_not_one_strict_json_object_is_refused(payload: bytes) -> None:
    assert "payload" in refusal(raw(HEADER, payload))


@pytest.mark.parametrize(
    "header",
    [
        HEADER[:-1] + b',"kid":"sk_evil"}',
        b'{"alg":"none",' + HEADER[1:],
        b"[]",
        b"null",
        b'"x"',
        b"{",
        b"\xff",
        b"[" * 2500,
    ],
    ids=range(8),  # the key's kid, which is in some of them, is another one in every process
)
def test_a_header_that_is_not_one_strict_json_object_is_refused(header: bytes) -> None:
    assert "header" in refusal(raw(header, json.dumps(CLAIMS).encode()))


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


def test_a_remembered_token_expires_all_the_same() -> None:
    judge, token = verifier(), OWN.sign(CLAIMS)
    judge.verify(token, NOW_S)
    assert judge.cached_count == 1
    assert "expired" in refusal(token, NOW_S + 3631, by=judge)
    # The clock went back: what was refused is not remembered, and is judged anew.
    assert judge.verify(token, NOW_S)
    assert "not valid yet" in refusal(token, NOW_S - 31, by=judge)


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
    assert "tid" in refusal(signed({**LEGACY, "tid": victim}, key=key))


@pytest.mark.parametrize("key", [ACME, BOUND], ids=["a tenant's", "our own, bound"])
@pytest.mark.parametrize("project_id", ["evil/lair", "demo/unknown", "demo/shop/", "DEMO/SHOP"])
def test_a_bound_key_cannot_name_another_tenants_project(key: SigningKey, project_id: str) -> None:
    judge = verifier()
    with pytest.raises(Forbidden):
        judge.verify(signed({**LEGACY, "pid": project_id}, key=key), NOW_S)
    assert judge.cached_count == 0


def test_a_project_taken_from_its_tenant_ends_remembered_tokens() -> None:
    projects = dict(PROJECTS)
    judge = TokenVerifier(KEYS, project_belongs=lambda tenant_id, pid: projects.get(pid) == tenant_id)
    token = signed(LEGACY, key=ACME)
    judge.verify(token, NOW_S)
    del projects["demo/shop"]
    with pytest.raises(Forbidden):
        judge.verify(token, NOW_S)


def test_without_knowledge_of_projects_bound_keys_are_refused() -> None:
    judge = TokenVerifier(KEYS)
    with pytest.raises(Forbidden):
        judge.verify(signed(LEGACY, key=ACME), NOW_S)
    assert judge.verify(signed(LEGACY), NOW_S)


# ---- the memory of verified tokens


def test_a_remembered_token_ends_when_its_key_is_revoked() -> None:
    judge, token = verifier(), signed(LEGACY, key=ACME)
    judge.verify(token, NOW_S)
    assert judge.use_keys(KeySet([OWN.verification_key()]))
    assert "kid" in refusal(token, by=judge)


def test_a_remembered_token_ends_when_its_kid_means_another_key() -> None:
    judge, token = verifier(), OWN.sign(CLAIMS)
    judge.verify(token, NOW_S)
    other = SigningKey(thiefs_private_key(), kid=OWN.kid)
    judge.use_keys(KeySet([other.verification_key()]))
    assert "signature" in refusal(token, by=judge)


def test_polling_the_same_keys_again_forgets_nothing() -> None:
    judge, token = verifier(), OWN.sign(CLAIMS)
    judge.verify(token, NOW_S)
    again = SigningKey.load(OWN.private_pem()).verification_key()
    assert again.public_key is not OWN.public_key
    rest = [KEYS.get(kid) for kid in (BOUND.kid, CURVE.kid, "sk_acme", "sk_evil")]
    assert not judge.use_keys(KeySet([again, *(key for key in rest if key)]))
    assert judge.cached_count == 1


def test_only_so_many_tokens_are_remembered_and_the_least_used_goes_first() -> None:
    judge = verifier(cache_size=3)
    tokens = [BOUND.sign({**LEGACY, "uid": f"u_{number}"}) for number in range(4)]
    for token in tokens[:3]:
        judge.verify(token, NOW_S)
    judge.verify(tokens[0], NOW_S)
    judge.verify(tokens[3], NOW_S)
    assert judge.cached_count == 3
    for token in tokens:
        assert judge.verify(token, NOW_S)


def test_a_remembered_token_yields_the_same_caller_without_another_check() -> None:
    judge, token = verifier(), OWN.sign(CLAIMS)
    first = judge.verify(token, NOW_S)
    assert judge.verify(token, NOW_S + 1) is first


def test_refused_tokens_fill_no_memory() -> None:
    judge = verifier()
    for number in range(50):
        refusal(f"{OWN.sign(CLAIMS)}{number}", by=judge)


# ---- properties

GOOD: dict[str, str] = {key.algorithm: key.sign(CLAIMS) for key in (OWN, CURVE, BOUND)}
FOR_MUTATION = verifier()


@settings(max_examples=400, deadline=None)
@given(data=st.data(), algorithm=st.sampled_from(sorted(GOOD)))
def test_any_mutation_of_a_valid_token_is_refused_or_yields_the_same_caller(
    data: st.DataObject, algorithm: str
) -> None:
    good = GOOD[algorithm]
    token = bytearray(good.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(token) - 1))
        kind = data.draw(st.sampled_from(["replace", "insert", "delete", "swap"]))
        if kind == "replace":
            token[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            token.insert(at, data.draw(st.integers(0, 255)))
        elif kind == "delete":
            del token[at]
        else:
            other = data.draw(st.integers(0, len(token) - 1))
            token[at], token[other] = token[other], token[at]
    expected = FOR_MUTATION.verify(good, NOW_S)
    try:
        caller = FOR_MUTATION.verify(token.decode("latin-1"), NOW_S)
    except InvalidToken:
        return
    assert caller == expected


@settings(max_examples=300, deadline=None)
@given(token=st.text() | st.from_regex(r"\A[\w-]*\.[\w-]*\.[\w-]*\Z"))
def test_no_text_whatever_raises_anything_but_invalid_token(token: str) -> None:
    with pytest.raises(InvalidToken):
        FOR_MUTATION.verify(token, NOW_S)


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
        caller = FOR_MUTATION.verify(token, NOW_S)
    except (InvalidToken, Forbidden):
        return
    assert caller.tenant_id == "acme"
    assert caller.role in ("user", "dashboard-service", "admin")


def test_a_jwt_is_told_from_a_placeholder_by_its_shape() -> None:
    assert is_token_shaped(OWN.sign(CLAIMS))
    assert not any(map(is_token_shaped, ["behest-pod", "sk-abc", "", "a.b", "a.b.c.d", "a..c"]))
