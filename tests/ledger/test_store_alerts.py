"""Thresholds: what is charged reaches them once for each window, whoever charges, and nobody has to look for it."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from behest_ledger.store.keeper import Keeper
from behest_ledger.store.reports import Alert, alerts_since, budgets_of
from ledger.books import TENANT, WHO, Books, keep_books, settlement
from ledger.sidecars import Sidecar, charge, reap

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


async def spend(books: Books, output: int, **who: Any) -> None:
    """Let a request cost `output` tokens at 10 pico-USD."""
    one, _ = await books.admit(need=0, **who)
    await books.settle(settlement(one, output=output))


async def told(books: Books) -> list[tuple[str, int, str]]:
    """(budget, percent, subject) of all alerts so far, after the keeper has looked."""
    await books.connection.fetchrow("SELECT * FROM ledger.tell_alerts_v1(100)")
    rows = await books.connection.fetch(
        "SELECT budget_id, percent, subject::text FROM ledger.budget_alert ORDER BY reached_at, window_id, percent"
    )
    return [(row[0].removeprefix("demo/"), row[1], "/".join(json.loads(row[2]))) for row in rows]


async def since(books: Books, *, limit: int = 10_000, **times: datetime) -> list[Alert]:
    """What is told of budgets, each from a time on, as if the time in which alerts settle were over."""
    wanted = {(TENANT, f"demo/{name}"): time for name, time in times.items()}
    return await alerts_since(books.connection, wanted, settle=timedelta(0), limit=limit)


async def write_alerts(books: Books, name: str, windows: int, *, began: datetime, percent: int = 50) -> None:
    """Alerts of a budget's first windows, a millisecond apart, as the keeper writes them."""
    await books.connection.execute(
        "INSERT INTO ledger.budget_alert (tenant_id, window_id, percent, budget_id, subject, used, limit_amount,"
        " reached_at) SELECT $1, i, $2, $3, jsonb_build_array('user ' || i), 5, 10,"
        " $4::timestamptz + i * interval '1 ms' FROM generate_series(1, $5) AS i",
        TENANT, percent, f"demo/{name}", began, windows,
    )  # fmt: skip


def test_thousands_of_a_budget_are_told_as_one_and_keep_no_other_budget_waiting(dsn: str) -> None:
    async def work(books: Books) -> None:
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        await books.budget("each", 10, per=["user"], thresholds=[50, 80])
        await books.budget("all", 10, thresholds=[50])
        await write_alerts(books, "each", 1500, began=hour_ago)
        await write_alerts(books, "each", 3, began=hour_ago, percent=80)
        await write_alerts(books, "all", 1, began=hour_ago + timedelta(minutes=1), percent=51)
        found = await since(books, each=LONG_AGO, all=LONG_AGO)
        told = [(alert.budget, alert.percent, alert.windows, alert.subject) for alert in found]
        assert told == [
            ("demo/all", 51, 1, ["user 1"]),
            ("demo/each", 50, 1500, ["user 1500"]),
            ("demo/each", 80, 3, ["user 3"]),
        ]
        first_at, reached_at = hour_ago + timedelta(milliseconds=1), hour_ago + timedelta(milliseconds=1500)
        assert (found[1].first_at, found[1].reached_at) == (first_at, reached_at)

    keep_books(dsn, work)


def test_however_many_are_looked_at_at_once_each_window_is_told_once(dsn: str) -> None:
    async def work(books: Books) -> None:
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        await books.budget("each", 10, per=["user"], thresholds=[50, 80])
        await write_alerts(books, "each", 10, began=hour_ago)
        # At the same moments, as where a limit comes down to what many windows had spent.
        await write_alerts(books, "each", 10, began=hour_ago, percent=80)
        counted = {50: 0, 80: 0}
        told_until = LONG_AGO
        rounds = 0
        while found := await since(books, each=told_until, limit=3):
            rounds += 1
            told_until = max(alert.reached_at for alert in found)
            for alert in found:
                counted[alert.percent] += alert.windows
        assert (counted, rounds) == ({50: 10, 80: 10}, 5)

    keep_books(dsn, work)


def test_what_may_still_be_overtaken_is_told_later_and_of_subjects_once_in_a_minute(dsn: str) -> None:
    async def work(books: Books) -> None:
        for name, per in (("all", []), ("each", ["user"])):
            await books.budget(name, 10, per=per, thresholds=[50])
        now: datetime = await books.connection.fetchval("SELECT clock_timestamp()")
        minute = now.replace(second=0, microsecond=0) - timedelta(hours=1)
        settle = now - (minute + timedelta(seconds=30))
        for name, percent, second in (("all", 50, 29), ("all", 51, 90), ("each", 52, -1), ("each", 53, 1)):
            await write_alerts(books, name, 1, began=minute + timedelta(seconds=second), percent=percent)
        wanted = {(TENANT, f"demo/{name}"): LONG_AGO for name in ("all", "each")}
        found = await alerts_since(books.connection, wanted, settle=settle)
        assert [alert.percent for alert in found] == [50, 52]

    keep_books(dsn, work)


def test_a_threshold_is_told_once_and_the_next_one_when_it_is_reached(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000, thresholds=[50, 80, 100])
        await spend(books, 49)
        assert await told(books) == []
        await spend(books, 1)
        assert await told(books) == [("money", 50, "")]
        await spend(books, 1)
        assert await told(books) == [("money", 50, "")]
        await spend(books, 49)
        assert sorted(await told(books)) == [("money", 50, ""), ("money", 80, ""), ("money", 100, "")]
        (first, *_) = await since(books, money=LONG_AGO)
        assert (first.unit, first.used, first.limit, first.windows) == ("usd", "500", "1000", 1)
        assert first.first_at == first.reached_at
        later = await since(books, money=first.reached_at)
        assert [alert.percent for alert in later] == [80, 100]
        assert await since(books, other=LONG_AGO) == []
        assert await alerts_since(books.connection, {("other", "demo/money"): LONG_AGO}, settle=timedelta(0)) == []
        assert await books.count("alert_due") == 0

    keep_books(dsn, work)


def test_what_is_only_held_reaches_no_threshold(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000, thresholds=[1])
        one, _ = await books.admit(need=100)
        assert await told(books) == []
        await books.settle(settlement(one, sent=False))
        assert await told(books) == []
        (state,) = await budgets_of(books.connection, TENANT, WHO)
        assert state.phase == "Active"

    keep_books(dsn, work)


def test_every_window_of_every_subject_has_alerts_of_its_own(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("day", 100, per=["user"], period="day", thresholds=[50])
        await spend(books, 5)
        await spend(books, 5, user="bob")
        await spend(books, 4, user="eve")
        await books.age("day", "1 day")
        assert sorted(await told(books)) == [("day", 50, "ann"), ("day", 50, "bob")]
        await spend(books, 5)
        assert sorted(await told(books)) == [("day", 50, "ann"), ("day", 50, "ann"), ("day", 50, "bob")]

    keep_books(dsn, work)


def test_a_window_that_ended_before_the_keeper_looked_is_told_all_the_same(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("day", 100, period="day", thresholds=[50])
        await spend(books, 6)
        await books.age("day", "1 day")
        await spend(books, 1)
        assert await told(books) == [("day", 50, "")]

    keep_books(dsn, work)


def test_a_limit_or_a_threshold_that_comes_down_to_what_was_spent_is_told(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000, thresholds=[80])
        await spend(books, 50)
        assert await told(books) == []
        await books.budget("money", 600, thresholds=[80])
        assert await told(books) == [("money", 80, "")]
        await books.budget("money", 600, thresholds=[70, 80])
        assert sorted(await told(books)) == [("money", 70, ""), ("money", 80, "")]
        # Raised and reached again: this window has told that already.
        await books.budget("money", 2000, thresholds=[70, 80, 100])
        await spend(books, 150)
        assert [alert for alert in await told(books) if alert[1] != 100] == [("money", 80, ""), ("money", 70, "")]
        assert len(await told(books)) == 3

    keep_books(dsn, work)


def test_an_overrun_counts_and_so_does_a_correction(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100, thresholds=[90])
        one, _ = await books.admit(need=3)
        other, _ = await books.admit(need=6)
        assert await books.settle(settlement(one, output=8)) == ["settled!"]
        assert (await books.window("money")).spent == 40
        assert await told(books) == []
        await books.settle(settlement(other, sent=False))
        assert await told(books) == []
        sidecar = await Sidecar.start(books)
        late = await sidecar.admitted(need=1)
        await sidecar.die()
        await reap(books)
        await charge(books, "checkpoint")
        assert await told(books) == []
        await books.settle(settlement(late, output=1))
        assert await told(books) == [("money", 90, "")]

    keep_books(dsn, work)


def test_a_soft_budget_alerts_and_says_by_how_much_it_was_passed(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("soft", 100, enforcement="soft", thresholds=[50, 100])
        await spend(books, 70)
        assert sorted(await told(books)) == [("soft", 50, ""), ("soft", 100, "")]
        (state,) = await budgets_of(books.connection, TENANT, WHO)
        assert (state.enforcement, state.spent, state.remaining, state.phase) == ("soft", "700", "-600", "Warning")

    keep_books(dsn, work)


@pytest.mark.parametrize(
    ("limit", "percent", "reached_at"), [(3, 50, 2), (1, 1, 1), (1000, 1, 10), (10**24 + 1, 33, 33 * 10**22 + 1)]
)
def test_a_part_of_a_percent_is_rounded_up(dsn: str, limit: int, percent: int, reached_at: int) -> None:
    async def work(books: Books) -> None:
        found = await books.connection.fetchval("SELECT ledger.alert_amount_v1($1, $2)::text", limit, percent)
        assert int(found) == reached_at
        assert reached_at * 100 >= limit * percent > (reached_at - 1) * 100

    keep_books(dsn, work)


def test_an_alert_is_written_once_and_never_changed(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100, thresholds=[50])
        await spend(books, 5)
        await told(books)
        for change in ("UPDATE ledger.budget_alert SET percent = 1", "DELETE FROM ledger.budget_alert"):
            with pytest.raises(asyncpg.RestrictViolationError):
                await books.connection.execute(change)

    keep_books(dsn, work)


def test_the_keeper_tells_alerts_in_its_log_once_and_in_bounded_steps(
    dsn: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("behest_ledger.store.keeper.BATCH_HOLDS_MAX", 2)
    monkeypatch.setattr("behest_ledger.store.keeper.BATCHES_MAX", 2)

    async def work(books: Books) -> None:
        caplog.set_level("WARNING", "behest_ledger")
        await books.budget("each", 10**12, per=["user", "session"], thresholds=[50, 80])
        await books.budget("calls", 10, unit="requests", thresholds=[60])
        for number in range(5):
            await spend(books, 6 * 10**10, user=f"u{number}")
        keeper = Keeper(dsn)
        assert [((await keeper.run_once()).alerts, len(caplog.records)) for _ in range(4)] == [
            (4, 4), (1, 5), (0, 5), (0, 5)
        ]  # fmt: skip
        await spend(books, 1, user="u9")
        await keeper.run_once()
        await keeper.aclose()
        messages = sorted(record.getMessage() for record in caplog.records)
        assert messages[0] == "budget demo/calls has reached 60 %: 6 of 10 requests are spent"
        assert messages[1] == (
            'budget demo/each of ["u0",["demo/shop","u0","s1"]] has reached 50 %: 0.6 of 1 USD are spent'
        )

    keep_books(dsn, work)


def test_charges_and_keepers_at_the_same_time_tell_every_threshold_once(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 4000, thresholds=[10, 25, 50, 75, 100])
        await books.budget("each", 400, per=["user"], thresholds=[50, 100])
        ended = asyncio.Event()

        async def keep() -> None:
            while not ended.is_set():
                await books.connection.fetchrow("SELECT * FROM ledger.tell_alerts_v1(3)")

        async def charge_all() -> None:
            # As many at once as there are connections: whoever waits for one would wait out his statement's time.
            places = asyncio.Semaphore(6)

            async def one(number: int) -> None:
                async with places:
                    await spend(books, 4, user=f"u{number % 10}")

            try:
                await asyncio.gather(*(one(number) for number in range(100)))
            finally:
                ended.set()

        await asyncio.gather(charge_all(), keep(), keep())
        found = await told(books)
        assert sorted(alert for alert in found if alert[0] == "money") == [
            ("money", percent, "") for percent in (10, 25, 50, 75, 100)
        ]
        assert len(found) == len(set(found)) == 5 + 20

    keep_books(dsn, work, connections=8)
