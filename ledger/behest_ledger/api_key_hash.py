"""API keys as they are made, recognised and stored: SHA-256 finds the row, argon2id proves the key.

The key itself is never stored. A key carries 128 random bits, so its SHA-256 cannot be searched for; argon2id
is the second lock, for the day when somebody finds a way to write a row of their own.
"""

import hashlib
import hmac
import re
import secrets

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

__all__ = [
    "API_KEY_PREFIX",
    "api_key_digest",
    "api_key_matches",
    "hash_api_key",
    "is_api_key",
    "last_four",
    "new_api_key",
    "same_digest",
]

API_KEY_PREFIX = "behest_sk_live_"
"""How every API key begins; 32 lower-case hexadecimal digits follow."""

_API_KEY = re.compile(r"behest_sk_live_[0-9a-f]{32}")

_HASHER = PasswordHasher()
"""argon2id at the defaults of argon2-cffi (RFC 9106, second recommendation): 64 MiB, 3 passes, 4 lanes."""


def new_api_key() -> str:
    """A fresh API key from the operating system's randomness. Show it once; store only its hashes."""
    return API_KEY_PREFIX + secrets.token_hex(16)


def is_api_key(text: str) -> bool:
    """Whether the text has exactly the form of an API key. Says nothing about whether it was ever issued."""
    return _API_KEY.fullmatch(text) is not None


def api_key_digest(key: str) -> bytes:
    """The 32 bytes of SHA-256 under which a key is looked up."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def same_digest(one: bytes, other: bytes) -> bool:
    """Whether two digests are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one, other)


def hash_api_key(key: str) -> str:
    """The argon2id hash to store, with its parameters and salt. Costs about 0.1 s and 64 MiB."""
    return _HASHER.hash(key)


def api_key_matches(key: str, *, argon2_hash: str) -> bool:
    """Whether the key has this argon2id hash. Costs what `hash_api_key` costs.

    A stored value that is no argon2 hash matches nothing, so a damaged row refuses instead of raising.
    """
    try:
        return _HASHER.verify(argon2_hash, key)
    except (VerificationError, InvalidHashError):
        return False


def last_four(key: str) -> str:
    """The last four characters, by which people tell their keys apart."""
    return key[-4:]
