"""Recompute the books and name every place that differs from what is written.

Balances are projections of postings; nothing here trusts them. Each check is one query that returns only what is
wrong: where, what was expected, what was found. All run in one snapshot, so live traffic does not disturb them. A check
that finds very much names the first places: what comes through here is bounded, whatever was done to the books.
"""

from collections.abc import Sequence

import msgspec

from behest_ledger.store import detached, seals, usage
from behest_ledger.store.detached import MonthAway
from behest_ledger.store.errors import mapped
from behest_ledger.store.findings import Finding, Progress, named
from behest_ledger.store.pool import Connection
from behest_ledger.store.seals import Seal

__all__ = ["CHECKS", "Finding", "MonthAway", "Verdict", "verify"]


class Verdict(msgspec.Struct, frozen=True):
    """The result of a verification: clean when there are no findings."""

    findings: list[Finding]
    windows: int
    postings: int
    requests: int
    overrun_windows: int
    """Windows with charges beyond what they could pay: not an error of the books, but somebody should know."""
    seals: list[Seal] = []
    """The newest of each tenant. Noted elsewhere, it vouches for all that was sealed before."""
    months_away: list[MonthAway] = []
    """Those that were put away, the oldest first, and which of their tables are here."""


_OF_WINDOWS: dict[str, str] = {
    "balances are the sums of their postings": """
        WITH moved AS (
            SELECT tenant_id, window_id, account, sum(amount) AS amount FROM (
                SELECT tenant_id, window_id, credit AS account, amount FROM ledger.posting
                UNION ALL
                SELECT tenant_id, window_id, debit, -amount FROM ledger.posting
                UNION ALL
                SELECT tenant_id, window_id, account, amount FROM ledger.opening_balance) AS both_sides
            GROUP BY tenant_id, window_id, account
        ), written AS (
            SELECT tenant_id, window_id, account, amount
            FROM ledger.budget_window w LEFT JOIN (
                SELECT tenant_id, window_id, sum(free) AS free FROM ledger.lease GROUP BY 1, 2) AS l
              USING (tenant_id, window_id)
            CROSS JOIN LATERAL (VALUES
                ('available', w.limit_amount - w.spent - w.held - w.suspense), ('held', w.held - coalesce(l.free, 0)),
                ('leased', coalesce(l.free, 0)), ('spent', w.spent),
                ('suspense', w.suspense), ('overrun', w.overrun)) AS a (account, amount)
        )
        SELECT format('window %s of %s, account %s', window_id, tenant_id, account),
               coalesce(moved.amount, 0), coalesce(written.amount, 0)
        FROM written FULL JOIN moved USING (tenant_id, window_id, account)
        WHERE account <> 'funding' AND coalesce(moved.amount, 0) <> coalesce(written.amount, 0)""",
    "a window holds what its open requests and its leases hold": """
        SELECT format('window %s of %s', w.window_id, w.tenant_id),
               format('%s and %s in suspense by %s', coalesce(h.held, 0) + coalesce(f.free, 0), coalesce(h.suspense, 0),
                      coalesce(h.holds, 0)),
               format('%s and %s in suspense by %s', w.held, w.suspense, w.live + coalesce(f.new_live, 0))
        FROM ledger.budget_window w LEFT JOIN (
            SELECT l.tenant_id, l.window_id, count(*) AS holds,
                   coalesce(sum(l.held) FILTER (WHERE o.state = 'open'), 0) AS held,
                   coalesce(sum(l.held) FILTER (WHERE o.state = 'suspense'), 0) AS suspense
            FROM ledger.hold_line l JOIN ledger.hold o USING (tenant_id, month, request_id)
            WHERE o.state IN ('open', 'suspense') GROUP BY 1, 2) AS h USING (tenant_id, window_id) LEFT JOIN (
            SELECT tenant_id, window_id, sum(free) AS free, sum(new_live) AS new_live
            FROM ledger.lease GROUP BY 1, 2) AS f USING (tenant_id, window_id)
        WHERE (coalesce(h.held, 0) + coalesce(f.free, 0), coalesce(h.suspense, 0), coalesce(h.holds, 0))
           <> (w.held, w.suspense, w.live + coalesce(f.new_live, 0))""",
    "what is free in a lease is what was granted to it and is neither used nor returned": """
        SELECT format('lease of window %s of %s, holder %s', window_id, tenant_id, holder_id),
               coalesce(p.free, 0), coalesce(l.free, 0)
        FROM ledger.lease l FULL JOIN (
            SELECT x.tenant_id, x.window_id, coalesce(o.holder_id, x.source_id) AS holder_id,
                   sum(CASE WHEN x.credit = 'leased' THEN x.amount ELSE -x.amount END) AS free,
                   bool_or(o.request_id IS NULL AND x.seq = 1) AS is_whole
            FROM ledger.posting x LEFT JOIN ledger.hold o
              ON o.tenant_id = x.tenant_id AND o.month = x.month AND o.request_id = x.source_id
            WHERE x.credit = 'leased' OR x.debit = 'leased' GROUP BY 1, 2, 3) AS p
          USING (tenant_id, window_id, holder_id)
        -- One whose first grant lies in a month that was detached shows in its window's account alone.
        WHERE coalesce(p.free, 0) <> coalesce(l.free, 0) AND coalesce(p.is_whole, coalesce(l.seq, 0) = 0)""",
    "a lease is of a holder that may have it and of a window, and counts its own postings": """
        SELECT format('lease of window %s of %s, holder %s', l.window_id, l.tenant_id, l.holder_id),
               'a holder, a window and posting ' || l.seq,
               format('%s, %s and posting %s', CASE WHEN h.holder_id IS NULL THEN 'none' ELSE 'a holder' END,
                      CASE WHEN w.window_id IS NULL THEN 'none' ELSE w.unit END, p.seq)
        FROM ledger.lease l
        LEFT JOIN ledger.holder h USING (holder_id)
        LEFT JOIN ledger.budget_window w USING (tenant_id, window_id)
        LEFT JOIN (
            SELECT tenant_id, source_id, window_id, max(seq) AS seq FROM ledger.posting
            WHERE credit = 'leased' OR debit = 'leased' GROUP BY 1, 2, 3) AS p
          ON p.tenant_id = l.tenant_id AND p.source_id = l.holder_id AND p.window_id = l.window_id
        WHERE h.holder_id IS NULL OR w.window_id IS NULL OR w.unit = 'concurrency' OR p.seq <> l.seq""",
    "no hard window is above its ceiling": """
        SELECT format('window %s of %s', window_id, tenant_id), ceiling, spent + held + suspense
        FROM ledger.budget_window
        WHERE ceiling IS NOT NULL AND spent + held + suspense > ceiling""",
    "a ceiling is the limit, or the balance found above a lowered one": """
        SELECT format('window %s of %s', window_id, tenant_id), greatest(limit_amount, spent + held + suspense), ceiling
        FROM ledger.budget_window
        WHERE ceiling IS NOT NULL AND ceiling <> greatest(limit_amount, spent + held + suspense)""",
    "a live window is as its budget says": """
        SELECT format('window %s of %s', w.window_id, w.tenant_id),
               b.unit || ' ' || b.limit_amount || ' ' || b.enforcement,
               w.unit || ' ' || w.limit_amount || CASE WHEN w.ceiling IS NULL THEN ' soft' ELSE ' hard' END
        FROM ledger.budget_window w JOIN ledger.budget b USING (tenant_id, budget_id)
        WHERE (w.ends_at IS NULL OR w.ends_at > now()) AND (w.unit <> b.unit OR w.limit_amount <> b.limit_amount
            OR (w.ceiling IS NULL) <> (b.enforcement = 'soft') OR (w.ends_at IS NULL) <> (b.period = 'lifetime'))""",
    "a subject's current window is its own and its last": """
        SELECT format('budget %s of %s, subject %s', s.budget_id, s.tenant_id, s.subject), last.window_id::text,
               s.window_id::text
        FROM ledger.budget_subject s LEFT JOIN (
            SELECT DISTINCT ON (tenant_id, budget_id, subject) tenant_id, budget_id, subject, window_id
            FROM ledger.budget_window ORDER BY tenant_id, budget_id, subject, starts_at DESC) AS last
          USING (tenant_id, budget_id, subject)
        WHERE s.window_id IS DISTINCT FROM last.window_id
        UNION ALL
        SELECT format('window %s of %s', w.window_id, w.tenant_id), 'a budget and a subject', 'none'
        FROM ledger.budget_window w
        LEFT JOIN ledger.budget b USING (tenant_id, budget_id)
        LEFT JOIN ledger.budget_subject s USING (tenant_id, budget_id, subject)
        WHERE b.budget_id IS NULL OR s.budget_id IS NULL""",
}

OF_REQUESTS: dict[str, str] = {
    "every posting moves between accounts that belong together": """
        SELECT format('posting of %s, window %s, seq %s', source_id, window_id, seq), 'a known movement',
               debit || ' to ' || credit
        FROM ledger.posting
        WHERE NOT CASE
            WHEN debit IN ('available', 'leased') AND credit = 'held' THEN seq BETWEEN 0 AND 999999
            WHEN 'leased' IN (debit, credit) THEN 'available' IN (debit, credit) AND seq > 0
            WHEN debit = 'funding' AND credit = 'available' OR debit = 'available' AND credit = 'funding' THEN seq = 0
            WHEN seq = 1000001 THEN (debit, credit) IN (('held', 'suspense'), ('suspense', 'available'))
            WHEN debit = 'held' AND credit = 'suspense' THEN false
            WHEN seq >= 1000002 THEN (debit, credit) IN (('available', 'spent'), ('spent', 'available'),
                ('funding', 'overrun'), ('overrun', 'funding'))
            ELSE seq = 1000000 AND (debit, credit) IN (('held', 'spent'), ('held', 'available'), ('available', 'spent'),
                ('funding', 'overrun'), ('suspense', 'spent'), ('suspense', 'available'))
        END""",
    "what was held for a request was posted for it": """
        SELECT format('request %s, window %s', l.request_id, l.window_id), coalesce(p.held, 0), l.held
        FROM ledger.hold_line l JOIN ledger.hold o USING (tenant_id, month, request_id) LEFT JOIN (
            SELECT tenant_id, month, source_id, window_id,
                   sum(CASE WHEN credit = 'held' THEN amount ELSE -amount END) AS held
            FROM ledger.posting WHERE credit = 'held' OR debit = 'suspense' AND seq = 1000001 GROUP BY 1, 2, 3, 4) AS p
          ON p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
         AND p.window_id = l.window_id
        WHERE coalesce(p.held, 0) <> l.held""",
    "credit was granted as it was posted": """
        SELECT format('request %s, window %s', o.request_id, l.window_id),
               f.admitted || ' and ' || f.extended || ', extension ' || o.last_seq,
               p.admitted || ' and ' || p.extended || ', extension ' || p.last_seq
        FROM ledger.hold o
        JOIN ledger.hold_line l USING (tenant_id, month, request_id)
        JOIN ledger.budget_window w USING (tenant_id, window_id)
        CROSS JOIN LATERAL (SELECT CASE WHEN w.unit = 'usd' THEN o.output_rate_pico
            WHEN w.unit = 'tokens' AND w.token_kind <> 'input' THEN 1 ELSE 0 END AS rate) AS r
        CROSS JOIN LATERAL (SELECT (o.answer ->> 'output_tokens')::numeric * r.rate AS admitted,
            (o.granted_output_tokens - (o.answer ->> 'output_tokens')::numeric) * r.rate AS extended) AS f
        LEFT JOIN (
            SELECT tenant_id, month, source_id, window_id, coalesce(sum(amount) FILTER (WHERE seq = 0), 0) AS admitted,
                   coalesce(sum(amount) FILTER (WHERE seq > 0), 0) AS extended, max(seq) AS last_seq
            FROM ledger.posting WHERE credit = 'held' GROUP BY 1, 2, 3, 4) AS x
          ON x.tenant_id = o.tenant_id AND x.month = o.month AND x.source_id = o.request_id
         AND x.window_id = l.window_id
        CROSS JOIN LATERAL (SELECT coalesce(x.admitted, 0) AS admitted, coalesce(x.extended, 0) AS extended,
            coalesce(x.last_seq, 0) AS last_seq) AS p
        WHERE p.admitted < f.admitted OR p.extended <> f.extended OR p.last_seq > o.last_seq""",
    "an ended request holds nothing": """
        SELECT format('request %s, window %s', l.request_id, l.window_id), l.held, coalesce(p.released, 0)
        FROM ledger.hold_line l JOIN ledger.hold o USING (tenant_id, month, request_id) LEFT JOIN (
            SELECT tenant_id, month, source_id, window_id,
                   sum(CASE WHEN debit = 'held' THEN amount ELSE -amount END) AS released
            FROM ledger.posting WHERE debit = 'held' OR debit = 'suspense' AND seq = 1000001 GROUP BY 1, 2, 3, 4) AS p
          ON p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
         AND p.window_id = l.window_id
        WHERE o.state NOT IN ('open', 'suspense') AND l.held <> coalesce(p.released, 0)""",
    "a request's charge is the sum of its lines": """
        SELECT format('request %s', r.request_id), coalesce(u.amount, 0), r.amount_pico
        FROM ledger.request_now r LEFT JOIN (
            SELECT tenant_id, month, request_id, sum(amount_pico) AS amount FROM ledger.usage_line
            GROUP BY 1, 2, 3) AS u USING (tenant_id, month, request_id)
        WHERE coalesce(u.amount, 0) <> r.amount_pico
        UNION ALL
        SELECT format('request %s before its corrections', r.request_id), coalesce(u.amount, 0), r.amount_pico
        FROM (SELECT DISTINCT tenant_id, month, request_id FROM ledger.correction) AS c
        JOIN ledger.request r USING (tenant_id, month, request_id)
        LEFT JOIN (
            SELECT tenant_id, month, request_id, sum(amount_pico) AS amount FROM ledger.usage_line WHERE entry = 0
            GROUP BY 1, 2, 3) AS u USING (tenant_id, month, request_id)
        WHERE coalesce(u.amount, 0) <> r.amount_pico
        UNION ALL
        SELECT format('request %s, correction %s', c.request_id, c.number), coalesce(u.amount, 0), c.amount_pico
        FROM ledger.correction c LEFT JOIN (
            SELECT tenant_id, month, request_id, entry, sum(amount_pico) AS amount FROM ledger.usage_line
            WHERE entry > 0 GROUP BY 1, 2, 3, 4) AS u
          ON u.tenant_id = c.tenant_id AND u.month = c.month AND u.request_id = c.request_id AND u.entry = 2 * c.number
        WHERE coalesce(u.amount, 0) <> c.amount_pico""",
    "a request's tokens are the sum of its lines": """
        SELECT format('request %s', r.request_id),
               coalesce(u.input_tokens, 0) || ' in, ' || coalesce(u.output_tokens, 0) || ' out',
               r.input_tokens || ' in, ' || r.output_tokens || ' out'
        FROM ledger.request_now r LEFT JOIN (
            SELECT tenant_id, month, request_id,
                   sum(quantity) FILTER (WHERE class IN ('input', 'cache_read', 'cache_write', 'audio_input'))
                       AS input_tokens,
                   sum(quantity) FILTER (WHERE class IN ('output', 'reasoning', 'audio_output')) AS output_tokens
            FROM ledger.usage_line GROUP BY 1, 2, 3) AS u USING (tenant_id, month, request_id)
        WHERE coalesce(u.input_tokens, 0) <> r.input_tokens OR coalesce(u.output_tokens, 0) <> r.output_tokens""",
    "a line's amount is its quantity at its rate": """
        SELECT format('request %s, entry %s, class %s', request_id, entry, class), quantity * rate_pico, amount_pico
        FROM ledger.usage_line
        WHERE amount_pico <> quantity * rate_pico OR class NOT IN ('input', 'cache_read', 'cache_write', 'audio_input',
              'output', 'reasoning', 'audio_output', 'request')""",
    "a request is attributed and priced as it was admitted": """
        SELECT format('request %s', request_id), h.told, r.told
        FROM (SELECT tenant_id, month, request_id, concat_ws(' | ', price_key, admitted_at,
                  coalesce(attributes ->> 'project', ''), coalesce(attributes ->> 'namespace', ''),
                  coalesce(attributes ->> 'user', ''), coalesce(attributes ->> 'session', ''),
                  coalesce(attributes ->> 'model', '')) AS told FROM ledger.hold) AS h
        JOIN (SELECT tenant_id, month, request_id, concat_ws(' | ', price_key, admitted_at,
                  project_id, namespace, user_id, session_id, model) AS told FROM ledger.request) AS r
          USING (tenant_id, month, request_id)
        WHERE h.told <> r.told""",
    "a request that was not sent was charged nothing": """
        SELECT format('request %s', r.request_id), 'nothing',
               o.state || ', ' || r.amount_pico || ' pico-USD, ' || r.input_tokens + r.output_tokens || ' tokens, '
                   || (r.facts ->> 'requests') || ' requests'
        FROM ledger.request_now r JOIN ledger.hold o USING (tenant_id, month, request_id)
        WHERE ((r.facts ->> 'requests')::numeric = 0 AND (r.amount_pico, r.input_tokens, r.output_tokens) <> (0, 0, 0))
           OR (o.state <> 'corrected' AND (o.state = 'void') <> ((r.facts ->> 'requests')::numeric = 0))""",
    "every window was charged what the request cost, once": """
        SELECT format('request %s, window %s', l.request_id, l.window_id), c.due, coalesce(p.charged, 0)
        FROM ledger.hold_line l
        JOIN ledger.request_now r USING (tenant_id, month, request_id)
        JOIN ledger.budget_window w USING (tenant_id, window_id)
        CROSS JOIN LATERAL (SELECT CASE w.unit
            WHEN 'usd' THEN r.amount_pico
            WHEN 'requests' THEN (r.facts ->> 'requests')::numeric
            WHEN 'concurrency' THEN 0
            ELSE CASE w.token_kind WHEN 'input' THEN r.input_tokens WHEN 'output' THEN r.output_tokens
                                   ELSE r.input_tokens + r.output_tokens END END AS due) AS c
        LEFT JOIN (
            SELECT tenant_id, month, source_id, window_id,
                   sum(CASE WHEN credit IN ('spent', 'overrun') THEN amount ELSE -amount END) AS charged
            FROM ledger.posting
            WHERE credit IN ('spent', 'overrun') OR debit IN ('spent', 'overrun') GROUP BY 1, 2, 3, 4) AS p
          ON p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
         AND p.window_id = l.window_id
        WHERE c.due <> coalesce(p.charged, 0)""",
    "what a holder left behind went to suspense, whole, and came out once": """
        SELECT format('request %s, window %s', l.request_id, l.window_id), o.state || ' of ' || l.held,
               coalesce(p.moved, 0) || ' in, ' || coalesce(p.cleared, 0) || ' out'
        FROM ledger.hold_line l JOIN ledger.hold o USING (tenant_id, month, request_id) LEFT JOIN (
            SELECT tenant_id, month, source_id, window_id,
                   sum(CASE WHEN credit = 'suspense' THEN amount ELSE -amount END) FILTER (
                       WHERE credit = 'suspense' OR seq = 1000001) AS moved,
                   sum(amount) FILTER (WHERE debit = 'suspense' AND seq <> 1000001) AS cleared
            FROM ledger.posting WHERE 'suspense' IN (debit, credit) GROUP BY 1, 2, 3, 4) AS p
          ON p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
         AND p.window_id = l.window_id
        WHERE (coalesce(p.moved, 0), coalesce(p.cleared, 0)) <> (
            CASE WHEN o.suspense_at IS NULL THEN 0 ELSE l.held END,
            CASE WHEN o.suspense_at IS NULL OR o.state = 'suspense' THEN 0 ELSE l.held END)
           OR o.state IN ('suspense', 'charged_by_policy') AND o.suspense_at IS NULL
           OR o.state = 'open' AND o.suspense_at IS NOT NULL""",
    "a checkpoint is the sum of its lines": """
        SELECT format('request %s', o.request_id),
               format('%s in, %s out, %s', c.input_tokens, c.output_tokens, c.amount),
               format('%s in, %s out, %s', o.checkpoint_input_tokens, o.checkpoint_output_tokens,
                      o.checkpoint_amount_pico)
        FROM ledger.hold o CROSS JOIN LATERAL (
            SELECT coalesce(sum(x.quantity) FILTER (WHERE x.class IN
                       ('input', 'cache_read', 'cache_write', 'audio_input')), 0) AS input_tokens,
                   coalesce(sum(x.quantity) FILTER (WHERE x.class IN
                       ('output', 'reasoning', 'audio_output')), 0) AS output_tokens,
                   coalesce(sum(x.quantity * x.rate_pico), 0) AS amount
            FROM jsonb_to_recordset(o.checkpoint_lines) AS x (class text, quantity numeric, rate_pico numeric)) AS c
        WHERE (c.input_tokens, c.output_tokens, c.amount)
            <> (o.checkpoint_input_tokens, o.checkpoint_output_tokens, o.checkpoint_amount_pico)""",
    "a charge by policy says so and is within its hold": """
        SELECT format('request %s, window %s', o.request_id, l.window_id),
               'crashed by checkpoint or hold, at most ' || l.held,
               format('%s by %s, %s', r.outcome, r.facts ->> 'policy', coalesce(p.charged, 0))
        FROM ledger.hold o
        JOIN ledger.request r USING (tenant_id, month, request_id)
        JOIN ledger.hold_line l USING (tenant_id, month, request_id)
        CROSS JOIN LATERAL (
            SELECT coalesce(r.facts ->> 'policy' IN ('checkpoint', 'hold'), false) AS told) AS policy
        LEFT JOIN (
            SELECT tenant_id, month, source_id, window_id, sum(amount) AS charged FROM ledger.posting
            WHERE seq = 1000000 AND credit IN ('spent', 'overrun') GROUP BY 1, 2, 3, 4) AS p
          ON p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
         AND p.window_id = l.window_id
        WHERE policy.told AND (coalesce(p.charged, 0) > l.held OR r.outcome <> 'crashed')
           OR policy.told AND o.state NOT IN ('charged_by_policy', 'corrected')
           OR o.state = 'charged_by_policy' AND NOT policy.told""",
    "a correction takes back what was charged before, and nothing else is corrected": """
        WITH touched AS (
            SELECT tenant_id, month, request_id FROM ledger.correction
            UNION SELECT tenant_id, month, request_id FROM ledger.usage_line WHERE entry > 0
            UNION SELECT tenant_id, month, source_id FROM ledger.posting WHERE seq > 1000001
            UNION SELECT tenant_id, month, request_id FROM ledger.hold WHERE state = 'corrected'),
        c AS (
            SELECT tenant_id, month, request_id, count(*) AS corrections, max(number) AS last
            FROM ledger.correction GROUP BY 1, 2, 3),
        pair AS (
            SELECT tenant_id, month, request_id, x.entry / 2 AS number, sum(x.quantity) AS tokens,
                   max(x.entry) AS last_entry
            FROM ledger.usage_line x JOIN touched USING (tenant_id, month, request_id)
            GROUP BY tenant_id, month, request_id, x.entry / 2, x.class, x.rate_pico),
        u AS (
            SELECT tenant_id, month, request_id, max(pair.last_entry) AS last_entry,
                   coalesce(sum(abs(pair.tokens)) FILTER (WHERE pair.number < c.last), 0) AS left_over
            FROM pair LEFT JOIN c USING (tenant_id, month, request_id) GROUP BY 1, 2, 3),
        p AS (
            SELECT x.tenant_id, x.month, x.source_id AS request_id, max(x.seq) AS last_seq FROM ledger.posting x
            JOIN touched t ON t.tenant_id = x.tenant_id AND t.month = x.month AND t.request_id = x.source_id
            GROUP BY 1, 2, 3)
        SELECT format('request %s', request_id),
               format('corrected, %s corrections, and nothing left of the charges before', greatest(c.last, 1)),
               format('%s, %s corrections, lines up to entry %s, movements up to %s, %s tokens left over', o.state,
                      coalesce(c.corrections, 0), u.last_entry, p.last_seq, u.left_over)
        FROM touched JOIN ledger.hold o USING (tenant_id, month, request_id)
        LEFT JOIN c USING (tenant_id, month, request_id)
        LEFT JOIN u USING (tenant_id, month, request_id)
        LEFT JOIN p USING (tenant_id, month, request_id)
        WHERE o.state <> 'corrected' OR c.last IS NULL OR c.corrections <> c.last OR u.left_over <> 0
           OR u.last_entry > 2 * c.last OR p.last_seq > 1000001 + c.last""",
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
        SELECT format('posting of %s, window %s, seq %s', p.source_id, p.window_id, p.seq), 'a hold line', 'none'
        FROM ledger.posting p LEFT JOIN ledger.hold_line l
          ON l.tenant_id = p.tenant_id AND l.month = p.month AND l.request_id = p.source_id
         AND l.window_id = p.window_id
        WHERE l.request_id IS NULL AND (p.debit, p.credit) NOT IN (('funding', 'available'), ('available', 'funding'),
            ('available', 'leased'), ('leased', 'available'))
        UNION ALL
        SELECT format('usage line of request %s', u.request_id), 'a request', 'none'
        FROM ledger.usage_line u LEFT JOIN ledger.request r USING (tenant_id, month, request_id)
        WHERE r.request_id IS NULL
        UNION ALL
        SELECT format('correction %s of request %s', c.number, c.request_id), 'a request', 'none'
        FROM ledger.correction c LEFT JOIN ledger.request r USING (tenant_id, month, request_id)
        WHERE r.request_id IS NULL""",
}
"""Of these, no query leaves a request's month: they are true of each month alone, also of one that was detached."""

CHECKS: dict[str, str] = _OF_WINDOWS | OF_REQUESTS
"""Sentence -> query of (place, expected, found) that returns no row when the sentence is true."""


SET_PLANNER = """
    SET LOCAL enable_nestloop = off; SET LOCAL enable_memoize = off; SET LOCAL jit = off; SET LOCAL work_mem = '64MB'"""
"""Every check reads whole tables and joins them by hashing or sorting. With statistics older than the rows, the planner
took a hundred thousand postings for one and summed them all up anew for each hold line: seconds became hours."""
_RESET_PLANNER = "SET LOCAL enable_nestloop = on; SET LOCAL enable_memoize = on"


async def verify(
    connection: Connection,
    *,
    noted: Sequence[Seal] = (),
    look_at_detached: bool = False,
    progress: Progress | None = None,
) -> Verdict:
    """Run every check in one snapshot, and look for the seals that somebody noted.

    `look_at_detached`: recompute also the months that were put away, as far as their tables are still here.
    Raises `LedgerUnavailableError` and `SchemaError`.
    """
    tell = progress or _nobody
    checks = CHECKS | usage.CHECKS | seals.CHECKS
    findings: list[Finding] = []
    with mapped():
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            months = await detached.hold_still(connection, detached=look_at_detached)
            await connection.execute(SET_PLANNER)
            for number, (check, query) in enumerate(checks.items()):
                tell(check, number / len(checks))
                findings += await named(connection, check, query)
            await connection.execute(_RESET_PLANNER)
            findings += await seals.check_rows(connection, tell)
            findings += await seals.check_noted(connection, noted)
            newest = await seals.newest(connection)
            row = await connection.fetchrow(
                "SELECT (SELECT count(*) FROM ledger.budget_window) AS windows,"
                " (SELECT count(*) FROM ledger.posting) AS postings, (SELECT count(*) FROM ledger.request) AS requests,"
                " (SELECT count(*) FROM ledger.budget_window WHERE overrun > 0) AS overrun_windows"
            )
            for month in months if look_at_detached else ():
                await connection.execute(SET_PLANNER)
                findings += await detached.check_month(connection, month, OF_REQUESTS, tell)
                await connection.execute(_RESET_PLANNER)
                findings += await detached.check_seals(connection, month, tell)
    return Verdict(
        findings=findings,
        windows=row["windows"],
        postings=row["postings"],
        requests=row["requests"],
        overrun_windows=row["overrun_windows"],
        seals=newest,
        months_away=months,
    )


def _nobody(_check: str, _done: float) -> None:
    """Nobody wants to know how far it is."""
