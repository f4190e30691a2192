"""Keys are what they say they are, and the world sees only their public halves."""

import base64
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from behest_ledger.store.identity import SigningKeyRecord
from behest_proxy.identity.keys import (
    KeySet,
    RegisteredKey,
    SigningKey,
    UnusableKeyError,
    is_kid,
    load_public_key,
    thumbprint,
)

RSA = SigningKey.generate()
EC = SigningKey(ec.generate_private_key(ec.SECP256R1()))
ED = SigningKey(ed25519.Ed25519PrivateKey.generate())


def record(key: SigningKey = RSA, **changes: Any) -> SigningKeyRecord:
    fields: dict[str, Any] = {
        "kid": key.kid,
        "tenant_id": None,
        "kind": "own",
        "algorithm": key.algorithm,
        "public_pem": key.public_pem(),
        "state": "current",
    }
    return SigningKeyRecord(**{**fields, **changes})


def public_pem(private_key: Any) -> str:
    pem: bytes = private_key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem.decode()


def test_the_thumbprint_is_that_of_rfc_7638() -> None:
    # The example of RFC 7638 section 3.1.
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCi"
        "FV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb"
        "9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls"
        "1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    number = int.from_bytes(base64.urlsafe_b64decode(modulus + "=="), "big")
    key = rsa.RSAPublicNumbers(65537, number).public_key()
    assert thumbprint(key) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


def test_the_thumbprint_of_an_ed25519_key_is_that_of_rfc_8037() -> None:
    # RFC 8037 appendix A.3.
    x = base64.urlsafe_b64decode("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo=")
    key = ed25519.Ed25519PublicKey.from_public_bytes(x)
    assert thumbprint(key) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


@pytest.mark.parametrize("key", [RSA, EC, ED], ids=lambda key: key.algorithm)
def test_the_jwk_set_verifies_what_the_key_signed(key: SigningKey) -> None:
    jwks = jwt.PyJWKSet.from_json(KeySet([key.verification_key()]).jwks().decode())
    published = jwks[key.kid]
    assert published.key_id == thumbprint(key.public_key)
    assert jwt.decode(key.sign({"a": 1}), published) == {"a": 1}


def test_the_jwk_set_holds_public_members_of_our_own_keys_only() -> None:
    keys = KeySet.from_records([record(RSA), record(EC, tenant_id="acme"), record(ED, kind="tenant", tenant_id="acme")])
    assert len(keys) == 3
    members = json.loads(keys.jwks())["keys"]
    assert [set(member) for member in members] == [
        {"kty", "n", "e", "kid", "use", "alg"},
        {"kty", "crv", "x", "y", "kid", "use", "alg"},
    ]
    assert [member["alg"] for member in members] == ["RS256", "ES256"]


def test_an_empty_key_set_is_an_empty_jwk_set() -> None:
    assert KeySet().jwks() == b'{"keys":[]}'


def test_coordinates_keep_their_leading_zeros() -> None:
    scalars = range(1, 5000)
    keys = (ec.derive_private_key(scalar, ec.SECP256R1()) for scalar in scalars)
    key = next(key for key in keys if key.public_key().public_numbers().x < 1 << 248)
    (member,) = json.loads(KeySet([SigningKey(key).verification_key()]).jwks())["keys"]
    assert len(base64.urlsafe_b64decode(member["x"] + "=")) == 32


def test_revoked_keys_are_not_in_the_set_and_previous_ones_are() -> None:
    keys = KeySet.from_records([record(RSA, state="revoked"), record(EC, state="previous")])
    assert (len(keys), keys.get(RSA.kid), keys.refused) == (1, None, {})


WEAK = rsa.generate_private_key(public_exponent=65537, key_size=1024)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kid": "../x"}, "kid"),
        ({"kid": "k" * 129}, "kid"),
        ({"kind": "tenant"}, "tenant"),
        ({"kind": "tenant", "tenant_id": ""}, "tenant"),
        ({"kind": "root"}, "kind"),
        ({"algorithm": "HS256"}, "RS256"),
        ({"algorithm": "ES256"}, "RS256"),
        ({"algorithm": "none"}, "RS256"),
        ({"public_pem": ""}, "PEM"),
        ({"public_pem": "\ud800"}, "PEM"),
        ({"public_pem": "x" * 20_000}, "over"),
        ({"public_pem": RSA.private_pem().decode()}, "PEM"),
        ({"public_pem": public_pem(WEAK)}, "1024"),
        ({"public_pem": public_pem(ec.generate_private_key(ec.SECP384R1()))}, "P-256"),
        ({"public_pem": public_pem(ec.generate_private_key(ec.SECP256K1()))}, "P-256"),
        ({"public_pem": public_pem(ed448.Ed448PrivateKey.generate())}, "Ed25519"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    bad = record(RSA, **changes)
    keys = KeySet.from_records([bad, record(EC)])
    assert keys.get(EC.kid) is not None
    assert len(keys) == 1
    assert reason in keys.refused[bad.kid]


def test_two_rows_under_one_kid_are_both_left_out() -> None:
    keys = KeySet.from_records([record(RSA), record(EC, kid=RSA.kid), record(ED, kid=RSA.kid)])
    assert (len(keys), list(keys.refused)) == (0, [RSA.kid])
    with pytest.raises(UnusableKeyError):
        KeySet([RSA.verification_key(), RSA.verification_key()])


def test_key_sets_are_equal_when_their_keys_are() -> None:
    again = SigningKey.load(RSA.private_pem())
    assert KeySet([RSA.verification_key()]) == KeySet([again.verification_key()])
    assert KeySet([RSA.verification_key()]) != KeySet([EC.verification_key()])
    bound = SigningKey.load(RSA.private_pem(), tenant_id="acme")
    assert KeySet([RSA.verification_key()]) != KeySet([bound.verification_key()])


@pytest.mark.parametrize("key", [RSA, EC, ED], ids=lambda key: key.algorithm)
def test_a_signing_key_survives_its_pem(key: SigningKey) -> None:
    again = SigningKey.load(key.private_pem(), tenant_id="acme")
    assert (again.kid, again.algorithm, again.tenant_id) == (key.kid, key.algorithm, "acme")
    assert load_public_key(key.public_pem().encode()) == again.public_key


def test_a_generated_key_is_rsa_of_2048_bits_under_its_thumbprint() -> None:
    assert isinstance(RSA.public_key, rsa.RSAPublicKey)
    assert (RSA.public_key.key_size, RSA.algorithm, RSA.kid) == (2048, "RS256", thumbprint(RSA.public_key))
    assert is_kid(RSA.kid)


def test_a_bad_private_key_is_refused_without_showing_it() -> None:
    encrypted = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    ed448_pem = ed448.Ed448PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    damaged = RSA.private_pem()[:400] + b"\n-----END PRIVATE KEY-----\n"
    for pem in (b"", b"hunter2", encrypted, damaged, ed448_pem, RSA.public_pem().encode(), b"x" * 20_000):
        with pytest.raises(UnusableKeyError) as caught:
            SigningKey.load(pem)
        assert caught.value.__cause__ is None
        assert "hunter2" not in str(caught.value)


def test_no_representation_shows_a_secret() -> None:
    shown = repr(RSA) + str(RSA) + repr(KeySet([RSA.verification_key()]))
    assert "PRIVATE" not in shown
    assert RSA.kid in shown


def test_claims_keep_their_order() -> None:
    payload = RSA.sign({"z": 1, "a": 2, "m": 3}).split(".")[1]
    assert base64.urlsafe_b64decode(payload + "==") == b'{"z":1,"a":2,"m":3}'


def registered(key: SigningKey, tenant_id: str, kid: str = "backend") -> RegisteredKey:
    return RegisteredKey(tenant_id=tenant_id, kid=kid, public_pem=key.public_pem())


def test_two_tenants_may_have_the_same_kid_for_keys_of_their_own() -> None:
    keys = KeySet.from_records([], [registered(RSA, "acme"), registered(EC, "zeta")])
    one, other = keys.get("backend", "acme"), keys.get("backend", "zeta")
    assert one is not None
    assert other is not None
    assert (one.public_key, other.public_key) == (RSA.public_key, EC.public_key)
    assert (one.kind, one.tenant_id, other.tenant_id) == ("tenant", "acme", "zeta")
    assert (keys.get("backend"), keys.get("backend", "third"), keys.get("backend", ["acme"])) == (None, None, None)
    assert keys.refused == {}


def test_a_tenant_that_registers_our_kid_takes_nothing_from_anybody() -> None:
    keys = KeySet.from_records([record(RSA)], [registered(EC, "acme", kid=RSA.kid)])
    for tenant_id in (None, "acme", "zeta"):
        found = keys.get(RSA.kid, tenant_id)
        assert found is not None
        assert (found.kind, found.public_key) == ("own", RSA.public_key)
    assert EC.kid not in keys.jwks().decode()


def test_two_projects_of_a_tenant_may_register_one_key_but_not_two_under_one_kid() -> None:
    assert len(KeySet.from_records([], [registered(RSA, "acme"), registered(RSA, "acme")])) == 1
    keys = KeySet.from_records([], [registered(RSA, "acme"), registered(EC, "acme"), registered(RSA, "zeta")])
    assert keys.get("backend", "acme") is None
    assert keys.get("backend", "zeta") is not None
    assert keys.refused == {"backend": "its kid is used twice"}


def test_a_kid_revoked_for_a_tenant_does_not_come_back_by_its_configuration() -> None:
    revoked = record(RSA, kid="backend", kind="tenant", tenant_id="acme", state="revoked")
    keys = KeySet.from_records([revoked], [registered(RSA, "acme"), registered(RSA, "zeta")])
    assert keys.get("backend", "acme") is None
    assert keys.get("backend", "zeta") is not None


def test_a_registered_key_that_cannot_be_used_is_named_and_harms_no_other() -> None:
    damaged = RegisteredKey(tenant_id="acme", kid="damaged", public_pem="-----BEGIN PUBLIC KEY-----\n")
    keys = KeySet.from_records([], [damaged, registered(RSA, "acme"), registered(RSA, "acme", kid="../x")])
    assert set(keys.refused) == {"damaged", "../x"}
    assert len(keys) == 1
