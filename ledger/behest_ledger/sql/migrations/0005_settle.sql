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
-- Of several items for one request the first counts.
-- Answers one row an item: "settled" (moved now), "already" (ended before; nothing moved), "corrected" (was charged by
-- policy, and is charged this instead: 0007_holders.sql), "unknown" (never admitted; a tombstone is left, so that a late
-- admission does nothing).
-- Raises serialization_failure where an unknown request was admitted in the same moment: ask again.
CREATE FUNCTION ledger.settle_batch_v1(p_items jsonb)
RETURNS TABLE (request_id uuid, result text, overrun boolean)
LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_known uuid[];                             -- items that have a hold, locked now
    v_moved uuid[];                             -- and those whose hold is not ended
    v_late uuid[];                              -- and those whose hold was charged by policy meanwhile
    v_todo jsonb;                               -- the items that move something
    v_unknown integer;
    v_tombstones integer;
BEGIN
    -- Locks in the one order that everybody keeps: holds by key, then windows by key.
    SELECT coalesce(array_agg(k.request_id), '{}'),
           coalesce(array_agg(k.request_id) FILTER (WHERE k.state IN ('open', 'suspense')), '{}'),
           coalesce(array_agg(k.request_id) FILTER (WHERE k.state = 'charged_by_policy'), '{}')
    INTO v_known, v_moved, v_late
    FROM (
        SELECT h.request_id, h.state FROM ledger.hold h
        JOIN jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid)
          ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id
        ORDER BY h.tenant_id, h.month, h.request_id FOR UPDATE OF h) AS k;
    SELECT coalesce(jsonb_agg(t.item), '[]') INTO v_todo FROM (
        SELECT DISTINCT ON (h.tenant_id, h.request_id) i.item
        FROM jsonb_array_elements(p_items) WITH ORDINALITY AS i (item, place)
        JOIN ledger.hold h ON h.tenant_id = i.item ->> 'tenant_id'
                          AND h.month = ledger.month_of_v1((i.item ->> 'request_id')::uuid)
                          AND h.request_id = (i.item ->> 'request_id')::uuid
        WHERE h.request_id = ANY (v_moved) AND h.state IN ('open', 'suspense')
        ORDER BY h.tenant_id, h.request_id, i.place) AS t;
    PERFORM FROM ledger.budget_window w
    WHERE (w.tenant_id, w.window_id) IN (
        SELECT l.tenant_id, l.window_id FROM ledger.hold_line l
        JOIN jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid)
          ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id
        WHERE i.request_id = ANY (v_moved || v_late))
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;

    -- Split every charge: from the hold, from the window's room in the order of the requests' ids, beyond it.
    WITH charge AS (
        SELECT l.tenant_id, l.month, l.request_id, l.window_id, l.held, w.limit_amount, w.ceiling IS NULL AS soft,
               CASE h.state WHEN 'suspense' THEN 'suspense' ELSE 'held' END AS account,
               ledger.charge_in_unit_v1(w.unit, w.token_kind, i.amount_pico, i.input_tokens, i.output_tokens,
                                        i.requests) AS due,
               w.spent + w.held + w.suspense AS balance
        FROM jsonb_to_recordset(v_todo) AS i (tenant_id text, request_id uuid, amount_pico numeric,
                                              input_tokens bigint, output_tokens bigint, requests integer)
        JOIN ledger.hold h ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id)
                          AND h.request_id = i.request_id
        JOIN ledger.hold_line l ON l.tenant_id = h.tenant_id AND l.month = h.month AND l.request_id = h.request_id
        JOIN ledger.budget_window w ON w.tenant_id = l.tenant_id AND w.window_id = l.window_id
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
        (s.account, 'spent', s.from_hold),
        (s.account, 'available', s.held - s.from_hold),
        ('available', 'spent', s.from_room),
        ('funding', 'overrun', s.excess - s.from_room)) AS p (debit, credit, amount)
    WHERE p.amount > 0;

    -- Balances follow the postings that were really made.
    WITH moved AS (
        SELECT l.tenant_id, l.window_id, count(DISTINCT l.request_id)::integer AS holds,
               coalesce(sum(p.amount) FILTER (WHERE p.credit = 'spent'), 0) AS spent,
               coalesce(sum(p.amount) FILTER (WHERE p.debit = 'held'), 0) AS released,
               coalesce(sum(p.amount) FILTER (WHERE p.debit = 'suspense'), 0) AS cleared,
               coalesce(sum(p.amount) FILTER (WHERE p.credit = 'overrun'), 0) AS overrun
        FROM jsonb_to_recordset(v_todo) AS i (tenant_id text, request_id uuid)
        JOIN ledger.hold_line l ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id)
                               AND l.request_id = i.request_id
        LEFT JOIN ledger.posting p ON p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
                                  AND p.window_id = l.window_id AND p.seq = 1000000
        GROUP BY l.tenant_id, l.window_id
    )
    UPDATE ledger.budget_window w SET
        spent = w.spent + m.spent,
        held = w.held - m.released,
        suspense = w.suspense - m.cleared,
        overrun = w.overrun + m.overrun,
        live = w.live - m.holds,
        -- A ceiling above a lowered limit falls with every release, never below the limit.
        ceiling = CASE WHEN w.ceiling IS NOT NULL THEN
            greatest(w.limit_amount, w.spent + m.spent + w.held - m.released + w.suspense - m.cleared) END
    FROM moved m WHERE w.tenant_id = m.tenant_id AND w.window_id = m.window_id;

    INSERT INTO ledger.request (tenant_id, month, request_id, project_id, namespace, user_id, session_id, model, attributes,
                                outcome, source, input_tokens, output_tokens, amount_pico, price_key, byok, facts,
                                admitted_at, ended_at)
    SELECT h.tenant_id, h.month, h.request_id, coalesce(h.attributes ->> 'project', ''),
           coalesce(h.attributes ->> 'namespace', ''), coalesce(h.attributes ->> 'user', ''),
           coalesce(h.attributes ->> 'session', ''), coalesce(h.attributes ->> 'model', ''),
           h.attributes - '{project,namespace,user,session,model}'::text[],
           i.outcome, i.source, i.input_tokens, i.output_tokens, i.amount_pico, h.price_key,
           h.attributes @> '{"byok": true}',
           i.facts || jsonb_build_object('requests', i.requests), h.admitted_at, v_now
    FROM jsonb_to_recordset(v_todo) AS i (tenant_id text, request_id uuid, outcome text, source text,
                                          input_tokens bigint, output_tokens bigint, amount_pico numeric, facts jsonb,
                                          requests integer)
    JOIN ledger.hold h ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id)
                      AND h.request_id = i.request_id;

    INSERT INTO ledger.usage_line (tenant_id, month, request_id, entry, class, quantity, rate_pico, amount_pico, source)
    SELECT i.tenant_id, ledger.month_of_v1(i.request_id), i.request_id, 0, l.class, l.quantity, l.rate_pico,
           l.amount_pico, l.source
    FROM jsonb_to_recordset(v_todo) AS i (tenant_id text, request_id uuid, lines jsonb)
    CROSS JOIN LATERAL jsonb_to_recordset(i.lines)
        AS l (class text, quantity bigint, rate_pico numeric, amount_pico numeric, source text);

    UPDATE ledger.hold h SET state = i.state, ended_at = v_now
    FROM jsonb_to_recordset(v_todo) AS i (tenant_id text, request_id uuid, state text)
    WHERE h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id;

    IF v_late <> '{}' THEN
        PERFORM ledger.correct_locked_v1(p_items, v_late);
    END IF;

    -- Tombstones last: who admits holds windows when it writes its hold, so nobody may wait for windows after them.
    SELECT count(DISTINCT (i.tenant_id, i.request_id)) INTO v_unknown
    FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid) WHERE i.request_id <> ALL (v_known);
    IF v_unknown > 0 THEN
        INSERT INTO ledger.hold (tenant_id, month, request_id, state, ended_at)
        SELECT DISTINCT i.tenant_id, ledger.month_of_v1(i.request_id), i.request_id, 'void', v_now
        FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid)
        WHERE i.request_id <> ALL (v_known)
        ORDER BY 1, 2, 3
        ON CONFLICT DO NOTHING;
        GET DIAGNOSTICS v_tombstones = ROW_COUNT;
        IF v_tombstones < v_unknown THEN
            RAISE EXCEPTION 'a request was admitted while it was settled' USING ERRCODE = 'serialization_failure';
        END IF;
    END IF;

    RETURN QUERY
    SELECT i.request_id,
           CASE WHEN i.request_id <> ALL (v_known) THEN 'unknown'
                WHEN i.request_id = ANY (v_moved) THEN 'settled'
                WHEN i.request_id = ANY (v_late) THEN 'corrected'
                ELSE 'already' END,
           EXISTS (SELECT FROM ledger.posting p
                   WHERE p.tenant_id = i.tenant_id AND p.month = ledger.month_of_v1(i.request_id)
                     AND p.source_id = i.request_id AND p.seq >= 1000000 AND p.credit = 'overrun')
    FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid);
END
$$;
