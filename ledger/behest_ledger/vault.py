"""What users and models said, at rest: sealed under a key of each thread or reply where the tenant's key is there.

Without a key it is kept as it is, and the first byte says which it is: a key that comes later seals what comes later.
What was sealed never opens anywhere but in its own place.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from uuid import UUID

from behest_ledger.sealing import NONCE_BYTES, SealingError, content_key, opened_bytes, seal_bytes

_PLAIN = b"\x00"
_SEALED = b"\x01"
_KEYS_KEPT = 4096


class Vault:
    """Closes and opens contents."""

    def __init__(self, key_of_tenant: Callable[[str], bytes] | None) -> None:
        """`key_of_tenant` None: contents are kept as they are."""
        self._key_of_tenant = key_of_tenant
        self._content_key = lru_cache(_KEYS_KEPT)(self._made)

    def closed(self, content: bytes, *, tenant_id: str, owner: UUID, place: str) -> bytes:
        """The content as it may be stored. `owner` is the thread or reply that it belongs to, `place` where in it."""
        if self._key_of_tenant is None:
            return _PLAIN + content
        key = self._content_key(tenant_id, owner)
        return _SEALED + seal_bytes(key, content, place=_place(tenant_id, owner, place), nonce=os.urandom(NONCE_BYTES))

    def opened(self, stored: bytes, *, tenant_id: str, owner: UUID, place: str) -> bytes:
        """The content. Raises `SealingError` where there is no key for it, or it was put into another place."""
        if stored[:1] == _PLAIN:
            return stored[1:]
        if self._key_of_tenant is None:
            raise SealingError("this content is sealed, and this process has no key")
        key = self._content_key(tenant_id, owner)
        return opened_bytes(key, stored[1:], place=_place(tenant_id, owner, place))

    def _made(self, tenant_id: str, owner: UUID) -> bytes:
        assert self._key_of_tenant is not None
        return content_key(self._key_of_tenant(tenant_id), owner)


def _place(tenant_id: str, owner: UUID, place: str) -> str:
    return f"{tenant_id} content {owner} {place}"
