"""What was used, from the books: per piece of time, and by model and session.

Both count what a request costs now: its row, and for the few that were corrected the difference to their last
correction, so that the many are summed from an index without looking at corrections one by one.
"""

from datetime import datetime
from typing import Literal

import msgspec

from behest_ledger.store.errors import mapped
from behest_ledger.store.pool import Connection

Granularity = Literal["minute", "hour", "day"]


class UsageBin(msgspec.Struct, frozen=True, kw_only=True):
    """The requests that ended in one minute, hour or day."""

    begins_at: datetime
    requests: int
    input_tokens: int
    output_tokens: int
    amount_pico: int


class UsageTotal(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over some requests of a project."""

    model: str
    session_id: str
    byok: bool
    requests: int
    input_tokens: int
    output_tokens: int
    amount_pico: int


_WHERE = "r.tenant_id = $1 AND r.project_id = $2 AND r.ended_at >= $3 AND r.ended_at < $4"

# $1 tenant, $2 project, $3 begin, $4 end, and $5 user where one is named: a plan of its own for each.
_SUMS = """
SELECT {names}, sum(requests)::bigint AS requests, sum(input_tokens)::bigint AS input_tokens,
       sum(output_tokens)::bigint AS output_tokens, sum(amount_pico)::text AS amount_pico
FROM (
    SELECT {keys}, count(*) AS requests, sum(r.input_tokens) AS input_tokens, sum(r.output_tokens) AS output_tokens,
           sum(r.amount_pico) AS amount_pico
    FROM ledger.request r WHERE {where} GROUP BY {places}
    UNION ALL
    SELECT {keys}, 0, sum(c.input_tokens - r.input_tokens), sum(c.output_tokens - r.output_tokens),
           sum(c.amount_pico - r.amount_pico)
    FROM (
        SELECT DISTINCT ON (tenant_id, month, request_id) * FROM ledger.correction WHERE tenant_id = $1
        ORDER BY tenant_id, month, request_id, number DESC) AS c
    JOIN ledger.request r USING (tenant_id, month, request_id) WHERE {where} GROUP BY {places}
) AS part GROUP BY {places} ORDER BY {places}
"""


def bins_query(*, by_user: bool) -> str:
    """The query of `usage_bins`: for who looks at its plan."""
    where, piece, zone = (f"{_WHERE} AND r.user_id = $5", "$6", "$7") if by_user else (_WHERE, "$5", "$6")
    key = f"date_trunc({piece}, r.ended_at, {zone}) AS begins_at"
    return _SUMS.format(names="begins_at", keys=key, places="1", where=where)


def totals_query(*, by_user: bool) -> str:
    """The query of `usage_by_model_and_session`: for who looks at its plan."""
    where = f"{_WHERE} AND r.user_id = $5" if by_user else _WHERE
    return _SUMS.format(
        names="model, session_id, byok", keys="r.model, r.session_id, r.byok", places="1, 2, 3", where=where
    )


async def usage_bins(
    connection: Connection,
    *,
    tenant_id: str,
    project_id: str,
    begin: datetime,
    end: datetime,
    user_id: str | None,
    granularity: Granularity,
    zone: str,
) -> list[UsageBin]:
    """The project's requests that ended in [begin, end), by minutes, hours or days of a time zone, in their order.

    A piece of time without a request is left out. `user_id` None means all users. Raises `LedgerUnavailableError`,
    and `LedgerRefusedError` for a zone that PostgreSQL does not know.
    """
    who = [] if user_id is None else [user_id]
    with mapped():
        rows = await connection.fetch(
            bins_query(by_user=bool(who)), tenant_id, project_id, begin, end, *who, granularity, zone
        )
    return [msgspec.convert(dict(row), UsageBin, strict=False) for row in rows]


async def usage_by_model_and_session(
    connection: Connection, *, tenant_id: str, project_id: str, begin: datetime, end: datetime, user_id: str | None
) -> list[UsageTotal]:
    """The project's requests that ended in [begin, end), by model, session and whose key paid.

    `user_id` None means all users. Raises `LedgerUnavailableError`.
    """
    who = [] if user_id is None else [user_id]
    with mapped():
        rows = await connection.fetch(totals_query(by_user=bool(who)), tenant_id, project_id, begin, end, *who)
    return [msgspec.convert(dict(row), UsageTotal, strict=False) for row in rows]
