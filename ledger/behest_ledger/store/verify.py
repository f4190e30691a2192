"""Recompute the books and name every place that differs from what is written.

Balances are projections of postings; nothing here trusts them. Each check is one query that returns only what is
wrong: where, what was expected, what was found. All run in one snapshot, so live traffic does not disturb them.
"""

import msgspec

from behest_ledger.store.errors import mapped
from behest_ledger.store.pool import Connection


class Finding(msgspec.Struct, frozen=True):
    """One place where the books do not agree."""

    check: str
    place: str
    expected: str
    found: str


class Verdict(msgspec.Struct, frozen=True):
    """The result of a verification: clean when there are no findings."""

    findings: list[Finding]
    windows: int
    postings: int
    requests: int
    overrun_windows: int
    """Windows with charges beyond what they could pay: not an error of the books, but somebody should know."""


CHECKS: dict[str, str] = {
    "balances are the sums of their postings": """
        WITH moved AS (
            SELECT tenant_id, window_id, account, sum(amount) AS amount FROM (
                SELECT tenant_id, window_id, credit AS account, amount FROM ledger.posting
                UNION ALL
                SELECT tenant_id, window_id, debit, -amount FROM ledger.posting) AS both_sides
            GROUP BY tenant_id, window_id, account
        ), written AS (
            SELECT tenant_id, window_id, account, amount
            FROM ledger.budget_window w CROSS JOIN LATERAL (VALUES
                ('available', w.limit_amount - w.spent - w.held - w.suspense), ('held', w.held), ('spent', w.spent),
                ('suspense', w.suspense), ('overrun', w.overrun)) AS a (account, amount)
        )
        SELECT format('window %s of %s, account %s', window_id, tenant_id, account),
               coalesce(moved.amount, 0), coalesce(written.amount, 0)
        FROM written FULL JOIN moved USING (tenant_id, window_id, account)
        WHERE account <> 'funding' AND coalesce(moved.amount, 0) <> coalesce(written.amount, 0)""",
    "a window holds what its open requests hold": """
        SELECT format('window %s of %s', w.window_id, w.tenant_id),
               coalesce(h.held, 0) || ' by ' || coalesce(h.holds, 0), w.held + w.suspense || ' by ' || w.live
        FROM ledger.budget_window w LEFT JOIN (
            SELECT l.tenant_id, l.window_id, sum(l.held) AS held, count(*) AS holds
            FROM ledger.hold_line l JOIN ledger.hold o USING (tenant_id, month, request_id)
            WHERE o.state IN ('open', 'suspense') GROUP BY 1, 2) AS h USING (tenant_id, window_id)
        WHERE coalesce(h.held, 0) <> w.held + w.suspense OR coalesce(h.holds, 0) <> w.live""",
    "no hard window is above its ceiling": """
        SELECT format('window %s of %s', window_id, tenant_id), ceiling, spent + held + suspense
        FROM ledger.budget_window
        WHERE ceiling IS NOT NULL AND (spent + held + suspense > ceiling OR ceiling < limit_amount)""",
    "what was held for a request was posted for it": """
        SELECT format('request %s, window %s', l.request_id, l.window_id), coalesce(p.held, 0), l.held
        FROM ledger.hold_line l JOIN ledger.hold o USING (tenant_id, month, request_id) LEFT JOIN (
            SELECT tenant_id, month, source_id, window_id, sum(amount) AS held FROM ledger.posting
            WHERE credit = 'held' GROUP BY 1, 2, 3, 4) AS p
          ON p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
         AND p.window_id = l.window_id
        WHERE coalesce(p.held, 0) <> l.held""",
    "an ended request holds nothing": """
        SELECT format('request %s, window %s', l.request_id, l.window_id), l.held, coalesce(p.released, 0)
        FROM ledger.hold_line l JOIN ledger.hold o USING (tenant_id, month, request_id) LEFT JOIN (
            SELECT tenant_id, month, source_id, window_id, sum(amount) AS released FROM ledger.posting
            WHERE debit = 'held' GROUP BY 1, 2, 3, 4) AS p
          ON p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
         AND p.window_id = l.window_id
        WHERE o.state NOT IN ('open', 'suspense') AND l.held <> coalesce(p.released, 0)""",
    "a request's charge is the sum of its lines": """
        SELECT format('request %s', r.request_id), coalesce(u.amount, 0), r.amount_pico
        FROM ledger.request r LEFT JOIN (
            SELECT tenant_id, month, request_id, sum(amount_pico) AS amount FROM ledger.usage_line
            GROUP BY 1, 2, 3) AS u USING (tenant_id, month, request_id)
        WHERE coalesce(u.amount, 0) <> r.amount_pico""",
    "a request's tokens are the sum of its lines": """
        SELECT format('request %s', r.request_id), coalesce(u.tokens, 0), r.input_tokens + r.output_tokens
        FROM ledger.request r LEFT JOIN (
            SELECT tenant_id, month, request_id, sum(quantity) AS tokens FROM ledger.usage_line
            WHERE class <> 'request' GROUP BY 1, 2, 3) AS u USING (tenant_id, month, request_id)
        WHERE coalesce(u.tokens, 0) <> r.input_tokens + r.output_tokens""",
    "every window was charged what the request cost, once": """
        SELECT format('request %s, window %s', l.request_id, l.window_id), c.due, coalesce(p.charged, 0)
        FROM ledger.hold_line l
        JOIN ledger.request r USING (tenant_id, month, request_id)
        JOIN ledger.budget_window w USING (tenant_id, window_id)
        CROSS JOIN LATERAL (SELECT CASE w.unit
            WHEN 'usd' THEN r.amount_pico
            WHEN 'requests' THEN (r.facts ->> 'requests')::numeric
            ELSE CASE w.token_kind WHEN 'input' THEN r.input_tokens WHEN 'output' THEN r.output_tokens
                                   ELSE r.input_tokens + r.output_tokens END END AS due) AS c
        LEFT JOIN (
            SELECT tenant_id, month, source_id, window_id, sum(amount) AS charged FROM ledger.posting
            WHERE credit IN ('spent', 'overrun') GROUP BY 1, 2, 3, 4) AS p
          ON p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
         AND p.window_id = l.window_id
        WHERE c.due <> coalesce(p.charged, 0)""",
    "every ended hold has its request, and every request its hold": """
        SELECT format('request %s', coalesce(o.request_id, r.request_id)),
               coalesce(o.state, 'a hold'), coalesce(r.outcome, 'no request')
        FROM (SELECT * FROM ledger.hold WHERE answer IS NOT NULL) o
        FULL JOIN ledger.request r USING (tenant_id, month, request_id)
        WHERE (r.request_id IS NULL AND o.state NOT IN ('open', 'suspense')) OR o.request_id IS NULL
           OR (r.request_id IS NOT NULL AND o.state IN ('open', 'suspense'))""",
    "every line and posting belongs to something": """
        SELECT format('hold line of request %s', l.request_id), 'a hold and a window', 'none'
        FROM ledger.hold_line l
        LEFT JOIN ledger.hold o USING (tenant_id, month, request_id)
        LEFT JOIN ledger.budget_window w USING (tenant_id, window_id)
        WHERE o.request_id IS NULL OR w.window_id IS NULL
        UNION ALL
        SELECT format('usage line of request %s', u.request_id), 'a request', 'none'
        FROM ledger.usage_line u LEFT JOIN ledger.request r USING (tenant_id, month, request_id)
        WHERE r.request_id IS NULL""",
}
"""Sentence -> query of (place, expected, found) that returns no row when the sentence is true."""


async def verify(connection: Connection) -> Verdict:
    """Run every check in one snapshot.

    Raises `LedgerUnavailableError` and `SchemaError`.
    """
    findings: list[Finding] = []
    with mapped():
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            for check, query in CHECKS.items():
                for place, expected, found in await connection.fetch(query):
                    findings.append(Finding(check, place, _plain(expected), _plain(found)))
            row = await connection.fetchrow(
                "SELECT (SELECT count(*) FROM ledger.budget_window) AS windows,"
                " (SELECT count(*) FROM ledger.posting) AS postings, (SELECT count(*) FROM ledger.request) AS requests,"
                " (SELECT count(*) FROM ledger.budget_window WHERE overrun > 0) AS overrun_windows"
            )
    return Verdict(
        findings=findings,
        windows=row["windows"],
        postings=row["postings"],
        requests=row["requests"],
        overrun_windows=row["overrun_windows"],
    )


def _plain(value: object) -> str:
    return value if isinstance(value, str) else f"{value:f}" if hasattr(value, "is_finite") else str(value)
