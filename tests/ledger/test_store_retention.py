"""Months that are put away: nothing of the balances is lost, nothing of the chain, and nobody has to wait for it."""

import asyncio
import datetime as dt
import time
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
import pytest

from behest_ledger.corrections import Correction, CorrectionsRefusedError
from behest_ledger.request_id import request_id
from behest_ledger.store import retention, seals
from behest_ledger.store.corrections import correct
from behest_ledger.store.keeper import Keeper
from behest_ledger.store.pool import connect
from behest_ledger.store.retention import PutAway, put_month_away, put_old_months_away
from behest_ledger.store.verify import CHECKS
from ledger.books import Books, granted, keep_books, settlement
from ledger.sealing import seal_all
from ledger.sidecars import Sidecar, reap

OLD = dt.date(2025, 3, 1)
OLDER = dt.date(2025, 2, 1)
BALANCES = next(iter(CHECKS))


def id_of(month: dt.date, number: int) -> UUID:
    """A request id of the tenth of a month."""
    moment = dt.datetime(month.year, month.month, 10, tzinfo=dt.UTC)
    return request_id(int(moment.timestamp() * 1000), number)


async def partitions(books: Books) -> None:
    for month in (OLDER, OLD):
        await books.connection.execute("SELECT ledger.make_partitions_v1($1, 1)", month)


async def settled(books: Books, one: UUID, *, output: int = 3, **what: Any) -> UUID:
    _, answer = await books.admit(id=one, input=2, need=3, **what)
    granted(answer)
    assert (await books.settle(settlement(one, input=2, output=output)))[0].startswith("settled")
    return one


async def put_away(books: Books, month: dt.date, *, drop: bool = False) -> str:
    connection = await connect(books.dsn)
    try:
        return (await put_month_away(connection, month, drop=drop)).told
    finally:
        await connection.close()


async def two_months(books: Books) -> None:
    """Requests of two old months and of now in the same windows, with an overrun, a correction, and what came back."""
    await partitions(books)
    await books.budget("money", 200)
    await books.budget("soft", 1, enforcement="soft")
    await books.budget("tokens", 100, unit="tokens", per=["user"])
    for number in range(2):
        await settled(books, id_of(OLDER, number))
    await settled(books, id_of(OLD, 1), output=0, user="bob")
    unsent, _ = await books.admit(id=id_of(OLD, 2), need=1)
    await books.settle(settlement(unsent, sent=False))
    over = await settled(books, id_of(OLD, 0), output=20)
    connection = await connect(books.dsn)
    wrong = Correction(place="", request_id=over, correction_id="i", reason="r", quantities={"output": 19})
    await correct(connection, [wrong])
    await connection.close()
    await books.budget("money", 500)
    live, _ = await books.admit(need=1)
    await books.settle(settlement(live, output=1))
    await books.admit(need=2)


def test_after_a_month_is_put_away_every_balance_is_still_a_sum(database: str) -> None:
    async def work(books: Books) -> None:
        await two_months(books)
        await seal_all(books)
        before = await books.windows()
        rows = await books.count("posting")
        assert await put_away(books, OLD) == "detached"
        assert await books.findings() == []
        assert await put_away(books, OLDER, drop=True) == "dropped"
        assert await books.windows() == before
        assert await books.findings() == []
        assert await books.count("posting") < rows
        assert await books.count("posting_2025_03_detached") > 0
        assert await books.connection.fetchval("SELECT to_regclass('ledger.posting_2025_02') IS NULL")
        # The accounts of a window come to nothing together: what left one is in another.
        sums = await books.connection.fetch(
            "SELECT sum(amount) FROM ledger.opening_balance GROUP BY tenant_id, window_id, month"
        )
        assert len(sums) >= 6
        assert {row[0] for row in sums} == {0}
        # Life goes on in the same windows.
        one, _ = await books.admit(need=2)
        await books.settle(settlement(one, output=2))
        await seal_all(books)
        assert await put_away(books, OLD) == "nothing there"

    keep_books(database, work)


def test_what_was_put_away_is_insert_only_and_still_under_its_seals(database: str) -> None:
    async def work(books: Books) -> None:
        await two_months(books)
        await seal_all(books)
        await put_away(books, OLD)
        for table in ("posting_2025_03_detached", "request_2025_03_detached", "opening_balance"):
            with pytest.raises(asyncpg.RestrictViolationError, match="insert-only"):
                await books.connection.execute(f"DELETE FROM ledger.{table}")
        changes = [
            (
                "UPDATE ledger.opening_balance SET amount = amount + 1 WHERE account = 'spent'",
                {BALANCES, seals.OPENING},
            ),
            ("DELETE FROM ledger.opening_balance WHERE account = 'funding'", {seals.OPENING}),
            ("DELETE FROM ledger.opening_balance", {BALANCES, seals.OPENING}),
            ("DELETE FROM ledger.seal WHERE kind = 'opening'", {seals.OPENING, seals.SOURCES}),
            ("UPDATE ledger.seal SET hash = sha256('x') WHERE kind = 'opening'", {seals.CHAIN}),
            ("UPDATE ledger.seal SET content = sha256('x') WHERE number = 1", {seals.CHAIN}),
        ]
        async with books.connection.acquire() as connection:
            for statement, expected in changes:
                undo = connection.transaction()
                await undo.start()
                await connection.execute("SET LOCAL session_replication_role = replica")
                assert (await connection.execute(statement)).split()[-1] != "0", statement
                found: set[str] = set()
                for check, query in (CHECKS | seals.CHECKS).items():
                    found |= {check for _ in await connection.fetch(query)}
                await undo.rollback()
                assert found >= expected, (statement, found)

    keep_books(database, work)


def test_a_month_stays_while_something_in_it_is_not_over(database: str) -> None:
    async def work(books: Books) -> None:
        await partitions(books)
        await books.budget("money", 1000)
        assert await put_away(books, dt.datetime.now(dt.UTC).date()) == "it has not ended"
        live, _ = await books.admit(id=id_of(OLD, 1), need=1)
        assert await put_away(books, OLD) == "it has requests that have not ended"
        await books.settle(settlement(live, output=1))
        assert await put_away(books, OLD) == "it has rows that are not sealed yet"
        await seal_all(books)
        sidecar = await Sidecar.start(books)
        dead = await sidecar.admitted(id=id_of(OLD, 2), need=1)
        await sidecar.die()
        assert await reap(books) == 1
        await seal_all(books)
        assert await put_away(books, OLD) == "it has requests that have not ended"
        await books.settle(settlement(dead, output=1))
        await seal_all(books)
        await books.connection.execute(
            "INSERT INTO ledger.lease (tenant_id, window_id, holder_id) SELECT tenant_id, window_id, source_id"
            " FROM ledger.posting WHERE source_id = $1 LIMIT 1",
            dead,
        )
        assert await put_away(books, OLD) == "it has movements of leases that live"
        await books.connection.execute("DELETE FROM ledger.lease")
        assert await put_away(books, OLD) == "detached"

    keep_books(database, work)


def test_a_month_with_rows_in_a_default_partition_stays(database: str) -> None:
    async def work(books: Books) -> None:
        await settled(books, id_of(OLD, 1))
        await seal_all(books)
        assert await put_away(books, OLD) == "nothing there"
        await settled(books, id_of(OLDER, 1))
        await books.connection.execute(
            "CREATE TABLE ledger.correction_2025_02 PARTITION OF ledger.correction FOR VALUES FROM ('2025-02-01') TO"
            " ('2025-03-01')"
        )
        await seal_all(books)
        assert await put_away(books, OLDER) == "it has rows in hold_default"

    keep_books(database, work)


def test_who_comes_late_for_a_month_that_was_put_away_moves_nothing(database: str) -> None:
    async def work(books: Books) -> None:
        await two_months(books)
        await seal_all(books)
        await put_away(books, OLD)
        before = await books.windows()
        one = id_of(OLD, 0)
        assert await books.settle(settlement(one, input=2, output=9)) == ["unknown"]
        connection = await connect(books.dsn)
        late = Correction(place="line 7", request_id=one, correction_id="j", reason="r", quantities={"output": 1})
        with pytest.raises(CorrectionsRefusedError, match=r"line 7: request_id: the month of request .* was put away"):
            await correct(connection, [msgspec.structs.replace(late, tenant_id="acme")])
        await connection.close()
        assert await books.windows() == before

    keep_books(database, work)


def test_nobody_waits_long_for_a_month_that_cannot_be_detached_now(database: str) -> None:
    async def work(books: Books) -> None:
        await two_months(books)
        await seal_all(books)
        busy = await connect(database)
        writing = busy.transaction()
        await writing.start()
        await busy.execute("LOCK TABLE ledger.posting IN ROW EXCLUSIVE MODE")
        waits: list[float] = []

        async def traffic() -> None:
            while not trying.done():
                begun = time.monotonic()
                one, _ = await books.admit(need=1)
                await books.settle(settlement(one, sent=False))
                waits.append(time.monotonic() - begun)

        trying = asyncio.create_task(put_away(books, OLD))
        await traffic()
        assert "its tables are busy" in await trying
        assert max(waits) < 3
        assert await books.count("opening_balance") == 0
        await writing.rollback()
        await busy.close()
        await seal_all(books)
        assert await put_away(books, OLD) == "detached"

    keep_books(database, work, connections=3)


def test_the_keeper_puts_away_what_is_older_than_the_retention(database: str, caplog: pytest.LogCaptureFixture) -> None:
    async def work(books: Books) -> None:
        caplog.set_level("INFO", retention.logger.name)
        await two_months(books)
        await seal_all(books)
        connection = await connect(database)
        assert await put_old_months_away(connection, kept_months=0, drop=True) == []
        assert await put_old_months_away(connection, kept_months=1200, drop=True) == []
        await connection.close()
        for_ever, thirteen = Keeper(database, retention_months=0), Keeper(database, drop_months=True)
        assert (await for_ever.run_once()).months_put_away == 0
        await for_ever.aclose()
        assert (await thirteen.run_once()).months_put_away == 2
        assert (await thirteen.run_once()).months_put_away == 0
        await thirteen.aclose()
        assert [record.getMessage() for record in caplog.records if record.name == retention.logger.name] == [
            "month 2025-02 was put away: its tables are dropped",
            "month 2025-03 was put away: its tables are dropped",
        ]

    keep_books(database, work)


def test_what_stays_is_told(database: str) -> None:
    async def work(books: Books) -> None:
        await two_months(books)
        connection = await connect(database)
        told = await put_old_months_away(connection, kept_months=13, drop=False)
        await connection.close()
        why = "it has rows that are not sealed yet"
        assert told == [PutAway(OLDER, done=False, told=why), PutAway(OLD, done=False, told=why)]

    keep_books(database, work)
