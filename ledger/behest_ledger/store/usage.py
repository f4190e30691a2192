"""What was used, from the books: per piece of time, by model and by session.

A question is answered from sums (`ledger.usage_sum`) as far as they go, and from the requests beside and after them,
in one snapshot: equal to the books to the last unit at every moment. The sums are made by the keeper, of what is sealed
(`add_up`); what a request costs now counts, so its last correction. Before the keeper has been there once, everything
is read from the requests: slower, and the same. `CHECKS` are what `behest ledger verify` looks at.
"""

from datetime import datetime
from typing import Literal

import msgspec

from behest_ledger.store.errors import mapped
from behest_ledger.store.pool import Connection

Granularity = Literal["minute", "hour", "day"]

SESSIONS_MAX = 1000
"""Sessions in one answer, of each way of paying: those that cost most. A client may make one for every request."""
OLD_REQUESTS = 20_000
"""Requests from before there were seals that one commit adds up."""


class UsageBin(msgspec.Struct, frozen=True, kw_only=True):
    """The requests that ended in one minute, hour or day."""

    begins_at: datetime
    requests: int
    input_tokens: int
    output_tokens: int
    amount_pico: int


class UsageTotal(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the requests of one model or session."""

    name: str
    byok: bool
    requests: int
    input_tokens: int
    output_tokens: int
    amount_pico: int


class UsageTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over some requests of a project, for each of whose key paid."""

    models: list[UsageTotal]
    """All of them: together everything that was used."""
    sessions: list[UsageTotal]
    """Those that cost most, the dearest first; at most `SESSIONS_MAX` of each way of paying."""
    sessions_number: int
    """How many there are, of those that the platform's keys paid for."""
    byok_sessions_number: int
    """And of those whose owner's key did."""


class Added(msgspec.Struct, frozen=True):
    """What was added to the sums."""

    requests: int
    more: bool
    """There are sealed requests left."""


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
    `LedgerForbiddenError`, and `LedgerRefusedError` for a zone that PostgreSQL does not know.
    """
    with mapped():
        rows = await connection.fetch(
            "SELECT begins_at, requests, input_tokens, output_tokens, amount_pico::text"
            " FROM ledger.usage_bins_v1($1, $2, $3, $4, $5, $6, $7)",
            tenant_id, project_id, user_id, begin, end, granularity, zone,
        )  # fmt: skip
    return [
        UsageBin(begins_at=at, requests=requests, input_tokens=input_tokens, output_tokens=output_tokens,
                 amount_pico=int(amount))
        for at, requests, input_tokens, output_tokens, amount in rows
    ]  # fmt: skip


async def usage_totals(
    connection: Connection, *, tenant_id: str, project_id: str, begin: datetime, end: datetime, user_id: str | None
) -> UsageTotals:
    """The project's requests that ended in [begin, end), by model, by session, and by whose key paid.

    `user_id` None means all users. Raises `LedgerUnavailableError` and `LedgerForbiddenError`.
    """
    with mapped():
        rows = await connection.fetch(
            "SELECT kind, number, name, byok, requests, input_tokens, output_tokens, amount_pico::text"
            " FROM ledger.usage_totals_v1($1, $2, $3, $4, $5, $6)",
            tenant_id, project_id, user_id, begin, end, SESSIONS_MAX,
        )  # fmt: skip
    found: dict[str, list[UsageTotal]] = {"model": [], "session": []}
    numbers = {False: 0, True: 0}
    for kind, number, name, byok, requests, input_tokens, output_tokens, amount in rows:
        found[kind].append(
            UsageTotal(name=name, byok=byok, requests=requests, input_tokens=input_tokens,
                       output_tokens=output_tokens, amount_pico=int(amount))
        )  # fmt: skip
        if kind == "session":
            numbers[byok] = number
    return UsageTotals(
        models=found["model"], sessions=found["session"], sessions_number=numbers[False],
        byok_sessions_number=numbers[True],
    )  # fmt: skip


async def add_up(connection: Connection, *, calls_max: int) -> Added:
    """Add what is sealed to the sums, in at most so many commits. Raises what asyncpg raises."""
    requests = 0
    more = True
    for _ in range(calls_max):
        row = await connection.fetchrow("SELECT added, more FROM ledger.roll_usage_v1($1)", OLD_REQUESTS)
        requests += row["added"]
        more = row["more"]
        if not more:
            break
    return Added(requests, more)


CHECKS: dict[str, str] = {
    "usage sums are the sums of their requests": """
        SELECT concat_ws(', ', kind || ' from ' || to_char(begins_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI"Z"'),
                         nullif(name, ''), CASE WHEN byok THEN 'with a key of their own' END, 'of ' || project_id,
                         CASE WHEN whose = '*' THEN 'all users' ELSE 'user ' || substr(whose, 2) END),
               coalesce(format('%s requests, %s in, %s out, %s', t.requests, t.input_tokens, t.output_tokens,
                               t.amount_pico), 'nothing'),
               coalesce(format('%s requests, %s in, %s out, %s', s.requests, s.input_tokens, s.output_tokens,
                               s.amount_pico), 'nothing')
        FROM ledger.seal_progress p
        CROSS JOIN LATERAL ledger.usage_sums_v1(
            0, p.rolled_until, CASE WHEN p.rolled_until = 0 THEN p.began END, '', '0001-01-01',
            '00000000-0000-0000-0000-000000000000', p.rolled_tenant, p.rolled_month, p.rolled_request) AS t
        FULL JOIN ledger.usage_sum s USING (tenant_id, month, project_id, kind, whose, begins_at, name, byok)
        WHERE (t.requests, t.input_tokens, t.output_tokens, t.amount_pico)
            IS DISTINCT FROM (s.requests, s.input_tokens, s.output_tokens, s.amount_pico)""",
    "usage sums reach as far as they say, and not beyond the seals": """
        SELECT 'seal_progress',
               format('nothing above %s, and nothing that ended after %s', p.sealed_until, p.rolled_to),
               format('up to %s, and a request that ended %s', p.rolled_until, r.ended_at)
        FROM ledger.seal_progress p
        CROSS JOIN LATERAL (SELECT max(x.ended_at) AS ended_at FROM ledger.request x WHERE x.tx < p.rolled_until) AS r
        WHERE p.rolled_until > p.sealed_until OR r.ended_at > p.rolled_to""",
    "a session's sum that says it is the only one is": """
        SELECT concat_ws(', ', 'session', nullif(name, ''), CASE WHEN byok THEN 'with a key of their own' END,
                         'of ' || project_id,
                         CASE WHEN whose = '*' THEN 'all users' ELSE 'user ' || substr(whose, 2) END),
               'one', count(*)::text
        FROM ledger.usage_sum WHERE kind = 'session' GROUP BY tenant_id, project_id, whose, name, byok
        HAVING count(*) > 1 AND bool_or(alone)""",
}
"""Sentence -> query of (place, expected, found) that returns no row when the sentence is true."""
