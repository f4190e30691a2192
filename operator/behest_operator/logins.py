"""Logins of the ledger that stand in Secrets: made, mended, rotated, dropped.

Every login has a name of its own, so that a Secret and its login always fit, whenever the operator is killed: first the
login, then the Secret that names it, then the logins that no Secret names any more are dropped. A rotation leaves the
one before it, which running processes still use, until the rotation after.
"""

import base64
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec

from behest_ledger.store.configuration import connected
from behest_ledger.store.pool import Connection
from behest_ledger.store.roles import TenantRole, create_role, drop_role, list_roles
from behest_operator.kubernetes import Object
from behest_operator.secret_objects import annotation_of, data_of

ROTATION = timedelta(days=30)
DSN_KEY = "database-url"
_ROTATED_AT = "behest.ai/rotated-at"
_LOGIN_BEFORE = "behest.ai/login-before"


class Login(msgspec.Struct, frozen=True, kw_only=True):
    """What a Secret is to say."""

    dsn: str
    annotations: dict[str, str]
    stale: tuple[str, ...]
    """Logins that are to be dropped once the Secret says it."""


async def current_login(
    pool: Connection, found: Object | None, *, prefix: str, tenants: Sequence[str] | None, dsn: str, now: datetime
) -> Login:
    """The login that a Secret holds, or a new one where it holds none that works, or has held it for long.

    `prefix` is how names of these logins begin, and no others; `tenants` for whom they act, None: for all; `dsn` where
    the ledger is, whatever login is in it. Raises `LedgerError`, and `RoleError` where no login can be made.
    """
    held = data_of(found).get(DSN_KEY, "")
    name, before = urlsplit(held).username or "", annotation_of(found, _LOGIN_BEFORE)
    known = await logins_of(pool, prefix)
    rotated_at = _time(found)
    wanted = tuple(sorted(set(tenants or ())))
    if not _serves(known.get(name), wanted) or rotated_at is None or now - rotated_at >= ROTATION:
        name, before, rotated_at = _new_name(prefix), name, now
        password = secrets.token_urlsafe(24)
        async with connected(pool) as connection:
            await create_role(connection, name, tenants=tenants, password=password)
        own = _with_login(dsn, f"{quote(name)}:{quote(password)}")
    else:
        # The ledger may have moved, or a pooler have come before it.
        own = _with_login(dsn, urlsplit(held).netloc.rpartition("@")[0])
    return Login(
        dsn=own,
        annotations={_ROTATED_AT: rotated_at.strftime("%Y-%m-%dT%H:%M:%SZ"), _LOGIN_BEFORE: before},
        stale=tuple(
            other for other, role in known.items() if other != name and not (other == before and _serves(role, wanted))
        ),
    )


async def drop_logins(pool: Connection, names: Sequence[str]) -> None:
    """Drop logins. Raises `LedgerError`."""
    for name in names:
        async with connected(pool) as connection:
            await drop_role(connection, name)


async def logins_of(pool: Connection, prefix: str) -> dict[str, TenantRole]:
    """The logins whose names begin so, by name. Raises `LedgerError`."""
    async with connected(pool) as connection:
        roles = await list_roles(connection)
    ours = re.compile(re.escape(prefix) + r"[a-z2-7]{8}")
    return {role.name: role for role in roles if ours.fullmatch(role.name)}


def _time(found: Object | None) -> datetime | None:
    try:
        return datetime.strptime(annotation_of(found, _ROTATED_AT), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def _serves(role: TenantRole | None, tenants: tuple[str, ...]) -> bool:
    return role is not None and role.exists and role.tenants == tenants


def _new_name(prefix: str) -> str:
    return prefix + base64.b32encode(secrets.token_bytes(5)).decode().lower()


def _with_login(dsn: str, login: str) -> str:
    parts = urlsplit(dsn)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{login}@{host}"))
