import asyncio
from typing import Any

import asyncpg
import pytest

from behest_ledger.store import holds
from behest_ledger.store.errors import LedgerConflictError, LedgerRefusedError
from ledger.books import Books, admission, granted, keep_books, new_id, refused, settlement


def test_what_was_used_is_spent_and_the_rest_is_free_again(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        await books.budget("tokens", 100, unit="tokens")
        await books.budget("calls", 5, unit="requests")
        first, _ = await books.admit(input=20, need=30)
        assert await books.settle(settlement(first, input=20, output=12)) == ["settled"]
        assert await books.balances("money") == (180, 0, 0, 0)
        assert await books.balances("tokens") == (32, 0, 0, 0)
        assert await books.balances("calls") == (1, 0, 0, 0)

    keep_books(dsn, work)


def test_the_request_and_its_lines_say_who_paid_for_what(dsn: str) -> None:
    async def work(books: Books) -> None:
        first, _ = await books.admit(input=20, need=30, team="red", byok=True)
        await books.settle(settlement(first, input=20, output=12, facts={"chunks": 4}))
        row = await books.connection.fetchrow("SELECT * FROM ledger.request")
        assert (row["project_id"], row["user_id"], row["session_id"], row["model"], row["namespace"]) == (
            "demo/shop", "ann", "s1", "small", "demo",
        )  # fmt: skip
        assert (row["outcome"], row["source"], row["amount_pico"], row["byok"]) == ("completed", "provider", 180, True)
        assert (row["price_key"], row["facts"]) == ("prices-1", '{"chunks": 4, "requests": 1}')
        assert '"team": "red"' in row["attributes"]
        lines = await books.connection.fetch("SELECT class, quantity, rate_pico, amount_pico FROM ledger.usage_line")
        assert sorted(map(tuple, lines)) == [("input", 20, 3, 60), ("output", 12, 10, 120)]

    keep_books(dsn, work)


def test_attributes_that_nobody_gave_are_empty(dsn: str) -> None:
    async def work(books: Books) -> None:
        first, _ = await books.admit(session=None, user=None)
        assert await books.settle(settlement(first)) == ["settled"]
        assert await books.connection.fetchval("SELECT user_id || session_id FROM ledger.request") == ""

    keep_books(dsn, work)


def test_settling_again_moves_nothing(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        first, _ = await books.admit(need=30)
        await books.settle(settlement(first, output=10))
        for again in (settlement(first, output=10), settlement(first, output=99), settlement(first, sent=False)):
            assert await books.settle(again) == ["already"]
        assert await books.balances("money") == (100, 0, 0, 0)
        assert await books.connection.fetchval("SELECT state FROM ledger.hold") == "settled"

    keep_books(dsn, work)


def test_of_two_settlements_for_one_request_in_one_batch_the_first_counts(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        first, _ = await books.admit(need=30)
        other, _ = await books.admit(need=30)
        unknown = new_id()
        batch = [
            settlement(first, output=3), settlement(unknown), settlement(other, sent=False),
            settlement(first, output=9), settlement(other, output=9), settlement(unknown),
        ]  # fmt: skip
        await books.settle(*batch)
        assert await books.balances("money") == (30, 0, 0, 0)
        assert set(await books.settle(*reversed(batch))) == {"already"}

    keep_books(dsn, work)


def test_a_settlement_of_an_unknown_request_leaves_only_a_tombstone(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        known, _ = await books.admit(need=30)
        assert await books.settle(settlement(new_id(), output=5), settlement(known, output=5)) == ["unknown", "settled"]
        assert await books.count("request") == 1
        assert await books.balances("money") == (50, 0, 0, 0)

    keep_books(dsn, work)


def test_requests_come_back_only_where_nothing_was_sent(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("calls", 2, unit="requests", refusal="rate", period="minute")
        sent, _ = await books.admit()
        unsent, _ = await books.admit()
        refused((await books.admit())[1])
        await books.settle(settlement(sent), settlement(unsent, sent=False))
        assert await books.balances("calls") == (1, 0, 0, 0)
        granted((await books.admit())[1])
        refused((await books.admit())[1])

    keep_books(dsn, work)


def test_a_charge_above_its_hold_takes_what_room_there_is_and_the_rest_is_overrun(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100)
        await books.budget("wide", 1000)
        first, _ = await books.admit(need=5)
        other, _ = await books.admit(need=3)
        assert await books.settle(settlement(first, output=9)) == ["settled!"]
        assert await books.balances("money") == (70, 30, 20, 1)
        assert await books.balances("wide") == (90, 30, 0, 1)
        assert await books.settle(settlement(other, output=3)) == ["settled"]
        assert await books.balances("money") == (100, 0, 20, 0)

    keep_books(dsn, work)


def test_charges_above_their_holds_share_the_room_of_a_batch_in_the_order_of_their_ids(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100)
        ids = sorted([new_id() for _ in range(4)])
        for one in ids:
            granted((await books.admit(id=one, need=2))[1])
        # 20 are left and the last gives 10 back: 30 of room for 20 + 20 + 20 beyond the holds.
        batch = [settlement(one, output=4) for one in ids[:3]] + [settlement(ids[3], output=1)]
        assert await books.settle(*reversed(batch)) == ["settled", "settled!", "settled!", "settled"]
        assert await books.balances("money") == (100, 0, 30, 0)
        rows = await books.connection.fetch(
            "SELECT source_id, amount::integer FROM ledger.posting WHERE credit = 'overrun' ORDER BY source_id"
        )
        assert list(map(tuple, rows)) == [(ids[1], 10), (ids[2], 20)]

    keep_books(dsn, work)


def test_money_in_suspense_is_settled_from_suspense(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100)
        lost, _ = await books.admit(need=6)
        async with books.connection.acquire() as connection, connection.transaction():
            await connection.execute(
                "INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)"
                " SELECT tenant_id, month, request_id, window_id, 1000001, 'held', 'suspense', held"
                " FROM ledger.hold_line"
            )
            await connection.execute("UPDATE ledger.hold SET state = 'suspense', suspense_at = now()")
            await connection.execute("UPDATE ledger.budget_window SET suspense = held, held = 0")
        assert await books.findings() == []
        assert refused((await books.admit(need=5))[1]).held == 60
        assert await books.settle(settlement(lost, output=4)) == ["settled"]
        assert await books.balances("money") == (40, 0, 0, 0)

    keep_books(dsn, work)


def test_an_item_that_cannot_be_right_moves_nothing_of_its_batch(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        good, _ = await books.admit(need=10)
        bad, _ = await books.admit(need=10)
        wrong = settlement(bad, output=5)
        wrong.lines.append(wrong.lines[0])
        with pytest.raises(LedgerRefusedError, match="usage_line"):
            await holds.settle(books.connection, [settlement(good, output=5), wrong])
        assert await books.balances("money") == (0, 200, 0, 2)

    keep_books(dsn, work)


@pytest.mark.parametrize("table", ["posting", "usage_line"])
@pytest.mark.parametrize("change", ["UPDATE ledger.{} SET amount{} = 1", "DELETE FROM ledger.{}"])
def test_postings_and_usage_lines_are_only_ever_inserted(dsn: str, table: str, change: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        first, _ = await books.admit(need=10)
        await books.settle(settlement(first, output=5))
        with pytest.raises(asyncpg.RestrictViolationError, match="insert-only"):
            await books.connection.execute(change.format(table, "_pico" if table == "usage_line" else ""))

    keep_books(dsn, work)


def test_room_that_somebody_is_taking_at_the_same_moment_is_no_room(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100)
        first, _ = await books.admit(need=5)
        async with books.connection.acquire() as other, other.transaction():
            granted(await holds.admit(other, admission(need=5)))
            settling = asyncio.create_task(books.settle(settlement(first, output=8)))
            await asyncio.sleep(0.1)
            assert not settling.done()
        assert await settling == ["settled!"]
        assert await books.balances("money") == (50, 50, 30, 1)

    keep_books(dsn, work, connections=2)


def test_a_void_and_its_admission_at_the_same_moment_wait_for_each_other_and_never_both_lose(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 10**9)
        busy = [(await books.admit(need=1))[0] for _ in range(60)]
        racing = [new_id() for _ in busy]
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        before = await books.connection.fetchval(deadlocks)

        async def end(one: Any, other: Any) -> None:
            # One batch ends a request that holds in the window and voids one that may be on its way in.
            while True:
                try:
                    await holds.settle(books.connection, [settlement(one), settlement(other, sent=False)])
                    return
                except LedgerConflictError:
                    await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for one, other in zip(busy, racing, strict=True):
                group.create_task(books.admit(id=other, need=1))
                group.create_task(end(one, other))
        assert await books.balances("money") == (0, 0, 0, 0)
        assert await books.connection.fetchval("SELECT count(*) FROM ledger.hold WHERE state = 'open'") == 0
        assert await books.connection.fetchval(deadlocks) == before

    keep_books(dsn, work, connections=8)
