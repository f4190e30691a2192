"""What the role of a sidecar may do, to the last function.

A migration that brings something for sidecars adds its name to `ledger.sidecar_right`, and to `ledger.houses` here.
"""

import asyncio
import os
import re
from uuid import uuid4

import asyncpg
import pytest

from behest_ledger.holds import Granted
from behest_ledger.store import holders, holds, identity, reports
from behest_ledger.store.configuration import load_configuration
from behest_ledger.store.keeper import Keeper
from behest_ledger.store.migrate import check_schema, migrate
from behest_proxy.cli.roles import dsn_of_role
from conftest import Server
from ledger.books import settlement
from ledger.houses import ALL_TABLES, FUNCTIONS, TABLES, Houses, in_two_houses, of_tenant, two_houses
from ledger.tenant_roles import logged_in, tenant_role

_TABLES = """
SELECT c.relname::text AS name, a.grantee::regrole::text AS grantee, a.privilege_type AS right
FROM pg_class c CROSS JOIN LATERAL aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
WHERE c.relnamespace = 'ledger'::regnamespace AND a.grantee <> c.relowner AND c.relkind IN ('r', 'p', 'v', 'm', 'S')
"""
_FUNCTIONS = """
SELECT p.proname::text AS name, a.grantee::regrole::text AS grantee, a.privilege_type AS right
FROM pg_proc p CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
WHERE p.pronamespace = 'ledger'::regnamespace AND a.grantee <> p.proowner
"""


def test_a_role_is_granted_exactly_this_and_the_public_nothing(dsn: str) -> None:
    async def main() -> None:
        async with tenant_role(dsn, "acme") as login, logged_in(dsn) as owner:
            name = login.split("//")[1].split(":")[0]
            tables = {tuple(row.values()) for row in await owner.fetch(_TABLES)}
            functions = {tuple(row.values()) for row in await owner.fetch(_FUNCTIONS)}
            assert tables == {(table, name, "SELECT") for table in TABLES}
            assert functions == {(function, name, "EXECUTE") for function in FUNCTIONS}
            rights = "SELECT nspacl::text FROM pg_namespace WHERE nspname = 'ledger'"
            assert f"{name}=U/" in await owner.fetchval(rights)
            assert not re.search(r"[{,]=", await owner.fetchval(rights))

    asyncio.run(main())


def test_every_function_of_sidecars_asks_for_whom_it_acts_before_it_touches_anything(dsn: str) -> None:
    async def main() -> None:
        async with logged_in(dsn) as owner:
            rows = await owner.fetch(
                "SELECT p.proname::text AS name, p.prosecdef AS definer, p.proconfig AS settings, p.prosrc AS source"
                " FROM pg_proc p WHERE p.pronamespace = 'ledger'::regnamespace"
            )
        for row in rows:
            if row["definer"]:
                assert "search_path=pg_catalog, pg_temp" in (row["settings"] or []), row["name"]
            if row["name"] in FUNCTIONS - {"session_tenants_v1"}:
                assert row["definer"], row["name"]
                asks = re.search(r"PERFORM ledger\.require_(tenants|holder)_v1\(", row["source"])
                touches = re.search(r"INSERT INTO|UPDATE |DELETE |FROM ledger\.|JOIN ledger\.", row["source"])
                assert asks, row["name"]
                assert touches is None or asks.start() < touches.start(), row["name"]

    asyncio.run(main())


def test_no_table_of_tenants_is_without_its_curtain(dsn: str) -> None:
    async def main() -> None:
        async with logged_in(dsn) as owner:
            rows = await owner.fetch(ALL_TABLES)
        assert [row["name"] for row in rows if row["of_tenants"] and not row["part"] and not row["hidden"]] == []

    asyncio.run(main())


def test_what_a_later_migration_brings_is_closed_and_hidden_by_itself(database: str) -> None:
    async def main() -> None:
        async with tenant_role(database, "acme") as login, logged_in(database) as owner, logged_in(login) as role:
            await owner.execute(
                "CREATE TABLE ledger.later (tenant_id text); INSERT INTO ledger.later VALUES ('acme'), ('globex');"
                "CREATE FUNCTION ledger.later_v1() RETURNS integer LANGUAGE sql AS 'SELECT 1'"
            )
            await migrate(database)
            for statement in ("SELECT ledger.later_v1()", "SELECT * FROM ledger.later"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await role.fetch(statement)
            await owner.execute("INSERT INTO ledger.sidecar_right VALUES ('table', 'later'), ('function', 'later_v1')")
            await migrate(database)
            assert await role.fetchval("SELECT ledger.later_v1()") == 1
            assert [row["tenant_id"] for row in await role.fetch("SELECT * FROM ledger.later")] == ["acme"]

    asyncio.run(main())


def test_what_a_sidecar_reads_at_its_start_is_its_own_tenants(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        await check_schema(houses.acme)
        await identity.put_signing_key(
            houses.owner, kid="all", tenant_id=None, kind="own", algorithm="EdDSA", public_pem="all"
        )
        configuration = await load_configuration(houses.acme, None)
        assert {project.project_id for project in configuration.projects.values()} == {"acme/shop"}
        assert {key.kid for key in await identity.load_signing_keys(houses.acme)} == {"kid-acme", "all"}
        assert len(await reports.budgets_of(houses.acme, "acme", {"project": "acme/shop"})) == 2

    in_two_houses(dsn, work)


def test_a_role_for_all_tenants_acts_for_all_and_owns_nothing(dsn: str) -> None:
    async def main() -> None:
        async with two_houses(dsn) as houses, tenant_role(dsn) as login, logged_in(login) as gateway:
            holder = uuid4()
            await holders.register(gateway, holder, "gateway")
            for tenant in ("acme", "globex"):
                asked = of_tenant(tenant, holder)
                assert isinstance(await holds.admit(gateway, asked), Granted)
                await holds.settle(gateway, [settlement(asked.request_id, input=1, output=1, tenant=tenant)])
            assert await gateway.fetchval("SELECT count(DISTINCT tenant_id) FROM ledger.request") == 2
            await identity.put_signing_key(
                gateway, kid="all", tenant_id=None, kind="own", algorithm="EdDSA", public_pem="all"
            )
            for statement in ("DELETE FROM ledger.posting", "SELECT ledger.reap_v1(1)"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await gateway.execute(statement)
            assert houses.owner is not None

    asyncio.run(main())


@pytest.mark.parametrize("statement", ["TRUNCATE {}", "DELETE FROM {}", "UPDATE {} SET month = month"])
def test_even_the_owner_only_adds_to_the_books(database: str, statement: str) -> None:
    async def main() -> None:
        async with two_houses(database) as houses:
            tables = await houses.owner.fetch(
                "SELECT relid::text AS name FROM unnest('{ledger.posting,ledger.usage_line}'::regclass[]) AS p (parent)"
                " CROSS JOIN LATERAL pg_partition_tree(p.parent)"
            )
            assert len(tables) > 8
            for table in tables:
                count = await houses.owner.fetchval(f"SELECT count(*) FROM {table['name']}")
                if statement.startswith("TRUNCATE") or count:
                    with pytest.raises(asyncpg.RestrictViolationError, match="insert-only"):
                        await houses.owner.execute(statement.format(table["name"]))

    asyncio.run(main())


def test_a_partition_made_later_is_guarded_too(database: str) -> None:
    async def main() -> None:
        async with logged_in(database) as owner:
            await owner.execute("SELECT ledger.make_partitions_v1('2031-05-01', 1)")
            for table in ("posting_2031_05", "usage_line_2031_05"):
                with pytest.raises(asyncpg.RestrictViolationError, match="insert-only"):
                    await owner.execute(f"TRUNCATE ledger.{table}")

    asyncio.run(main())


def test_an_owner_who_is_no_superuser_can_do_all_of_it(postgres: Server) -> None:
    name = f"test_owner_{os.getpid()}"
    owned = dsn_of_role(postgres.of(name), name, "secret%20word")

    async def main() -> None:
        async with logged_in(postgres.dsn) as superuser:
            await superuser.execute(f"CREATE ROLE {name} LOGIN CREATEROLE PASSWORD 'secret word'")
            await superuser.execute(f"GRANT pg_signal_backend TO {name}")  # the helper ends sessions
            await superuser.execute(f"CREATE DATABASE {name} OWNER {name}")
            try:
                await migrate(owned)
                assert (await migrate(owned)).applied == []
                async with two_houses(owned) as houses:
                    assert await houses.acme.fetchval("SELECT count(DISTINCT tenant_id) FROM ledger.request") == 1
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        await houses.acme.execute("DELETE FROM ledger.posting")
                keeper = Keeper(owned)
                assert (await keeper.run_once()).working
                await keeper.aclose()
            finally:
                await superuser.execute(f"DROP DATABASE {name} WITH (FORCE)")
                await superuser.execute(f"DROP ROLE {name}")

    asyncio.run(main())
