"""Usage sums: equal to the books to the last unit, for every piece of time, and read from an index."""

import asyncio
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from behest_ledger.store.pool import connect
from behest_ledger.store.usage import (
    Granularity,
    UsageTotal,
    bins_query,
    totals_query,
    usage_bins,
    usage_by_model_and_session,
)
from ledger.books import Books, granted, keep_books, settlement

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
FAR_AHEAD = datetime(2100, 1, 1, tzinfo=UTC)


async def spend(books: Books, output: int, **who: Any) -> None:
    one, answer = await books.admit(need=output, **who)
    granted(answer)
    await books.settle(settlement(one, input=1, output=output))


def test_usage_is_summed_by_model_session_and_whose_key_paid(dsn: str) -> None:
    async def work(books: Books) -> None:
        await spend(books, 5)
        await spend(books, 6)
        await spend(books, 7, user="bob")
        await spend(books, 8, byok=True)
        await spend(books, 9, project="demo/other")

        async def usage(user_id: str | None = None, **between: datetime) -> list[UsageTotal]:
            times: dict[str, Any] = {"begin": LONG_AGO, "end": FAR_AHEAD, **between}
            found = await usage_by_model_and_session(
                books.connection, tenant_id="acme", project_id="demo/shop", user_id=user_id, **times
            )
            return sorted(found, key=lambda one: one.amount_pico)

        own = UsageTotal(
            model="small", session_id="s1", byok=True, requests=1, input_tokens=1, output_tokens=8, amount_pico=83
        )
        assert await usage() == [
            own,
            UsageTotal(model="small", session_id="s1", byok=False, requests=3, input_tokens=3, output_tokens=18,
                       amount_pico=189),
        ]  # fmt: skip
        assert [(one.byok, one.requests) for one in await usage("ann")] == [(True, 1), (False, 2)]
        assert await usage("eve") == []
        # The begin is in, the end is out.
        first, last = await books.connection.fetchrow(
            "SELECT min(ended_at), max(ended_at) FROM ledger.request WHERE project_id = 'demo/shop'"
        )
        assert sum(one.requests for one in await usage(begin=first, end=last)) == 3

    keep_books(dsn, work)


FILL = """
INSERT INTO ledger.request (tenant_id, month, request_id, project_id, namespace, user_id, session_id, model, attributes,
                            outcome, source, input_tokens, output_tokens, amount_pico, price_key, facts, admitted_at,
                            ended_at)
SELECT 'acme', date_trunc('month', t), gen_random_uuid(), 'demo/shop', 'demo', 'user ' || n % $4::integer, 's1',
       'small', '{}', 'completed', 'provider', n % 97, n % 89, (n % 83)::numeric * 1000003, '', '{}', t, t
FROM generate_series(1, $1::integer) AS n,
     LATERAL (SELECT $2::timestamptz + ($3::timestamptz - $2::timestamptz) * (n::float8 / $1::integer)) AS k (t)
"""
"""$1 requests of $4 users, spread over the time from $2 to $3."""

CORRECT = """
INSERT INTO ledger.correction (tenant_id, month, request_id, number, correction_id, reason, outcome, source,
                               input_tokens, output_tokens, amount_pico, facts)
SELECT tenant_id, month, request_id, number, number::text, 'invoice', 'completed', 'invoice', number, 7 * number,
       number * 10::numeric ^ 20, '{}'
FROM ledger.request, generate_series(1, 2) AS number WHERE input_tokens % 10 = 0
"""
BEGIN, END = datetime(2025, 10, 20, tzinfo=UTC), datetime(2025, 11, 8, tzinfo=UTC)
"""The end of summer time in Europe and in America is between them."""


def begin_of(moment: datetime, granularity: Granularity, zone: ZoneInfo) -> datetime:
    """As a calendar of the zone says it; hours are counted in elapsed time, so that none is there twice as long."""
    local = moment.astimezone(zone)
    if granularity == "day":
        return local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0).astimezone(UTC)
    into = timedelta(seconds=local.second, microseconds=local.microsecond)
    if granularity == "hour":
        into += timedelta(minutes=local.minute)
    return moment - into


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"])
@pytest.mark.parametrize("granularity", ["minute", "hour", "day"])
def test_every_piece_of_time_in_every_zone_is_the_sum_of_its_requests(
    dsn: str, granularity: Granularity, zone: str
) -> None:
    async def work(books: Books) -> None:
        await books.connection.execute(FILL, 700, BEGIN, END, 3)
        await books.connection.execute(CORRECT)
        rows = await books.connection.fetch(
            "SELECT user_id, ended_at, input_tokens, output_tokens, amount_pico::text FROM ledger.request_now"
        )
        random.Random(zone + granularity).shuffle(rows)
        begin, end = rows[0]["ended_at"], rows[1]["ended_at"]
        for user_id, since, until in [(None, BEGIN, FAR_AHEAD), ("user 1", min(begin, end), max(begin, end))]:
            expected: dict[datetime, Counter[str]] = {}
            for row in rows:
                if since <= row["ended_at"] < until and user_id in (None, row["user_id"]):
                    sums = expected.setdefault(begin_of(row["ended_at"], granularity, ZoneInfo(zone)), Counter())
                    sums["requests"] += 1
                    sums["input_tokens"] += row["input_tokens"]
                    sums["output_tokens"] += row["output_tokens"]
                    sums["amount_pico"] += int(row["amount_pico"])
            found = await usage_bins(
                books.connection, tenant_id="acme", project_id="demo/shop", begin=since, end=until, user_id=user_id,
                granularity=granularity, zone=zone,
            )  # fmt: skip
            assert [one.begins_at for one in found] == sorted(expected)
            for one in found:
                sums = expected[one.begins_at]
                assert (one.requests, one.input_tokens) == (sums["requests"], sums["input_tokens"])
                assert (one.output_tokens, one.amount_pico) == (sums["output_tokens"], sums["amount_pico"])

    keep_books(dsn, work, clean=False)


def test_totals_count_the_last_correction_of_each_request(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.connection.execute(FILL, 300, BEGIN, END, 3)
        await books.connection.execute(CORRECT)
        for user_id in (None, "user 2"):
            (found,) = await usage_by_model_and_session(
                books.connection, tenant_id="acme", project_id="demo/shop", begin=BEGIN, end=FAR_AHEAD, user_id=user_id
            )
            row = await books.connection.fetchrow(
                "SELECT count(*) AS requests, sum(input_tokens) AS input, sum(output_tokens) AS output,"
                " sum(amount_pico)::text AS amount FROM ledger.request_now WHERE $1::text IS NULL OR user_id = $1",
                user_id,
            )
            assert (found.requests, found.input_tokens, found.output_tokens) == (
                row["requests"], row["input"], row["output"],
            )  # fmt: skip
            assert found.amount_pico == int(row["amount"])

    keep_books(dsn, work, clean=False)


@pytest.mark.parametrize("by_user", [False, True])
def test_usage_by_time_reads_an_index_and_no_table(database: str, by_user: bool) -> None:
    # `database`: it is vacuumed, as a ledger's is by PostgreSQL itself.
    async def main() -> None:
        connection = await connect(database)
        try:
            await connection.execute(FILL, 20_000, BEGIN, END, 100)
            await connection.execute("VACUUM ANALYZE ledger.request")
            who = ["user 7"] if by_user else []
            since = END - timedelta(days=1)
            plan = await connection.fetch(
                "EXPLAIN " + bins_query(by_user=by_user), "acme", "demo/shop", since, END, *who, "hour", "UTC"
            )
            text = "\n".join(row[0] for row in plan)
            index = (
                "request_default_tenant_id_project_id_user_id_ended_at" if by_user else "request_default_tenant_id_proj"
            )
            assert f"Index Only Scan using {index}" in text, text
            assert "Seq Scan on request_default" not in text, text
            plan = await connection.fetch(
                "EXPLAIN " + totals_query(by_user=by_user), "acme", "demo/shop", since, END, *who
            )
            text = "\n".join(row[0] for row in plan)
            assert "Seq Scan on request_default" not in text, text
        finally:
            await connection.close()

    asyncio.run(main())
