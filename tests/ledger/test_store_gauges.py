"""What the keeper tells of budgets and the books: the sums of the books, once a Budget, and nothing that is old."""

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from behest_ledger.money import PICO_PER_USD
from behest_ledger.store import gauges, keeper_watch
from behest_ledger.store.gauges import BooksGauges, BudgetGauges, read_gauges
from behest_ledger.store.keeper import Keeper, KeeperReport
from behest_ledger.store.keeper_watch import KeeperWatch
from behest_ledger.telemetry import names
from behest_ledger.telemetry.meter import Meter
from behest_ledger.telemetry.prometheus import page
from ledger.books import Books, keep_books, settlement
from ledger.sidecars import Sidecar, reap

DAY_S = 24 * 3600.0
INTERVAL_S = 15.0


async def read(books: Books) -> tuple[BooksGauges, dict[str, BudgetGauges]]:
    found = await read_gauges(books.connection)
    return found, {one.budget_id.removeprefix("demo/"): one for one in found.budgets}


def test_a_budget_is_the_sum_of_its_current_windows(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 5 * PICO_PER_USD)
        await books.budget("each", 100, unit="tokens", per=["user"], period="day")
        await books.budget("calls", 3, unit="requests", period="hour")
        for user, output in (("ann", 20), ("bob", 100)):
            one, _ = await books.admit(need=output, user=user)
            await books.settle(settlement(one, output=output))
        await books.admit(need=7, user="ann")
        _, found = await read(books)
        money = found["money"]
        assert (money.unit, money.limit, money.spent) == ("usd", 5.0, 1200 / PICO_PER_USD)
        assert (money.held, money.period_s, money.resets_at_s) == (70 / PICO_PER_USD, None, None)
        assert money.remaining == pytest.approx(5.0 - money.spent - money.held)
        each = found["each"]
        assert (each.limit, each.spent, each.held, each.remaining, each.exhausted) == (200, 120, 7, 73, 1)
        assert each.period_s == DAY_S
        calls = found["calls"]
        assert (calls.limit, calls.spent, calls.held, calls.remaining, calls.exhausted) == (3, 2, 1, 0, 1)

    keep_books(dsn, work)


def test_one_without_a_window_has_its_whole_limit_and_says_when_it_begins_again(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("day", 100, unit="tokens", period="day")
        await books.budget("rolling", 100, unit="tokens", period="day", alignment="rolling")
        await books.budget("used", 100, unit="tokens", period="day", scope={"user": "ann"})
        await books.admit(need=5, user="ann")
        await books.age("used", "1 day")
        _, found = await read(books)
        midnight = (datetime.now(UTC) + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        for name in ("day", "used"):
            one = found[name]
            if name == "used":
                assert (one.limit, one.spent, one.held, one.remaining) == (100, 0, 0, 100)
            assert abs((one.resets_at_s or 0) - midnight.timestamp()) < 2 * DAY_S
            assert one.period_s == DAY_S

    keep_books(dsn, work)


def test_where_windows_end_at_different_times_no_end_is_told(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("each", 100, unit="tokens", per=["user"], period="hour", alignment="rolling")
        await books.admit(user="ann")
        _, found = await read(books)
        assert (found["each"].resets_at_s or 0) > time.time()
        await books.admit(user="bob")
        _, found = await read(books)
        assert (found["each"].resets_at_s, found["each"].period_s) == (None, 3600)

    keep_books(dsn, work)


def test_a_soft_budget_is_never_exhausted_and_goes_below_zero(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("soft", 10, unit="tokens", enforcement="soft")
        one, _ = await books.admit(need=0)
        await books.settle(settlement(one, output=30))
        _, found = await read(books)
        assert (found["soft"].remaining, found["soft"].exhausted) == (-20, 0)

    keep_books(dsn, work)


def test_tiers_and_deleted_budgets_are_not_told_of_and_more_than_the_most_are_counted(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "BUDGETS_MAX", 2)

    async def work(books: Books) -> None:
        for name in ("c", "a", "b", "tier:free", "gone"):
            await books.budget(name, 1, unit="requests")
        await books.connection.execute("UPDATE ledger.budget SET deleted_at = now() WHERE name = 'gone'")
        books_found, found = await read(books)
        assert list(found) == ["a", "b"]
        assert books_found.budgets_untold == 1

    keep_books(dsn, work)


def test_holders_and_suspense_are_counted(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        sidecar = await Sidecar.start(books)
        await Sidecar.start(books)
        await sidecar.admitted(need=1)
        before, _ = await read(books)
        assert (before.holders, before.suspense, before.suspense_age_s) == (2, 0, 0)
        await sidecar.die()
        await reap(books)
        after, _ = await read(books)
        assert (after.holders, after.suspense) == (1, 1)
        assert after.suspense_age_s >= 0

    keep_books(dsn, work)


def told(meter: Meter, instrument: names.Instrument) -> dict[tuple[str, ...], Any]:
    (found,) = [one for one in meter.instruments if one.instrument is instrument]
    return dict(found.series)


def test_the_keeper_that_works_tells_and_the_one_that_stands_by_does_not(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        one, _ = await books.admit(need=0)
        await books.settle(settlement(one, output=3))
        meters = Meter(), Meter()
        keepers = [Keeper(dsn, watch=KeeperWatch(meter), interval_s=0.05, seal_interval_s=0.0) for meter in meters]
        running: list[asyncio.Task[None]] = []
        for each, meter, result in zip(keepers, meters, ("worked", "stood_by"), strict=True):
            running.append(asyncio.create_task(each.run()))
            async with asyncio.timeout(20):
                while not told(meter, names.KEEPER_ROUNDS).get((result,)):
                    await asyncio.sleep(0.01)
        assert told(meters[0], names.BUDGET_SPENT) == {("acme", "demo/money", "usd"): 30 / PICO_PER_USD}
        async with asyncio.timeout(20):  # who writes elsewhere on this server may hold seals up for a moment
            while not told(meters[0], names.SEALED_ROWS).get(()):
                await asyncio.sleep(0.01)
        assert told(meters[0], names.SEAL_LAG)[()] >= 0
        for instrument in (names.BUDGET_SPENT, names.HOLDERS, names.SEAL_LAG):
            assert told(meters[1], instrument) == {}
        text = page(meters[0]).decode()
        labels = 'behest_budget="demo/money",behest_tenant="acme",behest_unit="usd"'
        assert f"behest_budget_limit{{{labels}}} 1e-09" in text
        running[0].cancel()
        await asyncio.gather(running[0], return_exceptions=True)
        async with asyncio.timeout(20):
            while not told(meters[1], names.BUDGET_SPENT):
                await asyncio.sleep(0.01)
        running[1].cancel()
        await asyncio.gather(running[1], return_exceptions=True)

    keep_books(dsn, work, connections=4)


async def look(watch: KeeperWatch, books: Books) -> None:
    async with books.connection.acquire() as connection:
        await watch.look(connection, interval_s=INTERVAL_S)


def test_what_was_read_long_ago_is_not_told(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        now_s = time.monotonic()
        meter = Meter()
        watch = KeeperWatch(meter, clock_s=lambda: now_s)
        await look(watch, books)
        assert len(told(meter, names.BUDGET_LIMIT)) == 1
        await books.budget("other", 1000)
        now_s += INTERVAL_S / 2
        await look(watch, books)
        assert len(told(meter, names.BUDGET_LIMIT)) == 1, "it is not looked at all the time"
        now_s += INTERVAL_S
        await look(watch, books)
        assert len(told(meter, names.BUDGET_LIMIT)) == 2
        now_s += keeper_watch.STALE_S
        assert told(meter, names.BUDGET_LIMIT) == {}
        assert told(meter, names.HOLDERS) == {}

    keep_books(dsn, work)


def test_a_round_of_which_a_step_was_refused_has_failed_and_tells_what_it_did() -> None:
    meter = Meter()
    KeeperWatch(meter).done(KeeperReport(working=True, holds_to_suspense=3, failed=("seal",)), 0.1)
    assert told(meter, names.KEEPER_ROUNDS) == {("failed",): 1}
    assert told(meter, names.SUSPENDED) == {(): 3}


def test_a_look_that_takes_too_long_is_given_up_and_the_keeper_goes_on(
    dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeper_watch, "LOOK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(gauges, "_BOOKS", "SELECT pg_sleep(5)")
    caplog.set_level(logging.WARNING, "behest_ledger")

    async def work(books: Books) -> None:
        meter = Meter()
        keeper = Keeper(dsn, watch=KeeperWatch(meter))
        assert (await keeper.run_once()).working
        assert (await keeper.run_once()).working
        await keeper.aclose()
        assert told(meter, names.HOLDERS) == {}
        assert [record.getMessage() for record in caplog.records].count(
            "budgets are not told of: to look at them took more than 0 s"
        ) == 1

    keep_books(dsn, work)
