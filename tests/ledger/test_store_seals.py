"""Seals: every corruption under a seal is named, a late commit is not lost, and a noted seal is found again."""

import asyncio
import random
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.store import keeper, seals
from behest_ledger.store.findings import Finding
from behest_ledger.store.keeper import Keeper
from behest_ledger.store.migrate import migrate
from behest_ledger.store.pool import connect
from behest_ledger.store.seals import (
    CHAIN,
    MARK,
    NUMBERS,
    OPENING,
    ROWS,
    SOURCES,
    Seal,
    Sealer,
    check_noted,
    check_rows,
    held_up,
    newest,
    parse_noted,
    slices,
)  # fmt: skip
from behest_ledger.store.verify import verify
from ledger.books import Books, granted, keep_books, settlement
from ledger.sealing import seal_all


def month_of(one: UUID) -> str:
    """The month in a request's id (RFC 9562, version 7: the milliseconds are its first 48 bits)."""
    return datetime.fromtimestamp((one.int >> 80) / 1000, UTC).strftime("%Y-%m")


async def settled(books: Books, **what: Any) -> UUID:
    one, answer = await books.admit(input=2, need=3, **what)
    granted(answer)
    assert await books.settle(settlement(one, input=2, output=3, tenant=what.get("tenant", "acme"))) == ["settled"]
    return one


async def sealed_rows(books: Books) -> int:
    found: int = await books.connection.fetchval("SELECT coalesce(sum(row_count), 0)::bigint FROM ledger.seal")
    return found


async def rows(books: Books) -> int:
    return sum([await books.count(table) for table in ("posting", "usage_line", "request", "correction")])


async def findings(connection: Any) -> list[Finding]:
    """What the seals' own checks find, inside a transaction that is undone."""
    found = [
        Finding(check, place, str(expected), str(found))
        for check, query in seals.CHECKS.items()
        for place, expected, found in await connection.fetch(query)
    ]
    return found + await check_rows(connection, lambda _check, _done: None)


def test_everything_that_was_written_is_sealed_once_by_tenant(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        await books.budget("money", 1000, tenant="other")
        await settled(books)
        await seal_all(books)
        await settled(books)
        await settled(books, tenant="other")
        await seal_all(books)
        assert await sealed_rows(books) == await rows(books)
        assert [(seal.tenant_id, seal.number) for seal in await newest(books.connection)] == [("acme", 2), ("other", 1)]
        # Nothing new is no seal.
        await seal_all(books)
        assert len(await newest(books.connection)) == 2
        assert await books.count("seal") == 3

    keep_books(dsn, work)


def test_a_transaction_that_commits_after_later_ones_were_sealed_is_sealed_after_them(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        await seal_all(books)
        late = await connect(dsn)
        long = late.transaction()
        await long.start()
        one = UUID(int=random.getrandbits(128))
        window = (await books.window("money")) if await books.windows() else None
        assert window is None
        await late.execute(
            "INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)"
            " SELECT 'acme', date_trunc('month', now() AT TIME ZONE 'UTC'), $1, 4711, 0, 'funding', 'available', 1",
            one,
        )
        before = await sealed_rows(books)
        second = await settled(books)
        await Sealer().seal(books.connection, calls_max=100)
        # What came later waits for it too: else it would slip behind a seal.
        assert await sealed_rows(books) == before
        assert [f for f in await books.findings() if f.check == seals.ROWS] == []
        await long.commit()
        await late.close()
        await seal_all(books)
        assert await sealed_rows(books) == await rows(books)
        found = await books.connection.fetchval(
            "SELECT array_agg(DISTINCT s) FROM ledger.seal_source, unnest(sources) s"
        )
        assert {one, second} <= set(found)
        assert [f for f in await books.findings() if f.check in {*seals.CHECKS, seals.ROWS}] == []

    keep_books(dsn, work, clean=False)


def test_transactions_that_overlap_at_random_are_all_sealed_and_none_twice(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 10**6)
        choose = random.Random(7)
        sealers = [Sealer(), Sealer()]

        async def client() -> None:
            for _ in range(8):
                async with books.connection.acquire() as connection, connection.transaction():
                    await connection.execute("SELECT txid_current()")
                    await asyncio.sleep(choose.random() / 50)
                    await connection.execute(
                        "INSERT INTO ledger.usage_line"
                        " SELECT 'acme', '2026-11-01', gen_random_uuid(), 0, 'input', 0, 1, 0, 'local'"
                    )

        async def sealing(sealer: Sealer) -> None:
            for _ in range(12):
                await sealer.seal(books.connection, calls_max=3)
                await asyncio.sleep(choose.random() / 50)

        await asyncio.gather(*(client() for _ in range(4)), *(sealing(sealer) for sealer in sealers))
        await seal_all(books)
        assert await sealed_rows(books) == await rows(books) == 32
        assert [f for f in await books.findings() if f.check in {*seals.CHECKS, seals.ROWS}] == []

    keep_books(dsn, work, connections=6, clean=False)


# Each row: a statement, the checks that must notice, a part of a place that is named. $1 is a settled request, under
# seal 2 of acme; seal 3 has others.
ONE = "source {one} of acme in {month}, seal 2"
POSTING = "UPDATE ledger.posting SET {change} WHERE source_id = $1 AND seq = 0"
LINE = "UPDATE ledger.usage_line SET {change} WHERE request_id = $1"
NEW_LINE = (
    "INSERT INTO ledger.usage_line SELECT {tenant}, u.month, {source}, {entry}, u.class, 0, 1, 0, 'local', u.tx"
    " FROM ledger.usage_line u WHERE u.request_id = $1 AND class = 'input'"
)
NEW_POSTING = (
    "INSERT INTO ledger.posting SELECT p.tenant_id, p.month, p.source_id, p.window_id, 9, p.debit, p.credit, p.amount,"
    " now(), p.tx + 1000000 FROM ledger.posting p WHERE source_id = $1 AND seq = 0"
)
NEW_CORRECTION = (
    "INSERT INTO ledger.correction SELECT r.tenant_id, r.month, r.request_id, 1, 'x', 'y', r.outcome, r.source, 0, 0,"
    " 0, '{}', now(), r.tx FROM ledger.request r WHERE request_id = $1"
)


def seal(number: int, change: str) -> str:
    return f"UPDATE ledger.seal SET {change} WHERE number = {number} AND $1::uuid IS NOT NULL"


CHANGES: list[tuple[str, set[str], str]] = [
    (POSTING.format(change="amount = amount + 1"), {ROWS}, ONE),
    (POSTING.format(change="posted_at = posted_at - interval '1 us'"), {ROWS}, ONE),
    (POSTING.format(change="tx = tx + 1"), {ROWS}, "source {one} of acme"),
    ("DELETE FROM ledger.posting WHERE source_id = $1 AND seq = 0", {ROWS}, ONE),
    ("DELETE FROM ledger.usage_line WHERE request_id = $1 AND class = 'input'", {ROWS}, ONE),
    (LINE.format(change="source = 'local'"), {ROWS}, ONE),
    (LINE.format(change="month = month - interval '1 month'"), {ROWS}, ONE),
    ("UPDATE ledger.request SET user_id = 'eve' WHERE request_id = $1", {ROWS}, ONE),
    ("UPDATE ledger.request SET facts = facts || '{\"chunks\": 1}' WHERE request_id = $1", {ROWS}, ONE),
    ("UPDATE ledger.request SET tenant_id = 'other' WHERE request_id = $1", {ROWS}, ONE),
    ("DELETE FROM ledger.request WHERE request_id = $1", {ROWS}, ONE),
    (NEW_LINE.format(tenant="u.tenant_id", source="u.request_id", entry=7), {ROWS}, ONE),
    (NEW_LINE.format(tenant="u.tenant_id", source="gen_random_uuid()", entry=0), {ROWS}, "in {month}, seal 2"),
    (NEW_LINE.format(tenant="'third'", source="$1::uuid", entry=0), {ROWS}, "{one} of third in {month}, under no"),
    (NEW_POSTING, {MARK}, "posting of source {one} of acme"),
    (NEW_CORRECTION, {ROWS}, ONE),
    (seal(2, "row_count = row_count + 1"), {CHAIN, SOURCES}, "seal 2 of acme in {month}"),
    (seal(2, "sealed_at = now()"), {CHAIN}, "seal 2 of acme"),
    (seal(2, "content = sha256('x')"), {CHAIN, SOURCES}, "seal 2 of acme"),
    (seal(2, "hash = sha256('x')"), {CHAIN}, "seal 3 of acme"),
    (seal(3, "previous = sha256('x')"), {CHAIN}, "seal 3 of acme"),
    (seal(2, "tx_until = tx_until + 1"), {CHAIN}, "seal 2 of acme"),
    (seal(2, "tx_from = tx_from - 1"), {CHAIN, NUMBERS}, "seal 2 of acme"),
    (seal(3, "number = 9"), {CHAIN, NUMBERS}, "seal 9 of acme"),
    ("DELETE FROM ledger.seal WHERE number = 2 AND $1::uuid IS NOT NULL", {CHAIN, NUMBERS, ROWS}, "seal 3 of acme"),
    ("DELETE FROM ledger.seal WHERE number = 3 AND $1::uuid IS NOT NULL", {ROWS}, "under no seal"),
    ("DELETE FROM ledger.seal_source WHERE number = 2 AND $1::uuid IS NOT NULL", {SOURCES, ROWS}, "seal 2 of acme"),
    (seal(2, "digests[1] = sha256('x')").replace("seal SET", "seal_source SET"), {SOURCES, ROWS}, "seal 2 of acme"),
    ("UPDATE ledger.seal_progress SET sealed_until = sealed_until - 1 WHERE $1::uuid IS NOT NULL", {MARK}, "progress"),
    (
        "INSERT INTO ledger.opening_balance SELECT 'acme', '2026-01-01', 1, 'spent', 5 WHERE $1::uuid IS NOT NULL",
        {OPENING},
        "2026-01 of acme",
    ),
]


def test_whatever_is_changed_under_a_seal_is_named(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        await settled(books)
        await seal_all(books)
        one = await settled(books)
        await seal_all(books)
        await settled(books)
        await seal_all(books)
        noticed: set[str] = set()
        async with books.connection.acquire() as connection:
            assert await findings(connection) == []
            for statement, expected, place in CHANGES:
                undo = connection.transaction()
                await undo.start()
                await connection.execute("SET LOCAL session_replication_role = replica")
                done = await connection.execute(statement, one)
                assert done.split()[-1] != "0", statement
                found = await findings(connection)
                await undo.rollback()
                assert {finding.check for finding in found} >= expected, (statement, found)
                named = [finding.place for finding in found]
                assert any(place.format(one=one, month=month_of(one)) in name for name in named), (statement, found)
                noticed |= expected
        assert noticed == {*seals.CHECKS, seals.ROWS}

    keep_books(dsn, work)


def test_a_finding_tells_how_many_rows_were_sealed_and_how_many_are_found(dsn: str) -> None:
    async def work(books: Books) -> None:
        one = await settled(books)
        await seal_all(books)
        async with books.connection.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute("DELETE FROM ledger.usage_line WHERE class = 'input'")
        (found,) = [finding for finding in await books.findings() if finding.check == seals.ROWS]
        assert found.place == f"source {one} of acme in {month_of(one)}, seal 1"
        assert found.expected.startswith("3 rows, ")
        assert found.found.startswith("2 rows, ")

    keep_books(dsn, work, clean=False)


@pytest.mark.parametrize("table", ["seal", "seal_source", "request", "correction", "opening_balance"])
def test_what_is_sealed_and_the_seals_are_insert_only(dsn: str, table: str) -> None:
    async def work(books: Books) -> None:
        await settled(books)
        await seal_all(books)
        if not await books.count(table):
            await books.connection.execute(
                "INSERT INTO ledger.opening_balance VALUES ('t', '2020-01-01', 1, 'spent', 1)"
                if table == "opening_balance"
                else "INSERT INTO ledger.correction"
                " VALUES ('t', '2020-01-01', gen_random_uuid(), 1, 'i', 'r', 'completed', 'provider', 0, 0, 0, '{}')"
            )
        for statement in (f"DELETE FROM ledger.{table}", f"UPDATE ledger.{table} SET tenant_id = 'x'"):
            with pytest.raises(asyncpg.RestrictViolationError, match="insert-only"):
                await books.connection.execute(statement)

    keep_books(dsn, work, clean=False)


def test_a_noted_seal_is_found_again_and_another_past_is_not(dsn: str) -> None:
    async def work(books: Books) -> None:
        await settled(books)
        await seal_all(books)
        noted = await newest(books.connection)
        text = "4 windows: clean\n" + "".join(f"{seal}\n" for seal in noted)
        assert parse_noted(text) == noted
        await settled(books)
        await seal_all(books)
        assert await check_noted(books.connection, noted) == []
        other = Seal("acme", 1, "0" * 64)
        missing = Seal("acme", 3, "0" * 64)
        found = await check_noted(books.connection, [other, *noted, missing])
        assert found == [
            Finding(seals.NOTED, "seal 1 of acme", "0" * 64, noted[0].hash),
            Finding(seals.NOTED, "seal 3 of acme", "0" * 64, "no seal"),
        ]
        connection = await connect(dsn)
        told: list[tuple[str, float]] = []
        verdict = await verify(connection, noted=[other], progress=lambda check, done: told.append((check, done)))
        await connection.close()
        assert verdict.findings == found[:1]
        assert verdict.seals == await newest(books.connection)
        assert all(0 <= done < 1 for _, done in told)
        assert told[-1][0] == seals.ROWS

    keep_books(dsn, work)


def test_the_keeper_seals_at_intervals(dsn: str) -> None:
    async def work(books: Books) -> None:
        await settled(books)
        often, seldom = Keeper(dsn, seal_interval_s=0), Keeper(dsn)
        for _ in range(200):
            await often.run_once()
            if await sealed_rows(books) == await rows(books):
                break
            await asyncio.sleep(0.05)
        await settled(books)
        report = await often.run_once()
        for _ in range(200):
            if report.seals:
                break
            await asyncio.sleep(0.05)
            report = await often.run_once()
        assert report.sealed_rows > 0
        await often.aclose()
        await seldom.run_once()
        await settled(books)
        assert (await seldom.run_once()).seals == 0
        await seldom.aclose()

    keep_books(dsn, work)


def test_a_transaction_that_stays_open_holds_seals_up_and_is_told_of_once_in_a_while(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(books: Books) -> None:
        patient, keeper = Keeper(dsn, seal_interval_s=0), Keeper(dsn, seal_interval_s=0, seal_stall_s=0.001)
        forgetful = await connect(dsn, application_name="forgetful")
        try:
            async with forgetful.transaction():
                number = await forgetful.fetchval("SELECT txid_current()")
                await settled(books)
                await patient.run_once()
                await patient.aclose()
                assert caplog.messages == []
                report = await keeper.run_once()
                assert (report.seals, await sealed_rows(books)) == (0, 0)
            (told,) = caplog.messages
            assert f"transaction {number} of process {forgetful.get_server_pid()} (forgetful) in database" in told
            assert ", idle in transaction, " in told
        finally:
            await forgetful.close()
            await keeper.aclose()

    keep_books(dsn, work)


def test_who_holds_seals_up_is_shown_only_to_who_may_see_it(dsn: str) -> None:
    async def work(books: Books) -> None:
        forgetful, stranger = await connect(dsn), await connect(dsn)
        try:
            async with forgetful.transaction(), stranger.transaction():
                await forgetful.execute("SELECT txid_current()")
                await settled(books)
                await stranger.execute("SET LOCAL ROLE pg_monitor")
                seen = await held_up(stranger)
                await stranger.execute("SET LOCAL ROLE pg_database_owner")
                unseen = await held_up(stranger)
                assert seen is not None
                assert unseen is not None
                assert seen.age_s is not None
                assert f"process {forgetful.get_server_pid()}" in seen.whose
                assert (unseen.transaction, unseen.age_s) == (seen.transaction, None)
                assert unseen.whose == "a session that this role may not see"
            # Another test's transaction may run on this server; this one does not any more.
            left = await held_up(books.connection)
            assert left is None or left.transaction > seen.transaction
        finally:
            await forgetful.close()
            await stranger.close()

    keep_books(dsn, work)


def test_sealing_goes_in_pieces_of_bounded_size(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "ROWS_TARGET", 10)
    monkeypatch.setattr(seals, "SPAN_FIRST", 8)  # others on this server have transactions, too
    monkeypatch.setattr(keeper, "BATCHES_MAX", 2)

    async def work(books: Books) -> None:
        await seal_all(books)
        for _ in range(20):
            await settled(books)
        sealer = Sealer()
        first = await sealer.seal(books.connection, calls_max=1)
        assert 0 < first.rows < 20
        assert first.more
        await seal_all(books)
        assert await books.count("seal") > 5
        assert await sealed_rows(books) == await rows(books)

    keep_books(dsn, work)


def test_after_a_restore_from_a_dump_transactions_count_on(database: str) -> None:
    async def work(books: Books) -> None:
        await settled(books)
        await seal_all(books)
        # As if another cluster had written these books, with many more transactions.
        async with books.connection.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            for table in ("posting", "usage_line", "request"):
                await connection.execute(f"UPDATE ledger.{table} SET tx = tx + 1000000")
            await connection.execute("DELETE FROM ledger.seal")
            await connection.execute("DELETE FROM ledger.seal_source")
            await connection.execute("UPDATE ledger.seal_progress SET sealed_until = 0, tx_added = 1000000")
            await connection.execute("SELECT ledger.write_tx_default_v1(1000000)")
        await seal_all(books)
        assert await books.findings() == []
        await books.connection.execute("SELECT ledger.write_tx_default_v1(0)")
        await migrate(database)
        added = await books.connection.fetchval("SELECT tx_added FROM ledger.seal_progress")
        assert added > 900_000
        await settled(books)
        await migrate(database)
        assert await books.connection.fetchval("SELECT tx_added FROM ledger.seal_progress") == added
        await seal_all(books)
        assert await sealed_rows(books) == await rows(books)

    keep_books(database, work)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 400_000)), max_size=12), st.booleans())
def test_slices_cover_every_transaction_once_in_order(steps: list[tuple[int, int]], from_zero: bool) -> None:
    edges = [(0, 5)] if from_zero else []
    at = 0
    for step, count in steps:
        at += step
        edges.append((at, count))
    if edges:
        edges[-1] = (edges[-1][0], 0)  # nothing is sealed beyond the last edge
    made = slices(edges)
    for (left, _), (right, _) in pairwise(made):
        assert left[-1] == right[0]
    for bounds, _ in made:
        assert bounds == sorted(set(bounds))
        assert len(bounds) >= 2
    assert sum(count for _, count in made) == sum(count for _, count in edges)
    assert {bound for bounds, _ in made for bound in bounds} == ({0, *(edge for edge, _ in edges)} if at else set())
