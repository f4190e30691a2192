"""The keys this process signs tokens with: one for all tenants, or one for each that its database role may act for.

They are one private key under several kids: a kid is believed only for the tenant that it is registered for, so what a
stolen sidecar signs is believed for its own tenants and nowhere else.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence

from behest_ledger.store import identity
from behest_ledger.store.pool import Connection
from behest_ledger.store.roles import session_tenants
from behest_proxy.identity.keys import KeySet, SigningKey


class SigningKeys:
    """The private key of a PEM, as each tenant's key."""

    def __init__(self, pem: bytes) -> None:
        """Raises `UnusableKeyError`."""
        self._pem = pem
        self._everybodys: SigningKey | None = SigningKey.load(pem)
        self._of_tenants: dict[str, SigningKey] = {}

    async def register(self, pool: Connection) -> None:
        """Make the public halves known to everybody who verifies, for as many tenants as our role may act for.

        Raises `LedgerError`.
        """
        self.bind(await session_tenants(pool))
        await _register(pool, self._all())

    async def announce(self, pool: Connection, pem: bytes) -> None:
        """The same for another private key, with which `replace` signs once everybody has heard of it.

        Raises `LedgerError` and `UnusableKeyError`.
        """
        everybodys, of_tenants = _keys(pem, await session_tenants(pool))
        await _register(pool, [everybodys] if everybodys else [*of_tenants.values()])

    def replace(self, pem: bytes) -> None:
        """Sign with another private key from now on. Raises `UnusableKeyError`."""
        self._everybodys, self._of_tenants = _keys(pem, None if self._everybodys else [*self._of_tenants])
        self._pem = pem

    def bind(self, tenants: Sequence[str] | None) -> None:
        """Sign for these tenants only; None: for all."""
        self._everybodys, self._of_tenants = _keys(self._pem, tenants)

    def of(self, tenant_id: str) -> SigningKey | None:
        """The key that signs in this tenant's name; None: we may not."""
        return self._everybodys or self._of_tenants.get(tenant_id)

    def key_set(self) -> KeySet:
        """What we would believe if we knew of no other keys."""
        return KeySet(key.verification_key() for key in self._all())

    def _all(self) -> list[SigningKey]:
        return [*self._of_tenants.values()] if self._everybodys is None else [self._everybodys]


def _keys(pem: bytes, tenants: Sequence[str] | None) -> tuple[SigningKey | None, dict[str, SigningKey]]:
    """One for everybody, or one for each tenant. Raises `UnusableKeyError`."""
    key = SigningKey.load(pem)
    if tenants is None:
        return key, {}
    return None, {
        tenant: SigningKey.load(pem, kid=f"{key.kid}.{_short_hash(tenant)}", tenant_id=tenant) for tenant in tenants
    }


async def _register(pool: Connection, keys: Iterable[SigningKey]) -> None:
    for key in keys:
        await identity.put_signing_key(
            pool,
            kid=key.kid,
            tenant_id=key.tenant_id,
            kind="own",
            algorithm=key.algorithm,
            public_pem=key.public_pem(),
        )


def _short_hash(tenant_id: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(tenant_id.encode()).digest()[:9]).decode("ascii")
