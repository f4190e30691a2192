"""What people ask the books: who spent what, what is left, what runs now."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from behest_ledger.configuration.records import BudgetRecord
from behest_ledger.configuration.status import BudgetStatus, Phase, SubjectStatus, phase_of, spare_amount
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
                FROM ledger.request_now WHERE ended_at >= $1 GROUP BY 1, 2, 3, 4
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


class BudgetState(msgspec.Struct, frozen=True, kw_only=True):
    """One budget that applies to somebody, with its balances in its unit."""

    budget: str
    unit: str
    limit: str
    spent: str
    held: str
    overrun: str
    """Charged beyond what the window could pay; alerts and the phase count it as spent."""
    remaining: str
    """Of a soft budget it may be below zero, by as much as the limit was passed."""
    period: str
    enforcement: str
    alert_thresholds: list[int]
    suspended: bool
    resets_at: datetime | None

    @property
    def phase(self) -> Phase:
        """How the budget stands, in a word."""
        limit_amount = int(self.limit)
        return phase_of(
            limit_amount=limit_amount,
            used=int(self.spent) + int(self.overrun),
            thresholds=self.alert_thresholds,
            soft=self.enforcement == "soft",
            exhausted=int(self.remaining) < spare_amount(self.unit, limit_amount),
            suspended=self.suspended,
        )


async def budgets_of(connection: Connection, tenant_id: str, attributes: dict[str, Any]) -> list[BudgetState]:
    """The budgets that can bind a request with these attributes; a budget not used yet shows its whole limit.

    Only an attribute that is given and does not fit leaves a budget out: without a model, budgets of any model are
    shown. Raises `LedgerUnavailableError`.
    """
    with mapped():
        rows = await connection.fetch(
            'SELECT budget_id AS budget, unit, limit_amount::text AS "limit", spent::text, held::text, overrun::text,'
            " remaining::text, period, enforcement, alert_thresholds, suspended, resets_at"
            " FROM ledger.budgets_of_v2($1, $2::text::jsonb)",
            tenant_id,
            msgspec.json.encode(attributes).decode(),
        )
    return [BudgetState(**dict(row)) for row in rows]


# A window that has not ended is its subject's current one: the next one begins behind its end. (Where the server's
# clock went back it may be the one before, for as long: that is told then, and nobody's money hangs on it.)
_READ_WINDOWS = """
WITH windows AS (
    SELECT b.number, w.subject, w.spent, w.held + w.suspense AS held, w.overrun, w.ends_at, w.ceiling,
           w.limit_amount - w.spent - w.held - w.suspense AS free, b.spare::numeric AS spare,
           row_number() OVER (PARTITION BY b.number ORDER BY w.spent + w.held + w.suspense DESC, w.subject) AS place
    FROM unnest($1::text[], $2::text[], $3::text[]) WITH ORDINALITY AS b (tenant_id, budget_id, spare, number)
    JOIN ledger.budget_window w USING (tenant_id, budget_id)
    WHERE coalesce(w.ends_at, 'infinity') > statement_timestamp()
)
SELECT number, count(*) AS active, sum(spent)::text AS spent, sum(held)::text AS held, sum(overrun)::text AS overrun,
       min(CASE WHEN ceiling IS NULL THEN free ELSE greatest(free, 0) END)::text AS remaining,
       max(spent + overrun)::text AS most_used, max(ends_at) AS ends_at,
       count(*) FILTER (WHERE ceiling IS NOT NULL AND free < spare) AS exhausted,
       array_agg(ARRAY[subject::text, spent::text, held::text] ORDER BY place) FILTER (WHERE place <= 5) AS biggest
FROM windows GROUP BY number
"""


async def budget_statuses(connection: Connection, records: Sequence[BudgetRecord]) -> list[BudgetStatus]:
    """How budgets stand, in their order: current windows summed up, and the five biggest of them. One query for all.

    Raises `LedgerUnavailableError`.
    """
    with mapped():
        rows = await connection.fetch(
            _READ_WINDOWS,
            [record.tenant_id for record in records],
            [record.budget_id for record in records],
            [str(spare_amount(record.unit, record.limit_amount)) for record in records],
        )
    by_number = {row["number"]: row for row in rows}
    return [_status(record, by_number.get(number)) for number, record in enumerate(records, 1)]


async def budget_status(connection: Connection, record: BudgetRecord) -> BudgetStatus:
    """How one budget stands. Raises `LedgerUnavailableError`."""
    return (await budget_statuses(connection, [record]))[0]


def _status(record: BudgetRecord, row: Any) -> BudgetStatus:
    if row is None:
        return BudgetStatus(record=record, remaining=record.limit_amount)
    return BudgetStatus(
        record=record,
        spent=int(row["spent"]),
        held=int(row["held"]),
        overrun=int(row["overrun"]),
        remaining=int(row["remaining"]),
        active=row["active"],
        exhausted=row["exhausted"],
        most_used=int(row["most_used"]),
        window_ends_at=row["ends_at"],
        biggest=[
            SubjectStatus(subject=_subject(subject), spent=int(spent), held=int(held))
            for subject, spent, held in row["biggest"]
        ],
    )


def _subject(text: str) -> list[str]:
    """A subject's values as people read them; a session is told with its project and user."""
    parts: list[Any] = msgspec.json.decode(text, type=list[Any])
    return ["/".join(map(str, part)) if isinstance(part, list) else str(part) for part in parts]


ALERTS_SETTLE = timedelta(seconds=10)
"""So much later than it was reached a threshold may be written, because others were first: a statement has five."""
ALERTS_MAX = 10_000


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """Windows of a budget have reached one of its thresholds. What is said of one of them is of the last."""

    budget: str
    subject: list[str]
    unit: str
    percent: int
    used: str
    """Charged when it was told, overrun included; in the budget's unit."""
    limit: str
    windows: int
    first_at: datetime
    reached_at: datetime


async def alerts_since(
    connection: Connection,
    since: Mapping[tuple[str, str], datetime],
    *,
    settle: timedelta = ALERTS_SETTLE,
    limit: int = ALERTS_MAX,
) -> list[Alert]:
    """The thresholds of budgets that were reached after a time, one alert for all windows that reached the same.

    `since` has that time for each budget, (tenant, budget's id). Asked again from the latest `reached_at` of a budget
    it tells the rest, each window once. That is why it stops `settle` before now, and of budgets with subjects, which
    may be thousands, at a whole minute. Of each budget it looks at the `limit` windows that were first.
    Raises `LedgerUnavailableError`.
    """
    with mapped():
        rows = await connection.fetch(
            """
            SELECT DISTINCT ON (a.tenant_id, a.budget_id, a.percent)
                   a.budget_id AS budget, a.subject::text AS subject, b.unit, a.percent, a.used::text,
                   a.limit_amount::text AS "limit", a.reached_at,
                   count(*) OVER same AS windows, min(a.reached_at) OVER same AS first_at
            FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS s (tenant_id, budget_id, since)
            JOIN ledger.budget b USING (tenant_id, budget_id)
            CROSS JOIN LATERAL (
                SELECT * FROM ledger.budget_alert a
                WHERE a.tenant_id = s.tenant_id AND a.budget_id = s.budget_id AND a.reached_at > s.since
                  AND a.reached_at <= CASE WHEN b.per = '{}' THEN clock_timestamp() - $4::interval
                                           ELSE date_trunc('minute', clock_timestamp() - $4::interval) END
                ORDER BY a.reached_at FETCH FIRST $5 ROWS WITH TIES) AS a
            WINDOW same AS (PARTITION BY a.tenant_id, a.budget_id, a.percent)
            ORDER BY a.tenant_id, a.budget_id, a.percent, a.reached_at DESC, a.window_id DESC""",
            [tenant_id for tenant_id, _ in since],
            [budget_id for _, budget_id in since],
            list(since.values()),
            settle,
            limit,
        )
    return [msgspec.convert({**row, "subject": _subject(row["subject"])}, Alert) for row in map(dict, rows)]
