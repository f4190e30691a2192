"""A ledger of the first release, with money in every state, brought to this version."""

import asyncio
import json
import os
from typing import Any
from uuid import UUID, uuid4

from behest_ledger.store import holders
from behest_ledger.store.migrate import check_schema, migrate, migrations
from conftest import Server, execute
from ledger.books import HOLDER, INPUT_RATE, OUTPUT_RATE, TENANT, WHO, keep_books, new_id, settlement
from ledger.tenant_roles import logged_in

RELEASED = 7
"""Migrations of the first release."""

# What the schema is, in words: two databases that went different ways must tell the same.
_SCHEMA = """
SELECT c.relname || '.' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull::text
       || coalesce(' ' || pg_get_expr(d.adbin, d.adrelid), '') AS told
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE c.relnamespace = 'ledger'::regnamespace AND a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v')
UNION ALL
SELECT conrelid::regclass || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'ledger'::regnamespace AND conrelid <> 0
UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'ledger'
UNION ALL
SELECT tgrelid::regclass || ' ' || tgname || ' ' || tgtype || ' ' || tgenabled::text || ' ' || tgfoid::regproc
FROM pg_trigger WHERE tgrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'ledger'::regnamespace)
  AND NOT tgisinternal
UNION ALL
SELECT CASE prokind WHEN 'a' THEN oid::regprocedure::text ELSE pg_get_functiondef(oid) END || coalesce(proacl::text, '')
FROM pg_proc p WHERE pronamespace = 'ledger'::regnamespace
UNION ALL
SELECT polrelid::regclass || ' ' || polname || ' ' || polcmd::text || ' ' || pg_get_expr(polqual, polrelid)
FROM pg_policy
UNION ALL
SELECT relname || ' ' || relkind::text || ' ' || relrowsecurity::text || ' ' || coalesce(relacl::text, '')
       || coalesce(reloptions::text, '') || coalesce(pg_get_expr(relpartbound, oid), '')
FROM pg_class WHERE relnamespace = 'ledger'::regnamespace
ORDER BY 1
"""
_ADMIT = "SELECT ledger.admit_v1($1, $2, $3, $4::text::jsonb, 'p', $5, $6, $7, $8, $8, 1) ->> 'verdict'"


async def schema_of(dsn: str) -> list[str]:
    async with logged_in(dsn) as connection:
        return [row["told"] for row in await connection.fetch(_SCHEMA)]


async def first_release(dsn: str) -> None:
    """As the first release made it."""
    async with logged_in(dsn) as connection:
        await connection.execute(
            "CREATE SCHEMA ledger; CREATE TABLE ledger.schema_migration (name text PRIMARY KEY, sha256 text NOT NULL,"
            " applied_at timestamptz NOT NULL DEFAULT now())"
        )
        for migration in migrations()[:RELEASED]:
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO ledger.schema_migration (name, sha256) VALUES ($1, $2)", migration.name, migration.sha256
            )
        await connection.execute("SELECT ledger.make_partitions_v1((now() AT TIME ZONE 'UTC')::date, 3)")


async def use(connection: Any) -> dict[str, UUID]:
    """Requests in every state, made by the functions of the first release."""
    for name, limit, unit in (("money", 1_000_000, "usd"), ("tokens", 10_000, "tokens"), ("calls", 50, "requests")):
        budget = {
            "tenant_id": TENANT, "budget_id": f"demo/{name}", "namespace": "demo", "name": name, "scope": {}, "per": [],
            "unit": unit, "token_kind": "both", "limit_amount": limit, "period": "lifetime", "alignment": "calendar",
            "time_zone": "UTC", "enforcement": "hard", "alert_thresholds": [50], "suspended": False, "refusal": "quota",
        }  # fmt: skip
        await connection.execute("SELECT ledger.put_budget_v1($1::text::jsonb)", json.dumps(budget))
    living, dead = uuid4(), uuid4()
    for holder in (living, dead):
        await connection.execute("SELECT ledger.register_holder_v1($1, 'pod')", holder)
    made = {name: new_id() for name in ("open", "settled", "void", "suspense", "charged_by_policy")}
    for name, one in made.items():
        holder = dead if name in ("suspense", "charged_by_policy") else living
        verdict = await connection.fetchval(
            _ADMIT, TENANT, one, holder, json.dumps(WHO), 3, 3 * INPUT_RATE, OUTPUT_RATE, 20
        )
        assert verdict == "granted"
    item: dict[str, Any] = {
        "tenant_id": TENANT, "state": "settled", "outcome": "completed", "source": "provider", "requests": 1,
        "input_tokens": 3, "output_tokens": 25, "amount_pico": 3 * INPUT_RATE + 25 * OUTPUT_RATE, "facts": {},
        "lines": [
            {"class": name, "quantity": quantity, "rate_pico": rate, "amount_pico": quantity * rate, "source": "local"}
            for name, quantity, rate in (("input", 3, INPUT_RATE), ("output", 25, OUTPUT_RATE))
        ],
    }  # fmt: skip
    nothing = {"state": "void", "requests": 0, "input_tokens": 0, "output_tokens": 0, "amount_pico": 0, "lines": []}
    items = [{**item, "request_id": str(made["settled"])}, {**item, **nothing, "request_id": str(made["void"])}]
    await connection.execute("SELECT ledger.settle_batch_v1($1::text::jsonb)", json.dumps(items))
    await connection.execute(
        "UPDATE ledger.holder SET ttl = '1 ms', expires_at = now() - interval '1 s' WHERE holder_id = $1", dead
    )
    await connection.execute("SELECT ledger.reap_v1(100)")
    await connection.execute(
        "UPDATE ledger.hold SET suspense_at = suspense_at - interval '2 days' WHERE request_id = $1",
        made["charged_by_policy"],
    )
    await connection.execute("SELECT * FROM ledger.charge_by_policy_v1('1 day', 'hold')")
    return made


def test_a_used_ledger_of_the_first_release_is_brought_to_this_version(postgres: Server, template: Server) -> None:
    name = f"behest_upgrade_{os.getpid()}"
    dsn = postgres.of(name)

    async def before() -> dict[str, UUID]:
        await execute(postgres.dsn, f"CREATE DATABASE {name} TEMPLATE template0")
        await first_release(dsn)
        async with logged_in(dsn) as connection:
            made = await use(connection)
        assert (await migrate(dsn)).applied == [migration.name for migration in migrations()[RELEASED:]]
        assert await schema_of(dsn) == await schema_of(template.of("behest_template"))
        return made

    try:
        made = asyncio.run(before())

        async def after(books: Any) -> None:
            await check_schema(books.connection)
            states = {
                row[0]: row[1] for row in await books.connection.fetch("SELECT request_id, state FROM ledger.hold")
            }
            assert {name: states[one] for name, one in made.items()} == {name: name for name in made}
            assert await books.findings() == []
            ended = [settlement(made[name], input=3, output=7) for name in ("open", "suspense", "charged_by_policy")]
            assert await books.settle(*ended) == ["settled", "settled", "corrected"]
            await holders.register(books.connection, HOLDER, "pod")
            one, answer = await books.admit(input=1, need=2)
            assert await books.settle(settlement(one, input=1, output=2)) == ["settled"], answer

        keep_books(dsn, after)
    finally:
        asyncio.run(execute(postgres.dsn, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


_RELEASED_SHA256 = {
    "0001_configuration.sql": "487510540bb8a736",
    "0002_books.sql": "6a4273596c5c88c3",
    "0003_budgets.sql": "db8f94c35766f2e5",
    "0004_holds.sql": "8d3c7791f7fbe51c",
    "0005_settle.sql": "0b24689b2a7fa3a4",
    "0006_reports.sql": "4773479e78a7b4f8",
    "0007_holders.sql": "0ac0f441258d3f1b",
}


def test_what_was_released_is_never_edited() -> None:
    found = {migration.name: migration.sha256[:16] for migration in migrations()[:RELEASED]}
    assert found == _RELEASED_SHA256
