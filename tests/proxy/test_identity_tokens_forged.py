"""Every way we know to be somebody else: keys, algorithms, tampered and malformed tokens."""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_proxy.errors import InvalidToken
from behest_proxy.identity.keys import KeySet, SigningKey
from behest_proxy.identity.tokens import TOKEN_BYTES_MAX, is_token_shaped
from proxy.token_makers import (
    ACME,
    BOUND,
    CLAIMS,
    CURVE,
    HEADER,
    KEYS,
    LEGACY,
    NOW_S,
    OWN,
    b64,
    raw,
    refusal,
    signed,
    thiefs_private_key,
    verifier,
)

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


def test_a_jwt_is_told_from_a_placeholder_by_its_shape() -> None:
    assert is_token_shaped(OWN.sign(CLAIMS))
    assert not any(map(is_token_shaped, ["behest-pod", "sk-abc", "", "a.b", "a.b.c.d", "a..c"]))
