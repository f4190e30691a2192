"""Keys that sign tokens and keys that verify them; what the world may see of them as a JWK set."""

import base64
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import jwt
import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from behest_ledger.store.identity import SigningKeyRecord

__all__ = [
    "Algorithm",
    "KeyKind",
    "KeySet",
    "PublicKey",
    "RegisteredKey",
    "SigningKey",
    "UnusableKeyError",
    "VerificationKey",
    "algorithm_of",
    "is_kid",
    "load_public_key",
    "thumbprint",
]

Algorithm = Literal["RS256", "ES256", "EdDSA"]
KeyKind = Literal["own", "tenant"]
"""`own`: made here, its claims are believed. `tenant`: a tenant signs with it, as role `user` only."""

PublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
PrivateKey: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

RSA_BITS = 2048
RSA_BITS_MAX = 8192
"""Above this a tenant's key would make every verification of its tokens expensive for everybody."""
PEM_BYTES_MAX = 16 * 1024

_KID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.:~-]{0,127}")
_BAD_KID = "its kid is not 1-128 of the characters A-Z a-z 0-9 _ - . : ~, the first none of the last three"
_LOADED_MAX = 4096
"""Public keys that are kept parsed: the configuration is read again whenever anything in it changes."""


class UnusableKeyError(ValueError):
    """A key that cannot be believed: damaged, too weak, of a kind we do not take, or under a bad kid."""


class VerificationKey(msgspec.Struct, frozen=True, kw_only=True):
    """A public key, and for whom it may speak."""

    kid: str
    tenant_id: str | None
    """The only tenant in whose name it may sign; None, for an own key, means every tenant."""
    kind: KeyKind
    algorithm: Algorithm
    """The one algorithm its signatures are checked with, whatever a token says."""
    public_key: PublicKey

    @staticmethod
    def of_tenant(kid: str, *, tenant_id: str, public_pem: str) -> "VerificationKey":
        """A key that a tenant registered. Raises `UnusableKeyError` saying what is wrong with it."""
        if not is_kid(kid):
            raise UnusableKeyError(_BAD_KID)
        public_key = load_public_key(public_pem.encode("utf-8", "replace"))
        return VerificationKey(
            kid=kid, tenant_id=tenant_id, kind="tenant", algorithm=algorithm_of(public_key), public_key=public_key
        )

    @staticmethod
    def from_record(record: SigningKeyRecord) -> "VerificationKey":
        """The key of a stored row. Raises `UnusableKeyError` saying what is wrong with the row."""
        if not is_kid(record.kid):
            raise UnusableKeyError(_BAD_KID)
        if record.kind not in ("own", "tenant"):
            raise UnusableKeyError("its kind is neither own nor tenant")
        if record.kind == "tenant" and not record.tenant_id:
            raise UnusableKeyError("it is a tenant's key without a tenant")
        public_key = load_public_key(record.public_pem.encode("utf-8", "replace"))
        algorithm = algorithm_of(public_key)
        if record.algorithm != algorithm:
            raise UnusableKeyError(f"its key is for {algorithm}, its row says otherwise")
        return VerificationKey(
            kid=record.kid,
            tenant_id=record.tenant_id,
            kind="own" if record.kind == "own" else "tenant",
            algorithm=algorithm,
            public_key=public_key,
        )


class RegisteredKey(msgspec.Struct, frozen=True, kw_only=True):
    """A public key that a tenant's configuration names, not looked at yet."""

    tenant_id: str
    kid: str
    public_pem: str

    def verification_key(self) -> VerificationKey:
        """Raises `UnusableKeyError`."""
        return VerificationKey.of_tenant(self.kid, tenant_id=self.tenant_id, public_pem=self.public_pem)


_Place = tuple[str | None, str]
"""Whose a kid is, None for our own, and the kid."""


class KeySet:
    """The keys believed at one moment. Immutable: a change of keys is another key set.

    A kid of our own is one key. A tenant's kid is that tenant's: two tenants may have the same one, and neither
    hears of the other's.
    """

    __slots__ = ("_jwks", "_keys", "_refused")

    def __init__(self, keys: Iterable[VerificationKey] = (), *, refused: Mapping[str, str] | None = None) -> None:
        by_place: dict[_Place, VerificationKey] = {}
        for key in keys:
            place = _place(key)
            if not is_kid(key.kid) or place in by_place:
                raise UnusableKeyError("every key needs a kid of its own")
            by_place[place] = key
        self._keys = MappingProxyType(by_place)
        self._refused = MappingProxyType(dict(refused or {}))
        own = [_jwk(key) for key in by_place.values() if key.kind == "own"]
        self._jwks = msgspec.json.encode({"keys": own})

    @staticmethod
    def from_records(records: Iterable[SigningKeyRecord], registered: Iterable[RegisteredKey] = ()) -> "KeySet":
        """The key set of stored rows, without revoked ones, and of what the tenants' configuration registers.

        What cannot be used is left out and named in `refused`: one tenant's damaged key must not take
        everybody's away. A kid that was revoked for a tenant stays so, whatever its configuration says.
        """
        keys: dict[_Place, VerificationKey] = {}
        refused: dict[str, str] = {}
        spoiled: set[_Place] = set()
        given: list[SigningKeyRecord | RegisteredKey] = []
        for record in records:
            if record.state in ("current", "previous"):
                given.append(record)
            elif record.kind == "tenant":
                spoiled.add((record.tenant_id, record.kid))
        for one in [*given, *registered]:
            try:
                key = one.verification_key() if isinstance(one, RegisteredKey) else VerificationKey.from_record(one)
            except UnusableKeyError as error:
                refused[one.kid] = str(error)
                continue
            place = _place(key)
            known = keys.get(place)
            if place in spoiled or known == key:
                continue
            if known is None:
                keys[place] = key
                continue
            # Two keys under one kid cannot be told apart by a token: neither is believed.
            del keys[place]
            spoiled.add(place)
            refused[key.kid] = "its kid is used twice"
        return KeySet(keys.values(), refused=refused)

    @property
    def refused(self) -> Mapping[str, str]:
        """Rows that were left out: kid to reason, to be logged."""
        return self._refused

    def get(self, kid: str, tenant_id: object = None) -> VerificationKey | None:
        """Our own key with this kid, else the one of the tenant in whose name a token says that it speaks."""
        own = self._keys.get((None, kid))
        return own or self._keys.get((tenant_id, kid)) if isinstance(tenant_id, str) else own

    def jwks(self) -> bytes:
        """The body of `/.well-known/jwks.json` (RFC 7517): public members of our own keys only."""
        return self._jwks

    def __len__(self) -> int:
        return len(self._keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeySet) and self._keys == other._keys

    __hash__ = None  # type: ignore[assignment]  # public keys have none

    def __repr__(self) -> str:
        return f"KeySet({sorted(key.kid for key in self._keys.values())})"


class SigningKey:
    """A private key of ours, its kid and the tenant it signs for. Only `private_pem` shows the secret."""

    __slots__ = ("_private_key", "algorithm", "kid", "public_key", "tenant_id")

    def __init__(self, private_key: PrivateKey, *, kid: str | None = None, tenant_id: str | None = None) -> None:
        self._private_key = private_key
        self.public_key: PublicKey = private_key.public_key()
        self.algorithm: Algorithm = algorithm_of(self.public_key)
        self.kid: str = kid if kid is not None else thumbprint(self.public_key)
        self.tenant_id = tenant_id
        """The only tenant in whose name it signs; None means every tenant."""
        if not is_kid(self.kid):
            raise UnusableKeyError(_BAD_KID)

    @staticmethod
    def generate(*, tenant_id: str | None = None) -> "SigningKey":
        """A new RSA key of 2048 bits, for RS256. Takes about 0.1 s."""
        private_key = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
        return SigningKey(private_key, tenant_id=tenant_id)

    @staticmethod
    def load(pem: bytes, *, kid: str | None = None, tenant_id: str | None = None) -> "SigningKey":
        """The key in an unencrypted PEM (PKCS#8, PKCS#1 or SEC 1); its kid is its thumbprint unless given.

        Raises `UnusableKeyError`, never with any of the PEM in its message.
        """
        if len(pem) > PEM_BYTES_MAX:
            raise UnusableKeyError(f"the private key is over {PEM_BYTES_MAX} bytes")
        try:
            private_key = serialization.load_pem_private_key(pem, password=None)
        except Exception:  # noqa: BLE001 - cryptography's own list of exceptions is open
            raise UnusableKeyError("the private key is not an unencrypted PEM") from None
        if not isinstance(private_key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
            raise UnusableKeyError("the private key is not RSA, EC P-256 or Ed25519")
        return SigningKey(private_key, kid=kid, tenant_id=tenant_id)

    def sign(self, claims: Mapping[str, Any]) -> str:
        """A token with these claims in this order, in JWS compact form."""
        return jwt.encode(dict(claims), self._private_key, algorithm=self.algorithm, headers={"kid": self.kid})

    def verification_key(self) -> VerificationKey:
        """The public half, as an own key."""
        return VerificationKey(
            kid=self.kid,
            tenant_id=self.tenant_id,
            kind="own",
            algorithm=self.algorithm,
            public_key=self.public_key,
        )

    def public_pem(self) -> str:
        """The public half as PEM, as `ledger.signing_key` stores it."""
        pem = self.public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        return pem.decode("ascii")

    def private_pem(self) -> bytes:
        """The secret, as unencrypted PKCS#8 PEM: for a file of mode 0600 or a Secret, nothing else."""
        return self._private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid!r}, tenant_id={self.tenant_id!r})"


def is_kid(text: str) -> bool:
    """Whether the text may be a kid: 1-128 characters that mean nothing to a path, a query or a shell."""
    return _KID.fullmatch(text) is not None


@functools.lru_cache(maxsize=_LOADED_MAX)
def load_public_key(pem: bytes) -> PublicKey:
    """The public key in a PEM. Raises `UnusableKeyError` for anything but RSA, EC P-256 or Ed25519."""
    if len(pem) > PEM_BYTES_MAX:
        raise UnusableKeyError(f"the public key is over {PEM_BYTES_MAX} bytes")
    try:
        public_key = serialization.load_pem_public_key(pem)
    except Exception:  # noqa: BLE001 - cryptography's own list of exceptions is open
        raise UnusableKeyError("the public key is not a PEM of a public key") from None
    if not isinstance(public_key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise UnusableKeyError("the public key is not RSA, EC P-256 or Ed25519")
    algorithm_of(public_key)
    return public_key


def algorithm_of(public_key: PublicKey) -> Algorithm:
    """The one algorithm a key is used with (RFC 7518, RFC 8037).

    Raises `UnusableKeyError` for RSA under 2048 or over 8192 bits and for curves other than P-256.
    """
    if isinstance(public_key, rsa.RSAPublicKey):
        if not RSA_BITS <= public_key.key_size <= RSA_BITS_MAX:
            raise UnusableKeyError(f"an RSA key has {RSA_BITS}-{RSA_BITS_MAX} bits, not {public_key.key_size}")
        return "RS256"
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        if not isinstance(public_key.curve, ec.SECP256R1):
            raise UnusableKeyError("an EC key is on the curve P-256")
        return "ES256"
    return "EdDSA"


def thumbprint(public_key: PublicKey) -> str:
    """The key's JWK thumbprint (RFC 7638, SHA-256, base64url): our keys' kid."""
    # msgspec writes no white space and keeps the order, which is what RFC 7638 section 3 asks for.
    canonical = msgspec.json.encode(_required_members(public_key))
    return _base64url(hashlib.sha256(canonical).digest())


def _place(key: VerificationKey) -> _Place:
    return (None if key.kind == "own" else key.tenant_id, key.kid)


def _jwk(key: VerificationKey) -> dict[str, str]:
    return {**_required_members(key.public_key), "kid": key.kid, "use": "sig", "alg": key.algorithm}


def _required_members(public_key: PublicKey) -> dict[str, str]:
    """The members that RFC 7638 section 3.2 counts, in lexicographic order; they are all public."""
    if isinstance(public_key, rsa.RSAPublicKey):
        numbers = public_key.public_numbers()
        return {"e": _base64url_uint(numbers.e), "kty": "RSA", "n": _base64url_uint(numbers.n)}
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        point = public_key.public_numbers()
        # RFC 7518 section 6.2.1.2: coordinates have the full size of the field, leading zeros included.
        x, y = point.x.to_bytes(32, "big"), point.y.to_bytes(32, "big")
        return {"crv": "P-256", "kty": "EC", "x": _base64url(x), "y": _base64url(y)}
    return {"crv": "Ed25519", "kty": "OKP", "x": _base64url(public_key.public_bytes_raw())}


def _base64url_uint(number: int) -> str:
    return _base64url(number.to_bytes((number.bit_length() + 7) // 8, "big"))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
