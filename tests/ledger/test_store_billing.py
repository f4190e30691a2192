"""The bill: every line once, in the hour in which it was written, with what was true at its admission."""

import random
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from behest_ledger.billing import BillingPeriodError, BillingRow, hours_between
from behest_ledger.corrections import Correction
from behest_ledger.store.billing import billing_rows, hours_over, lines_query, next_query
from behest_ledger.store.corrections import correct
from behest_ledger.store.pool import connect
from ledger.books import TENANT, Books, granted, keep_books, settlement
from ledger.sidecars import Sidecar, charge, reap

HOUR = timedelta(hours=1)


def present_hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


@asynccontextmanager
async def connected(books: Books) -> AsyncGenerator[Any]:
    connection = await connect(books.dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def bill(
    books: Books, begin: datetime | None = None, end: datetime | None = None, **how: Any
) -> list[BillingRow]:
    begin = begin or present_hour() - HOUR
    async with connected(books) as connection:
        pieces = billing_rows(connection, begin, end or present_hour() + HOUR, **how)
        return [row async for _, rows in pieces for row in rows]


async def spend(books: Books, output: int, **who: Any) -> Any:
    one, answer = await books.admit(need=output, **who)
    granted(answer)
    await books.settle(settlement(one, input=1, output=output, tenant=who.get("tenant", TENANT)))
    return one


async def move_to(books: Books, one: Any, ended_at: datetime) -> None:
    """As if it had ended then: the books are insert-only, so this is done behind their back."""
    async with connected(books) as connection, connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        await connection.execute("UPDATE ledger.request SET ended_at = $2 WHERE request_id = $1", one, ended_at)


def test_labels_are_those_of_the_admission_from_the_pod_or_else_from_the_project(dsn: str) -> None:
    async def work(books: Books) -> None:
        await spend(books, 2)
        await spend(books, 3, team="search", cost_center="CC 1", workload="pods/web", upstream="demo/openai")
        await spend(books, 4, team="ads")
        found = {row.quantity: row for row in await bill(books) if row.token_class == "output"}
        told = {
            quantity: (row.namespace, row.workload, row.team, row.cost_center, row.upstream)
            for quantity, row in found.items()
        }
        assert told == {
            2: ("demo", None, None, None, ""),
            3: ("pods", "web", "search", "CC 1", "demo/openai"),
            4: ("demo", None, "ads", None, ""),
        }

    keep_books(dsn, work)


def test_what_a_policy_charges_has_the_labels_of_its_admission(dsn: str) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        await sidecar.admitted(need=4, team="search", workload="pods/web")
        await sidecar.die()
        await reap(books)
        await charge(books, policy="hold")
        (row,) = await bill(books)
        assert (row.team, row.namespace, row.workload, row.quantity) == ("search", "pods", "web", 4)

    keep_books(dsn, work)


def test_a_correction_takes_back_and_charges_anew_in_the_hour_in_which_it_is_made(dsn: str) -> None:
    async def work(books: Books) -> None:
        one = await spend(books, 5, team="search")
        long_ago = present_hour() - timedelta(days=70)
        await move_to(books, one, long_ago + timedelta(minutes=5))
        wanted = Correction(
            place="line 1", request_id=one, correction_id="i", reason="invoice", quantities={"output": 3},
            rates_pico={"output": 10},
        )  # fmt: skip
        async with connected(books) as connection:
            await correct(connection, [wanted])
        then = await bill(books, long_ago, long_ago + HOUR)
        assert [(row.part, row.token_class, row.quantity) for row in then] == [
            ("charge", "input", 1), ("charge", "output", 5),
        ]  # fmt: skip
        now = await bill(books)
        assert [(row.part, row.token_class, row.quantity, row.amount_pico) for row in now] == [
            ("replacement", "input", 1, 3), ("reversal", "input", -1, -3),
            ("replacement", "output", 3, 30), ("reversal", "output", -5, -50),
        ]  # fmt: skip
        assert {(row.hour, row.team) for row in [*then, *now]} == {(long_ago, "search")}
        assert {row.booked_month for row in then} < {row.booked_month for row in [*then, *now]}

    keep_books(dsn, work, clean=False)


@pytest.mark.parametrize("seed", range(3))
def test_the_bill_has_every_line_once_whatever_the_period_is_cut_into(dsn: str, seed: int) -> None:
    """By session or not, the sums by each thing that a row tells are the ledger's."""
    draw = random.Random(seed)

    async def work(books: Books) -> None:
        start = present_hour() - 6 * HOUR
        made: list[Any] = []
        for _ in range(40):
            who = {
                "session": f"s{draw.randrange(3)}",
                "user": draw.choice(["ann", "bob"]),
                "model": draw.choice(["small", "large"]),
                "project": draw.choice(["demo/shop", "demo/other"]),
                "tenant": draw.choice(["acme", "other"]),
                **({"team": draw.choice(["a", "b"])} if draw.random() < 0.5 else {}),
            }
            one = await spend(books, draw.randrange(1, 2**39), rate=10, **who) if draw.random() < 0.9 else None
            if one is None:
                continue
            made.append((one, who["tenant"]))
        for one, _ in made[::2]:
            await move_to(books, one, start + timedelta(minutes=draw.randrange(300)))
        async with connected(books) as connection:
            for number, (one, tenant) in enumerate(made[::5]):
                wanted = Correction(
                    place="line 1", request_id=one, correction_id=f"i{number}", reason="invoice",
                    quantities={"output": draw.randrange(9)}, rates_pico={"output": 7}, tenant_id=tenant,
                )  # fmt: skip
                await correct(connection, [wanted])
            lines = await connection.fetch(
                "SELECT tenant_id, project_id, model, class, rate_pico::text, sum(quantity)::text AS quantity,"
                " sum(u.amount_pico)::text AS amount FROM ledger.usage_line u JOIN ledger.request r"
                " USING (tenant_id, month, request_id) GROUP BY 1, 2, 3, 4, 5"
            )
        truth = {tuple(row)[:5]: (int(row["quantity"]), int(row["amount"])) for row in lines}

        def summed(rows: list[BillingRow]) -> dict[Any, tuple[int, int]]:
            quantities: Counter[Any] = Counter()
            amounts: Counter[Any] = Counter()
            for row in rows:
                assert row.amount_pico == row.quantity * row.rate_pico
                key = (row.tenant_id, row.project_id, row.model, row.token_class, str(row.rate_pico))
                quantities[key] += row.quantity
                amounts[key] += row.amount_pico
            return {key: (quantities[key], amounts[key]) for key in quantities}

        end = present_hour() + HOUR
        for by_session in (False, True):
            whole = await bill(books, start, end, by_session=by_session)
            assert summed(whole) == truth
            assert len({msgspec.structs.replace(row, quantity=0, amount_pico=0) for row in whole}) == len(whole)
            assert all((row.session_id is not None) == by_session for row in whole)
            cut = start + draw.randrange(1, 6) * HOUR
            parts = await bill(books, start, cut, by_session=by_session)
            parts += await bill(books, cut, end, by_session=by_session)
            assert parts == whole
        own = await bill(books, start, end, project=("acme", "demo/shop"))
        assert summed(own) == {key: sums for key, sums in truth.items() if key[:2] == ("acme", "demo/shop")}

    keep_books(dsn, work, clean=False)


def test_an_hour_is_found_by_indexes_alone(dsn: str) -> None:
    async def work(books: Books) -> None:
        hour = present_hour()
        async with connected(books) as connection:
            for name in ("enable_hashjoin", "enable_mergejoin", "enable_seqscan"):
                await connection.execute(f"SET {name} = off")
            for of_project, who in ((False, ()), (True, ("acme", "demo/shop"))):
                query = lines_query(of_project=of_project, by_session=True)
                plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {query}", hour, hour + HOUR, *who))
                assert "Seq Scan" not in plan, plan
                plan = "\n".join(
                    row[0]
                    for row in await connection.fetch(
                        f"EXPLAIN {next_query(of_project=of_project)}", hour, hour + HOUR, *who
                    )
                )
                assert "Seq Scan" not in plan, plan

    keep_books(dsn, work)


@pytest.mark.parametrize(("time", "over"), [("00:00:00.4", 23), ("00:01:59.9", 23), ("00:02:00", 24), ("00:59:59", 24)])
def test_an_hour_is_over_by_the_databases_clock_and_when_what_was_begun_in_it_is_written(
    dsn: str, time: str, over: int
) -> None:
    async def work(books: Books) -> None:
        async with connected(books) as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(
                "CREATE SCHEMA other_clock; CREATE FUNCTION other_clock.clock_timestamp() RETURNS timestamptz"
                f" LANGUAGE sql AS $$ SELECT timestamptz '2026-04-02 {time}+00' $$;"
                " SET LOCAL search_path = other_clock, pg_catalog"
            )
            assert await hours_over(connection) == datetime(2026, 4, 1, tzinfo=UTC) + over * HOUR
            await transaction.rollback()

    keep_books(dsn, work)


def test_a_period_is_of_whole_hours() -> None:
    noon = datetime(2026, 4, 1, 12, tzinfo=UTC)
    assert hours_between(noon, noon + timedelta(days=2)) == 48
    for begin, end in ((noon, noon), (noon + HOUR, noon), (noon + timedelta(minutes=30), noon + HOUR)):
        with pytest.raises(BillingPeriodError):
            hours_between(begin, end)


def test_the_cursor_takes_no_more_rows_than_it_may(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("behest_ledger.store.billing.FETCHED_ROWS", 2)

    async def work(books: Books) -> None:
        for session in range(5):
            await spend(books, 2, session=f"s{session}")
        async with connected(books) as connection:
            pieces = billing_rows(connection, present_hour() - HOUR, present_hour() + HOUR, by_session=True)
            sizes = [len(rows) async for _, rows in pieces]
        assert (max(sizes), sum(sizes)) == (2, 10)

    keep_books(dsn, work)


def test_ten_years_without_a_charge_take_a_few_questions(dsn: str) -> None:
    async def work(books: Books) -> None:
        asked: list[str] = []

        def note(query: Any) -> None:
            asked.append(query.query)

        async with connected(books) as connection:
            connection.add_query_logger(note)
            long_ago = present_hour() - timedelta(days=3652)
            assert [row async for row in billing_rows(connection, long_ago, present_hour() + HOUR)] == []
            assert 0 < len(asked) < 30

    keep_books(dsn, work)
