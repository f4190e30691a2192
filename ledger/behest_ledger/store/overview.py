"""What is going on, at a glance: live spend, cost per model over time, top sessions, recent requests, budgets.

For a person who looks on, not for bills: everything is of a time that is over in a moment, and every list is short.
What is asked is bounded by a look-back and by the timeout of the connection.
"""

from datetime import datetime, timedelta
from typing import Any

import msgspec

from behest_ledger.configuration.records import is_tier_budget
from behest_ledger.configuration.status import BudgetStatus
from behest_ledger.store.configuration import read_budgets
from behest_ledger.store.errors import mapped
from behest_ledger.store.pool import Connection

MODELS_MAX = 6
"""Models with a line of their own; the others are one."""
SESSIONS_MAX = 12
REQUESTS_MAX = 30
FOUND_MAX = 20
BUDGETS_MAX = 40
OTHERS = "others"

# What requests cost now: their rows, and for the few that were corrected the difference (see usage.py).
_COSTS = """
cost AS MATERIALIZED (
    SELECT {keys}, count(*) AS requests, sum(r.input_tokens + r.output_tokens) AS tokens,
           sum(r.amount_pico) AS amount, max(r.ended_at) AS last_at
    FROM ledger.request r WHERE r.ended_at >= $1 GROUP BY {places}
    UNION ALL
    SELECT {keys}, 0, sum(c.input_tokens + c.output_tokens - r.input_tokens - r.output_tokens),
           sum(c.amount_pico - r.amount_pico), max(r.ended_at)
    FROM (
        SELECT DISTINCT ON (tenant_id, month, request_id) * FROM ledger.correction WHERE corrected_at >= $1
        ORDER BY tenant_id, month, request_id, number DESC) AS c
    JOIN ledger.request r USING (tenant_id, month, request_id) WHERE r.ended_at >= $1 GROUP BY {places}
)"""

_MODELS = """
WITH {costs},
top AS (SELECT model FROM cost GROUP BY model ORDER BY sum(amount) DESC, model LIMIT $3)
SELECT bin, CASE WHEN top.model IS NULL THEN $4::text ELSE top.model END AS model, top.model IS NULL AS is_others,
       sum(requests)::bigint AS requests, sum(tokens)::bigint AS tokens, sum(amount)::text AS amount_pico
FROM cost LEFT JOIN top ON top.model = cost.model GROUP BY 1, 2, 3 ORDER BY 1, 3, 2
"""
MODELS_QUERY = _MODELS.format(costs=_COSTS.format(keys="date_bin($2, r.ended_at, $1) AS bin, r.model", places="1, 2"))
"""$1 since, $2 a piece's length, $3 models, $4 what the others are called."""

_SESSIONS = """
WITH {costs},
live AS (
    SELECT tenant_id, coalesce(attributes ->> 'project', '') AS project_id,
           coalesce(attributes ->> 'user', '') AS user_id, coalesce(attributes ->> 'session', '') AS session_id,
           count(*) AS live, sum(checkpoint_amount_pico) AS amount,
           sum(checkpoint_input_tokens + checkpoint_output_tokens) AS tokens, max(admitted_at) AS last_at
    FROM ledger.hold WHERE state = 'open' GROUP BY 1, 2, 3, 4
), ended AS (
    SELECT tenant_id, project_id, user_id, session_id, sum(requests) AS requests, sum(tokens) AS tokens,
           sum(amount) AS amount, max(last_at) AS last_at
    FROM cost GROUP BY 1, 2, 3, 4
)
SELECT tenant_id, project_id, user_id, session_id, coalesce(requests, 0)::bigint AS requests,
       coalesce(live, 0)::bigint AS live, (coalesce(ended.tokens, 0) + coalesce(live.tokens, 0))::bigint AS tokens,
       (coalesce(ended.amount, 0) + coalesce(live.amount, 0))::text AS amount_pico,
       greatest(ended.last_at, live.last_at) AS last_at
FROM ended FULL JOIN live USING (tenant_id, project_id, user_id, session_id)
WHERE $2::text IS NULL OR starts_with(session_id, $2)
ORDER BY coalesce(ended.amount, 0) + coalesce(live.amount, 0) DESC, last_at DESC LIMIT $3
"""
SESSIONS_QUERY = _SESSIONS.format(
    costs=_COSTS.format(keys="r.tenant_id, r.project_id, r.user_id, r.session_id", places="1, 2, 3, 4")
)

# By key, tenant by tenant: no look-back is needed, and nothing but those that were admitted last is read.
REQUESTS_QUERY = """
SELECT n.* FROM (SELECT DISTINCT tenant_id FROM ledger.project) AS t
CROSS JOIN LATERAL (
    SELECT r.request_id::text, r.tenant_id, r.project_id, r.user_id, r.session_id, r.model, r.outcome,
           r.input_tokens, r.output_tokens, r.amount_pico::text, r.admitted_at, r.ended_at
    FROM ledger.request r
    WHERE r.tenant_id = t.tenant_id AND r.month >= ($1::timestamptz AT TIME ZONE 'UTC')::date
    ORDER BY r.month DESC, r.request_id DESC LIMIT $2) AS n
ORDER BY n.ended_at DESC, n.request_id DESC LIMIT $2
"""

LIVE_QUERY = """
SELECT count(*) AS live, coalesce(sum(checkpoint_amount_pico), 0)::text AS amount_pico
FROM ledger.hold WHERE state = 'open'
"""


class ModelBin(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests of a model that ended in a piece of time cost."""

    begins_at: datetime
    model: str
    is_others: bool
    """Not one model, but all that have no line of their own."""
    requests: int
    tokens: int
    amount_pico: int


class SessionSpend(msgspec.Struct, frozen=True, kw_only=True):
    """A session's spend since the begin, what runs now included."""

    tenant_id: str
    project_id: str
    user_id: str
    session_id: str
    requests: int
    live: int
    tokens: int
    amount_pico: int
    last_at: datetime


class RecentRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that ended."""

    request_id: str
    tenant_id: str
    project_id: str
    user_id: str
    session_id: str
    model: str
    outcome: str
    input_tokens: int
    output_tokens: int
    amount_pico: int
    admitted_at: datetime
    ended_at: datetime


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, as of about now."""

    live: int
    live_pico: int
    """What the requests that run have come to, as of their last checkpoints: a second old or more."""
    bins: list[ModelBin]
    sessions: list[SessionSpend]
    requests: list[RecentRequest]
    budgets: list[BudgetStatus]
    """The fullest first, at most `BUDGETS_MAX`."""
    budgets_left_out: int


async def read_overview(connection: Connection, *, since: datetime, piece: timedelta) -> Overview:
    """What is going on since a time, cost per model in pieces of that length.

    Raises `LedgerUnavailableError`, also where it took longer than the connection's timeout.
    """
    with mapped():
        (live,) = await connection.fetch(LIVE_QUERY)
        bins = await connection.fetch(MODELS_QUERY, since, piece, MODELS_MAX, OTHERS)
        requests = await connection.fetch(REQUESTS_QUERY, since.replace(day=1), REQUESTS_MAX)
    sessions = await find_sessions(connection, since=since, limit=SESSIONS_MAX)
    budgets = [one for one in await read_budgets(connection, None, None) if not is_tier_budget(one.record)]
    budgets.sort(key=_fullness, reverse=True)
    return Overview(
        live=live["live"],
        live_pico=int(live["amount_pico"]),
        bins=[_of(ModelBin, {**row, "begins_at": row["bin"]}) for row in map(dict, bins)],
        sessions=sessions,
        requests=[_of(RecentRequest, dict(row)) for row in requests],
        budgets=budgets[:BUDGETS_MAX],
        budgets_left_out=max(0, len(budgets) - BUDGETS_MAX),
    )


async def find_sessions(
    connection: Connection, *, since: datetime, prefix: str | None = None, limit: int = FOUND_MAX
) -> list[SessionSpend]:
    """The sessions that spent most since a time; with `prefix` those whose ids begin so. Raises as `read_overview`."""
    with mapped():
        rows = await connection.fetch(SESSIONS_QUERY, since, prefix, limit)
    return [_of(SessionSpend, dict(row)) for row in rows]


def _fullness(status: BudgetStatus) -> float:
    """How much of the limit the fullest subject has used or holds: an order, no amount."""
    biggest = status.biggest[0].spent + status.biggest[0].held if status.biggest else status.spent + status.held
    return biggest / status.record.limit_amount if status.record.limit_amount else 1.0


def _of(kind: Any, row: dict[str, Any]) -> Any:
    return msgspec.convert(row, kind, strict=False)
