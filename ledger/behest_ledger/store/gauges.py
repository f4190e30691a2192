"""How budgets and the books stand, as numbers to be told: read by the one keeper that works, for everybody.

Told by each sidecar they would be there as often as there are sidecars, and of as many sessions as these have. So there
is one set of series a Budget, whatever it is per, and at most `BUDGETS_MAX` of them; Tiers are not told of.
"""

from typing import Any

import msgspec

from behest_ledger.money import PICO_PER_USD
from behest_ledger.store.pool import Connection
from behest_ledger.telemetry.names import SERIES_MAX

BUDGETS_MAX = SERIES_MAX
"""Budgets that are told of, in the order of tenant and name: the same ones every time."""

# A window that has not ended is its subject's current one: the next one begins behind its end. (Where the server's
# clock went back it may be the one before, for as long: that is told then, and nobody's money hangs on it.)
_BUDGETS = """
WITH told AS MATERIALIZED (
    SELECT * FROM ledger.budget WHERE deleted_at IS NULL AND name NOT LIKE 'tier:%'
    ORDER BY tenant_id, budget_id LIMIT $1
), sums AS MATERIALIZED (
    SELECT n.tenant_id, n.budget_id, sum(n.limit_amount) AS limit_amount, sum(n.spent) AS spent,
           sum(n.held + n.suspense) AS held, sum(n.limit_amount - n.spent - n.held - n.suspense) AS free,
           min(n.ends_at) AS first_end, max(n.ends_at) AS ends_at, max(n.ends_at - n.starts_at) AS period,
           count(*) FILTER (WHERE n.ceiling IS NOT NULL
               -- As `spare_amount` of configuration/status.py has it.
               AND n.limit_amount - n.spent - n.held - n.suspense < greatest(1, CASE n.unit
                   WHEN 'usd' THEN least(div(n.limit_amount, 1000), 1000000000)
                   WHEN 'tokens' THEN least(div(n.limit_amount, 100), 16) ELSE 1 END)) AS exhausted
    FROM told b JOIN ledger.budget_window n USING (tenant_id, budget_id)
    WHERE coalesce(n.ends_at, 'infinity') > statement_timestamp()
    GROUP BY n.tenant_id, n.budget_id
)
SELECT b.tenant_id, b.budget_id, b.unit, coalesce(w.limit_amount, b.limit_amount)::float8 AS limit_amount,
       coalesce(w.spent, 0)::float8 AS spent, coalesce(w.held, 0)::float8 AS held,
       coalesce(w.free, b.limit_amount)::float8 AS remaining, coalesce(w.exhausted, 0) AS exhausted,
       extract(epoch FROM CASE WHEN w.spent IS NULL THEN c.ends_at WHEN w.first_end = w.ends_at THEN w.ends_at
               END)::float8 AS resets_at_s,
       extract(epoch FROM coalesce(w.period, c.ends_at - c.starts_at))::float8 AS period_s
FROM told b LEFT JOIN sums w USING (tenant_id, budget_id)
LEFT JOIN LATERAL (
    SELECT * FROM ledger.window_bounds_v1(b.period, b.alignment, b.time_zone, clock_timestamp())
    WHERE w.spent IS NULL AND b.alignment = 'calendar' AND b.period <> 'lifetime') AS c ON true
ORDER BY b.tenant_id, b.budget_id
"""

_BOOKS = """
SELECT (SELECT count(*) FROM ledger.budget WHERE deleted_at IS NULL AND name NOT LIKE 'tier:%') AS budgets,
       (SELECT count(*) FROM ledger.holder WHERE fenced_at IS NULL AND expires_at > clock_timestamp()) AS holders,
       s.number AS suspense, coalesce(extract(epoch FROM clock_timestamp() - s.since), 0)::float8 AS suspense_age_s
FROM (SELECT count(*) AS number, min(suspense_at) AS since FROM ledger.hold WHERE state = 'suspense') AS s
"""


class BudgetGauges(msgspec.Struct, frozen=True, kw_only=True):
    """One Budget's current windows together; amounts are USD, tokens or requests, for the eye and not for bills."""

    tenant_id: str
    budget_id: str
    unit: str
    limit: float
    spent: float
    held: float
    remaining: float
    exhausted: int
    period_s: float | None
    resets_at_s: float | None
    """Unix time."""


class BooksGauges(msgspec.Struct, frozen=True, kw_only=True):
    """How the books stand."""

    budgets: list[BudgetGauges]
    budgets_untold: int
    holders: int
    suspense: int
    suspense_age_s: float


async def read_gauges(connection: Connection) -> BooksGauges:
    """All of it. Raises asyncpg's errors: it is called inside of a keeper's round."""
    rows = await connection.fetch(_BUDGETS, BUDGETS_MAX)
    books = await connection.fetchrow(_BOOKS)
    return BooksGauges(
        budgets=[_of(row) for row in rows],
        budgets_untold=max(0, books["budgets"] - len(rows)),
        holders=books["holders"],
        suspense=books["suspense"],
        suspense_age_s=max(0.0, books["suspense_age_s"]),
    )


def _of(row: Any) -> BudgetGauges:
    scale = PICO_PER_USD if row["unit"] == "usd" else 1
    return BudgetGauges(
        tenant_id=row["tenant_id"],
        budget_id=row["budget_id"],
        unit=row["unit"],
        limit=row["limit_amount"] / scale,
        spent=row["spent"] / scale,
        held=row["held"] / scale,
        remaining=row["remaining"] / scale,
        exhausted=row["exhausted"],
        period_s=row["period_s"],
        resets_at_s=row["resets_at_s"],
    )
