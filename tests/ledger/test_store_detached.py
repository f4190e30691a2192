"""Months that were put away: as long as their tables are here, whatever is changed in them is named."""

import asyncio
from typing import Any
from uuid import UUID

import pytest

from behest_ledger.store import detached, findings, seals
from behest_ledger.store.detached import CARRIED, TABLES, MonthAway, asked_of, needed
from behest_ledger.store.findings import Finding, Progress
from behest_ledger.store.pool import connect
from behest_ledger.store.seals import ROWS, SOURCES
from behest_ledger.store.verify import CHECKS, OF_REQUESTS, Verdict, verify
from ledger.books import Books, keep_books, settlement
from ledger.sealing import seal_all
from ledger.sidecars import Sidecar, charge, reap
from ledger.test_store_retention import OLD, OLDER, id_of, put_away, settled, two_months
from ledger.test_store_verify import (
    AMOUNT,
    ATTRIBUTION,
    CHARGED,
    CHECKPOINT,
    CORRECTION,
    CREDIT,
    LINE,
    MOVEMENT,
    ORPHANS,
    PAIRS,
    POLICY,
    POSTED,
    RELEASED,
    SUSPENSE,
    TOKENS,
    UNSENT,
)

OVER, VOID, POLICED, LATE = (id_of(OLD, number) for number in (0, 2, 3, 4))
"""Of the old month: a request that was overrun and corrected, one that was not sent, one that was charged by policy,
and one whose settlement came after that."""

NEW = id_of(OLD, 5)

NEW_POSTING = (
    "INSERT INTO posting_D SELECT p.tenant_id, p.month, p.source_id, p.window_id, 9, p.debit, p.credit, p.amount,"
    " p.posted_at, p.tx FROM posting_D p WHERE source_id = $1 AND seq = 0 LIMIT 1"
)
NEW_LINE = (
    "INSERT INTO usage_line_D SELECT u.tenant_id, u.month, u.request_id, 0, 'reasoning', 1, 7, 7, 'local', u.tx"
    " FROM usage_line_D u WHERE request_id = $1 AND entry = 0 AND class = 'input'"
)
NEW_REQUEST = (
    f"INSERT INTO request_D SELECT r.tenant_id, r.month, '{NEW}', r.project_id, r.namespace, r.user_id,"
    " r.session_id, r.model, r.attributes, r.outcome, r.source, 0, 0, 0, r.price_key, r.byok, r.facts, r.admitted_at,"
    " r.ended_at, r.tx + 1000000 FROM request_D r WHERE request_id = $1"
)
NEW_LIST = (
    "INSERT INTO seal_source_D SELECT tenant_id, month, 99, sources, row_counts, digests FROM seal_source_D"
    " WHERE $1 = sources[1] LIMIT 1"
)
GONE = "dropped, or moved away"
NOT_LOOKED_AT = "what needs them was not looked at"
OF_THE_MONTH = "month = '2025-03-01' AND $1::uuid IS NOT NULL"
SPENT = "WHERE source_id = $1 AND credit = 'spent' AND seq = 1000000"

# Each row: the request that is $1, a statement, the checks that must notice.
CHANGES: list[tuple[UUID, str, set[str]]] = [
    (OVER, f"UPDATE posting_D SET amount = amount + 1 {SPENT}", {CARRIED, CHARGED, ROWS}),
    (OVER, f"DELETE FROM posting_D {SPENT}", {CARRIED, CHARGED, ROWS}),
    (OVER, NEW_POSTING, {CARRIED, POSTED, CREDIT, ROWS}),
    (OVER, f"UPDATE posting_D SET window_id = 4711 + window_id {SPENT}", {CARRIED, ORPHANS, ROWS}),
    (OVER, f"UPDATE posting_D SET seq = 7 {SPENT}", {MOVEMENT, ROWS}),
    (OVER, f"UPDATE posting_D SET tx = tx + 1000000 {SPENT}", {ROWS}),
    (OVER, f"UPDATE posting_D SET posted_at = posted_at + interval '1 us' {SPENT}", {ROWS}),
    (LATE, "DELETE FROM posting_D WHERE source_id = $1 AND debit = 'suspense'", {CARRIED, SUSPENSE, ROWS}),
    (OVER, "UPDATE hold_D SET state = 'open' WHERE request_id = $1", {PAIRS}),
    (VOID, "UPDATE hold_D SET state = 'settled' WHERE request_id = $1", {UNSENT}),
    (OVER, "UPDATE hold_D SET price_key = 'cheaper' WHERE request_id = $1", {ATTRIBUTION}),
    (POLICED, "UPDATE hold_D SET checkpoint_amount_pico = 1 WHERE request_id = $1", {CHECKPOINT}),
    (POLICED, "UPDATE hold_D SET state = 'settled' WHERE request_id = $1", {POLICY}),
    (POLICED, "UPDATE hold_D SET suspense_at = NULL WHERE request_id = $1", {SUSPENSE}),
    (OVER, "DELETE FROM hold_D WHERE request_id = $1", {PAIRS, ORPHANS}),
    (OVER, "UPDATE hold_line_D SET held = held + 1 WHERE request_id = $1", {POSTED, RELEASED}),
    (OVER, "DELETE FROM hold_line_D WHERE request_id = $1", {ORPHANS}),
    (OVER, "UPDATE request_D SET amount_pico = amount_pico + 1 WHERE request_id = $1", {AMOUNT, ROWS}),
    (VOID, "UPDATE request_D SET amount_pico = 1 WHERE request_id = $1", {AMOUNT, CHARGED, UNSENT, ROWS}),
    (OVER, "UPDATE request_D SET user_id = 'eve' WHERE request_id = $1", {ATTRIBUTION, ROWS}),
    (OVER, "UPDATE request_D SET facts = facts || '{\"chunks\": 7}' WHERE request_id = $1", {ROWS}),
    (OVER, "UPDATE request_D SET month = '2025-04-01' WHERE request_id = $1", {PAIRS, ORPHANS, ROWS}),
    (VOID, "DELETE FROM request_D WHERE request_id = $1", {PAIRS, ROWS}),
    (OVER, NEW_REQUEST, {PAIRS, ROWS}),
    (OVER, "UPDATE usage_line_D SET quantity = quantity + 1 WHERE request_id = $1 AND entry = 2", {TOKENS, LINE, ROWS}),
    (OVER, NEW_LINE, {AMOUNT, TOKENS, ROWS}),
    (LATE, "DELETE FROM usage_line_D WHERE request_id = $1 AND class = 'output'", {AMOUNT, TOKENS, ROWS}),
    (OVER, "UPDATE correction_D SET amount_pico = amount_pico + 1 WHERE request_id = $1", {AMOUNT, CHARGED, ROWS}),
    (OVER, "DELETE FROM correction_D WHERE request_id = $1", {CORRECTION, ROWS}),
    (OVER, "UPDATE seal_source_D SET digests[1] = sha256('x') WHERE $1 = ANY (sources)", {SOURCES, ROWS}),
    (OVER, "DELETE FROM seal_source_D WHERE $1 = ANY (sources)", {SOURCES, ROWS}),
    (OVER, NEW_LIST, {SOURCES}),
    (OVER, f"DELETE FROM seal WHERE kind = 'rows' AND {OF_THE_MONTH}", {SOURCES, ROWS}),
    (OVER, f"UPDATE opening_balance SET amount = amount + 1 WHERE account = 'spent' AND {OF_THE_MONTH}", {CARRIED}),
    (OVER, f"DELETE FROM opening_balance WHERE {OF_THE_MONTH}", {CARRIED}),
]


async def put_both_away(books: Books) -> None:
    """Two months in which everything happened that can, sealed in many pieces, and put away."""
    await two_months(books)
    await seal_all(books)
    sidecar = await Sidecar.start(books)
    for one in (POLICED, LATE):
        await sidecar.admitted(id=one, input=2, need=3)
        await sidecar.checkpoint(one, input=2, output=1)
        await seal_all(books)
    await sidecar.die()
    assert await reap(books) == 2
    assert await charge(books, "checkpoint") == {POLICED: 16, LATE: 16}
    await seal_all(books)
    assert await books.settle(settlement(LATE, input=2, output=3)) == ["corrected"]
    await seal_all(books)
    assert [await put_away(books, month) for month in (OLDER, OLD)] == ["detached", "detached"]


async def verified(books: Books, progress: Progress | None = None) -> Verdict:
    connection = await connect(books.dsn)
    try:
        return await verify(connection, look_at_detached=True, progress=progress)
    finally:
        await connection.close()


async def found_in(connection: Any) -> list[Finding]:
    """What is found in the months that were put away, inside a transaction that is undone."""
    found: list[Finding] = []
    for month in await detached.hold_still(connection, detached=True):
        found += await detached.check_month(connection, month, OF_REQUESTS, lambda _check, _done: None)
        found += await detached.check_seals(connection, month, lambda _check, _done: None)
    return found


def test_a_month_that_was_put_away_is_as_it_was_sealed_and_came_to_what_it_left(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seals, "SLICE_ROWS", 5)
    told: list[tuple[str, float]] = []

    def tell(check: str, done: float) -> None:
        told.append((check, done))

    async def work(books: Books) -> None:
        await put_both_away(books)
        verdict = await verified(books, tell)
        assert verdict.findings == []
        assert [str(month) for month in verdict.months_away] == [
            "month 2025-02 was put away, and its tables are here",
            "month 2025-03 was put away, and its tables are here",
        ]
        assert all(0 <= done < 1 for _, done in told)
        for month in ("2025-02", "2025-03"):
            looked_at = {check for check, _ in told if check.startswith(month)}
            assert looked_at == {f"{month}: {check}" for check in (*OF_REQUESTS, CARRIED, ROWS)}
        assert len([check for check, _ in told if check == f"2025-03: {ROWS}"]) > 1, "it goes in slices"

    keep_books(database, work)


def test_whatever_is_changed_in_a_month_that_was_put_away_is_named(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seals, "SLICE_ROWS", 5)

    async def work(books: Books) -> None:
        await put_both_away(books)
        noticed: set[str] = set()
        async with books.connection.acquire() as connection:
            for one, change, expected in CHANGES:
                undo = connection.transaction()
                await undo.start()
                await connection.execute("SET LOCAL session_replication_role = replica; SET LOCAL search_path = ledger")
                await connection.execute("ALTER TABLE usage_line_2025_03_detached DROP CONSTRAINT usage_line_check")
                done = await connection.execute(change.replace("_D", "_2025_03_detached"), one)
                assert done.split()[-1] != "0", change
                await connection.execute("SET LOCAL search_path = pg_catalog")
                found = await found_in(connection)
                await undo.rollback()
                assert {finding.check for finding in found} >= expected, (change, found)
                assert {finding.place for finding in found if "2025-0" not in finding.place} == set(), change
                places = [finding.place for finding in found if finding.check in expected]
                assert any(name in place for place in places for name in (str(one), str(NEW), "window ", "list "))
                noticed |= expected
        assert noticed == {*OF_REQUESTS, CARRIED, SOURCES, ROWS}
        # The books themselves do not look there.
        assert await books.findings() == []

    keep_books(database, work)


def test_a_finding_says_what_was_sealed_or_carried_on_and_what_is_there(database: str) -> None:
    async def work(books: Books) -> None:
        await put_both_away(books)
        window = (await books.window("money")).window_id
        async with books.connection.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute(
                "DELETE FROM ledger.posting_2025_02_detached WHERE source_id = $1 AND window_id = $2"
                " AND credit = 'spent'",
                id_of(OLDER, 1),
                window,
            )
        found = {(finding.check, finding.place): finding for finding in (await verified(books)).findings}
        carried = found[CARRIED, f"2025-02, window {window} of acme, account spent"]
        assert (carried.expected, carried.found) == ("36", "72")
        (sealed,) = [finding for (check, _), finding in found.items() if check == ROWS]
        assert sealed.place.startswith(f"source {id_of(OLDER, 1)} of acme in 2025-02, seal ")
        assert int(sealed.expected.split()[0]) == int(sealed.found.split()[0]) + 1
        assert (CHARGED, f"2025-02, request {id_of(OLDER, 1)}, window {window}") in found

    keep_books(database, work)


def test_tables_that_were_dropped_or_moved_away_are_told_and_what_is_left_is_looked_at(database: str) -> None:
    async def work(books: Books) -> None:
        await put_both_away(books)
        for table in ("posting", "seal_source"):
            await books.connection.execute(f"ALTER TABLE ledger.{table}_2025_03_detached SET SCHEMA public")
        await books.connection.execute("DROP TABLE " + ", ".join(f"ledger.{t}_2025_02_detached" for t in TABLES))
        verdict = await verified(books)
        assert verdict.findings == []
        gone, rest = map(str, verdict.months_away)
        assert (
            gone == f"month 2025-02 was put away, and its tables are not here ({GONE}): its balances are what is left"
        )
        assert rest == (
            f"month 2025-03 was put away, and some of its tables are not here ({GONE}): posting_2025_03_detached,"
            f" seal_source_2025_03_detached; {NOT_LOOKED_AT}"
        )
        async with books.connection.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute("DELETE FROM ledger.correction_2025_03_detached")
        assert {finding.check for finding in (await verified(books)).findings} == {AMOUNT, TOKENS}
        # They come back, as out of a dump, and everything is looked at again.
        for table in ("posting", "seal_source"):
            await books.connection.execute(f"ALTER TABLE public.{table}_2025_03_detached SET SCHEMA ledger")
        verdict = await verified(books)
        assert {finding.check for finding in verdict.findings} == {AMOUNT, TOKENS, CHARGED, CORRECTION, ROWS}
        assert str(verdict.months_away[1]) == "month 2025-03 was put away, and its tables are here"

    keep_books(database, work)


def test_a_table_that_is_dropped_while_it_is_waited_for_is_told_as_the_others(database: str) -> None:
    async def work(books: Books) -> None:
        await put_both_away(books)
        dropping = await connect(database)
        drop = dropping.transaction()
        await drop.start()
        await dropping.execute("DROP TABLE ledger.hold_2025_03_detached")
        verifying = asyncio.create_task(verified(books))
        async with asyncio.timeout(20):
            while not await books.connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                assert not verifying.done()
                await asyncio.sleep(0.01)
        await drop.commit()
        await dropping.close()
        verdict = await verifying
        assert verdict.findings == []
        assert str(verdict.months_away[1]).endswith(f"({GONE}): hold_2025_03_detached; {NOT_LOOKED_AT}")

    keep_books(database, work)


def test_a_check_that_finds_very_much_names_the_first_places(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "NAMED_MAX", 3)
    monkeypatch.setattr(seals, "NAMED_MAX", 3)
    monkeypatch.setattr(seals, "SLICE_ROWS", 1)

    async def work(books: Books) -> None:
        for number in range(5):
            await settled(books, id_of(OLD, number))
            await seal_all(books)
        async with books.connection.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute("UPDATE ledger.usage_line SET quantity = 9, amount_pico = 9 * rate_pico")
        found = await books.findings()
        for check in (ROWS, AMOUNT, TOKENS):
            places = [finding.place for finding in found if finding.check == check]
            assert len(places) == 4, check
            assert places[3] == "more places than these 3"

    keep_books(database, work, clean=False)


def test_what_a_query_needs_is_read_from_it() -> None:
    assert needed("SELECT FROM ledger.hold_line JOIN ledger.hold JOIN ledger.budget_window") == {"hold", "hold_line"}
    assert needed(CHECKS[AMOUNT]) == {"request", "correction", "usage_line"}
    assert all(needed(query) for query in OF_REQUESTS.values())
    asked = asked_of("SELECT ledger.f(h) FROM ledger.hold h, ledger.posting", MonthAway(OLD, frozenset({"hold"})))
    assert asked == (
        "WITH hold AS NOT MATERIALIZED (TABLE ledger.hold_2025_03_detached)"
        " SELECT * FROM (SELECT ledger.f(h) FROM hold h, posting) AS asked"
    )
