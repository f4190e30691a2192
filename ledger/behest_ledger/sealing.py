"""Secrets at rest: AES-256-GCM under a key of each tenant, which comes out of one master key.

Only the operator and gateways that serve all tenants have the master key; a sidecar has its tenant's. A sealed secret
says nothing of whose it is, so its place is authenticated with it: put into another row it does not open.
"""

import base64
import binascii
from uuid import UUID

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


def content_key(key: bytes, owner: UUID) -> bytes:
    """The key of one thread or reply, out of its tenant's.

    Random nonces of AES-GCM are good for some 2**32 messages under one key (NIST SP 800-38D, section 8.3): a tenant's
    chunks could be more in a month, those of one thread never.
    """
    info = b"behest content key\x00" + owner.bytes
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(key)


def seal(key: bytes, secret: str, *, place: str, nonce: bytes) -> bytes:
    """The sealed form of a secret for one place. `nonce` is 12 random bytes, never used twice with a key."""
    return seal_bytes(key, secret.encode(), place=place, nonce=nonce)


def seal_bytes(key: bytes, secret: bytes, *, place: str, nonce: bytes) -> bytes:
    """See `seal`."""
    assert len(nonce) == NONCE_BYTES, "the nonce of AES-GCM has 12 bytes"
    return _VERSION + nonce + AESGCM(key).encrypt(nonce, secret, _VERSION + place.encode())


def opened(key: bytes, sealed: bytes, *, place: str) -> str:
    """The secret. Raises `SealingError` where the key, the place or a single bit is another one."""
    return opened_bytes(key, sealed, place=place).decode()


def opened_bytes(key: bytes, sealed: bytes, *, place: str) -> bytes:
    """See `opened`."""
    version, nonce, ciphertext = sealed[:1], sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
    if version != _VERSION or len(nonce) != NONCE_BYTES:
        raise SealingError("this was sealed by another version")
    try:
        return AESGCM(key).decrypt(nonce, ciphertext, version + place.encode())
    except InvalidTag:
        raise SealingError("this was sealed with another key, or for another place") from None
