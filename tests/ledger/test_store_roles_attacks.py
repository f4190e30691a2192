"""What a tenant with a stolen login of its sidecar tries, in plain SQL: nothing of it leads to another tenant."""

import time
from collections.abc import Awaitable
from typing import Any
from uuid import uuid4

import asyncpg
import msgspec
import pytest

from behest_ledger.api_key_hash import api_key_digest
from behest_ledger.holds import Gone
from behest_ledger.leases import Want
from behest_ledger.request_id import request_id
from behest_ledger.store import holders, holds, identity, leases, reports
from behest_ledger.store.errors import LedgerForbiddenError, LedgerRefusedError
from ledger.books import Books, granted, settlement
from ledger.houses import ALL_TABLES, FUNCTIONS, TABLES, Houses, in_two_houses, of_tenant
from ledger.sidecars import checkpoint


def test_of_every_table_a_tenant_sees_its_own_rows_or_nothing(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        for row in await houses.owner.fetch(ALL_TABLES):
            name = row["name"]
            if name not in TABLES:
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await houses.acme.fetch(f"SELECT * FROM ledger.{name}")
            elif row["of_tenants"]:
                own = f"SELECT count(*) FROM ledger.{name} WHERE tenant_id = 'acme' OR tenant_id IS NULL"
                seen = await houses.acme.fetchval(f"SELECT count(*) FROM ledger.{name}")
                assert seen == await houses.acme.fetchval(own) == await houses.owner.fetchval(own), name
                total = await houses.owner.fetchval(f"SELECT count(*) FROM ledger.{name}")
                assert 0 < seen < total or (name == "correction" and total == 0), name

    in_two_houses(dsn, work)


def test_no_table_can_be_written_and_nothing_can_be_altered(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        for row in await houses.owner.fetch(ALL_TABLES):
            if row["kind"] == "v":
                continue
            table = f"ledger.{row['name']}"
            column = await houses.owner.fetchval(
                "SELECT attname FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum = 1", table
            )
            for statement in (
                f"INSERT INTO {table} DEFAULT VALUES",
                f"UPDATE {table} SET {column} = {column}",
                f"DELETE FROM {table}",
                f"TRUNCATE {table}",
                f"SELECT 1 FROM {table} FOR UPDATE",
                f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
                f"ALTER TABLE {table} DISABLE TRIGGER ALL",
                f"DROP TABLE {table}",
                f"CREATE POLICY mine ON {table} USING (true)",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await houses.acme.execute(statement)
        for statement in (
            "CREATE TABLE ledger.mine ()",
            "CREATE FUNCTION ledger.mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
            "CREATE OR REPLACE FUNCTION ledger.require_tenants_v1(text[]) RETURNS void LANGUAGE sql AS 'SELECT'",
            "ALTER FUNCTION ledger.require_tenants_v1 SECURITY INVOKER",
            "DROP FUNCTION ledger.require_tenants_v1",
            "DROP SCHEMA ledger CASCADE",
            "SELECT nextval('ledger.window_id_seq')",
            "SET SESSION AUTHORIZATION postgres",
            "SET session_replication_role = replica",
            "CREATE ROLE mine",
            "SELECT * FROM pg_authid",
        ):
            with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.InvalidParameterValueError)):
                await houses.acme.execute(statement)
        assert await houses.acme.fetch("SET row_security = on") == []
        await houses.acme.execute("SET row_security = off")  # makes what is hidden an error, not visible
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            await houses.acme.fetch("SELECT * FROM ledger.project")

    in_two_houses(dsn, work)


def test_no_function_that_is_not_for_sidecars_can_be_called(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        rows = await houses.owner.fetch(
            "SELECT p.proname::text AS name, (SELECT coalesce(string_agg(format('NULL::%s', t.type::regtype), ', '"
            " ORDER BY t.place), '') FROM unnest(p.proargtypes) WITH ORDINALITY AS t (type, place)) AS arguments"
            " FROM pg_proc p WHERE p.pronamespace = 'ledger'::regnamespace AND p.prorettype <> 'trigger'::regtype"
        )
        for row in rows:
            if row["name"] not in FUNCTIONS:
                with pytest.raises(
                    asyncpg.InsufficientPrivilegeError, match=r"permission denied for (function|aggregate)"
                ):
                    await houses.acme.fetch(f"SELECT ledger.{row['name']}({row['arguments']})")

    in_two_houses(dsn, work)


def test_nobody_moves_another_tenants_money(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        theirs = houses.globex_request
        its_checkpoint = msgspec.structs.replace(checkpoint(theirs, output=1), tenant_id="globex")
        before = await houses.owner.fetch("SELECT * FROM ledger.budget_window ORDER BY window_id")
        for moved in (
            holds.admit(houses.acme, of_tenant("globex", houses.acme_holder)),
            holds.settle(houses.acme, [settlement(theirs, sent=False, tenant="globex")]),
            holds.settle(
                houses.acme,
                [
                    settlement(houses.acme_request, sent=False, tenant="acme"),
                    settlement(theirs, sent=False, tenant="globex"),
                ],
            ),
            holders.checkpoint(houses.acme, [its_checkpoint]),
            Books(houses.dsn, houses.acme).extend(theirs, 1, need=5, tenant="globex"),
            leases.lease(houses.acme, houses.acme_holder, [Want("globex", 1, 10)]),
            reports.budgets_of(houses.acme, "globex", {}),
        ):
            with pytest.raises(LedgerForbiddenError, match="may not act for tenant globex"):
                await moved
        lease = "SELECT * FROM ledger.lease_batch_v1($1, ARRAY[$2], ARRAY[$3::bigint], '{100}')"
        window = await houses.owner.fetchval(
            "SELECT min(window_id) FROM ledger.budget_window WHERE tenant_id = 'globex'"
        )
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="may not act for tenant globex"):
            await houses.acme.fetch(lease, houses.acme_holder, "globex", window)
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match=r"holder .* is another"):
            await houses.acme.fetch(lease, houses.globex_holder, "acme", window)
        assert await houses.acme.fetch(lease, houses.acme_holder, "acme", window) == []
        # Under their own name, what is another's is not there.
        assert await Books(houses.dsn, houses.acme).extend(theirs, 1, need=5, tenant="acme") == Gone()
        assert before == await houses.owner.fetch("SELECT * FROM ledger.budget_window ORDER BY window_id")

    in_two_houses(dsn, work)


def test_nobody_makes_an_item_without_a_tenant_pass(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        for statement in (
            "SELECT * FROM ledger.settle_batch_v1(jsonb_build_array(jsonb_build_object('request_id', $1::uuid)))",
            "SELECT * FROM ledger.admit_batch_v1(NULL, jsonb_build_array(jsonb_build_object('request_id', $1::uuid)))",
            "SELECT * FROM ledger.extend_batch_v1('{NULL}', ARRAY[$1::uuid], '{1}', '{1}', '{1}', 1)",
            "SELECT * FROM ledger.lease_batch_v1($1, '{NULL}', '{1}', '{1}')",
            "SELECT * FROM ledger.checkpoint_batch_v1('{NULL}', ARRAY[$1::uuid], '{1}', '{1}', '{1}', '{null}')",
            "SELECT * FROM ledger.budgets_of_v2(NULL, jsonb_build_object('request', $1::uuid))",
            "SELECT * FROM ledger.put_signing_key_v1($1::uuid::text, NULL, 'own', 'EdDSA', 'x', 'current')",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="may not act for all tenants"):
                await houses.acme.fetch(statement, houses.globex_request)

    in_two_houses(dsn, work)


def test_a_holder_belongs_to_the_tenant_whose_role_registered_it(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        theirs = houses.globex_holder
        before = await houses.owner.fetch("SELECT * FROM ledger.holder ORDER BY holder_id")
        for taken in (
            holders.register(houses.acme, theirs, "pod"),
            holders.renew(houses.acme, theirs),
            holders.unregister(houses.acme, theirs),
            leases.lease(houses.acme, theirs, [Want("acme", 1, 10)]),
        ):
            with pytest.raises(LedgerForbiddenError, match=r"holder .* is another"):
                await taken
        with pytest.raises(LedgerForbiddenError, match=r"holder .* is another"):
            await holds.admit(houses.acme, of_tenant("acme", theirs))
        assert before == await houses.owner.fetch("SELECT * FROM ledger.holder ORDER BY holder_id")
        assert await holders.renew(houses.globex, theirs)
        with pytest.raises(asyncpg.InvalidParameterValueError, match="at most an hour"):
            await houses.acme.fetch("SELECT ledger.renew_holder_v1($1, '100 years')", houses.acme_holder)

    in_two_houses(dsn, work)


def test_a_name_for_people_cannot_write_lines_of_its_own_into_logs(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        one = uuid4()
        await holders.register(houses.acme, one, "pod\nCRITICAL all is lost\x1b[2J" + "x" * 500)
        name = await houses.owner.fetchval("SELECT name FROM ledger.holder WHERE holder_id = $1", one)
        assert name.startswith("pod?CRITICAL all is lost?[2J")
        assert len(name) == 128

    in_two_houses(dsn, work)


def test_nobody_raises_a_limit_by_a_strange_settlement(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        one = settlement(houses.acme_request, input=1, output=1, tenant="acme")
        for strange in (
            {"requests": -5},
            {"input_tokens": -1_000_000},
            {"output_tokens": -1_000_000},
            {"amount_pico": -1},
        ):
            with pytest.raises(LedgerRefusedError, match="violates check"):
                await holds.settle(houses.acme, [msgspec.structs.replace(one, **strange)])
        item = msgspec.to_builtins(one)
        with pytest.raises(asyncpg.PostgresError):
            await houses.acme.fetch(
                "SELECT * FROM ledger.settle_batch_v1($1::text::jsonb)",
                msgspec.json.encode([{**item, "amount_pico": "NaN"}]).decode(),
            )
        # What cannot be summed up, and parts of a unit.
        line = item["lines"][0]
        for unsummable in (
            {"input_tokens": 9 * 10**18},
            {"output_tokens": 10**12 + 1},
            {"amount_pico": 0.5},
            {"amount_pico": 10**31},
            {"lines": [{**line, "rate_pico": 0.25, "quantity": 2, "amount_pico": 0.5}]},
            {"lines": [{**line, "quantity": 9 * 10**18, "rate_pico": 0, "amount_pico": 0}]},
        ):
            with pytest.raises(asyncpg.CheckViolationError):
                await houses.acme.fetch(
                    "SELECT * FROM ledger.settle_batch_v1($1::text::jsonb)",
                    msgspec.json.encode([{**item, **unsummable}]).decode(),
                )

    in_two_houses(dsn, work)


STRANGE_ADMISSIONS: list[dict[str, Any]] = [
    {"input_amount_pico": 0.5},
    {"input_amount_pico": -1},
    {"input_amount_pico": "NaN"},
    {"input_amount_pico": 10**31},
    {"output_rate_pico": 0.5},
    {"output_rate_pico": 10**16},
    {"input_tokens": -1},
    {"need_tokens": -1},
    {"want_tokens": 10**13},
    {"shares": 0},
    {"attributes": 5},
    {"attributes": {"project": "acme/shop", "user": "u" * 1025}},
]


def test_nothing_is_held_that_is_no_whole_amount(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        await houses.owner.execute(
            "UPDATE ledger.budget_window SET ceiling = NULL; UPDATE ledger.budget SET enforcement = 'soft'"
        )
        for strange in STRANGE_ADMISSIONS:
            asked = [msgspec.to_builtins(of_tenant("acme", houses.acme_holder)) | strange for _ in range(2)]
            with pytest.raises(asyncpg.CheckViolationError, match="domain"):
                await houses.acme.fetch(
                    "SELECT * FROM ledger.admit_batch_v1($1, $2::text::jsonb)",
                    houses.acme_holder,
                    msgspec.json.encode(asked).decode(),
                )
        extend = (
            "SELECT * FROM ledger.extend_batch_v1("
            "'{acme}', ARRAY[$1::uuid], '{1}', ARRAY[$2::bigint], ARRAY[$3::bigint], $4)"
        )
        for need, want, shares in ((-3, -3, 1), (0, -1, 1), (-1, 0, 1), (10**13, 0, 1), (1, 1, 0)):
            with pytest.raises(asyncpg.CheckViolationError, match="domain"):
                await houses.acme.fetch(extend, houses.acme_request, need, want, shares)

    in_two_houses(dsn, work)


@pytest.mark.parametrize(
    ("amount", "lines"),
    [
        ("0", [{"class": "input", "quantity": "x", "rate_pico": 1}]),
        ("0", [{"class": "input", "quantity": 1e30, "rate_pico": 0}]),
        ("0", [{"class": "input", "quantity": -1, "rate_pico": 0}]),
        ("0", [{"class": "input", "rate_pico": 0}]),
        ("0", [{"class": "tea", "quantity": 1, "rate_pico": 0}]),
        ("0", {"class": "input", "quantity": 1, "rate_pico": 0}),
        ("0.5", [{"class": "request", "quantity": 1, "rate_pico": 0.5}]),
        ("7", [{"class": "request", "quantity": 1, "rate_pico": 8}]),
        ("1" + 30 * "0" + "1", []),
    ],
)
def test_no_checkpoint_is_written_that_could_not_be_charged(dsn: str, amount: str, lines: Any) -> None:
    async def work(houses: Houses) -> None:
        with pytest.raises((asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)):
            await houses.acme.fetch(
                "SELECT * FROM ledger.checkpoint_batch_v1('{acme}', ARRAY[$1::uuid], '{0}', '{0}',"
                " ARRAY[$2::text::numeric], ARRAY[$3::text::jsonb])",
                houses.acme_request,
                amount,
                msgspec.json.encode(lines).decode(),
            )

    in_two_houses(dsn, work)


def test_a_request_id_of_months_to_come_is_refused(dsn: str) -> None:
    """Its month would have rows in the default partitions, and with them never partitions of its own."""

    async def work(houses: Houses) -> None:
        now_ms = int(time.time() * 1000)
        later = request_id(now_ms + 200 * 86_400_000, 1)
        asked = msgspec.structs.replace(of_tenant("acme", houses.acme_holder), request_id=later)
        with pytest.raises(LedgerRefusedError, match="has not begun"):
            await holds.admit(houses.acme, asked)
        with pytest.raises(LedgerRefusedError, match="has not begun"):
            await holds.settle(houses.acme, [settlement(later, input=1, output=1, tenant="acme")])
        # Of now, though a clock is an hour fast; and of long ago, as a journal may have it.
        for days in (1 / 24, -200):
            one = request_id(now_ms + round(days * 86_400_000), 2)
            granted(await holds.admit(houses.acme, msgspec.structs.replace(asked, request_id=one)))
            await holds.settle(houses.acme, [settlement(one, input=1, output=1, tenant="acme")])
        month = await houses.owner.fetchval("SELECT ledger.month_of_v1($1)", later)
        assert await houses.owner.fetchval("SELECT ledger.make_partitions_v1($1, 1)", month) > 5

    in_two_houses(dsn, work)


def test_keys_are_their_tenants_own(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        hashes = await houses.acme.fetch("SELECT tenant_id FROM ledger.api_key")
        assert [row["tenant_id"] for row in hashes] == ["acme"]
        theirs = await houses.owner.fetchval("SELECT sha256 FROM ledger.api_key WHERE tenant_id = 'globex'")
        assert await identity.find_api_key(houses.acme, theirs) is None
        assert await identity.find_api_key(houses.acme, api_key_digest("x")) is None

        def put(kid: str, tenant: str | None, state: str = "current") -> Awaitable[None]:
            return identity.put_signing_key(
                houses.acme, kid=kid, tenant_id=tenant, kind="own", algorithm="EdDSA", public_pem="mine", state=state
            )

        with pytest.raises(LedgerForbiddenError, match="may not act for all tenants"):
            await put("new", None)
        with pytest.raises(LedgerForbiddenError, match="may not act for tenant globex"):
            await put("kid-globex", "globex", "revoked")
        with pytest.raises(identity.KeyConflictError):
            await put("kid-globex", "acme")
        for number in range(99):
            await put(f"mine-{number}", "acme")
        with pytest.raises(LedgerRefusedError, match="100 signing keys"):
            await put("one-more", "acme")

    in_two_houses(dsn, work)


def test_an_id_of_another_tenant_is_another_request(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        """Keys begin with the tenant: who guesses an id gets a request of its own, and disturbs nobody."""
        asked = msgspec.structs.replace(of_tenant("acme", houses.acme_holder), request_id=houses.globex_request)
        granted(await holds.admit(houses.acme, asked))
        await holds.settle(houses.acme, [settlement(houses.globex_request, input=1, output=2, tenant="acme")])
        states = await houses.owner.fetch(
            "SELECT tenant_id, state FROM ledger.hold WHERE request_id = $1 ORDER BY 1", houses.globex_request
        )
        assert [tuple(row.values()) for row in states] == [("acme", "settled"), ("globex", "open")]

    in_two_houses(dsn, work)
