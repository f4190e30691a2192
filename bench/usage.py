"""Questions about usage over a million requests: how long they take, and what it costs to keep them so."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

from bench.books import TENANT, Spread
from bench.cpu import snapshot, used_since_s

from behest_ledger.store.pool import Connection, connect
from behest_ledger.store.usage import add_up, usage_bins, usage_totals

REQUESTS = 1_000_000
DAYS = 30
USERS = 2_000
SESSION_REQUESTS = 20
TARGET_MS = 100.0
ASKED = 20
_PROJECT = "shop/web"
_BATCH = 50_000

_FILL = """
INSERT INTO ledger.request (tenant_id, month, request_id, project_id, namespace, user_id, session_id, model, attributes,
                            outcome, source, input_tokens, output_tokens, amount_pico, price_key, byok, facts,
                            admitted_at, ended_at)
SELECT $1, date_trunc('month', t AT TIME ZONE 'UTC'), gen_random_uuid(), $2, 'shop',
       CASE WHEN n % 2 = 0 THEN 'service' ELSE 'user-' || n / $7 % $6 END, 'session-' || n / $7, 'model-' || n % 5,
       '{}', 'completed', 'provider', 1000 + n % 997, n % 499, (n % 9973)::numeric * 1000003, '', n / $7 % 10 = 0,
       '{"requests": 1}', t, t
FROM generate_series($3::integer, $4::integer) AS n,
     LATERAL (SELECT $5::timestamptz + (n::float8 / $8::integer) * $9::interval) AS k (t)
"""
_CORRECT = """
INSERT INTO ledger.correction (tenant_id, month, request_id, number, correction_id, reason, outcome, source,
                               input_tokens, output_tokens, amount_pico, facts)
SELECT tenant_id, month, request_id, 1, 'invoice', 'invoice', 'completed', 'invoice', 7, 7, 7, '{}'
FROM ledger.request WHERE (input_tokens, output_tokens) = (1003, 7)
"""


async def measure(dsn: str, say: Callable[[str], None]) -> AsyncGenerator[str]:
    """Fill a database, let it be added up as the keeper does, and ask: a line each."""
    connection: Connection = await connect(dsn)
    try:
        end = datetime.now(UTC)
        say(f"usage: {REQUESTS:,} requests are written and added up")
        yield await _fill(connection, end)
        await connection.execute("VACUUM ANALYZE ledger.request, ledger.usage_sum, ledger.correction", timeout=120)
        for line in await _ask(connection, end, say):
            yield line
    finally:
        await connection.close()


async def _fill(connection: Connection, end: datetime) -> str:
    """Write what is asked about. Nothing is sealed, which would take longer than all else: only the mark is set."""
    begin = end - timedelta(days=DAYS)
    added, took_s, cpu_s = 0, 0.0, 0.0
    server = connection.get_server_pid()
    for first in range(0, REQUESTS, _BATCH):
        await connection.execute(
            _FILL, TENANT, _PROJECT, first, first + _BATCH - 1, begin, USERS, SESSION_REQUESTS, REQUESTS,
            timedelta(days=DAYS), timeout=60,
        )  # fmt: skip
        if first == REQUESTS // 2:
            await connection.execute(_CORRECT, timeout=60)
        await connection.execute("UPDATE ledger.seal_progress SET sealed_until = txid_current() + tx_added")
        started_s, before = time.perf_counter(), snapshot([server])
        more = True
        while more:
            result = await add_up(connection, calls_max=1)
            added, more = added + result.requests, result.more
        took_s += time.perf_counter() - started_s
        cpu_s += used_since_s(before)
    rows = await connection.fetchval("SELECT count(*) FROM ledger.usage_sum")
    return (
        f"usage-sums: {added:,} requests were added up in {took_s:.1f} s, {cpu_s / added * 1e6:.0f} us of CPU"
        f" of PostgreSQL each, by the keeper and beside all requests: {rows:,} rows"
    )


async def _ask(connection: Connection, end: datetime, say: Callable[[str], None]) -> list[str]:
    month, week = end - timedelta(days=DAYS, seconds=1234), end - timedelta(days=7, seconds=1234)
    lines: list[str] = []

    def bins(granularity: str, zone: str, begin: datetime, user: str | None) -> Callable[[], Awaitable[object]]:
        return lambda: usage_bins(
            connection, tenant_id=TENANT, project_id=_PROJECT, begin=begin, end=end, user_id=user,
            granularity=granularity, zone=zone,  # type: ignore[arg-type]
        )  # fmt: skip

    def totals(user: str | None) -> Callable[[], Awaitable[object]]:
        return lambda: usage_totals(
            connection, tenant_id=TENANT, project_id=_PROJECT, begin=month, end=end, user_id=user
        )

    questions = {
        "project, a month by the day": bins("day", "Asia/Kathmandu", month, None),
        "project, a month by the hour": bins("hour", "Europe/Berlin", month, None),
        "project, a week by the minute": bins("minute", "UTC", week, None),
        "project, a month by model and session": totals(None),
        "a user of 500,000 requests, a month by the day": bins("day", "Asia/Kathmandu", month, "service"),
        "a user of 500,000 requests, a week by the minute": bins("minute", "UTC", week, "service"),
        "a user of 500,000 requests, a month by model and session": totals("service"),
        "a user of 250 requests, a month by the hour": bins("hour", "UTC", month, "user-7"),
    }
    for name, ask in questions.items():
        say(f"usage: {name}")
        await ask()
        times_s: list[float] = []
        before = snapshot([connection.get_server_pid()])
        for _ in range(ASKED):
            started_s = time.perf_counter()
            await ask()
            times_s.append(time.perf_counter() - started_s)
        spread = Spread(times_s)
        met = "met" if spread.ms(1.0) <= TARGET_MS else "NOT met"
        lines.append(
            f"usage: {name}: p50 {spread.ms(0.5):.0f} ms, max {spread.ms(1.0):.0f} ms of {ASKED}"
            f" (target <= {TARGET_MS:.0f} ms: {met}); {used_since_s(before) / ASKED * 1e3:.0f} ms of PostgreSQL's CPU"
        )
    return lines
