-- Settling: what was held is spent or given back, once, in batches.

-- The amount of one charge in a window's unit.
CREATE FUNCTION ledger.charge_in_unit_v1(
    p_unit text, p_kind text, p_amount_pico numeric, p_input_tokens bigint, p_output_tokens bigint, p_requests integer
) RETURNS numeric LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE p_unit
        WHEN 'usd' THEN p_amount_pico
        WHEN 'requests' THEN p_requests
        ELSE CASE p_kind WHEN 'input' THEN p_input_tokens WHEN 'output' THEN p_output_tokens
                         ELSE p_input_tokens + p_output_tokens END
    END;
$$;

-- Settle a batch. p_items is a JSON array; an item has
--   tenant_id, request_id, state ("settled" | "void"), outcome, source, requests (0 | 1), input_tokens, output_tokens,
--   amount_pico, facts (object), lines [{class, quantity, rate_pico, amount_pico, source}]
-- Per window: spent += min(charge, held + room), the rest goes to `overrun`; the unspent part of the hold is free again.
-- Answers one row an item: "settled" (moved now), "already" (ended before; nothing moved), "unknown" (never admitted; a
-- tombstone is left, so that a late admission does nothing).
CREATE FUNCTION ledger.settle_batch_v1(p_items jsonb)
RETURNS TABLE (request_id uuid, result text, overrun boolean)
LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_unknown uuid[];
    v_moved uuid[];
BEGIN
    -- Tombstones first: after this every item has a row to lock.
    WITH made AS (
        INSERT INTO ledger.hold (tenant_id, month, request_id, state, ended_at)
        SELECT i.tenant_id, ledger.month_of_v1(i.request_id), i.request_id, 'void', v_now
        FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid)
        ORDER BY 1, 2, 3
        ON CONFLICT DO NOTHING
        RETURNING request_id
    )
    SELECT coalesce(array_agg(made.request_id), '{}') INTO v_unknown FROM made;

    -- Locks in the one order that everybody keeps: holds by key, then windows by key.
    PERFORM FROM ledger.hold h
    JOIN jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid)
      ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id
    ORDER BY h.tenant_id, h.month, h.request_id FOR UPDATE OF h;
    SELECT coalesce(array_agg(h.request_id), '{}') INTO v_moved FROM ledger.hold h
    JOIN jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid)
      ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id
    WHERE h.state IN ('open', 'suspense');
    PERFORM FROM ledger.budget_window w
    WHERE (w.tenant_id, w.window_id) IN (
        SELECT l.tenant_id, l.window_id FROM ledger.hold_line l
        JOIN jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid)
          ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id
        WHERE l.request_id = ANY (v_moved))
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;

    -- Split every charge: from the hold, from the window's room in the order of the batch, beyond it.
    WITH charge AS (
        SELECT l.tenant_id, l.month, l.request_id, l.window_id, l.held, w.limit_amount, w.ceiling IS NULL AS soft,
               ledger.charge_in_unit_v1(w.unit, w.token_kind, i.amount_pico, i.input_tokens, i.output_tokens,
                                        i.requests) AS due,
               w.spent + w.held + w.suspense AS balance
        FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid, amount_pico numeric,
                                               input_tokens bigint, output_tokens bigint, requests integer)
        JOIN ledger.hold_line l ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id)
                               AND l.request_id = i.request_id
        JOIN ledger.budget_window w ON w.tenant_id = l.tenant_id AND w.window_id = l.window_id
        WHERE l.request_id = ANY (v_moved)
    ), ordered AS (
        SELECT c.*, least(c.due, c.held) AS from_hold, greatest(c.due - c.held, 0) AS excess,
               greatest(c.limit_amount - c.balance
                   + sum(greatest(c.held - c.due, 0)) OVER (PARTITION BY c.tenant_id, c.window_id), 0) AS room,
               coalesce(sum(greatest(c.due - c.held, 0)) OVER (
                   PARTITION BY c.tenant_id, c.window_id ORDER BY c.request_id
                   ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS excess_before
        FROM charge c
    ), split AS (
        SELECT o.*, CASE WHEN o.soft THEN o.excess
                         ELSE least(o.excess, greatest(o.room - o.excess_before, 0)) END AS from_room
        FROM ordered o
    )
    INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
    SELECT s.tenant_id, s.month, s.request_id, s.window_id, 1000000, p.debit, p.credit, p.amount
    FROM split s CROSS JOIN LATERAL (VALUES
        ('held', 'spent', s.from_hold),
        ('held', 'available', s.held - s.from_hold),
        ('available', 'spent', s.from_room),
        ('funding', 'overrun', s.excess - s.from_room)) AS p (debit, credit, amount)
    WHERE p.amount > 0;

    -- Balances follow the postings that were really made.
    WITH moved AS (
        SELECT l.tenant_id, l.window_id, count(DISTINCT l.request_id)::integer AS holds,
               coalesce(sum(p.amount) FILTER (WHERE p.credit = 'spent'), 0) AS spent,
               coalesce(sum(p.amount) FILTER (WHERE p.debit = 'held'), 0) AS released,
               coalesce(sum(p.amount) FILTER (WHERE p.credit = 'overrun'), 0) AS overrun
        FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid)
        JOIN ledger.hold_line l ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id)
                               AND l.request_id = i.request_id
        LEFT JOIN ledger.posting p ON p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
                                  AND p.window_id = l.window_id AND p.seq = 1000000
        WHERE l.request_id = ANY (v_moved)
        GROUP BY l.tenant_id, l.window_id
    )
    UPDATE ledger.budget_window w SET
        spent = w.spent + m.spent,
        held = w.held - m.released,
        overrun = w.overrun + m.overrun,
        live = w.live - m.holds,
        -- A ceiling above a lowered limit falls with every release, never below the limit.
        ceiling = CASE WHEN w.ceiling IS NOT NULL THEN
            greatest(w.limit_amount, w.spent + m.spent + w.held - m.released + w.suspense) END
    FROM moved m WHERE w.tenant_id = m.tenant_id AND w.window_id = m.window_id;

    INSERT INTO ledger.request (tenant_id, month, request_id, project_id, namespace, user_id, session_id, model, attributes,
                                outcome, source, input_tokens, output_tokens, amount_pico, price_key, facts,
                                admitted_at, ended_at)
    SELECT h.tenant_id, h.month, h.request_id, h.attributes ->> 'project', h.attributes ->> 'namespace',
           h.attributes ->> 'user', h.attributes ->> 'session', h.attributes ->> 'model',
           h.attributes - '{project,namespace,user,session,model}'::text[],
           i.outcome, i.source, i.input_tokens, i.output_tokens, i.amount_pico, h.price_key,
           i.facts || jsonb_build_object('requests', i.requests), h.admitted_at, v_now
    FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid, outcome text, source text,
                                           input_tokens bigint, output_tokens bigint, amount_pico numeric, facts jsonb,
                                           requests integer)
    JOIN ledger.hold h ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id)
                      AND h.request_id = i.request_id
    WHERE h.request_id = ANY (v_moved)
    ON CONFLICT DO NOTHING;

    INSERT INTO ledger.usage_line (tenant_id, month, request_id, entry, class, quantity, rate_pico, amount_pico, source)
    SELECT i.tenant_id, ledger.month_of_v1(i.request_id), i.request_id, 0, l.class, l.quantity, l.rate_pico,
           l.amount_pico, l.source
    FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid, lines jsonb)
    CROSS JOIN LATERAL jsonb_to_recordset(i.lines)
        AS l (class text, quantity bigint, rate_pico numeric, amount_pico numeric, source text)
    WHERE i.request_id = ANY (v_moved)
    ON CONFLICT DO NOTHING;

    UPDATE ledger.hold h SET state = i.state, ended_at = v_now
    FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid, state text)
    WHERE h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id
      AND h.request_id = ANY (v_moved);

    RETURN QUERY
    SELECT i.request_id,
           CASE WHEN i.request_id = ANY (v_unknown) THEN 'unknown'
                WHEN i.request_id = ANY (v_moved) THEN 'settled'
                ELSE 'already' END,
           EXISTS (SELECT FROM ledger.posting p
                   WHERE p.tenant_id = i.tenant_id AND p.month = ledger.month_of_v1(i.request_id)
                     AND p.source_id = i.request_id AND p.seq = 1000000 AND p.credit = 'overrun')
    FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid);
END
$$;
