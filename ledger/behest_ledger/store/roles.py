"""The roles of sidecars: logins that may do what a sidecar does, for their own tenants, and nothing else.

What exactly that is says the schema (`ledger.sidecar_right`, 0008_roles.sql). Roles belong to the whole server, so
making one needs CREATEROLE; giving rights to one that is there needs only the owner of the schema. Every function may
also raise the errors of `store.errors`.
"""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

import asyncpg
import msgspec

from behest_ledger.store.errors import LedgerError, mapped
from behest_ledger.store.pool import Connection

PASSWORD_LENGTH_MAX = 256
_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,62}")
_ITERATIONS = 4096
"""PostgreSQL's own number (`scram_iterations`)."""


class RoleError(LedgerError):
    """The role cannot be made or used; the message says why, and nothing was changed."""


class TenantRole(msgspec.Struct, frozen=True, kw_only=True):
    """A role of sidecars, as this ledger knows it."""

    name: str
    tenants: tuple[str, ...]
    """For whom it may act; empty: for all."""
    exists: bool
    """Whether the server knows it too."""
    too_mighty: str | None
    """Why no rule of the ledger binds it, such as "is a superuser"."""


_TOO_MIGHTY = """
SELECT r.rolname::text AS name,
       CASE WHEN r.rolsuper THEN 'is a superuser'
            WHEN r.rolbypassrls THEN 'bypasses row-level security'
            WHEN pg_has_role(r.oid, n.nspowner, 'MEMBER') THEN 'owns the schema'
            WHEN pg_has_role(r.oid, 'pg_write_all_data', 'MEMBER') THEN 'may write all data'
            WHEN r.rolcreaterole THEN 'may make roles'
            WHEN pg_has_role(r.oid, d.datdba, 'MEMBER') THEN 'owns the database' END AS reason
FROM pg_roles r, pg_namespace n, pg_database d
WHERE n.nspname = 'ledger' AND d.datname = current_database()
"""
_LIST = f"""
SELECT t.role_name::text AS name, m.name IS NOT NULL AS "exists", m.reason AS too_mighty,
       CASE WHEN bool_or(t.tenant_id IS NULL) THEN '{{}}'
            ELSE array_agg(t.tenant_id ORDER BY t.tenant_id) END AS tenants
FROM ledger.tenant_role t LEFT JOIN ({_TOO_MIGHTY}) m ON m.name = t.role_name GROUP BY 1, 2, 3 ORDER BY 1
"""  # noqa: S608 - two constants


async def create_role(
    connection: Connection, name: str, *, tenants: Sequence[str] | None, password: str | None, renew: bool = False
) -> None:
    """Make a login for the sidecars of these tenants (None: of all), or give a role that is there the rights.

    `password` None: the role is there already; what it may act for is set anew, its password stays. Otherwise the role
    is made; the server gets only the password's SCRAM verifier, which is useless in its logs. `renew`: one that is
    there gets the password too; for whoever is sure that it is his.
    Raises `RoleError` and `LedgerForbiddenError`.
    """
    if not _NAME.fullmatch(name) or name.startswith("pg_"):
        raise RoleError(f"{name!r} is no name for a role: 1-63 of the characters a-z 0-9 _ -, not pg_, no digit first")
    if tenants is not None and (not tenants or not all(tenants)):
        raise RoleError("a role acts for one or more tenants, or for all")
    with mapped():
        async with connection.transaction():
            if password is None:
                await _check_existing(connection, name)
            else:
                await _make(connection, name, password, renew=renew)
            await connection.execute("DELETE FROM ledger.tenant_role WHERE role_name = $1", name)
            await connection.executemany(
                "INSERT INTO ledger.tenant_role (role_name, tenant_id) VALUES ($1, $2)",
                [(name, tenant) for tenant in (sorted(set(tenants)) if tenants is not None else [None])],
            )
            await connection.execute("SELECT ledger.grant_rights_v1()")


async def _check_existing(connection: Connection, name: str) -> None:
    row = await connection.fetchrow(f"{_TOO_MIGHTY} AND r.rolname = $1", name)
    if row is None:
        raise RoleError(f"there is no role {name}")
    if row["reason"] is not None:
        raise RoleError(f"role {name} {row['reason']}: no rule of the ledger would bind it")


async def _make(connection: Connection, name: str, password: str, *, renew: bool) -> None:
    verifier = scram_verifier(password)
    there = renew and await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", name)
    if there:
        await _check_existing(connection, name)
    try:
        # A name is checked above, and a verifier has no quotes: this statement takes no parameters.
        async with connection.transaction():
            verb = "ALTER" if there else "CREATE"
            await connection.execute(f"{verb} ROLE \"{name}\" LOGIN PASSWORD '{verifier}'")
    except asyncpg.DuplicateObjectError:
        raise RoleError(f"there is a role {name} already; to give it rights here, add --existing") from None
    except asyncpg.InsufficientPrivilegeError:
        owner = await connection.fetchval("SELECT session_user::text")
        raise RoleError(
            f"role {owner} may not make roles: give it CREATEROLE, or have {name} made by who may"
            f' (CREATE ROLE "{name}" LOGIN PASSWORD ...) and add --existing'
        ) from None
    # Every name is qualified; this is for those that a pooler keeps from saying so at the start of a session.
    await connection.execute(f'ALTER ROLE "{name}" SET search_path = pg_catalog')
    connects, database = await connection.fetchrow(
        "SELECT has_database_privilege($1, current_database(), 'CONNECT'), quote_ident(current_database())", name
    )
    if not connects:
        await connection.execute(f'GRANT CONNECT ON DATABASE {database} TO "{name}"')


async def list_roles(connection: Connection) -> list[TenantRole]:
    """The roles that may act for tenants of this ledger, by name."""
    with mapped():
        rows = await connection.fetch(_LIST)
    return [msgspec.convert(dict(row), TenantRole) for row in rows]


async def drop_role(connection: Connection, name: str, *, keep: bool = False) -> None:
    """Take a role's rights in this ledger, at once also for its open sessions; and the role itself unless `keep`.

    Raises `RoleError`: where the role is not one of this ledger's, or has rights elsewhere.
    """
    with mapped():
        async with connection.transaction():
            known = await connection.fetchval("DELETE FROM ledger.tenant_role WHERE role_name = $1 RETURNING 1", name)
            if known is None:
                raise RoleError(f"{name} is no role of this ledger: see `behest ledger role list`")
            row = await connection.fetchrow(
                "SELECT quote_ident(rolname), quote_ident(current_database()) FROM pg_roles WHERE rolname = $1", name
            )
            if row is None:
                return
            role, database = row
            for what in ("TABLES", "SEQUENCES", "ROUTINES"):
                await connection.execute(f"REVOKE ALL ON ALL {what} IN SCHEMA ledger FROM {role}")
            await connection.execute(f"REVOKE ALL ON SCHEMA ledger FROM {role}")
            if not keep:
                await connection.execute(f"REVOKE CONNECT ON DATABASE {database} FROM {role}")
                await _drop(connection, name, role)


async def _drop(connection: Connection, name: str, role: str) -> None:
    try:
        async with connection.transaction():
            await connection.execute(f"DROP ROLE {role}")
    except asyncpg.DependentObjectsStillExistError as error:
        detail: str = getattr(error, "detail", None) or str(error)
        raise RoleError(
            f"role {name} is used elsewhere too ({'; '.join(detail.splitlines()[:3])}): add --keep to take"
            " only its rights in this ledger"
        ) from None
    except asyncpg.InsufficientPrivilegeError:
        raise RoleError(f"you may not drop role {name}: add --keep to take only its rights in this ledger") from None


async def session_tenants(connection: Connection) -> tuple[str, ...] | None:
    """The tenants that the role of this connection may act for; None: all of them.

    Raises `RoleError` where there is none, which nobody could use.
    """
    with mapped():
        row = await connection.fetchrow("SELECT session_user::text AS name, ledger.session_tenants_v1() AS tenants")
    if row["tenants"] is None:
        return None
    if not row["tenants"]:
        raise RoleError(f"role {row['name']} may act for no tenant: see `behest ledger role create`")
    return tuple(row["tenants"])


def scram_verifier(password: str, salt: bytes | None = None) -> str:
    """The SCRAM-SHA-256 verifier of a password, in the form of `pg_authid.rolpassword` (RFC 5803).

    Raises `RoleError` for a password that is not 8-256 printable ASCII characters: others would need to be prepared
    (RFC 4013) in the same way by every client.
    """
    if not 8 <= len(password) <= PASSWORD_LENGTH_MAX or not (password.isascii() and password.isprintable()):
        raise RoleError(f"a password has 8-{PASSWORD_LENGTH_MAX} printable ASCII characters")
    salt = secrets.token_bytes(16) if salt is None else salt
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, _ITERATIONS)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    stored_key = hashlib.sha256(client_key).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    return f"SCRAM-SHA-256${_ITERATIONS}:{_base64(salt)}${_base64(stored_key)}:{_base64(server_key)}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
