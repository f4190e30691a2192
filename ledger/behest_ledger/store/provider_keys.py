"""The keys of providers in PostgreSQL, sealed. Every function may also raise the errors of `store.errors`."""

import os
from typing import Any

import msgspec

from behest_ledger.sealing import NONCE_BYTES, SealingError, opened, seal
from behest_ledger.store.configuration import connected
from behest_ledger.store.errors import mapped
from behest_ledger.store.pool import Connection

KEY_LENGTH_MAX = 8192


class SealedKey(msgspec.Struct, frozen=True, kw_only=True):
    """One row: what it is for, and what cannot be read without the tenant's key."""

    tenant_id: str
    place: str
    sealed: bytes
    last_four: str

    def opened(self, key: bytes) -> str:
        """The provider's key. Raises `SealingError`."""
        return opened(key, self.sealed, place=f"{self.tenant_id} {self.place}")


def upstream_place(qualified_name: str) -> str:
    """The place of the key of an Upstream, `<namespace>/<name>`."""
    return f"upstream:{qualified_name}"


def project_place(project_id: str, provider: str) -> str:
    """The place of a project's own key for a provider."""
    return f"project:{project_id}:{provider}"


def project_of_place(place: str) -> tuple[str, str] | None:
    """Project and provider of a project's own key; None: the key is something else's."""
    kind, _, rest = place.partition(":")
    project_id, _, provider = rest.partition(":")
    return (project_id, provider) if kind == "project" and provider else None


async def put_key(connection: Connection, *, tenant_id: str, place: str, secret: str, key: bytes) -> bool:
    """Seal and write a provider's key. False: it is there already, as it is.

    Raises `SealingError` for what can be no key.
    """
    if not 1 <= len(secret) <= KEY_LENGTH_MAX or not (secret.isascii() and secret.isprintable()):
        raise SealingError(f"a provider's key has 1-{KEY_LENGTH_MAX} printable ASCII characters")
    for found in await load_keys(connection, tenant_id):
        if found.place == place and _is(found, key, secret):
            return False
    sealed = seal(key, secret, place=f"{tenant_id} {place}", nonce=os.urandom(NONCE_BYTES))
    with mapped():
        async with connected(connection) as writer, writer.transaction():
            await writer.execute(
                "INSERT INTO ledger.provider_key (tenant_id, place, sealed, last_four) VALUES ($1, $2, $3, $4)"
                " ON CONFLICT (tenant_id, place) DO UPDATE SET sealed = excluded.sealed,"
                " last_four = excluded.last_four, written_at = clock_timestamp()",
                tenant_id,
                place,
                sealed,
                secret[-4:] if len(secret) >= 12 else "",
            )
            await writer.fetchval("SELECT ledger.bump_configuration_v1($1)", tenant_id)
    return True


async def delete_key(connection: Connection, *, tenant_id: str, place: str) -> bool:
    """Forget a provider's key. False: there was none."""
    with mapped():
        async with connected(connection) as writer, writer.transaction():
            found = await writer.fetchval(
                "DELETE FROM ledger.provider_key WHERE tenant_id = $1 AND place = $2 RETURNING 1", tenant_id, place
            )
            if found is not None:
                await writer.fetchval("SELECT ledger.bump_configuration_v1($1)", tenant_id)
    return found is not None


async def load_keys(connection: Connection, tenant_id: str | None) -> list[SealedKey]:
    """The sealed keys of a tenant, or of all that the session's role may see."""
    with mapped():
        rows: list[Any] = await connection.fetch(
            "SELECT tenant_id, place, sealed, last_four FROM ledger.provider_key"
            " WHERE $1::text IS NULL OR tenant_id = $1 ORDER BY tenant_id, place",
            tenant_id,
        )
    return [SealedKey(**dict(row)) for row in rows]


def _is(found: SealedKey, key: bytes, secret: str) -> bool:
    try:
        return found.opened(key) == secret
    except SealingError:
        return False
