import asyncio

import pytest

from behest_ledger.store.errors import SchemaError
from behest_ledger.store.migrate import Migrated, check_schema, migrate, migrations
from behest_ledger.store.pool import connect


def test_migrating_twice_applies_nothing_more(database: str) -> None:
    assert asyncio.run(migrate(database)) == Migrated([], [])


def test_a_migration_that_was_changed_after_it_was_applied_is_refused(database: str) -> None:
    async def scenario() -> None:
        connection = await connect(database)
        await connection.execute("UPDATE ledger.schema_migration SET sha256 = 'other' WHERE name LIKE '0002%'")
        with pytest.raises(SchemaError, match=r"0002_books\.sql was changed.*use the release that migrated it"):
            await migrate(database)
        with pytest.raises(SchemaError, match=r"0002_books\.sql was changed.*use the release that migrated it"):
            await check_schema(connection)
        await connection.close()

    asyncio.run(scenario())


def test_what_is_missing_is_named_with_what_to_do(database: str) -> None:
    async def scenario() -> None:
        connection = await connect(database)
        names = [migration.name for migration in migrations()[-2:]]
        await connection.execute("DELETE FROM ledger.schema_migration WHERE name = ANY($1)", names)
        with pytest.raises(SchemaError, match=rf"lacks {', '.join(names)}: run `behest ledger migrate`$"):
            await check_schema(connection)
        await connection.close()

    asyncio.run(scenario())


def test_a_schema_of_a_later_release_is_used_and_left_alone_and_told_of_once(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "behest_ledger.store.migrate")

    async def scenario() -> None:
        connection = await connect(database)
        await connection.execute("INSERT INTO ledger.schema_migration (name, sha256) VALUES ('9999_later.sql', 'x')")
        await check_schema(connection)
        await check_schema(connection)
        assert await migrate(database) == Migrated([], ["9999_later.sql"])
        await connection.execute("DELETE FROM ledger.schema_migration WHERE name LIKE '0002%'")
        with pytest.raises(SchemaError, match=r"it has 9999_later\.sql and not 0002_books\.sql"):
            await migrate(database)
        await connection.close()

    asyncio.run(scenario())
    assert [record.getMessage() for record in caplog.records] == [
        "the ledger was migrated by a later release (9999_later.sql): this one goes on with it"
    ]


def test_an_unknown_migration_that_is_no_later_one_is_refused(database: str) -> None:
    async def scenario() -> None:
        connection = await connect(database)
        await connection.execute("INSERT INTO ledger.schema_migration (name, sha256) VALUES ('0002_other.sql', 'x')")
        for call in (migrate(database), check_schema(connection)):
            with pytest.raises(SchemaError, match=r"does not know 0002_other\.sql"):
                await call
        await connection.close()

    asyncio.run(scenario())


def test_the_names_of_migrations_give_their_order() -> None:
    names = [migration.name for migration in migrations()]
    numbers = [int(name[:4]) for name in names]
    assert numbers == sorted(set(numbers))
