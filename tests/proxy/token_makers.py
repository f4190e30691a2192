"""Keys, claims and tokens for the token verifier's tests: proper ones, and whatever a forger would send."""

import base64
import functools
import json
from collections.abc import Mapping
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from behest_proxy.errors import InvalidToken
from behest_proxy.identity.keys import KeySet, SigningKey, VerificationKey
from behest_proxy.identity.tokens import TokenVerifier

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


@functools.cache
def thiefs_private_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


HEADER = json.dumps({"alg": "RS256", "kid": OWN.kid}).encode()
