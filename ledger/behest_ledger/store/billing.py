"""The bill, hour by hour: every usage line once, in the hour in which the ledger wrote it.

A settlement is in the hour in which its request ended, a correction in the hour in which it was made. So periods that
follow each other have every line in exactly one of them, and their sums are the ledger's.
"""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import msgspec

from behest_ledger.billing import HOUR, BillingRow
from behest_ledger.store.errors import mapped
from behest_ledger.store.pool import Connection

FETCHED_ROWS = 1000
"""Rows that are in memory at once: what a cursor brings in one round trip."""

HOUR_TIMEOUT_S = 120.0
"""For the sums of one hour. They are read from the lines themselves, so a busy hour takes some seconds."""

OVER_AFTER = timedelta(minutes=2)
"""How long after its end an hour counts as over. A line bears the time at which its statement began, and is seen when
that is committed: a settlement within `COMMAND_TIMEOUT_S`, what the keeper charges within its round of a minute."""

# $1 begin, $2 end; $3 tenant and $4 project, where the bill is one project's. The requests of an hour first, then their
# lines by key: the settings forbid to read all lines of a month for it.
_LINES = """
WITH line AS (
    SELECT r.*, r.ended_at AS booked_at, 'charge' AS part, u.class, u.rate_pico, u.quantity,
           u.amount_pico AS line_pico, u.source AS line_source
    FROM ledger.request r
    JOIN ledger.usage_line u ON u.tenant_id = r.tenant_id AND u.month = r.month AND u.request_id = r.request_id
                            AND u.entry = 0
    WHERE r.ended_at >= $1 AND r.ended_at < $2{where}
    UNION ALL
    SELECT r.*, c.corrected_at, CASE WHEN u.entry % 2 = 1 THEN 'reversal' ELSE 'replacement' END, u.class, u.rate_pico,
           u.quantity, u.amount_pico, u.source
    FROM ledger.correction c
    JOIN ledger.request r ON r.tenant_id = c.tenant_id AND r.month = c.month AND r.request_id = c.request_id
    JOIN ledger.usage_line u ON u.tenant_id = r.tenant_id AND u.month = r.month AND u.request_id = r.request_id
                            AND u.entry IN (2 * c.number - 1, 2 * c.number)
    WHERE c.corrected_at >= $1 AND c.corrected_at < $2{where}
)
SELECT date_trunc('hour', ended_at, 'UTC') AS hour, date_trunc('month', booked_at, 'UTC') AS booked_month, part,
       tenant_id, project_id, model, coalesce(attributes ->> 'upstream', '') AS upstream,
       coalesce(attributes ->> 'upstream_model', model) AS upstream_model, byok,
       coalesce(split_part(attributes ->> 'workload', '/', 1), namespace) AS namespace,
       substr(attributes ->> 'workload', strpos(attributes ->> 'workload', '/') + 1) AS workload,
       attributes ->> 'team' AS team, attributes ->> 'cost_center' AS cost_center, price_key,
       class AS token_class, rate_pico::text AS rate_pico, line_source AS source,
       sum(quantity)::text AS quantity, sum(line_pico)::text AS amount_pico{session}
FROM line
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, rate_pico, line_source{session}
ORDER BY 1, 4, 5, 6, 15, 3, 14, rate_pico, line_source, 2, 7, 8, 9, 10, 11, 12, 13{session}
"""

_SETTINGS = ("enable_hashjoin = off", "enable_mergejoin = off", "jit = off")


def lines_query(*, of_project: bool, by_session: bool) -> str:
    """The query of one hour: for who looks at its plan."""
    return _LINES.format(
        where=" AND r.tenant_id = $3 AND r.project_id = $4" if of_project else "",
        session=", user_id, session_id" if by_session else "",
    )


async def hours_over(connection: Connection) -> datetime:
    """The end of the last hour that gets no more lines, by the database's clock, which is that of the lines.

    Raises `LedgerUnavailableError`.
    """
    with mapped():
        found: datetime = await connection.fetchval(
            "SELECT date_trunc('hour', clock_timestamp() - $1::interval, 'UTC')", OVER_AFTER
        )
    return found


async def billing_rows(
    connection: Connection,
    begin: datetime,
    end: datetime,
    *,
    project: tuple[str, str] | None = None,
    by_session: bool = False,
) -> AsyncIterator[tuple[datetime, list[BillingRow]]]:
    """What was charged in [begin, end), whole hours: pieces of at most `FETCHED_ROWS` rows, with the hour they are of.

    `project` is (tenant, project's id). Each hour is read as it is when it is reached, in a transaction of its own: an
    hour before `hours_over` does not change any more, and no snapshot is held that would keep the ledger from cleaning
    up.
    Raises `LedgerUnavailableError`.
    """
    query = lines_query(of_project=project is not None, by_session=by_session)
    who = project or ()
    hour = await _next_hour(connection, begin, end, *who)
    while hour < end:
        nothing = True
        async for rows in _of_one_hour(connection, query, hour, *who):
            if rows:
                nothing = False
                yield hour, rows
        hour += HOUR
        if nothing:
            hour = await _next_hour(connection, hour, end, *who)


_NEXT = """
SELECT least((SELECT min(r.ended_at) FROM ledger.request r WHERE r.ended_at >= $1 AND r.ended_at < $2{request}),
             (SELECT min(c.corrected_at) FROM ledger.correction c
              WHERE c.corrected_at >= $1 AND c.corrected_at < $2{correction}))
"""


def next_query(*, of_project: bool) -> str:
    """The query that looks for the next hour with a line: for who looks at its plan."""
    return _NEXT.format(
        request=" AND r.tenant_id = $3 AND r.project_id = $4" if of_project else "",
        # Whose project a correction is of is not in its row: an hour too many is looked at.
        correction=" AND c.tenant_id = $3" if of_project else "",
    )


async def _next_hour(connection: Connection, hour: datetime, end: datetime, *who: str) -> datetime:
    """The next hour in which anything was written; `end`: none. What is looked at grows with the gap, not beyond."""
    query = next_query(of_project=bool(who))
    span = HOUR
    while hour < end:
        with mapped():
            found: datetime | None = await connection.fetchval(
                query, hour, min(hour + span, end), *who, timeout=HOUR_TIMEOUT_S
            )
        if found is not None:
            return found.replace(minute=0, second=0, microsecond=0)
        hour += span
        span *= 2
    return end


async def _of_one_hour(
    connection: Connection, query: str, hour: datetime, *who: str
) -> AsyncIterator[list[BillingRow]]:
    with mapped():
        async with connection.transaction(readonly=True):
            for setting in _SETTINGS:
                await connection.execute(f"SET LOCAL {setting}")
            cursor = await connection.cursor(query, hour, hour + HOUR, *who, timeout=HOUR_TIMEOUT_S)
            while True:
                rows: list[Any] = await cursor.fetch(FETCHED_ROWS, timeout=HOUR_TIMEOUT_S)
                yield [msgspec.convert(dict(row), BillingRow, strict=False) for row in rows]
                if len(rows) < FETCHED_ROWS:
                    return
