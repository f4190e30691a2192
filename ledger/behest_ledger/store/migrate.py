"""The schema: plain SQL files applied once each, in the order of their names, under a lock.

A file that was applied and later changed is an error: the schema of a running ledger is not rewritten. Later releases'
files are none: no migration breaks what an earlier release calls, so its processes go on, and start again, after it.
"""

import hashlib
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files

import msgspec

from behest_ledger.store.errors import SchemaError, mapped
from behest_ledger.store.pool import Connection, connect

logger = logging.getLogger(__name__)

_LOCK_KEY = 0x6265_6865  # "behe": one migration at a time per database
PARTITIONS_AHEAD_MONTHS = 3


class Migration(msgspec.Struct, frozen=True):
    """One file of `sql/migrations`."""

    name: str
    sql: str

    @property
    def sha256(self) -> str:
        """Of the text, to notice a file that was changed after it was applied."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations() -> list[Migration]:
    """All migrations that this version brings, in order."""
    folder = files("behest_ledger").joinpath("sql/migrations")
    return sorted(
        (Migration(item.name, item.read_text("utf-8")) for item in folder.iterdir() if item.name.endswith(".sql")),
        key=lambda migration: migration.name,
    )


class Migrated(msgspec.Struct, frozen=True):
    """What `migrate` did and found; names of migrations, in order."""

    applied: list[str]
    """Now; those of before are not among them."""
    later: list[str]
    """Of a later release than this one."""


async def migrate(dsn: str) -> Migrated:
    """Bring the schema up to this version; one of a later release stays as it is.

    Raises `SchemaError` where another build made the schema, and `LedgerUnavailableError`.
    """
    connection = await connect(dsn, application_name="behest migrate")
    try:
        with mapped():
            return await _migrate(connection)
    finally:
        await connection.close()


async def _migrate(connection: Connection) -> Migrated:
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK_KEY)
        await connection.execute("SET LOCAL client_min_messages = warning")
        await connection.execute("CREATE SCHEMA IF NOT EXISTS ledger")
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS ledger.schema_migration (name text PRIMARY KEY, sha256 text NOT NULL,"
            " applied_at timestamptz NOT NULL DEFAULT now())"
        )
        missing, later = _compare(await _applied(connection))
        if missing and later:
            raise _of_another_build(f"it has {later[0]} and not {missing[0].name}")
        for migration in missing:
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO ledger.schema_migration (name, sha256) VALUES ($1, $2)",
                migration.name,
                migration.sha256,
            )
        month = datetime.now(UTC).date().replace(day=1)
        await connection.execute("SELECT ledger.make_partitions_v1($1, $2)", month, PARTITIONS_AHEAD_MONTHS)
        # After a restore from a dump, before anybody writes: seals go by the numbers of transactions.
        await connection.execute("SELECT ledger.rebase_tx_v1()")
        await connection.execute("SELECT ledger.grant_rights_v1()")
    return Migrated([migration.name for migration in missing], later)


async def check_schema(connection: Connection) -> None:
    """Raise `SchemaError` unless the database has every migration that this version brings; it may have later ones."""
    with mapped():
        applied = await _applied(connection)
    missing, later = _compare(applied)
    if missing:
        raise SchemaError(f"the schema lacks {', '.join(migration.name for migration in missing)}")
    if later:
        _tell_later(", ".join(later))


async def _applied(connection: Connection) -> dict[str, str]:
    rows = await connection.fetch("SELECT name, sha256 FROM ledger.schema_migration")
    return {row["name"]: row["sha256"] for row in rows}


def _compare(applied: Mapping[str, str]) -> tuple[list[Migration], list[str]]:
    """What is to be applied of this version's migrations, and what was applied of later ones. Raises `SchemaError`."""
    known = migrations()
    for migration in known:
        if applied.get(migration.name, migration.sha256) != migration.sha256:
            raise _of_another_build(f"migration {migration.name} was changed after it was applied to this database")
    unknown = sorted(set(applied) - {migration.name for migration in known})
    if unknown and unknown[0] < known[-1].name:
        raise _of_another_build(f"this version does not know {unknown[0]}, which is no later one")
    return [migration for migration in known if migration.name not in applied], unknown


def _of_another_build(fault: str) -> SchemaError:
    return SchemaError(
        f"the schema was made by another build: {fault}", "use the release that migrated it, or a later one"
    )


@cache
def _tell_later(names: str) -> None:
    """Once in a process, however often it connects."""
    logger.info("the ledger was migrated by a later release (%s): this one goes on with it", names)
