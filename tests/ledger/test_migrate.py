import asyncio

import pytest

from behest_ledger.store.errors import SchemaError
from behest_ledger.store.migrate import check_schema, migrate, migrations
from behest_ledger.store.pool import connect


def test_migrating_twice_applies_nothing_more(database: str) -> None:
    assert asyncio.run(migrate(database)) == []


def test_a_migration_that_was_changed_after_it_was_applied_is_refused(database: str) -> None:
    async def scenario() -> None:
        connection = await connect(database)
        await connection.execute("UPDATE ledger.schema_migration SET sha256 = 'other' WHERE name LIKE '0002%'")
        with pytest.raises(SchemaError, match=r"0002_books\.sql was changed"):
            await migrate(database)
        with pytest.raises(SchemaError, match="behest ledger migrate"):
            await check_schema(connection)
        await connection.close()

    asyncio.run(scenario())


def test_a_schema_of_a_newer_version_is_left_alone(database: str) -> None:
    async def scenario() -> None:
        connection = await connect(database)
        await connection.execute("INSERT INTO ledger.schema_migration (name, sha256) VALUES ('9999_later.sql', 'x')")
        with pytest.raises(SchemaError, match="newer behest"):
            await migrate(database)
        await connection.close()

    asyncio.run(scenario())


def test_the_names_of_migrations_give_their_order() -> None:
    names = [migration.name for migration in migrations()]
    numbers = [int(name[:4]) for name in names]
    assert numbers == sorted(set(numbers))
