"""Secrets at rest: AES-256-GCM under a key of each tenant, which comes out of one master key.

Only the operator and gateways that serve all tenants have the master key; a sidecar has its tenant's. A sealed secret
says nothing of whose it is, so its place is authenticated with it: put into another row it does not open.
"""

import base64
import binascii

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
NONCE_BYTES = 12
_VERSION = b"\x01"


class SealingError(ValueError):
    """A key is malformed, or what is sealed does not open with it."""


def key_from_text(text: str) -> bytes:
    """The 32 bytes of a key written in base64. Raises `SealingError`."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        raise SealingError("a key is 32 bytes in base64: make one with `openssl rand -base64 32`") from None
    if len(key) != KEY_BYTES:
        raise SealingError(f"a key is 32 bytes in base64, this one has {len(key)}")
    return key


def tenant_key(master_key: bytes, tenant_id: str) -> bytes:
    """A tenant's key: HKDF-SHA256 (RFC 5869) of the master key, with the tenant as its context."""
    info = b"behest tenant data key\x00" + tenant_id.encode()
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(master_key)


def seal(key: bytes, secret: str, *, place: str, nonce: bytes) -> bytes:
    """The sealed form of a secret for one place. `nonce` is 12 random bytes, never used twice with a key."""
    assert len(nonce) == NONCE_BYTES, "the nonce of AES-GCM has 12 bytes"
    return _VERSION + nonce + AESGCM(key).encrypt(nonce, secret.encode(), _VERSION + place.encode())


def opened(key: bytes, sealed: bytes, *, place: str) -> str:
    """The secret. Raises `SealingError` where the key, the place or a single bit is another one."""
    version, nonce, ciphertext = sealed[:1], sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
    if version != _VERSION or len(nonce) != NONCE_BYTES:
        raise SealingError("this was sealed by another version")
    try:
        return AESGCM(key).decrypt(nonce, ciphertext, version + place.encode()).decode()
    except InvalidTag:
        raise SealingError("this was sealed with another key, or for another place") from None
