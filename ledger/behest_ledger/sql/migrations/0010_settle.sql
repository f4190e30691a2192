-- Settling, made fast: one parse, one look at each hold, and plans that are made once a connection.
--
-- The settings on the function are about its plans, for all that it asks is look-ups by whole primary keys:
--   force_generic_plan: planning these statements anew for each batch took as long as running them;
--   other joins off, joins in the order written (the batch first), pages cheap: the statistics of a partition that
--   fills are always old, and a plan made while it was empty would read all of it for every batch;
--   jit off: up to PostgreSQL 17 a way that is switched off costs so much that the compiler would be started for it.

-- Settle a batch. p_items is a JSON array; an item has
--   tenant_id, request_id, state ("settled" | "void"), outcome, source, requests (0 | 1), input_tokens, output_tokens,
--   amount_pico, facts (object), lines [{class, quantity, rate_pico, amount_pico, source}]
-- Per window: spent += min(charge, held + room), the rest goes to `overrun`; what is left of the hold is free again.
-- Of several items for one request the first counts.
-- Answers one row an item: "settled" (moved now), "already" (ended before; nothing moved), "corrected" (was charged by
-- policy, and is charged this instead: 0007_holders.sql), "unknown" (never admitted; a tombstone is left, so that a
-- late admission does nothing).
-- Raises serialization_failure where an unknown request was admitted in the same moment: ask again.
CREATE OR REPLACE FUNCTION ledger.settle_batch_v1(p_items jsonb)
RETURNS TABLE (request_id uuid, result text, overrun boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET join_collapse_limit = 1 SET random_page_cost = 0.1 SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_known uuid[];                             -- requests that have a hold, locked now
    -- Those whose hold is not ended: what is settled, and what the hold said. Parallel arrays, an element each.
    v_tenants text[];
    v_months date[];
    v_requests uuid[];
    v_states text[];                            -- of the holds, until now
    v_ends text[];                              -- and from now on
    v_outcomes text[];
    v_sources text[];
    v_counts integer[];
    v_inputs bigint[];
    v_outputs bigint[];
    v_amounts numeric[];
    v_facts jsonb[];
    v_lines jsonb[];
    v_attributes jsonb[];
    v_prices text[];
    v_admitted timestamptz[];
    -- Those whose hold was charged by policy meanwhile.
    v_late_tenants text[];
    v_late_months date[];
    v_late uuid[];
    v_window_tenants text[];                    -- of the windows that are locked
    v_windows bigint[];
    v_short record;                             -- a window that cannot pay what goes beyond its holds
    v_overrun uuid[];
    v_unknown integer;
    v_tombstones integer;
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY(
        SELECT DISTINCT i.item ->> 'tenant_id' FROM jsonb_array_elements(p_items) AS i (item)));

    -- Locks in the one order that everybody keeps: holds by key, then windows by key. The month grows with the id of
    -- the request, so the order by tenant and request is the one by key.
    SELECT coalesce(array_agg(k.request_id), '{}'),
           array_agg(k.tenant_id) FILTER (WHERE k.moves), array_agg(k.month) FILTER (WHERE k.moves),
           coalesce(array_agg(k.request_id) FILTER (WHERE k.moves), '{}'), array_agg(k.was) FILTER (WHERE k.moves),
           array_agg(k.state) FILTER (WHERE k.moves), array_agg(k.outcome) FILTER (WHERE k.moves),
           array_agg(k.source) FILTER (WHERE k.moves), array_agg(k.requests) FILTER (WHERE k.moves),
           array_agg(k.input_tokens) FILTER (WHERE k.moves), array_agg(k.output_tokens) FILTER (WHERE k.moves),
           array_agg(k.amount_pico) FILTER (WHERE k.moves), array_agg(k.facts) FILTER (WHERE k.moves),
           array_agg(k.lines) FILTER (WHERE k.moves), array_agg(k.attributes) FILTER (WHERE k.moves),
           array_agg(k.price_key) FILTER (WHERE k.moves), array_agg(k.admitted_at) FILTER (WHERE k.moves),
           coalesce(array_agg(k.tenant_id) FILTER (WHERE k.was = 'charged_by_policy'), '{}'),
           coalesce(array_agg(k.month) FILTER (WHERE k.was = 'charged_by_policy'), '{}'),
           coalesce(array_agg(k.request_id) FILTER (WHERE k.was = 'charged_by_policy'), '{}')
    INTO v_known, v_tenants, v_months, v_requests, v_states, v_ends, v_outcomes, v_sources, v_counts, v_inputs,
         v_outputs, v_amounts, v_facts, v_lines, v_attributes, v_prices, v_admitted,
         v_late_tenants, v_late_months, v_late
    FROM (
        SELECT i.*, h.month, h.state AS was, h.state IN ('open', 'suspense') AS moves, h.attributes, h.price_key,
               h.admitted_at
        FROM (
            SELECT DISTINCT ON (e.tenant_id, e.request_id) e.*
            FROM ROWS FROM (jsonb_to_recordset(p_items) AS (
                tenant_id text, request_id uuid, state text, outcome text, source text, requests integer,
                input_tokens bigint, output_tokens bigint, amount_pico numeric, facts jsonb, lines jsonb
            )) WITH ORDINALITY AS e (tenant_id, request_id, state, outcome, source, requests, input_tokens,
                                     output_tokens, amount_pico, facts, lines, place)
            ORDER BY e.tenant_id, e.request_id, e.place) AS i
        JOIN ledger.hold h ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id)
                          AND h.request_id = i.request_id
        ORDER BY i.tenant_id, i.request_id FOR UPDATE OF h) AS k;

    SELECT array_agg(k.tenant_id), array_agg(k.window_id) INTO v_window_tenants, v_windows
    FROM (
        SELECT w.tenant_id, w.window_id FROM ledger.budget_window w
        WHERE (w.tenant_id, w.window_id) IN (
            SELECT l.tenant_id, l.window_id
            FROM unnest(v_tenants || v_late_tenants, v_months || v_late_months, v_requests || v_late)
                AS i (tenant_id, month, request_id)
            JOIN ledger.hold_line l ON l.tenant_id = i.tenant_id AND l.month = i.month AND l.request_id = i.request_id)
        ORDER BY w.tenant_id, w.window_id FOR UPDATE) AS k;

    -- Nothing is an overrun that money in leases could pay: what is free in them comes back first.
    IF EXISTS (SELECT FROM unnest(v_window_tenants, v_windows) AS k (tenant_id, window_id)
               JOIN ledger.lease l ON l.tenant_id = k.tenant_id AND l.window_id = k.window_id WHERE l.free > 0) THEN
        FOR v_short IN
            SELECT l.tenant_id, l.window_id
            FROM unnest(v_tenants, v_months, v_requests, v_amounts, v_inputs, v_outputs, v_counts)
                AS i (tenant_id, month, request_id, amount_pico, input_tokens, output_tokens, requests)
            JOIN ledger.hold_line l ON l.tenant_id = i.tenant_id AND l.month = i.month AND l.request_id = i.request_id
            JOIN ledger.budget_window w ON w.tenant_id = l.tenant_id AND w.window_id = l.window_id
            CROSS JOIN LATERAL (SELECT ledger.charge_in_unit_v1(
                w.unit, w.token_kind, i.amount_pico, i.input_tokens, i.output_tokens, i.requests) AS due) AS c
            WHERE w.ceiling IS NOT NULL
            GROUP BY l.tenant_id, l.window_id, w.limit_amount, w.spent, w.held, w.suspense
            HAVING sum(greatest(c.due - l.held, 0))
                 > greatest(w.limit_amount - w.spent - w.held - w.suspense + sum(greatest(l.held - c.due, 0)), 0)
            ORDER BY l.tenant_id, l.window_id
        LOOP
            PERFORM ledger.recall_leases_v1(v_short.tenant_id, v_short.window_id, 0);
        END LOOP;
    END IF;

    -- Split every charge: from the hold, from the window's room in the order of the requests' ids, beyond it. By the
    -- same numbers the postings are made and the balances moved. One statement may do both: those before it locked all
    -- that it reads.
    WITH charge AS (
        SELECT l.tenant_id, l.month, l.request_id, l.window_id, l.held, w.limit_amount, w.ceiling IS NULL AS soft,
               CASE i.state WHEN 'suspense' THEN 'suspense' ELSE 'held' END AS account,
               ledger.charge_in_unit_v1(w.unit, w.token_kind, i.amount_pico, i.input_tokens, i.output_tokens,
                                        i.requests) AS due,
               w.spent + w.held + w.suspense AS balance
        FROM unnest(v_tenants, v_months, v_requests, v_states, v_amounts, v_inputs, v_outputs, v_counts)
            AS i (tenant_id, month, request_id, state, amount_pico, input_tokens, output_tokens, requests)
        JOIN ledger.hold_line l ON l.tenant_id = i.tenant_id AND l.month = i.month AND l.request_id = i.request_id
        JOIN ledger.budget_window w ON w.tenant_id = l.tenant_id AND w.window_id = l.window_id
    ), ordered AS (
        SELECT c.*, least(c.due, c.held) AS from_hold, greatest(c.due - c.held, 0) AS excess,
               greatest(c.limit_amount - c.balance
                   + sum(greatest(c.held - c.due, 0)) OVER (PARTITION BY c.tenant_id, c.window_id), 0) AS room,
               coalesce(sum(greatest(c.due - c.held, 0)) OVER (
                   PARTITION BY c.tenant_id, c.window_id ORDER BY c.request_id
                   ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS excess_before
        FROM charge c
    ), split AS MATERIALIZED (
        SELECT o.*, CASE WHEN o.soft THEN o.excess
                         ELSE least(o.excess, greatest(o.room - o.excess_before, 0)) END AS from_room
        FROM ordered o
    ), posted AS (
        INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
        SELECT s.tenant_id, s.month, s.request_id, s.window_id, 1000000, p.debit, p.credit, p.amount
        FROM split s CROSS JOIN LATERAL (VALUES
            (s.account, 'spent', s.from_hold),
            (s.account, 'available', s.held - s.from_hold),
            ('available', 'spent', s.from_room),
            ('funding', 'overrun', s.excess - s.from_room)) AS p (debit, credit, amount)
        WHERE p.amount > 0
    ), moved AS (
        SELECT s.tenant_id, s.window_id, count(*)::integer AS holds, sum(s.from_hold + s.from_room) AS spent,
               coalesce(sum(s.held) FILTER (WHERE s.account = 'held'), 0) AS released,
               coalesce(sum(s.held) FILTER (WHERE s.account = 'suspense'), 0) AS cleared,
               sum(s.excess - s.from_room) AS overrun
        FROM split s GROUP BY s.tenant_id, s.window_id
    ), balanced AS (
        UPDATE ledger.budget_window w SET
            spent = w.spent + m.spent,
            held = w.held - m.released,
            suspense = w.suspense - m.cleared,
            overrun = w.overrun + m.overrun,
            live = w.live - m.holds,
            -- A ceiling above a lowered limit falls with every release, never below the limit.
            ceiling = CASE WHEN w.ceiling IS NOT NULL THEN
                greatest(w.limit_amount, w.spent + m.spent + w.held - m.released + w.suspense - m.cleared) END
        FROM moved m WHERE w.tenant_id = m.tenant_id AND w.window_id = m.window_id
    )
    SELECT coalesce(array_agg(s.request_id), '{}') INTO v_overrun FROM split s WHERE s.excess > s.from_room;

    INSERT INTO ledger.request (tenant_id, month, request_id, project_id, namespace, user_id, session_id, model,
                                attributes, outcome, source, input_tokens, output_tokens, amount_pico, price_key, byok,
                                facts, admitted_at, ended_at)
    SELECT i.tenant_id, i.month, i.request_id, coalesce(i.attributes ->> 'project', ''),
           coalesce(i.attributes ->> 'namespace', ''), coalesce(i.attributes ->> 'user', ''),
           coalesce(i.attributes ->> 'session', ''), coalesce(i.attributes ->> 'model', ''),
           i.attributes - '{project,namespace,user,session,model}'::text[],
           i.outcome, i.source, i.input_tokens, i.output_tokens, i.amount_pico, i.price_key,
           i.attributes @> '{"byok": true}',
           i.facts || jsonb_build_object('requests', i.requests), i.admitted_at, v_now
    FROM unnest(v_tenants, v_months, v_requests, v_attributes, v_outcomes, v_sources, v_inputs, v_outputs, v_amounts,
                v_prices, v_facts, v_counts, v_admitted)
        AS i (tenant_id, month, request_id, attributes, outcome, source, input_tokens, output_tokens, amount_pico,
              price_key, facts, requests, admitted_at);

    INSERT INTO ledger.usage_line (tenant_id, month, request_id, entry, class, quantity, rate_pico, amount_pico, source)
    SELECT i.tenant_id, i.month, i.request_id, 0, l.class, l.quantity, l.rate_pico, l.amount_pico, l.source
    FROM unnest(v_tenants, v_months, v_requests, v_lines) AS i (tenant_id, month, request_id, lines)
    CROSS JOIN LATERAL jsonb_to_recordset(i.lines)
        AS l (class text, quantity bigint, rate_pico numeric, amount_pico numeric, source text);

    UPDATE ledger.hold h SET state = i.state, ended_at = v_now
    FROM unnest(v_tenants, v_months, v_requests, v_ends) AS i (tenant_id, month, request_id, state)
    WHERE h.tenant_id = i.tenant_id AND h.month = i.month AND h.request_id = i.request_id;

    IF cardinality(v_requests) = jsonb_array_length(p_items) THEN
        RETURN QUERY
        SELECT i.request_id, 'settled', i.request_id = ANY (v_overrun) FROM unnest(v_requests) AS i (request_id);
        RETURN;
    END IF;

    -- Seldom: a batch that comes again, or with requests that are not known or were charged by policy.
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
                WHEN i.request_id = ANY (v_requests) THEN 'settled'
                WHEN i.request_id = ANY (v_late) THEN 'corrected'
                ELSE 'already' END,
           EXISTS (SELECT FROM ledger.posting p
                   WHERE p.tenant_id = i.tenant_id AND p.month = ledger.month_of_v1(i.request_id)
                     AND p.source_id = i.request_id AND p.seq >= 1000000 AND p.credit = 'overrun')
    FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid);
END
$$;

-- The other functions of a request's way look things up by whole keys too, and are planned the same way. Without it an
-- extension locked its windows by going through every hold of every window of the tenant.
DO $$
DECLARE
    v_function regprocedure;
BEGIN
    FOR v_function IN
        SELECT p.oid::regprocedure FROM pg_catalog.pg_proc p
        WHERE p.pronamespace = 'ledger'::regnamespace
          AND p.proname IN (
              'admit_v1', 'admit_batch_v1', 'extend_batch_v1', 'checkpoint_batch_v1', 'lease_batch_v1')
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET plan_cache_mode = force_generic_plan SET enable_seqscan = off'
                       ' SET enable_hashjoin = off SET enable_mergejoin = off SET join_collapse_limit = 1'
                       ' SET random_page_cost = 0.1 SET jit = off', v_function);
    END LOOP;
END
$$;

-- Of two indexes that begin with the tenant and look as cheap, the planner takes the younger one. In a young ledger
-- that was the unique key: every look-up of one window read all windows of its tenant, until statistics knew better.
ALTER TABLE ledger.budget_window DROP CONSTRAINT budget_window_pkey, ADD PRIMARY KEY (tenant_id, window_id);
