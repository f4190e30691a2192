from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from behest_ledger.configuration.status import BudgetStatus
from behest_ledger.holds import UsageLine
from behest_ledger.store.configuration import read_budgets
from behest_ledger.store.gauges import read_gauges
from behest_ledger.store.reports import (
    BudgetState,
    TopRow,
    budget_status,
    budgets_of,
    top,
)
from ledger.books import WHO, Books, granted, keep_books, settlement

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
FAR_AHEAD = datetime(2100, 1, 1, tzinfo=UTC)


async def spend(books: Books, output: int, **who: Any) -> None:
    one, answer = await books.admit(need=output, **who)
    granted(answer)
    await books.settle(settlement(one, input=1, output=output))


def test_top_shows_the_dearest_session_and_model_first_with_what_runs_now(dsn: str) -> None:
    async def work(books: Books) -> None:
        await spend(books, 5, session="s1")
        await spend(books, 6, session="s1")
        await spend(books, 30, session="s2", model="large")
        await books.admit(session="s1")
        await books.admit(session="s3", user="bob")
        rows = await top(books.connection, since=LONG_AGO)
        assert [(row.session_id, row.model, row.requests, row.live, row.amount_pico) for row in rows] == [
            ("s2", "large", 1, 0, 303),
            ("s1", "small", 2, 1, 116),
            ("s3", "small", 0, 1, 0),
        ]
        now = datetime.now(UTC)
        assert rows[1] == TopRow(
            project_id="demo/shop", user_id="ann", session_id="s1", model="small", requests=2, input_tokens=2,
            output_tokens=11, amount_pico=116, live=1, last_at=rows[1].last_at,
        )  # fmt: skip
        assert now - timedelta(minutes=1) < rows[1].last_at <= now + timedelta(minutes=1)
        assert rows[:1] == await top(books.connection, since=LONG_AGO, limit=1)
        # What ended before is left out, what runs is not.
        assert [row.session_id for row in await top(books.connection, since=FAR_AHEAD)] == ["s3", "s1"]

    keep_books(dsn, work)


def test_top_counts_amounts_beyond_64_bits(dsn: str) -> None:
    async def work(books: Books) -> None:
        for _ in range(2):
            one, _ = await books.admit()
            dear = UsageLine(
                class_="output", quantity=1, rate_pico=9 * 10**18, amount_pico=9 * 10**18, source="provider"
            )
            ended = settlement(one, output=1)
            await books.settle(msgspec.structs.replace(ended, amount_pico=dear.amount_pico, lines=[dear]))
        (row,) = await top(books.connection, since=LONG_AGO)
        assert row.amount_pico == 18 * 10**18

    keep_books(dsn, work)


def test_top_shows_a_request_without_a_session_or_a_user(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.admit(session=None, user=None)
        (row,) = await top(books.connection, since=LONG_AGO)
        assert (row.user_id, row.session_id, row.live) == ("", "", 1)

    keep_books(dsn, work)


def test_a_budget_that_was_not_used_yet_shows_its_whole_limit(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("life", 500, per=["user"], suspended=True)
        await books.budget("month", 10**25, period="month", enforcement="soft")
        await books.budget("roll", 7, unit="requests", period="hour", alignment="rolling")
        life, month, roll = await budgets_of(books.connection, "acme", WHO)
        assert life == BudgetState(
            budget="demo/life", unit="usd", limit="500", spent="0", held="0", overrun="0", remaining="500",
            period="lifetime", enforcement="hard", alert_thresholds=[], suspended=True, resets_at=None,
        )  # fmt: skip
        assert [state.phase for state in (life, month, roll)] == ["Suspended", "Active", "Active"]
        assert (month.limit, month.remaining, month.enforcement) == (str(10**25), str(10**25), "soft")
        assert month.resets_at is not None
        assert month.resets_at.day == 1
        # A rolling window begins with its first request: until then nobody knows when it ends.
        assert (roll.remaining, roll.resets_at) == ("7", None)

    keep_books(dsn, work)


def test_the_budgets_of_somebody_show_the_balances_of_the_current_window(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("day", 500, per=["user"], period="day")
        await spend(books, 20)
        await books.age("day", "1 day")
        await spend(books, 4)
        await books.admit(need=5)
        await spend(books, 9, user="bob")
        (state,) = await budgets_of(books.connection, "acme", WHO)
        assert (state.spent, state.held, state.remaining) == ("43", "50", "407")
        (state,) = await budgets_of(books.connection, "acme", {**WHO, "user": "new"})
        assert (state.spent, state.remaining) == ("0", "500")
        await books.budget("day", 60, per=["user"], period="day")
        (state,) = await budgets_of(books.connection, "acme", WHO)
        assert (state.limit, state.remaining) == ("60", "0")

    keep_books(dsn, work)


def test_only_an_attribute_that_is_given_and_does_not_fit_leaves_a_budget_out(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("all", 1)
        await books.budget("bob", 1, scope={"user": "bob"})
        await books.budget("large", 1, scope={"model": "large%"})
        await books.budget("web", 1, labels={"app": "web"})
        await books.budget("other", 1, tenant="other")

        async def names(**who: Any) -> list[str]:
            return [state.budget for state in await budgets_of(books.connection, "acme", who)]

        assert await names(user="ann") == ["demo/all", "demo/large"]
        assert await names(user="bob", model="small") == ["demo/all", "demo/bob"]
        assert await names(user="ann", model="small", labels={"app": "web"}) == ["demo/all", "demo/web"]
        await books.connection.execute("UPDATE ledger.budget SET deleted_at = now() WHERE name = 'all'")
        assert await names(user="ann", model="small") == []

    keep_books(dsn, work)


def test_the_status_of_a_budget_has_its_five_biggest_subjects_by_names_that_people_know(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("each", 93, per=["session", "model"], thresholds=[50, 80])
        record = next(one.record for one in await read_budgets(books.connection, None))
        assert await budget_status(books.connection, record) == BudgetStatus(record=record, remaining=93)
        for number in range(7):
            await spend(books, number, session=f"s{number}")
        await books.admit(need=3, session="s6")
        status = await budget_status(books.connection, record)
        assert (status.active, status.exhausted, status.most_used, status.remaining) == (7, 1, 63, 0)
        assert (status.spent, status.held, status.phase) == (7 * 3 + 210, 30, "Warning")
        assert [(entry.subject, entry.spent, entry.held) for entry in status.biggest] == [
            ([f"demo/shop/ann/s{number}", "small"], 3 + 10 * number, 30 * (number == 6)) for number in (6, 5, 4, 3, 2)
        ]
        told = status.wire()
        assert told["subjects"] == {"active": 7, "exhausted": 1}
        assert told["biggest"][0] == {
            "subject": {"session": "demo/shop/ann/s6", "model": "small"}, "spent": "0.000000000063",
            "held": "0.00000000003",
        }  # fmt: skip

    keep_books(dsn, work)


def test_the_status_of_a_soft_budget_may_be_below_zero_and_is_never_exhausted(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("soft", 10, unit="tokens", enforcement="soft")
        record = next(one.record for one in await read_budgets(books.connection, None))
        await spend(books, 29)
        status = await budget_status(books.connection, record)
        assert (status.spent, status.remaining, status.exhausted, status.phase) == (30, -20, 0, "Warning")
        assert status.wire()["remaining"] == "-20"

    keep_books(dsn, work)


_READ = """
SELECT relname, sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::integer FROM pg_stat_xact_user_tables
WHERE schemaname = 'ledger' AND relname IN ('budget_subject', 'budget_window') GROUP BY 1
"""
# 300 budgets with 10 users each; three of them have 1,000 more. And sixty thousand windows that have ended.
_FILL = """
INSERT INTO ledger.budget (tenant_id, budget_id, namespace, name, scope, per, unit, limit_amount, period, alignment,
                           time_zone, enforcement)
SELECT 'acme', 'demo/' || n, 'demo', n, '{}', '{user}', 'usd', 1000, 'day', 'calendar', 'UTC', 'hard'
FROM generate_series(1, 300) AS n;
INSERT INTO ledger.budget_window (tenant_id, budget_id, subject, unit, token_kind, starts_at, ends_at, limit_amount,
                                  ceiling)
SELECT 'acme', 'demo/' || 1 + n % CASE WHEN n <= 3000 THEN 300 ELSE 3 END, jsonb_build_array('user ' || n), 'usd',
       'both', now(), now() + interval '1 day', 1000, 1000 FROM generate_series(1, 6000) AS n;
INSERT INTO ledger.budget_subject SELECT tenant_id, budget_id, subject, window_id FROM ledger.budget_window;
INSERT INTO ledger.budget_window (tenant_id, budget_id, subject, unit, token_kind, starts_at, ends_at, limit_amount,
                                  ceiling)
SELECT 'acme', 'demo/' || 1 + n % 300, jsonb_build_array('user ' || n % 3000), 'usd', 'both',
       now() - n * interval '1 min', now() - (n - 1) * interval '1 min', 1000, 1000 FROM generate_series(1, 60000) AS n;
VACUUM ANALYZE
"""


def test_of_a_budget_each_window_that_has_not_ended_is_read_once_and_no_other_one(database: str) -> None:
    async def work(books: Books) -> None:
        for statement in _FILL.split(";"):
            await books.connection.execute(statement)
        async with books.connection.acquire() as connection:
            budgets = {item.record.name: item for item in await read_budgets(connection, None)}
            assert [budgets[name].active for name in ("1", "4")] == [1010, 10]

            async def read(ask: Awaitable[object]) -> dict[str, int]:
                async with connection.transaction(isolation="repeatable_read", readonly=True):
                    # So few rows PostgreSQL would rather read all: what it can do without, it does when they are many.
                    await connection.execute("SET LOCAL enable_seqscan = off")
                    before = dict(map(tuple, await connection.fetch(_READ)))
                    await ask
                    after = dict(map(tuple, await connection.fetch(_READ)))
                return {table: number - before.get(table, 0) for table, number in after.items()}

            assert await read(read_budgets(connection, None)) == {"budget_subject": 0, "budget_window": 6000}
            assert await read(read_gauges(connection)) == {"budget_subject": 0, "budget_window": 6000}
            one = budget_status(connection, budgets["4"].record)
            assert await read(one) == {"budget_subject": 0, "budget_window": 10}

    keep_books(database, work, clean=False)
