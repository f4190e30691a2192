"""What people ask the books: who spent what, what is left, what runs now."""

from datetime import datetime
from typing import Any

import msgspec

from behest_ledger.store.errors import mapped
from behest_ledger.store.pool import Connection


class TopRow(msgspec.Struct, frozen=True, kw_only=True):
    """Spend of one session and model."""

    project_id: str
    user_id: str
    session_id: str
    model: str
    requests: int
    input_tokens: int
    output_tokens: int
    amount_pico: int
    live: int
    """Requests of it that run now; their cost is not in the sums above yet."""
    last_at: datetime
    live_input_tokens: int = 0
    live_output_tokens: int = 0
    live_amount_pico: int = 0
    """What those have come to so far, as of their last checkpoints: a second old, more where the ledger was away."""


async def top(connection: Connection, *, since: datetime, limit: int = 20) -> list[TopRow]:
    """The sessions and models that spent most since a time, what runs now included.

    Raises `LedgerUnavailableError` and `SchemaError`.
    """
    with mapped():
        rows = await connection.fetch(
            """
            WITH ended AS (
                SELECT project_id, user_id, session_id, model, count(*) AS requests, sum(input_tokens) AS input_tokens,
                       sum(output_tokens) AS output_tokens, sum(amount_pico) AS amount_pico, max(ended_at) AS last_at
                FROM ledger.request WHERE ended_at >= $1 GROUP BY 1, 2, 3, 4
            ), live AS (
                SELECT coalesce(attributes ->> 'project', '') AS project_id,
                       coalesce(attributes ->> 'user', '') AS user_id,
                       coalesce(attributes ->> 'session', '') AS session_id,
                       coalesce(attributes ->> 'model', '') AS model,
                       count(*) AS live, max(admitted_at) AS last_at,
                       sum(checkpoint_input_tokens) AS live_input_tokens,
                       sum(checkpoint_output_tokens) AS live_output_tokens,
                       sum(checkpoint_amount_pico) AS live_amount_pico
                FROM ledger.hold WHERE state = 'open' GROUP BY 1, 2, 3, 4
            )
            SELECT project_id, user_id, session_id, model, coalesce(requests, 0)::bigint AS requests,
                   coalesce(input_tokens, 0)::bigint AS input_tokens,
                   coalesce(output_tokens, 0)::bigint AS output_tokens,
                   coalesce(amount_pico, 0)::text AS amount_pico, coalesce(live, 0)::bigint AS live,
                   coalesce(live_input_tokens, 0)::bigint AS live_input_tokens,
                   coalesce(live_output_tokens, 0)::bigint AS live_output_tokens,
                   coalesce(live_amount_pico, 0)::text AS live_amount_pico,
                   greatest(ended.last_at, live.last_at) AS last_at
            FROM ended FULL JOIN live USING (project_id, user_id, session_id, model)
            ORDER BY coalesce(amount_pico, 0) + coalesce(live_amount_pico, 0) DESC, last_at DESC LIMIT $2""",
            since,
            limit,
        )
    return [msgspec.convert(dict(row), TopRow, strict=False) for row in rows]


class UsageTotal(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over some requests of a project."""

    model: str
    session_id: str
    byok: bool
    requests: int
    input_tokens: int
    output_tokens: int
    amount_pico: int


async def usage_by_model_and_session(
    connection: Connection, *, tenant_id: str, project_id: str, begin: datetime, end: datetime, user_id: str | None
) -> list[UsageTotal]:
    """The project's requests that ended in [begin, end), by model, session and whose key paid.

    `user_id` None means all users. Raises `LedgerUnavailableError`.
    """
    with mapped():
        rows = await connection.fetch(
            """
            SELECT model, session_id, byok, count(*) AS requests, sum(input_tokens)::bigint AS input_tokens,
                   sum(output_tokens)::bigint AS output_tokens, sum(amount_pico)::text AS amount_pico
            FROM ledger.request
            WHERE tenant_id = $1 AND project_id = $2 AND ended_at >= $3 AND ended_at < $4
              AND ($5::text IS NULL OR user_id = $5)
            GROUP BY 1, 2, 3""",
            tenant_id,
            project_id,
            begin,
            end,
            user_id,
        )
    return [msgspec.convert(dict(row), UsageTotal, strict=False) for row in rows]


class BudgetState(msgspec.Struct, frozen=True, kw_only=True):
    """One budget that applies to somebody, with its balances in its unit."""

    budget: str
    unit: str
    limit: str
    spent: str
    held: str
    remaining: str
    period: str
    enforcement: str
    suspended: bool
    resets_at: datetime | None


async def budgets_of(connection: Connection, tenant_id: str, attributes: dict[str, Any]) -> list[BudgetState]:
    """The budgets that can bind a request with these attributes; a budget not used yet shows its whole limit.

    Only an attribute that is given and does not fit leaves a budget out: without a model, budgets of any model are
    shown. Raises `LedgerUnavailableError`.
    """
    with mapped():
        rows = await connection.fetch(
            'SELECT budget_id AS budget, unit, limit_amount::text AS "limit", spent::text, held::text,'
            " remaining::text, period, enforcement, suspended, resets_at"
            " FROM ledger.budgets_of_v1($1, $2::text::jsonb)",
            tenant_id,
            msgspec.json.encode(attributes).decode(),
        )
    return [BudgetState(**dict(row)) for row in rows]
