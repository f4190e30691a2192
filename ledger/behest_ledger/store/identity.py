"""API keys and signing keys in PostgreSQL: who may mint, and whose signature is believed.

Every change bumps the tenant's configuration version in the same transaction, so that sidecars, which poll
that number, hear of a revocation. Only public halves of signing keys come here. Every
function may also raise the errors of `store.errors`.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeAlias

import asyncpg
import msgspec

from behest_ledger.api_key_hash import api_key_digest, hash_api_key, is_api_key, last_four
from behest_ledger.store.errors import LedgerError, mapped
from behest_ledger.store.pool import Connection, connect

__all__ = [
    "SIGNING_KEY_KINDS",
    "SIGNING_KEY_STATES",
    "ApiKeyRecord",
    "KeyConflictError",
    "SigningKeyRecord",
    "find_api_key",
    "list_api_keys",
    "load_signing_keys",
    "put_signing_key",
    "register_api_key",
    "revoke_api_key",
    "set_signing_key_state",
    "tenants_of_project",
]

ConnectionOrDsn: TypeAlias = Any
"""An asyncpg connection or pool, or a `str`: a DSN for which a connection is opened and closed."""

SIGNING_KEY_KINDS = ("own", "tenant")
"""`own`: ours, its claims are believed. `tenant`: registered by a tenant, which signs locally."""

SIGNING_KEY_STATES = ("current", "previous", "revoked")
"""`current` signs and verifies, `previous` only verifies, `revoked` does neither and stays so."""

_REVOKED = "a revoked signing key stays revoked: register a new one"
_LISTED_MAX = 1000
_SIGNING_KEYS_MAX = 10_000

# Columns are named as the fields of the structs below.
_FIND_API_KEY = """
SELECT tenant_id, project_id, key_id, sha256, argon2, role, name, last_four, created_at, revoked_at
FROM ledger.api_key WHERE sha256 = $1
"""
_INSERT_API_KEY = """
INSERT INTO ledger.api_key (tenant_id, project_id, key_id, sha256, argon2, role, name, last_four)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
ON CONFLICT (sha256) DO NOTHING
RETURNING key_id
"""
_LIST_API_KEYS = """
SELECT tenant_id, project_id, key_id, sha256, argon2, role, name, last_four, created_at, revoked_at
FROM ledger.api_key
WHERE ($1::text IS NULL OR tenant_id = $1) AND ($2::text IS NULL OR project_id = $2)
ORDER BY created_at, key_id
LIMIT $3
"""
_REVOKE_API_KEY = """
UPDATE ledger.api_key SET revoked_at = now()
WHERE key_id = $1 AND revoked_at IS NULL AND ($2::text IS NULL OR tenant_id = $2)
RETURNING tenant_id
"""
_LOAD_SIGNING_KEYS = """
SELECT kid, tenant_id, kind, algorithm, public_pem, state, created_at
FROM ledger.signing_key ORDER BY created_at, kid LIMIT $1
"""
_LOCK_SIGNING_KEY = """
SELECT kid, tenant_id, kind, algorithm, public_pem, state, created_at
FROM ledger.signing_key WHERE kid = $1 FOR UPDATE
"""
_PUT_SIGNING_KEY = "SELECT ledger.put_signing_key_v1($1, $2, $3, $4, $5, $6)"
_TENANTS_OF_PROJECT = "SELECT tenant_id FROM ledger.project WHERE project_id = $1 ORDER BY tenant_id LIMIT 10"
_SET_SIGNING_KEY_STATE = "UPDATE ledger.signing_key SET state = $2 WHERE kid = $1"
_BUMP = "SELECT ledger.bump_configuration_v1($1)"


class KeyConflictError(LedgerError):
    """The key is registered already, for somebody else or with another meaning; nothing was changed."""


class ApiKeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A registered API key, without the key."""

    tenant_id: str
    project_id: str
    """`<namespace>/<name>`."""
    key_id: str
    """Public name of the key, for listing and revoking."""
    sha256: bytes
    """The 32 bytes by which it is found."""
    argon2: str
    """The argon2id hash by which it is proved."""
    role: str
    """The highest role that a token minted with it may have."""
    name: str
    last_four: str
    created_at: datetime
    revoked_at: datetime | None = None
    """None while the key is good."""


class SigningKeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The public half of a key whose signature on tokens is believed."""

    kid: str
    tenant_id: str | None
    """The only tenant the key may speak for; None, for an own key, means every tenant."""
    kind: str
    """One of `SIGNING_KEY_KINDS`."""
    algorithm: str
    """RS256, ES256 or EdDSA."""
    public_pem: str
    state: str
    """One of `SIGNING_KEY_STATES`."""
    created_at: datetime | None = None


async def find_api_key(connection: Connection, sha256: bytes) -> ApiKeyRecord | None:
    """The key with this digest, revoked or not; None if never issued. Takes a connection or a pool."""
    with mapped():
        row = await connection.fetchrow(_FIND_API_KEY, sha256)
    return None if row is None else ApiKeyRecord(**dict(row))


async def tenants_of_project(connection_or_dsn: ConnectionOrDsn, project_id: str) -> list[str]:
    """The tenants that have a project `<namespace>/<name>`: one, or none when it is not configured."""
    async with _opened(connection_or_dsn) as connection:
        rows = await connection.fetch(_TENANTS_OF_PROJECT, project_id)
    return [row["tenant_id"] for row in rows]


async def register_api_key(
    connection_or_dsn: ConnectionOrDsn, *, tenant_id: str, project_id: str, key: str, role: str, name: str
) -> ApiKeyRecord:
    """Store an API key's hashes and return its record. Idempotent: a known key's record comes back unchanged.

    A revoked key stays revoked: the record says so. Raises `ValueError` when the text has not the form of a
    key and `KeyConflictError` when the key belongs to another tenant or project.
    """
    if not is_api_key(key):
        raise ValueError("an API key is behest_sk_live_ followed by 32 lower-case hexadecimal digits")
    digest = api_key_digest(key)
    async with _opened(connection_or_dsn) as connection:
        record = await find_api_key(connection, digest)
        if record is None:
            # argon2 takes 0.1 s: neither the event loop nor a transaction waits for it.
            argon2 = await asyncio.to_thread(hash_api_key, key)
            key_id = "key_" + secrets.token_hex(8)
            row = (tenant_id, project_id, key_id, digest, argon2, role, name, last_four(key))
            async with connection.transaction():
                if await connection.fetchrow(_INSERT_API_KEY, *row):
                    await connection.execute(_BUMP, tenant_id)
            record = await find_api_key(connection, digest)
        if record is None or (record.tenant_id, record.project_id) != (tenant_id, project_id):
            raise KeyConflictError("this API key is registered for another tenant or project")
        return record


async def list_api_keys(
    connection_or_dsn: ConnectionOrDsn, *, tenant_id: str | None = None, project_id: str | None = None
) -> list[ApiKeyRecord]:
    """The keys of a tenant and project, oldest first, revoked ones too; None means any. At most 1000."""
    async with _opened(connection_or_dsn) as connection:
        rows = await connection.fetch(_LIST_API_KEYS, tenant_id, project_id, _LISTED_MAX)
    return [ApiKeyRecord(**dict(row)) for row in rows]


async def revoke_api_key(connection_or_dsn: ConnectionOrDsn, *, key_id: str, tenant_id: str | None = None) -> bool:
    """Revoke a key for good. False when there is no such key, or it was revoked before."""
    async with _opened(connection_or_dsn) as connection, connection.transaction():
        row = await connection.fetchrow(_REVOKE_API_KEY, key_id, tenant_id)
        if row is None:
            return False
        await connection.execute(_BUMP, row["tenant_id"])
    return True


async def load_signing_keys(connection_or_dsn: ConnectionOrDsn) -> list[SigningKeyRecord]:
    """Every signing key this database role may see, revoked ones too, oldest first."""
    async with _opened(connection_or_dsn) as connection:
        rows: Sequence[Any] = await connection.fetch(_LOAD_SIGNING_KEYS, _SIGNING_KEYS_MAX)
    if len(rows) == _SIGNING_KEYS_MAX:
        # A silent cut would refuse good tokens, the newest keys' first.
        raise KeyConflictError(f"more than {_SIGNING_KEYS_MAX - 1} signing keys: delete revoked ones")
    return [SigningKeyRecord(**dict(row)) for row in rows]


async def put_signing_key(
    connection_or_dsn: ConnectionOrDsn,
    *,
    kid: str,
    tenant_id: str | None,
    kind: str,
    algorithm: str,
    public_pem: str,
    state: str = "current",
) -> None:
    """Register a public key under its kid, or change the state of the one there. Idempotent.

    A kid belongs to whom it was registered for first: another tenant, kind, algorithm or key under the same
    kid raises `KeyConflictError`, or one tenant could take over what another signs; so does un-revoking.
    Raises `ValueError` for an unknown kind or state, and for a tenant's key without its tenant.
    """
    if kind not in SIGNING_KEY_KINDS or state not in SIGNING_KEY_STATES:
        raise ValueError(f"a signing key is of kind {SIGNING_KEY_KINDS} and in state {SIGNING_KEY_STATES}")
    if kind == "tenant" and not tenant_id:
        raise ValueError("a tenant's signing key needs its tenant")
    async with _opened(connection_or_dsn) as connection:
        result = await connection.fetchval(_PUT_SIGNING_KEY, kid, tenant_id, kind, algorithm, public_pem, state)
    if result == "conflict":
        raise KeyConflictError("this kid is registered already for another key or tenant")
    if result == "revoked":
        raise KeyConflictError(_REVOKED)


async def set_signing_key_state(
    connection_or_dsn: ConnectionOrDsn, *, kid: str, state: str, tenant_id: str | None = None
) -> None:
    """Retire (`previous`) or revoke (`revoked`) a signing key; with `tenant_id`, only one of that tenant.

    Raises `KeyConflictError` when there is no such key, or it is revoked and should come back.
    """
    if state not in SIGNING_KEY_STATES:
        raise ValueError(f"a signing key's state is one of {SIGNING_KEY_STATES}")
    async with _opened(connection_or_dsn) as connection, connection.transaction():
        known = await _locked_signing_key(connection, kid)
        if tenant_id is not None and known.tenant_id != tenant_id:
            raise KeyConflictError("there is no signing key with this kid")
        await _change_state(connection, known, state)


async def _locked_signing_key(connection: Connection, kid: str) -> SigningKeyRecord:
    row = await connection.fetchrow(_LOCK_SIGNING_KEY, kid)
    if row is None:
        # Row-level security hides other tenants' rows: the kid may exist all the same.
        raise KeyConflictError("there is no signing key with this kid, or it is another tenant's")
    return SigningKeyRecord(**dict(row))


async def _change_state(connection: Connection, known: SigningKeyRecord, state: str) -> None:
    if known.state == state:
        return
    if known.state == "revoked":
        raise KeyConflictError(_REVOKED)
    await connection.execute(_SET_SIGNING_KEY_STATE, known.kid, state)
    await connection.execute(_BUMP, known.tenant_id)


@asynccontextmanager
async def _opened(connection_or_dsn: ConnectionOrDsn) -> AsyncGenerator[Connection, None]:
    """A connection, with asyncpg's faults mapped to those of `store.errors`."""
    with mapped():
        if isinstance(connection_or_dsn, str):
            connection = await connect(connection_or_dsn, application_name="behest identity")
            try:
                yield connection
            finally:
                await connection.close()
        elif isinstance(connection_or_dsn, asyncpg.Pool):
            async with connection_or_dsn.acquire() as connection:
                yield connection
        else:
            yield connection_or_dsn
