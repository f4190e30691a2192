"""How many requests at once: a budget whose window never ends, and from which nothing is ever spent."""

import asyncio
from typing import Any

from behest_ledger.holds import Granted, Refused
from behest_ledger.store.keeper import Keeper
from behest_ledger.store.verify import CHECKS
from ledger.books import Books, granted, keep_books, refused, settlement
from ledger.sidecars import Sidecar, charge, reap, state


async def at_once(books: Books, limit: int, **more: Any) -> None:
    """What a Tier's `concurrency` is in the books."""
    await books.budget("at-once", limit, unit="concurrency", per=["project", "user"], refusal="rate", **more)


def test_no_more_run_than_the_limit_and_who_ends_makes_place(dsn: str) -> None:
    async def work(books: Books) -> None:
        await at_once(books, 2)
        first, _ = await books.admit(need=10, want=10**6)
        second, answer = await books.admit(need=10)
        granted(answer)
        no = refused((await books.admit(need=1))[1])
        assert (no.reason, no.unit, no.limit, no.spent, no.held, no.remaining) == ("rate", "concurrency", 2, 0, 2, 0)
        assert (no.resets_at, no.retry_after_s) == (None, None)
        # Another user, and another project of the same user, have places of their own.
        granted((await books.admit(user="bob"))[1])
        granted((await books.admit(project="demo/other"))[1])
        # Output takes no place.
        assert granted(await books.extend(first, 1, need=10**9)).output_tokens == 10**9
        await books.settle(settlement(first, output=10))
        granted((await books.admit(need=1))[1])
        refused((await books.admit(need=1))[1])
        # A request that was never sent, too, gives its place back.
        await books.settle(settlement(second, sent=False))
        granted((await books.admit(need=1))[1])
        (window,) = [window for window in await books.windows() if window.subject == ["demo/shop", "ann"]]
        assert (window.spent, window.held, window.live, window.overrun) == (0, 2, 2, 0)

    keep_books(dsn, work)


def test_many_that_come_together_are_as_many_as_the_limit(dsn: str) -> None:
    async def work(books: Books) -> None:
        await at_once(books, 7)
        for _ in range(3):
            asked = await asyncio.gather(*(books.admit() for _ in range(60)))
            running = [one for one, answer in asked if isinstance(answer, Granted)]
            assert len(running) == 7
            assert sum(isinstance(answer, Refused) for _, answer in asked) == 53
            await books.settle(*[settlement(one, output=1) for one in running])
        assert await books.balances("at-once") == (0, 0, 0, 0)

    keep_books(dsn, work, connections=8)


def test_a_lower_limit_ends_nobody_and_lets_nobody_in_until_enough_have_ended(dsn: str) -> None:
    async def work(books: Books) -> None:
        await at_once(books, 4)
        running = [(await books.admit())[0] for _ in range(4)]
        await at_once(books, 2)
        granted(await books.extend(running[0], 1, need=5))
        for one in running[:2]:
            refused((await books.admit())[1])
            await books.settle(settlement(one))
        refused((await books.admit())[1])
        await books.settle(settlement(running[2]))
        granted((await books.admit())[1])

    keep_books(dsn, work)


def test_money_comes_before_concurrency_and_nothing_is_held_where_one_refuses(dsn: str) -> None:
    async def work(books: Books) -> None:
        await at_once(books, 1)
        await books.budget("money", 100)
        await books.admit(need=1)
        assert refused((await books.admit(need=1))[1]).unit == "concurrency"
        assert refused((await books.admit(need=10))[1]).unit == "usd"
        assert await books.balances("money") == (0, 10, 0, 1)

    keep_books(dsn, work)


def test_the_places_of_a_dead_sidecar_are_free_at_once_while_its_money_waits(dsn: str) -> None:
    async def work(books: Books) -> None:
        await at_once(books, 2)
        await books.budget("money", 1000)
        sidecar = await Sidecar.start(books)
        other = await Sidecar.start(books)
        left = [await sidecar.admitted(need=10) for _ in range(2)]
        await sidecar.die()
        assert await reap(books) == 2
        refused((await other.admit())[1])
        keeper = Keeper(dsn)
        await keeper.run_once()
        await keeper.run_once()
        assert await books.findings() == []
        window = await books.window("at-once")
        assert (window.held, window.suspense, window.live) == (0, 0, 2)
        assert (await books.window("money")).suspense == 200
        running = [await other.admitted(need=1) for _ in range(2)]
        refused((await other.admit())[1])

        # Its journal comes back, or never: both end what is left, and neither takes a place from those who run.
        assert await books.settle(settlement(left[0], output=4)) == ["settled"]
        assert set(await charge(books, "checkpoint")) == {left[1]}
        assert await books.settle(settlement(left[1], output=3)) == ["corrected"]
        window = await books.window("at-once")
        assert (window.spent, window.held, window.suspense, window.live) == (0, 2, 0, 2)
        await books.settle(*[settlement(one, output=1) for one in running])
        await keeper.run_once()
        await keeper.aclose()
        assert await books.balances("money") == (90, 0, 0, 0)

    keep_books(dsn, work)


def test_a_journal_that_comes_back_before_the_place_was_given_back_gives_it_back(dsn: str) -> None:
    async def work(books: Books) -> None:
        await at_once(books, 1)
        sidecar = await Sidecar.start(books)
        one = await sidecar.admitted()
        await sidecar.die()
        await reap(books)
        assert await books.settle(settlement(one, output=1)) == ["settled"]
        assert await books.connection.fetchval("SELECT ledger.free_concurrency_v1(100)") == 0
        assert await state(books, one) == "settled"
        window = await books.window("at-once")
        assert (window.held, window.suspense, window.live) == (0, 0, 0)

    keep_books(dsn, work)


def test_places_are_given_back_by_many_keepers_at_once_and_in_bounded_steps(dsn: str) -> None:
    async def work(books: Books) -> None:
        await at_once(books, 10)
        for _ in range(3):
            sidecar = await Sidecar.start(books)
            for _ in range(10):
                await sidecar.admitted()
            await sidecar.die()
            await reap(books)
            free = "SELECT ledger.free_concurrency_v1(4)"
            while sum(await asyncio.gather(*(books.connection.fetchval(free) for _ in range(3)))):
                pass
            window = await books.window("at-once")
            assert (window.held, window.suspense, window.ceiling) == (0, 0, 10)

    keep_books(dsn, work, connections=4)


def test_a_place_that_was_given_back_is_proved_by_its_postings(dsn: str) -> None:
    async def work(books: Books) -> None:
        await at_once(books, 2)
        sidecar = await Sidecar.start(books)
        await sidecar.admitted()
        await sidecar.die()
        await reap(books)
        assert await books.connection.fetchval("SELECT ledger.free_concurrency_v1(10)") == 1
        freed = "source_id IS NOT NULL AND debit = 'suspense'"
        changes = {
            f"DELETE FROM ledger.posting WHERE {freed}": {
                "balances are the sums of their postings",
                "what was held for a request was posted for it",
                "what a holder left behind went to suspense, whole, and came out once",
            },
            f"UPDATE ledger.posting SET credit = 'spent' WHERE {freed}": {
                "every posting moves between accounts that belong together",
            },
            "UPDATE ledger.hold_line SET held = 1": {
                "a window holds what its open requests and its leases hold",
                "what was held for a request was posted for it",
            },
            "UPDATE ledger.budget_window SET suspense = 1": {
                "a window holds what its open requests and its leases hold"
            },
        }
        async with books.connection.acquire() as connection:
            for change, checks in changes.items():
                undo = connection.transaction()
                await undo.start()
                await connection.execute("SET LOCAL session_replication_role = replica")
                await connection.execute(change)
                found = {check for check in checks if await connection.fetch(CHECKS[check])}
                await undo.rollback()
                assert found == checks, change

    keep_books(dsn, work)
