"""Usage is equal to the books to the last unit, at every moment, for every piece of time in every zone, and cheap."""

import asyncio
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_ledger.store import usage
from behest_ledger.store.keeper import Keeper
from behest_ledger.store.pool import connect
from behest_ledger.store.usage import Granularity, UsageTotal, UsageTotals, add_up, usage_bins, usage_totals
from ledger.books import Books, granted, keep_books, settlement
from ledger.sealing import seal_all

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
FAR_AHEAD = datetime(2100, 1, 1, tzinfo=UTC)
BEGIN, END = datetime(2025, 10, 20, tzinfo=UTC), datetime(2025, 11, 8, tzinfo=UTC)
"""The end of summer time in Europe and in America is between them."""
SUMS, REACH, ALONE = usage.CHECKS
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe", "Asia/Kolkata"]


async def spend(books: Books, output: int, **who: Any) -> UUID:
    one, answer = await books.admit(need=output, **who)
    granted(answer)
    await books.settle(settlement(one, input=1, output=output))
    return one


async def add_all(books: Books) -> int:
    """Put everything that is written by now into the sums."""
    await seal_all(books)
    added = await add_up(books.connection, calls_max=1000)
    assert not added.more
    return added.requests


async def totals_of(books: Books, user_id: str | None = None, **between: datetime) -> UsageTotals:
    times: dict[str, Any] = {"begin": LONG_AGO, "end": FAR_AHEAD, **between}
    return await usage_totals(books.connection, tenant_id="acme", project_id="demo/shop", user_id=user_id, **times)


def test_usage_is_summed_by_model_session_and_whose_key_paid(dsn: str) -> None:
    async def work(books: Books) -> None:
        await spend(books, 5)
        await spend(books, 6)
        await spend(books, 7, user="bob", session="s2")
        await spend(books, 8, byok=True)
        await spend(books, 9, project="demo/other")
        paid = {"requests": 3, "input_tokens": 3, "output_tokens": 18, "amount_pico": 189}
        own = {"requests": 1, "input_tokens": 1, "output_tokens": 8, "amount_pico": 83}
        ann = {"requests": 2, "input_tokens": 2, "output_tokens": 11, "amount_pico": 116}
        bob = {"requests": 1, "input_tokens": 1, "output_tokens": 7, "amount_pico": 73}
        expected = UsageTotals(
            models=[UsageTotal(name="small", byok=False, **paid), UsageTotal(name="small", byok=True, **own)],
            sessions=[
                UsageTotal(name="s1", byok=False, **ann),
                UsageTotal(name="s2", byok=False, **bob),
                UsageTotal(name="s1", byok=True, **own),
            ],
            sessions_number=2,
            byok_sessions_number=1,
        )

        async def check() -> None:
            found = await totals_of(books)
            assert sorted(found.models, key=lambda one: one.byok) == expected.models
            assert (found.sessions, found.sessions_number, found.byok_sessions_number) == (expected.sessions, 2, 1)
            assert [one.amount_pico for one in (await totals_of(books, "bob")).models] == [73]
            assert (await totals_of(books, "eve")).models == []
            # The begin is in, the end is out.
            first, last = await books.connection.fetchrow(
                "SELECT min(ended_at), max(ended_at) FROM ledger.request WHERE project_id = 'demo/shop'"
            )
            assert sum(one.requests for one in (await totals_of(books, begin=first, end=last)).models) == 3

        await check()
        assert await add_all(books) == 5
        assert await add_all(books) == 0
        await check()

    keep_books(dsn, work)


def test_of_many_sessions_those_that_cost_most_are_told(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(books: Books) -> None:
        monkeypatch.setattr(usage, "SESSIONS_MAX", 2)
        for output, session in enumerate("cab", start=5):
            await spend(books, output, session=session)
        for _ in range(2):
            found = await totals_of(books)
            assert ([one.name for one in found.sessions], found.sessions_number) == (["b", "a"], 3)
            assert found.models[0].requests == 3
            await add_all(books)

    keep_books(dsn, work)


def test_a_session_is_alone_until_it_has_another_hour_and_is_counted_once_beside_what_is_new(database: str) -> None:
    async def work(books: Books) -> None:
        async def later(session: str, hours: int) -> None:
            """A request of a session that ended so many hours from now, as its row says: not settled as it is."""
            await books.connection.execute(
                "INSERT INTO ledger.request SELECT tenant_id, month, gen_random_uuid(), project_id, namespace, user_id,"
                " $1, model, attributes, outcome, source, 1, 1, 1000, price_key, byok, facts, admitted_at,"
                " ended_at + make_interval(hours => $2) FROM ledger.request ORDER BY ended_at LIMIT 1", session, hours,
            )  # fmt: skip

        async def alone() -> set[str]:
            rows = await books.connection.fetch("SELECT name FROM ledger.usage_sum WHERE alone AND whose = '*'")
            return {row["name"] for row in rows}

        async def told() -> list[tuple[str, int]]:
            found = await totals_of(books)
            assert found.sessions_number == len(found.sessions)
            return [(one.name, one.requests) for one in found.sessions]

        await spend(books, 5, session="short")
        await later("twice at once", 0)
        await later("twice at once", 3)
        await later("long", 0)
        await add_all(books)
        assert await alone() == {"short", "long"}
        await later("long", 0)  # in the same hour: it stays one row
        await later("new", 0)
        # Above the mark: beside a row that is alone, and a session that has none.
        assert await told() == [("long", 2), ("twice at once", 2), ("new", 1), ("short", 1)]
        await add_all(books)
        assert await alone() == {"short", "long", "new"}
        await later("long", 0)
        await later("long", 2)  # both at once: the row that is there, and another
        await later("new", -800)  # another hour alone, and another month's
        assert await told() == [("long", 4), ("new", 2), ("twice at once", 2), ("short", 1)]
        await add_all(books)
        assert await alone() == {"short"}
        assert await told() == [("long", 4), ("new", 2), ("twice at once", 2), ("short", 1)]
        assert await books.connection.fetch(usage.CHECKS[ALONE]) == []
        assert await books.connection.fetch(usage.CHECKS[SUMS]) == []

    keep_books(database, work, clean=False)


class Row(NamedTuple):
    """A request, and what it costs after each of its corrections."""

    ended_at: datetime
    user: str
    session: str
    byok: bool
    month: datetime
    costs: list[tuple[int, int, int]]
    steps: list[int]
    """When it and its corrections were written: before which rolling up."""


def _moment(base: datetime, off_us: int) -> datetime:
    return base + timedelta(microseconds=off_us)


_times = st.builds(
    _moment,
    st.sampled_from([BEGIN, datetime(2025, 10, 26, 0, 45, tzinfo=UTC), datetime(2025, 11, 2, 6, tzinfo=UTC)]),
    st.sampled_from([-1, 0, 1])
    | st.integers(-4 * 3600 * 10**6, 4 * 3600 * 10**6)
    | st.sampled_from([60 * 10**6 * minutes for minutes in (-60, -15, -1, 1, 15, 45, 60)]),
)
_costs = st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 10**20))
_rows = st.integers(1, 3).flatmap(
    lambda number: st.builds(
        Row,
        ended_at=_times,
        user=st.sampled_from(["ann", "*", ""]),
        session=st.sampled_from(["s1", "s2", "x" * 600]),
        byok=st.booleans(),
        month=st.sampled_from([BEGIN.replace(day=1), END.replace(day=1)]),
        costs=st.lists(_costs, min_size=number, max_size=number),
        steps=st.lists(st.integers(0, 2), min_size=number, max_size=number).map(sorted),
    )
)


def begin_of(moment: datetime, granularity: Granularity, zone: ZoneInfo) -> datetime:
    """As a calendar of the zone says it; hours are counted in elapsed time, so that none is there twice as long."""
    local = moment.astimezone(zone)
    if granularity == "day":
        return local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0).astimezone(UTC)
    into = timedelta(seconds=local.second, microseconds=local.microsecond)
    if granularity == "hour":
        into += timedelta(minutes=local.minute)
    return moment - into


async def write(connection: Any, rows: list[Row], step: int, tx: int) -> None:
    for number, row in enumerate(rows):
        key = ("acme", row.month.date(), UUID(int=number))
        for place, (cost, when) in enumerate(zip(row.costs, row.steps, strict=True)):
            if when != step:
                continue
            if place == 0:
                await connection.execute(
                    "INSERT INTO ledger.request VALUES ($1, $2, $3, 'demo/shop', 'demo', $4, $5, 'small', '{}',"
                    " 'completed', 'provider', $6, $7, $8::text::numeric, '', $9, '{}', $10, $10, $11)",
                    *key, row.user, row.session, *cost[:2], str(cost[2]), row.byok, row.ended_at, tx,
                )  # fmt: skip
            else:
                await connection.execute(
                    "INSERT INTO ledger.correction VALUES ($1, $2, $3, $4, $5, 'invoice', 'completed', 'invoice',"
                    " $6, $7, $8::text::numeric, '{}', now(), $9)",
                    *key, place, str(place), *cost[:2], str(cost[2]), max(tx, 100),
                )  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(
    rows=st.lists(_rows, min_size=1, max_size=8),
    begin=_times,
    end=_times,
    user=st.sampled_from([None, "ann", "*"]),
    granularity=st.sampled_from(["minute", "hour", "day"]),
    zone=st.sampled_from(ZONES),
    old=st.booleans(),
)
def test_whatever_is_summed_already_every_question_is_the_sum_of_its_requests(
    shared_database: str,
    rows: list[Row],
    begin: datetime,
    end: datetime,
    user: str | None,
    granularity: Granularity,
    zone: str,
    old: bool,
) -> None:
    begin, end = min(begin, end), max(begin, end)

    async def check(connection: Any, step: int) -> None:
        expected: dict[datetime, Counter[str]] = {}
        sessions: Counter[tuple[str, bool]] = Counter()
        for row in rows:
            written = [cost for cost, when in zip(row.costs, row.steps, strict=True) if when <= step]
            if written and begin <= row.ended_at < end and user in (None, row.user):
                sums = expected.setdefault(begin_of(row.ended_at, granularity, ZoneInfo(zone)), Counter())
                sums.update(requests=1, input=written[-1][0], output=written[-1][1], amount=written[-1][2])
                sessions[row.session[:100], row.byok] += written[-1][2]
        asked: dict[str, Any] = {
            "tenant_id": "acme", "project_id": "demo/shop", "begin": begin, "end": end, "user_id": user,
        }  # fmt: skip
        bins = await usage_bins(connection, **asked, granularity=granularity, zone=zone)
        assert [
            (one.begins_at, (one.requests, one.input_tokens, one.output_tokens, one.amount_pico)) for one in bins
        ] == [
            (at, (sums["requests"], sums["input"], sums["output"], sums["amount"]))
            for at, sums in sorted(expected.items())
        ]  # fmt: skip
        totals = await usage_totals(connection, **asked)
        assert {(one.name[:100], one.byok): one.amount_pico for one in totals.sessions} == dict(sessions)
        numbers = Counter(byok for _, byok in sessions)
        assert (totals.sessions_number, totals.byok_sessions_number) == (numbers[False], numbers[True])
        for name, value in (("requests", "requests"), ("output_tokens", "output"), ("amount_pico", "amount")):
            assert sum(getattr(one, name) for one in totals.models) == sum(sums[value] for sums in expected.values())

    async def main() -> None:
        connection = await connect(shared_database)
        whole = connection.transaction()
        await whole.start()
        try:
            # Transactions by number, as if they had been: one that sealed nothing yet, or has rows older than seals.
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute("DELETE FROM ledger.request")
            await connection.execute("DELETE FROM ledger.usage_sum")
            await connection.execute(
                "UPDATE ledger.seal_progress SET began = 100, sealed_until = 100, rolled_until = $1,"
                " rolled_to = '-infinity'", 0 if old else 100,
            )  # fmt: skip
            for step in range(3):
                await write(connection, rows, step, 0 if old and step == 0 else 100 + 2 * step)
                await check(connection, step)
                if step:
                    await connection.execute("UPDATE ledger.seal_progress SET sealed_until = $1", 101 + 2 * step)
                more = True
                while more:
                    _, more = await connection.fetchrow("SELECT * FROM ledger.roll_usage_v1(4)")
                    for query in usage.CHECKS.values():
                        assert await connection.fetch(query) == []
                    await check(connection, step)
        finally:
            await whole.rollback()
            await connection.close()

    asyncio.run(main())


def test_every_hour_and_day_of_every_zone_begins_with_a_quarter_of_an_hour() -> None:
    """Else a quarter's sum could not be said to belong to one of them."""
    step = timedelta(days=14)
    for name in sorted(available_timezones() - {"localtime"}):
        zone = ZoneInfo(name)
        moment, last = datetime(2024, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC)
        offset = moment.astimezone(zone).utcoffset()
        while moment < last:
            assert offset is not None
            assert offset.total_seconds() % 900 == 0, (name, moment)
            after = (moment + step).astimezone(zone).utcoffset()
            if after != offset:
                low, high = moment, moment + step
                while high - low > timedelta(seconds=1):
                    middle = low + (high - low) / 2
                    low, high = (middle, high) if middle.astimezone(zone).utcoffset() == offset else (low, middle)
                assert round(high.timestamp()) % 900 in (0, 1, 899), (name, high)
            moment, offset = moment + step, after


FILL = """
INSERT INTO ledger.request (tenant_id, month, request_id, project_id, namespace, user_id, session_id, model, attributes,
                            outcome, source, input_tokens, output_tokens, amount_pico, price_key, facts, admitted_at,
                            ended_at)
SELECT 'acme', date_trunc('month', t), gen_random_uuid(), 'demo/shop', 'demo',
       'user ' || n % $4::integer, 's' || n / 20, 'small', '{}', 'completed', 'provider', n % 97, n % 89,
       (n % 83)::numeric * 1000003, '', '{}', t, t
FROM generate_series(1, $1::integer) AS n,
     LATERAL (SELECT $2::timestamptz + ($3::timestamptz - $2::timestamptz) * (n::float8 / $1::integer)) AS k (t)
"""
"""$1 requests of $4 users, spread over the time from $2 to $3."""
_READ = """
SELECT CASE WHEN relname LIKE 'usage_sum%' THEN 'sums' ELSE 'requests' END, sum(seq_scan)::integer,
       sum(coalesce(idx_tup_fetch, 0))::integer
FROM pg_stat_xact_user_tables WHERE schemaname = 'ledger' AND (relname LIKE 'request%' OR relname LIKE 'usage_sum%')
GROUP BY 1
"""
_QUESTIONS = {
    "by time": "SELECT * FROM ledger.usage_bins_v1('acme', 'demo/shop', $1, $2, $3, 'hour', 'Asia/Kathmandu')",
    "by minute": "SELECT * FROM ledger.usage_bins_v1('acme', 'demo/shop', $1, $2, $3, 'minute', 'UTC')",
    "by session": "SELECT * FROM ledger.usage_totals_v1('acme', 'demo/shop', $1, $2, $3, 100)",
}


def test_a_question_reads_indexes_and_of_the_requests_next_to_none(database: str) -> None:
    # `database`: it is vacuumed, as a ledger's is by PostgreSQL itself.
    async def main() -> None:
        connection = await connect(database)
        books = Books(database, connection)
        log: list[str] = []

        def listen(_connection: Any, message: Any) -> None:
            log.append(message.message)

        try:
            await connection.execute(FILL, 8_000, BEGIN, END, 100)
            assert await add_all(books) == 8_000
            await connection.execute("VACUUM ANALYZE ledger.request, ledger.usage_sum")
            connection.add_log_listener(listen)
            await connection.execute(
                "LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0;"
                " SET auto_explain.log_nested_statements = on; SET client_min_messages = log"
            )
            a_week = (END - timedelta(days=7, seconds=17), END - timedelta(seconds=90))
            for name, question in _QUESTIONS.items():
                for user in (None, "user 7"):
                    log.clear()
                    async with connection.transaction(readonly=True):
                        before = {row[0]: row[1:] for row in await connection.fetch(_READ)}
                        assert await connection.fetch(question, user, *a_week)
                        after = {row[0]: row[1:] for row in await connection.fetch(_READ)}
                    read = {
                        table: [one - other for one, other in zip(after[table], before.get(table, (0, 0)), strict=True)]
                        for table in after
                    }
                    # An hour at each end, 18 each, and one range of blocks in which rows above the mark could be.
                    assert (read["requests"][0], read["sums"][0]) == (0, 0), (name, user, read)
                    assert read["requests"][1] < 1000, (name, user, read)
                    assert read["sums"][1] > 0, (name, user, read)
                    plans = "\n".join(log)
                    assert not re.search("Seq Scan on (request|usage_sum)", plans), plans
                    assert re.search("Index Scan (using|on) usage_sum_default_pkey", plans), plans
                    assert re.search("Index Scan (using|on) request_default_tenant_id_proj", plans), plans
        finally:
            await connection.close()

    asyncio.run(main())


_ANOTHER_HOUR = """
INSERT INTO ledger.usage_sum
SELECT tenant_id, month, project_id, kind, whose, begins_at - interval '1 hour', name, byok, 0, 0, 0, 0
FROM ledger.usage_sum WHERE kind = 'session' AND alone
"""
# Each row: a change behind the ledger's back, the check that must notice, and a part of the place that is named.
CHANGES = [
    ("UPDATE ledger.usage_sum SET requests = requests + 1 WHERE kind = 'minute' AND whose = '*'", SUMS, "all users"),
    ("UPDATE ledger.usage_sum SET input_tokens = 7 WHERE kind = 'quarter' AND whose = '=ann'", SUMS, "user ann"),
    ("UPDATE ledger.usage_sum SET output_tokens = 9 WHERE kind = 'model' AND whose = '*'", SUMS, "model from"),
    ("UPDATE ledger.usage_sum SET amount_pico = amount_pico - 1 WHERE kind = 'session'", SUMS, "session from"),
    ("UPDATE ledger.usage_sum SET begins_at = begins_at + interval '1 hour' WHERE kind = 'session'", SUMS, "s1"),
    ("UPDATE ledger.usage_sum SET name = 'large' WHERE kind = 'model' AND whose = '=ann'", SUMS, "large"),
    ("UPDATE ledger.usage_sum SET byok = true WHERE kind = 'session' AND whose = '=ann'", SUMS, "a key of their own"),
    ("UPDATE ledger.usage_sum SET project_id = 'demo/other' WHERE kind = 'minute'", SUMS, "demo/other"),
    ("DELETE FROM ledger.usage_sum WHERE kind = 'quarter' AND whose = '*'", SUMS, "quarter from"),
    ("UPDATE ledger.request SET ended_at = ended_at - interval '2 hours'", SUMS, "all users"),
    ("DELETE FROM ledger.correction", SUMS, "all users"),
    ("UPDATE ledger.seal_progress SET rolled_until = 1", SUMS, "all users"),
    ("UPDATE ledger.seal_progress SET rolled_until = sealed_until + 1", REACH, "seal_progress"),
    ("UPDATE ledger.seal_progress SET rolled_to = rolled_to - interval '1 us'", REACH, "seal_progress"),
    (_ANOTHER_HOUR, ALONE, "s1, of demo/shop"),
]


def test_every_sum_that_was_changed_is_named(dsn: str) -> None:
    async def work(books: Books) -> None:
        one = await spend(books, 5)
        await spend(books, 6, user="bob")
        lines = '[{"class": "output", "quantity": 7, "rate_pico": 10, "amount_pico": 70, "source": "invoice"}]'
        (row,) = await books.connection.fetch(
            "SELECT result FROM ledger.correct_v1(jsonb_build_array(jsonb_build_object('tenant_id', 'acme',"
            " 'request_id', $1::uuid, 'correction_id', 'x', 'reason', 'invoice', 'source', 'invoice',"
            " 'lines', $2::text::jsonb)))", one, lines,
        )  # fmt: skip
        assert row["result"] == "corrected"
        await add_all(books)
        assert await books.findings() == []
        async with books.connection.acquire() as connection:
            for change, check, place in CHANGES:
                whole = connection.transaction()
                await whole.start()
                await connection.execute("SET LOCAL session_replication_role = replica")
                await connection.execute(change)
                found = {name: await connection.fetch(query) for name, query in usage.CHECKS.items()}
                await whole.rollback()
                assert any(place in row[0] for row in found[check]), (change, found)

    keep_books(dsn, work)


def test_the_keeper_sums_what_it_sealed_and_a_month_that_is_put_away_takes_its_sums_along(database: str) -> None:
    async def work(books: Books) -> None:
        await books.connection.execute(
            "SELECT ledger.make_partitions_v1('2020-01-01', 1)",
        )
        old = datetime(2020, 1, 10, tzinfo=UTC)
        await books.connection.execute(FILL, 50, old, old + timedelta(days=1), 3)
        await spend(books, 5)
        keeper = Keeper(books.dsn, seal_interval_s=0.0, retention_months=0)
        summed = 0
        async with asyncio.timeout(30):
            while summed < 51:
                summed += (await keeper.run_once()).usage_requests
        await keeper.aclose()
        begin = datetime(2019, 1, 1, tzinfo=UTC)
        assert sum(one.requests for one in (await totals_of(books, begin=begin)).models) == 51
        assert await books.connection.fetchval("SELECT ledger.put_month_away_v1('2020-01-01')") == "detached"
        assert sum(one.requests for one in (await totals_of(books, begin=begin)).models) == 1
        assert [f for f in await books.findings() if f.check in usage.CHECKS] == []

    keep_books(database, work, clean=False)
