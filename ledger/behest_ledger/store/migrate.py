"""The schema: plain SQL files applied once each, in the order of their names, under a lock.

A file that was applied and later changed is an error: the schema of a running ledger is not rewritten.
"""

import hashlib
from datetime import UTC, datetime
from importlib.resources import files

import msgspec

from behest_ledger.store.errors import SchemaError, mapped
from behest_ledger.store.pool import Connection, connect

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


async def migrate(dsn: str) -> list[str]:
    """Bring the schema up to this version and return the names that were applied now.

    Raises `SchemaError` where the database holds a schema of a newer version or an applied file was changed, and
    `LedgerUnavailableError`.
    """
    connection = await connect(dsn, application_name="behest migrate")
    try:
        with mapped():
            return await _migrate(connection)
    finally:
        await connection.close()


async def _migrate(connection: Connection) -> list[str]:
    applied_now: list[str] = []
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK_KEY)
        await connection.execute("SET LOCAL client_min_messages = warning")
        await connection.execute("CREATE SCHEMA IF NOT EXISTS ledger")
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS ledger.schema_migration (name text PRIMARY KEY, sha256 text NOT NULL,"
            " applied_at timestamptz NOT NULL DEFAULT now())"
        )
        rows = await connection.fetch("SELECT name, sha256 FROM ledger.schema_migration")
        applied = {row["name"]: row["sha256"] for row in rows}
        known = migrations()
        if unknown := sorted(set(applied) - {migration.name for migration in known}):
            raise SchemaError(
                f"the database has migrations that this version does not know ({', '.join(unknown)}):"
                " it was written by a newer behest; upgrade this one"
            )
        for migration in known:
            if migration.name in applied:
                if applied[migration.name] != migration.sha256:
                    raise SchemaError(f"migration {migration.name} was changed after it was applied to this database")
                continue
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO ledger.schema_migration (name, sha256) VALUES ($1, $2)",
                migration.name,
                migration.sha256,
            )
            applied_now.append(migration.name)
        month = datetime.now(UTC).date().replace(day=1)
        await connection.execute("SELECT ledger.make_partitions_v1($1, $2)", month, PARTITIONS_AHEAD_MONTHS)
        # After a restore from a dump, before anybody writes: seals go by the numbers of transactions.
        await connection.execute("SELECT ledger.rebase_tx_v1()")
        await connection.execute("SELECT ledger.grant_rights_v1()")
    return applied_now


async def check_schema(connection: Connection) -> None:
    """Raise `SchemaError` unless the database has exactly the migrations that this version brings."""
    with mapped():
        rows = await connection.fetch("SELECT name, sha256 FROM ledger.schema_migration")
    found = {row["name"]: row["sha256"] for row in rows}
    wanted = {migration.name: migration.sha256 for migration in migrations()}
    if found != wanted:
        missing = sorted(set(wanted) - set(found)) or ["none"]
        raise SchemaError(
            f"the schema is not the one of this version (missing: {', '.join(missing)}): run `behest ledger migrate`"
        )
