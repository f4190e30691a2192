-- Leases: a slice of a busy window that is one holder's own, so that its admissions need not lock the window's row.
--
-- One row takes under a thousand commits a second, whoever asks. A lease is a sub-account of its window: its `free` has
-- left `available` and is part of the window's `held`, so that the ceiling covers it; who is admitted from a lease moves
-- money from there to the request's hold, in the database, before the request is sent. Nothing is ever in doubt about a
-- lease: a holder that ends loses it, and what was free in it is available again.
--
-- Locks, in the one order that everybody keeps: holders, holds by key, subjects by budget and subject, leases by window
-- and holder, windows by key. A lease that is wanted back by who has its window already (recall_leases_v1) is taken only
-- where nobody has it: that never waits.

CREATE TABLE ledger.lease (
    tenant_id text NOT NULL,
    window_id bigint NOT NULL,
    holder_id uuid NOT NULL,
    free numeric(38, 0) NOT NULL DEFAULT 0 CHECK (free >= 0),
    new_live integer NOT NULL DEFAULT 0 CHECK (new_live >= 0),  -- admissions that the window's `live` does not count yet
    seq integer NOT NULL DEFAULT 0,             -- of its last grant or return
    PRIMARY KEY (tenant_id, window_id, holder_id)
) WITH (fillfactor = 50);                       -- written in place (HOT): leave room
CREATE INDEX ON ledger.lease (holder_id);

-- grant: available -> leased (source: the holder, seq: the lease's); use: leased -> held (source and seq: the request's,
-- as in any hold); return: leased -> available (as the grant).
ALTER TABLE ledger.posting
    DROP CONSTRAINT posting_debit_check,
    DROP CONSTRAINT posting_credit_check,
    ADD CONSTRAINT posting_debit_check CHECK (
        debit IN ('funding', 'available', 'leased', 'held', 'spent', 'suspense', 'overrun')),
    ADD CONSTRAINT posting_credit_check CHECK (
        credit IN ('funding', 'available', 'leased', 'held', 'spent', 'suspense', 'overrun'));

-- A request that was admitted from a lease and ends before its lease tells the window makes `live` less than what the
-- window was told of; with the leases' `new_live` it counts the open requests.
ALTER TABLE ledger.budget_window DROP CONSTRAINT budget_window_live_check;

-- Give these leases this much free money each, and tell their windows how many requests they admitted. Parallel arrays,
-- each lease once. The leases and their windows are locked already.
CREATE FUNCTION ledger.set_leases_locked_v1(
    p_tenants text[], p_windows bigint[], p_holders uuid[], p_slices numeric[]
) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
    SELECT l.tenant_id, date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC')::date, l.holder_id, l.window_id,
           l.seq + 1, CASE WHEN i.slice > l.free THEN 'available' ELSE 'leased' END,
           CASE WHEN i.slice > l.free THEN 'leased' ELSE 'available' END, abs(i.slice - l.free)
    FROM unnest(p_tenants, p_windows, p_holders, p_slices) AS i (tenant_id, window_id, holder_id, slice)
    JOIN ledger.lease l USING (tenant_id, window_id, holder_id)
    WHERE i.slice <> l.free;
    UPDATE ledger.budget_window w SET
        held = w.held + m.change,
        live = w.live + m.live,
        ceiling = CASE WHEN w.ceiling IS NOT NULL THEN
            greatest(w.limit_amount, w.spent + w.held + m.change + w.suspense) END
    FROM (
        SELECT l.tenant_id, l.window_id, sum(i.slice - l.free) AS change, sum(l.new_live)::integer AS live
        FROM unnest(p_tenants, p_windows, p_holders, p_slices) AS i (tenant_id, window_id, holder_id, slice)
        JOIN ledger.lease l USING (tenant_id, window_id, holder_id)
        GROUP BY l.tenant_id, l.window_id) AS m
    WHERE w.tenant_id = m.tenant_id AND w.window_id = m.window_id AND (m.change <> 0 OR m.live <> 0);
    UPDATE ledger.lease l SET free = i.slice, new_live = 0, seq = l.seq + CASE WHEN i.slice <> l.free THEN 1 ELSE 0 END
    FROM unnest(p_tenants, p_windows, p_holders, p_slices) AS i (tenant_id, window_id, holder_id, slice)
    WHERE l.tenant_id = i.tenant_id AND l.window_id = i.window_id AND l.holder_id = i.holder_id
      AND (l.free <> i.slice OR l.new_live <> 0);
END
$$;

-- Take back what is free in the leases of a window, where together it is at least p_lacking. The window is locked already,
-- so a lease that somebody is using at this moment is passed over: waiting for it could be waiting for oneself.
CREATE FUNCTION ledger.recall_leases_v1(p_tenant text, p_window bigint, p_lacking numeric)
RETURNS TABLE (freed numeric, told_live integer)
LANGUAGE plpgsql AS $$
DECLARE
    v_holders uuid[];
BEGIN
    freed := 0;
    told_live := 0;
    IF (SELECT sum(l.free) FROM ledger.lease l WHERE l.tenant_id = p_tenant AND l.window_id = p_window) >= p_lacking THEN
        SELECT coalesce(array_agg(k.holder_id), '{}'), coalesce(sum(k.free), 0), coalesce(sum(k.new_live), 0)
        INTO v_holders, freed, told_live
        FROM (
            SELECT l.holder_id, l.free, l.new_live FROM ledger.lease l
            WHERE l.tenant_id = p_tenant AND l.window_id = p_window AND l.free > 0
            FOR UPDATE SKIP LOCKED) AS k;
        PERFORM ledger.set_leases_locked_v1(
            array_fill(p_tenant, ARRAY[cardinality(v_holders)]), array_fill(p_window, ARRAY[cardinality(v_holders)]),
            v_holders, array_fill(0::numeric, ARRAY[cardinality(v_holders)]));
    END IF;
    RETURN NEXT;
END
$$;

-- One request of a batch of admissions, as it is asked.
CREATE TYPE ledger.admission AS (
    tenant_id text,
    request_id uuid,
    attributes jsonb,                           -- namespace, project, user ...: as credentials and routing say
    price_key text,
    input_tokens bigint,
    input_amount_pico numeric,
    output_rate_pico numeric,
    need_tokens bigint,                         -- output tokens without which it is not worth to begin
    want_tokens bigint,                         -- the wish
    shares integer                              -- the grant is at most 1/(shares x live) of what a window has left
);

-- And one window that it needs, in the window's unit.
CREATE TYPE ledger.admission_line AS (
    place integer,                              -- of the request in its batch
    tenant_id text,
    budget_id text,
    subject jsonb,
    window_id bigint,
    fixed numeric,                              -- for the input
    rate numeric,                               -- for an output token
    amount numeric                              -- what was held; NULL: nothing
);

-- Admit requests against every budget that matches their verified attributes: each in all its windows or in none.
-- p_items is a JSON array of ledger.admission, p_holder the sidecar that will hold the money. Answers one row an item,
-- {"verdict": "granted" | "refused" | "void", ...}. Asking again with the same id gives the first answer while the hold
-- is open, and "void" when it has ended, or when the holder has.
--
-- A window of which the holder has a lease that can pay all that the batch wishes of it is not locked: the lease pays, and
-- it pays wishes whole, for its size was a fair share already. Every other window is locked and shared as grant_v1 says;
-- before it refuses anybody, it takes back what is free in its leases.
--
-- It raises where one item cannot be read or written at all: ask again, one by one.
--
-- The settings on this function and on extend_batch_v1 are about plans, as in 0010_settle.sql: all that they ask is look-ups
-- by whole primary keys, planned once a connection and joined in the order written, whatever the statistics of a partition
-- that fills may say.
CREATE FUNCTION ledger.admit_batch_v1(p_holder uuid, p_items jsonb) RETURNS TABLE (request_id uuid, answer jsonb)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET join_collapse_limit = 1 SET random_page_cost = 0.1 SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_may_admit boolean;
    v_items ledger.admission[];
    v_item ledger.admission;
    v_answers jsonb[] := '{}';                  -- by place, where it is known without any window
    v_tenants text[];
    v_lines ledger.admission_line[] := '{}';    -- in the order of places and windows
    v_line ledger.admission_line;
    v_first integer;
    v_next integer := 1;
    v_hold record;
    v_match record;
    v_id bigint;
    -- The windows. Those of `v_leased` are paid by a lease and bind nobody here.
    v_leased bigint[];
    v_ids bigint[];
    v_bind boolean[];
    v_left numeric[];
    v_live integer[];
    v_moved numeric[];
    v_new integer[];
    v_slot integer;
    v_window ledger.budget_window;
    v_budget ledger.budget;
    v_recalled record;
    v_grant bigint;
    v_possible bigint;
    v_rest numeric;
    v_refusal jsonb;
    v_bound_by jsonb;                           -- the window that granted less than the wish
BEGIN
    SELECT array_agg(i ORDER BY i.tenant_id, ledger.month_of_v1(i.request_id), i.request_id),
           array_agg(DISTINCT i.tenant_id)
    INTO v_items, v_tenants FROM jsonb_populate_recordset(NULL::ledger.admission, p_items) AS i;
    PERFORM ledger.require_tenants_v1(v_tenants);
    PERFORM ledger.require_holder_v1(p_holder);
    v_may_admit := ledger.holder_may_admit_v1(p_holder);

    FOR v_place IN 1 .. coalesce(cardinality(v_items), 0) LOOP
        v_item := v_items[v_place];
        SELECT h.state, h.answer INTO v_hold FROM ledger.hold h
        WHERE h.tenant_id = v_item.tenant_id AND h.month = ledger.month_of_v1(v_item.request_id)
          AND h.request_id = v_item.request_id FOR UPDATE;
        IF FOUND THEN
            v_answers[v_place] := CASE WHEN v_hold.state = 'open' THEN v_hold.answer ELSE '{"verdict": "void"}' END;
            CONTINUE;
        ELSIF NOT v_may_admit THEN
            v_answers[v_place] := '{"verdict": "void"}';
            CONTINUE;
        ELSIF EXISTS (SELECT FROM ledger.project p WHERE p.tenant_id = v_item.tenant_id
                                                     AND p.project_id = v_item.attributes ->> 'project' AND p.suspended) THEN
            v_answers[v_place] := jsonb_build_object('verdict', 'refused', 'reason', 'suspended', 'what', 'project',
                                                     'name', v_item.attributes ->> 'project');
            CONTINUE;
        END IF;
        v_answers[v_place] := NULL;
        FOR v_match IN
            SELECT b.budget_id, b.suspended, k.subject, c.window_id, c.unit, c.token_kind
            FROM ledger.budget b
            CROSS JOIN LATERAL (SELECT CASE WHEN b.per = '{}' THEN '[]'
                                            ELSE ledger.subject_v1(b.per, v_item.attributes) END AS subject) AS k
            LEFT JOIN LATERAL (
                SELECT w.window_id, w.unit, w.token_kind
                FROM ledger.budget_subject s JOIN ledger.budget_window w USING (tenant_id, window_id)
                WHERE s.tenant_id = b.tenant_id AND s.budget_id = b.budget_id AND s.subject = k.subject
                  AND (w.ends_at IS NULL OR w.ends_at > v_now) LIMIT 1) AS c ON true
            WHERE b.tenant_id = v_item.tenant_id AND b.deleted_at IS NULL
              AND NOT EXISTS (SELECT FROM jsonb_each_text(b.scope) s
                              WHERE coalesce(v_item.attributes ->> s.key, '') NOT LIKE s.value)
              AND (b.workload_labels IS NULL OR v_item.attributes -> 'labels' @> b.workload_labels)
            ORDER BY b.budget_id
        LOOP
            IF v_match.suspended THEN
                v_answers[v_place] := jsonb_build_object('verdict', 'refused', 'reason', 'suspended', 'what', 'budget',
                                                         'name', v_match.budget_id);
                EXIT;
            END IF;
            v_line := (v_place, v_item.tenant_id, v_match.budget_id, v_match.subject, v_match.window_id,
                ledger.input_part_v1(v_match.unit, v_match.token_kind, v_item.input_tokens, v_item.input_amount_pico),
                ledger.output_rate_v1(v_match.unit, v_match.token_kind, v_item.output_rate_pico), NULL);
            v_lines := v_lines || v_line;
        END LOOP;
    END LOOP;

    -- Open what is missing, in the order in which everyone locks their subjects.
    FOR v_match IN
        SELECT l.tenant_id, l.budget_id, l.subject, array_agg(l.line) AS lines
        FROM unnest(v_lines) WITH ORDINALITY AS l (place, tenant_id, budget_id, subject, window_id, fixed, rate, amount, line)
        WHERE l.window_id IS NULL AND v_answers[l.place] IS NULL
        GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
    LOOP
        v_id := ledger.open_window_v1(v_match.tenant_id, v_match.budget_id, v_match.subject);
        SELECT * INTO STRICT v_window FROM ledger.budget_window w
        WHERE w.tenant_id = v_match.tenant_id AND w.window_id = v_id;
        FOREACH v_next IN ARRAY v_match.lines LOOP
            v_line := v_lines[v_next];
            v_item := v_items[v_line.place];
            v_line.window_id := v_id;
            v_line.fixed := ledger.input_part_v1(v_window.unit, v_window.token_kind, v_item.input_tokens,
                                                 v_item.input_amount_pico);
            v_line.rate := ledger.output_rate_v1(v_window.unit, v_window.token_kind, v_item.output_rate_pico);
            v_lines[v_next] := v_line;
        END LOOP;
    END LOOP;
    SELECT coalesce(array_agg(l ORDER BY l.place, l.window_id), '{}'), coalesce(array_agg(DISTINCT l.window_id), '{}')
    INTO v_lines, v_ids FROM unnest(v_lines) AS l WHERE v_answers[l.place] IS NULL;

    -- Lock, then look: the leases, and the windows that they cannot pay for.
    WITH lease AS (
        SELECT l.window_id, l.free FROM ledger.lease l
        WHERE l.tenant_id = ANY (v_tenants) AND l.window_id = ANY (v_ids) AND l.holder_id = p_holder
        ORDER BY l.tenant_id, l.window_id FOR UPDATE
    )
    SELECT coalesce(array_agg(l.window_id), '{}') INTO v_leased FROM lease l
    WHERE l.free > 0 AND l.free >= (
        SELECT sum(k.fixed + k.rate * greatest(v_items[k.place].need_tokens, v_items[k.place].want_tokens))
        FROM unnest(v_lines) AS k WHERE k.window_id = l.window_id);
    SELECT coalesce(array_agg(k.window_id), '{}') || v_leased, coalesce(array_agg(k.ceiling IS NOT NULL), '{}'),
           array_agg(k.limit_amount - k.spent - k.held - k.suspense), array_agg(k.live)
    INTO v_ids, v_bind, v_left, v_live
    FROM (
        SELECT w.* FROM ledger.budget_window w
        WHERE w.tenant_id = ANY (v_tenants) AND w.window_id = ANY (v_ids) AND w.window_id <> ALL (v_leased)
        ORDER BY w.tenant_id, w.window_id FOR UPDATE) AS k;
    v_moved := array_fill(0::numeric, ARRAY[cardinality(v_ids)]);
    v_new := array_fill(0, ARRAY[cardinality(v_ids)]);

    v_next := 1;
    FOR v_place IN 1 .. coalesce(cardinality(v_items), 0) LOOP
        v_item := v_items[v_place];
        request_id := v_item.request_id;
        answer := v_answers[v_place];
        IF answer IS NOT NULL THEN
            RETURN NEXT;
            CONTINUE;
        END IF;

        -- Money before rates, and of several refusals the first by window.
        v_grant := greatest(v_item.want_tokens, v_item.need_tokens);
        v_refusal := NULL;
        v_bound_by := NULL;
        v_first := v_next;
        WHILE v_lines[v_next].place = v_place LOOP
            v_line := v_lines[v_next];
            v_next := v_next + 1;
            v_slot := array_position(v_ids, v_line.window_id);
            CONTINUE WHEN v_bind[v_slot] IS NOT TRUE;
            v_rest := v_left[v_slot] - v_line.fixed;
            v_possible := ledger.grant_v1(v_rest, v_line.rate, v_item.need_tokens, v_item.want_tokens, v_item.shares,
                                          greatest(v_live[v_slot], 0) + 1);
            IF v_possible < 0 THEN
                SELECT * INTO v_recalled FROM ledger.recall_leases_v1(
                    v_item.tenant_id, v_line.window_id, v_item.need_tokens * v_line.rate - v_rest);
                IF v_recalled.freed > 0 THEN
                    v_left[v_slot] := v_left[v_slot] + v_recalled.freed;
                    v_live[v_slot] := v_live[v_slot] + v_recalled.told_live;
                    v_possible := ledger.grant_v1(
                        v_rest + v_recalled.freed, v_line.rate, v_item.need_tokens, v_item.want_tokens, v_item.shares,
                        greatest(v_live[v_slot], 0) + 1);
                END IF;
            END IF;
            CONTINUE WHEN v_possible >= v_grant;
            SELECT * INTO STRICT v_budget FROM ledger.budget b
            WHERE b.tenant_id = v_item.tenant_id AND b.budget_id = v_line.budget_id;
            SELECT * INTO STRICT v_window FROM ledger.budget_window w
            WHERE w.tenant_id = v_item.tenant_id AND w.window_id = v_line.window_id;
            v_window.held := v_window.held + v_moved[v_slot];  -- by those before it in this batch
            IF v_possible >= 0 THEN
                v_grant := v_possible;
                v_bound_by := ledger.refusal_v1(v_budget.refusal, v_budget, v_window);
            ELSIF v_refusal IS NULL OR (v_refusal ->> 'reason' = 'rate' AND v_budget.refusal = 'quota') THEN
                v_refusal := ledger.refusal_v1(v_budget.refusal, v_budget, v_window);
            END IF;
        END LOOP;
        IF v_refusal IS NOT NULL THEN
            answer := v_refusal;
            RETURN NEXT;
            CONTINUE;
        END IF;

        SELECT jsonb_build_object(
            'verdict', 'granted', 'output_tokens', v_grant, 'bound_by', v_bound_by,
            'windows', coalesce(jsonb_agg(l.window_id ORDER BY l.window_id), '[]'),
            'amounts', coalesce(jsonb_agg((l.fixed + v_grant * l.rate)::text ORDER BY l.window_id), '[]'))
        INTO answer FROM unnest(v_lines[v_first : v_next - 1]) AS l;
        INSERT INTO ledger.hold (tenant_id, month, request_id, state, holder_id, attributes, price_key, output_rate_pico,
                                 granted_output_tokens, answer, input_tokens, input_amount_pico)
        VALUES (v_item.tenant_id, ledger.month_of_v1(v_item.request_id), v_item.request_id, 'open', p_holder,
                v_item.attributes, v_item.price_key, v_item.output_rate_pico, v_grant, answer, v_item.input_tokens,
                v_item.input_amount_pico)
        ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            -- The same id came twice at once, or its void overtook it: what is there counts, and nothing has moved here.
            SELECT h.state, h.answer INTO STRICT v_hold FROM ledger.hold h
            WHERE h.tenant_id = v_item.tenant_id AND h.month = ledger.month_of_v1(v_item.request_id)
              AND h.request_id = v_item.request_id;
            answer := CASE WHEN v_hold.state = 'open' THEN v_hold.answer ELSE '{"verdict": "void"}' END;
            RETURN NEXT;
            CONTINUE;
        END IF;
        FOR v_at IN v_first .. v_next - 1 LOOP
            v_line := v_lines[v_at];
            v_line.amount := v_line.fixed + v_grant * v_line.rate;
            v_lines[v_at] := v_line;
            v_slot := array_position(v_ids, v_line.window_id);
            v_moved[v_slot] := v_moved[v_slot] + v_line.amount;
            v_left[v_slot] := v_left[v_slot] - v_line.amount;
            v_new[v_slot] := v_new[v_slot] + 1;
            v_live[v_slot] := v_live[v_slot] + 1;
        END LOOP;
        RETURN NEXT;
    END LOOP;

    INSERT INTO ledger.hold_line (tenant_id, month, request_id, window_id, held)
    SELECT l.tenant_id, ledger.month_of_v1(v_items[l.place].request_id), v_items[l.place].request_id, l.window_id, l.amount
    FROM unnest(v_lines) AS l WHERE l.amount IS NOT NULL;
    INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
    SELECT l.tenant_id, ledger.month_of_v1(v_items[l.place].request_id), v_items[l.place].request_id, l.window_id, 0,
           CASE WHEN l.window_id = ANY (v_leased) THEN 'leased' ELSE 'available' END, 'held', l.amount
    FROM unnest(v_lines) AS l WHERE l.amount > 0;
    UPDATE ledger.budget_window w SET held = w.held + m.moved, live = w.live + m.new_live
    FROM unnest(v_ids, v_moved, v_new) AS m (window_id, moved, new_live)
    WHERE m.new_live > 0 AND w.tenant_id = ANY (v_tenants) AND w.window_id = m.window_id
      AND m.window_id <> ALL (v_leased);
    UPDATE ledger.lease l SET free = l.free - m.moved, new_live = l.new_live + m.new_live
    FROM unnest(v_ids, v_moved, v_new) AS m (window_id, moved, new_live)
    WHERE m.new_live > 0 AND l.tenant_id = ANY (v_tenants) AND l.window_id = m.window_id AND l.holder_id = p_holder
      AND m.window_id = ANY (v_leased);
END
$$;
DROP FUNCTION ledger.admit_v1(text, uuid, uuid, jsonb, text, bigint, numeric, numeric, bigint, bigint, integer);
DELETE FROM ledger.sidecar_right WHERE name = 'admit_v1';
INSERT INTO ledger.sidecar_right (kind, name) VALUES ('function', 'admit_batch_v1') ON CONFLICT DO NOTHING;

-- More output tokens for one open hold. Its windows are locked already, or a lease of its holder is that can pay the
-- whole wish (p_leased); those that output does not move are only read.
DROP FUNCTION ledger.extend_locked_v1(text, date, uuid, integer, bigint, bigint, integer);
CREATE FUNCTION ledger.extend_locked_v1(
    p_tenant text, p_month date, p_request uuid, p_seq integer, p_need bigint, p_want bigint, p_shares integer,
    p_leased bigint[]
) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    v_hold ledger.hold;
    v_budget ledger.budget;
    v_window ledger.budget_window;
    v_rate numeric;
    v_left numeric;
    v_grant bigint := greatest(p_want, p_need);
    v_possible bigint;
    v_recalled record;
    v_windows bigint[] := '{}';                 -- that output moves
    v_rates numeric[] := '{}';
    v_refusal jsonb;
    v_answer jsonb;
BEGIN
    SELECT * INTO v_hold FROM ledger.hold h
    WHERE h.tenant_id = p_tenant AND h.month = p_month AND h.request_id = p_request;
    IF NOT FOUND OR v_hold.state <> 'open' THEN
        RETURN '{"verdict": "void"}';
    ELSIF p_seq <= v_hold.last_seq THEN
        RETURN coalesce(v_hold.extension, v_hold.answer);
    ELSIF EXISTS (SELECT FROM ledger.holder o WHERE o.holder_id = v_hold.holder_id AND o.fenced_at IS NOT NULL) THEN
        RETURN '{"verdict": "void"}';           -- a reap of many has not come to it yet
    END IF;

    IF EXISTS (SELECT FROM ledger.project p
               WHERE p.tenant_id = p_tenant AND p.project_id = v_hold.attributes ->> 'project' AND p.suspended) THEN
        v_refusal := jsonb_build_object('verdict', 'refused', 'reason', 'suspended', 'what', 'project',
                                        'name', v_hold.attributes ->> 'project');
    END IF;

    FOR v_window IN
        SELECT w.* FROM ledger.hold_line l JOIN ledger.budget_window w USING (tenant_id, window_id)
        WHERE l.tenant_id = p_tenant AND l.month = p_month AND l.request_id = p_request
        ORDER BY w.window_id
    LOOP
        EXIT WHEN v_refusal ->> 'reason' = 'suspended';
        SELECT * INTO STRICT v_budget FROM ledger.budget b
        WHERE b.tenant_id = p_tenant AND b.budget_id = v_window.budget_id;
        IF v_budget.suspended THEN
            v_refusal := jsonb_build_object('verdict', 'refused', 'reason', 'suspended', 'what', 'budget',
                                            'name', v_budget.budget_id);
            CONTINUE;
        END IF;
        v_rate := ledger.output_rate_v1(v_window.unit, v_window.token_kind, v_hold.output_rate_pico);
        -- A window that output does not move (requests, input tokens) has nothing to say here.
        CONTINUE WHEN v_rate = 0;
        v_windows := v_windows || v_window.window_id;
        v_rates := v_rates || v_rate;
        CONTINUE WHEN v_window.ceiling IS NULL OR v_window.window_id = ANY (p_leased);
        v_left := v_window.limit_amount - v_window.spent - v_window.held - v_window.suspense;
        v_possible := ledger.grant_v1(v_left, v_rate, p_need, p_want, p_shares, greatest(v_window.live, 1));
        IF v_possible < 0 THEN
            SELECT * INTO v_recalled FROM ledger.recall_leases_v1(p_tenant, v_window.window_id, p_need * v_rate - v_left);
            v_left := v_left + v_recalled.freed;
            v_window.live := v_window.live + v_recalled.told_live;
            v_window.held := v_window.held - v_recalled.freed;
            v_possible := ledger.grant_v1(v_left, v_rate, p_need, p_want, p_shares, greatest(v_window.live, 1));
        END IF;
        IF v_possible >= 0 THEN
            v_grant := least(v_grant, v_possible);
        ELSIF v_refusal IS NULL THEN
            v_refusal := ledger.refusal_v1(v_budget.refusal, v_budget, v_window);
        END IF;
    END LOOP;

    IF v_refusal IS NULL THEN
        SELECT jsonb_build_object(
            'verdict', 'granted', 'output_tokens', v_grant, 'windows', coalesce(jsonb_agg(m.window_id), '[]'),
            'amounts', coalesce(jsonb_agg((v_grant * m.rate)::text), '[]'))
        INTO v_answer FROM unnest(v_windows, v_rates) AS m (window_id, rate);
        INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
        SELECT p_tenant, p_month, p_request, m.window_id, p_seq,
               CASE WHEN m.window_id = ANY (p_leased) THEN 'leased' ELSE 'available' END, 'held', v_grant * m.rate
        FROM unnest(v_windows, v_rates) AS m (window_id, rate) WHERE v_grant > 0;
        UPDATE ledger.hold_line l SET held = l.held + v_grant * m.rate
        FROM unnest(v_windows, v_rates) AS m (window_id, rate)
        WHERE l.tenant_id = p_tenant AND l.month = p_month AND l.request_id = p_request AND l.window_id = m.window_id;
        UPDATE ledger.budget_window w SET held = w.held + v_grant * m.rate
        FROM unnest(v_windows, v_rates) AS m (window_id, rate)
        WHERE w.tenant_id = p_tenant AND w.window_id = m.window_id AND m.window_id <> ALL (p_leased);
        UPDATE ledger.lease l SET free = l.free - v_grant * m.rate
        FROM unnest(v_windows, v_rates) AS m (window_id, rate)
        WHERE l.tenant_id = p_tenant AND l.window_id = m.window_id AND l.holder_id = v_hold.holder_id
          AND m.window_id = ANY (p_leased);
    ELSE
        v_grant := 0;
        v_answer := v_refusal;
    END IF;
    UPDATE ledger.hold h SET last_seq = p_seq, extension = v_answer,
                             granted_output_tokens = h.granted_output_tokens + v_grant
    WHERE h.tenant_id = p_tenant AND h.month = p_month AND h.request_id = p_request;
    RETURN v_answer;
END
$$;

-- Extend several holds in one commit. Parallel arrays, an item each; answers come in any order.
-- As with admissions, a window is not locked of which the holder of all these holds has a lease that can pay all that is
-- wished of it; but a lease ends with its window, extensions do not.
CREATE OR REPLACE FUNCTION ledger.extend_batch_v1(
    p_tenants text[], p_requests uuid[], p_seqs integer[], p_needs bigint[], p_wants bigint[], p_shares integer
) RETURNS TABLE (request_id uuid, answer jsonb)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET join_collapse_limit = 1 SET random_page_cost = 0.1 SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_item record;
    v_tenants text[];
    v_windows bigint[];
    v_holders uuid[];
    v_wishes numeric[];
    v_leased bigint[];
BEGIN
    PERFORM ledger.require_tenants_v1(p_tenants);
    PERFORM FROM unnest(p_tenants, p_requests) AS i (tenant_id, request_id)
    JOIN ledger.hold h
      ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id
    ORDER BY h.tenant_id, h.month, h.request_id FOR UPDATE OF h;

    SELECT array_agg(n.tenant_id), array_agg(n.window_id), array_agg(n.holder_id), array_agg(n.wish)
    INTO v_tenants, v_windows, v_holders, v_wishes
    FROM (
        SELECT l.tenant_id, l.window_id, sum(greatest(i.want, i.need) * r.rate) AS wish,
               CASE WHEN min(h.holder_id::text) = max(h.holder_id::text) AND bool_and(w.ends_at > clock_timestamp()) IS NOT FALSE
                   THEN min(h.holder_id::text)::uuid END AS holder_id
        FROM unnest(p_tenants, p_requests, p_seqs, p_needs, p_wants) AS i (tenant_id, request_id, seq, need, want)
        JOIN ledger.hold h
          ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id
        JOIN ledger.hold_line l ON l.tenant_id = h.tenant_id AND l.month = h.month AND l.request_id = h.request_id
        JOIN ledger.budget_window w ON w.tenant_id = l.tenant_id AND w.window_id = l.window_id
        CROSS JOIN LATERAL (
            SELECT ledger.output_rate_v1(w.unit, w.token_kind, h.output_rate_pico) AS rate) AS r
        WHERE h.state = 'open' AND i.seq > h.last_seq AND r.rate > 0
        GROUP BY l.tenant_id, l.window_id) AS n;
    SELECT coalesce(array_agg(k.window_id) FILTER (WHERE k.free >= k.wish), '{}') INTO v_leased
    FROM (
        SELECT l.window_id, l.free, n.wish
        FROM unnest(v_tenants, v_windows, v_holders, v_wishes) AS n (tenant_id, window_id, holder_id, wish)
        JOIN ledger.lease l USING (tenant_id, window_id, holder_id)
        ORDER BY l.tenant_id, l.window_id, l.holder_id FOR UPDATE OF l) AS k;
    PERFORM FROM ledger.budget_window w
    WHERE w.tenant_id = ANY (v_tenants) AND w.window_id = ANY (v_windows) AND w.window_id <> ALL (v_leased)
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;

    FOR v_item IN
        SELECT * FROM unnest(p_tenants, p_requests, p_seqs, p_needs, p_wants)
            AS i (tenant_id, request_id, seq, need, want)
    LOOP
        request_id := v_item.request_id;
        answer := ledger.extend_locked_v1(v_item.tenant_id, ledger.month_of_v1(v_item.request_id), v_item.request_id,
                                          v_item.seq, v_item.need, v_item.want, p_shares, v_leased);
        RETURN NEXT;
    END LOOP;
END
$$;

-- Bring the leases of a holder in these tenants to what it wants of each window, and give up those that it does not name.
-- Parallel arrays, an item each. Answers each lease with what is free in it now.
--
-- A lease is at most a quarter of the holder's fair share of what its window has left, and nothing at all where that is
-- far below the wish: at the end of a window everybody takes from the window itself, and the last of it is found by whoever
-- asks. A holder that is not believed to live gets nothing; neither does anybody of a window that has ended, nor of one that
-- counts what runs at once. Of a soft window it is the wish, within the limit.
CREATE FUNCTION ledger.lease_batch_v1(p_holder uuid, p_tenants text[], p_windows bigint[], p_wants numeric[])
RETURNS TABLE (tenant_id text, window_id bigint, free numeric)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_tenants text[];
    v_windows bigint[];
    v_slices numeric[];
BEGIN
    PERFORM ledger.require_tenants_v1(p_tenants);
    PERFORM ledger.require_holder_v1(p_holder);
    -- Nobody fences the holder while it is given money.
    PERFORM FROM ledger.holder h WHERE h.holder_id = p_holder AND ledger.holder_lives_v1(h) FOR SHARE;
    IF NOT FOUND THEN
        RETURN;
    END IF;

    INSERT INTO ledger.lease (tenant_id, window_id, holder_id)
    SELECT DISTINCT w.tenant_id, w.window_id, p_holder
    FROM unnest(p_tenants, p_windows, p_wants) AS i (tenant_id, window_id, want)
    JOIN ledger.budget_window w USING (tenant_id, window_id)
    WHERE i.want > 0 AND (w.ends_at IS NULL OR w.ends_at > v_now) AND w.unit <> 'concurrency'
    ORDER BY 1, 2 ON CONFLICT DO NOTHING;
    SELECT coalesce(array_agg(k.tenant_id), '{}'), coalesce(array_agg(k.window_id), '{}') INTO v_tenants, v_windows
    FROM (
        SELECT l.tenant_id, l.window_id FROM ledger.lease l
        WHERE l.holder_id = p_holder AND l.tenant_id = ANY (p_tenants)
        ORDER BY l.tenant_id, l.window_id FOR UPDATE) AS k;
    PERFORM FROM ledger.budget_window w
    WHERE w.tenant_id = ANY (v_tenants) AND w.window_id = ANY (v_windows)
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;

    SELECT coalesce(array_agg(s.tenant_id), '{}'), coalesce(array_agg(s.window_id), '{}'),
           coalesce(array_agg(CASE
               WHEN s.ends_at <= v_now THEN 0
               WHEN s.ceiling IS NULL THEN least(s.want, s.limit_amount)
               WHEN least(s.want, s.fair) * 4 >= s.want THEN least(s.want, s.fair)
               ELSE 0 END), '{}')
    INTO v_tenants, v_windows, v_slices
    FROM (
        SELECT w.*, coalesce(i.want, 0) AS want,
               div(greatest(w.limit_amount - w.spent - w.held - w.suspense + l.free, 0),
                   4 * (SELECT count(*) FROM ledger.lease o
                        WHERE o.tenant_id = l.tenant_id AND o.window_id = l.window_id
                          AND (o.free > 0 OR o.holder_id = p_holder))) AS fair
        FROM ledger.lease l
        JOIN ledger.budget_window w USING (tenant_id, window_id)
        LEFT JOIN (
            SELECT x.tenant_id, x.window_id, max(x.want) AS want
            FROM unnest(p_tenants, p_windows, p_wants) AS x (tenant_id, window_id, want)
            WHERE x.want > 0 AND x.want < 'Infinity' GROUP BY 1, 2) AS i USING (tenant_id, window_id)
        WHERE l.holder_id = p_holder AND l.tenant_id = ANY (v_tenants) AND l.window_id = ANY (v_windows)) AS s;
    PERFORM ledger.set_leases_locked_v1(v_tenants, v_windows, array_fill(p_holder, ARRAY[cardinality(v_windows)]), v_slices);

    DELETE FROM ledger.lease l
    WHERE l.holder_id = p_holder AND l.tenant_id = ANY (v_tenants) AND l.window_id = ANY (v_windows)
      AND EXISTS (SELECT FROM ledger.budget_window w
                  WHERE w.tenant_id = l.tenant_id AND w.window_id = l.window_id AND w.ends_at <= v_now);
    RETURN QUERY
    SELECT l.tenant_id, l.window_id, l.free FROM ledger.lease l
    WHERE l.holder_id = p_holder AND l.tenant_id = ANY (v_tenants) AND l.window_id = ANY (v_windows);
END
$$;
INSERT INTO ledger.sidecar_right (kind, name) VALUES ('function', 'lease_batch_v1') ON CONFLICT DO NOTHING;

-- A clean end: what is leased is free again at once. False: the holder still holds something; its row stays, and expires.
CREATE OR REPLACE FUNCTION ledger.unregister_holder_v1(p_holder uuid) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
DECLARE
    v_fenced boolean;
    v_tenants text[];
    v_windows bigint[];
BEGIN
    PERFORM ledger.require_holder_v1(p_holder);
    UPDATE ledger.holder h SET fenced_at = clock_timestamp()
    WHERE h.holder_id = p_holder AND h.fenced_at IS NULL
      AND NOT EXISTS (SELECT FROM ledger.hold o WHERE o.state = 'open' AND o.holder_id = p_holder);
    v_fenced := FOUND OR NOT EXISTS (
        SELECT FROM ledger.holder h WHERE h.holder_id = p_holder AND h.fenced_at IS NULL);

    SELECT coalesce(array_agg(k.tenant_id), '{}'), coalesce(array_agg(k.window_id), '{}') INTO v_tenants, v_windows
    FROM (SELECT l.tenant_id, l.window_id FROM ledger.lease l WHERE l.holder_id = p_holder
          ORDER BY l.tenant_id, l.window_id FOR UPDATE) AS k;
    PERFORM FROM ledger.budget_window w
    WHERE w.tenant_id = ANY (v_tenants) AND w.window_id = ANY (v_windows)
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;
    PERFORM ledger.set_leases_locked_v1(
        v_tenants, v_windows, array_fill(p_holder, ARRAY[cardinality(v_windows)]),
        array_fill(0::numeric, ARRAY[cardinality(v_windows)]));
    -- The row of one that goes on stays: the numbers of its postings go on too.
    DELETE FROM ledger.lease l WHERE l.holder_id = p_holder AND v_fenced;
    RETURN v_fenced;
END
$$;

-- As in 0007_holders.sql; and what is free in the leases of fenced holders, and of windows that have ended, is available
-- again at once: no request has a part in it.
CREATE OR REPLACE FUNCTION ledger.reap_v1(
    p_limit integer, p_since timestamptz DEFAULT '-infinity',
    OUT fenced text[], OUT holds integer, OUT more boolean
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_tenants text[];
    v_requests uuid[];
    v_lease_tenants text[];
    v_lease_windows bigint[];
    v_lease_holders uuid[];
    v_holders boolean := EXISTS (SELECT FROM ledger.holder);
BEGIN
    PERFORM ledger.require_tenants_v1(NULL);
    WITH dead AS (
        UPDATE ledger.holder h SET fenced_at = v_now
        WHERE h.holder_id IN (
            SELECT d.holder_id FROM ledger.holder d
            WHERE d.fenced_at IS NULL AND NOT ledger.holder_lives_v1(d) AND p_since + d.ttl < v_now
            ORDER BY d.holder_id FOR UPDATE)
        RETURNING h.name || ' ' || h.holder_id AS told
    )
    SELECT coalesce(array_agg(d.told ORDER BY d.told), '{}') INTO fenced FROM dead d;

    SELECT coalesce(array_agg(k.tenant_id), '{}'), coalesce(array_agg(k.request_id), '{}') INTO v_tenants, v_requests
    FROM (
        SELECT h.tenant_id, h.request_id FROM ledger.hold h LEFT JOIN ledger.holder o ON o.holder_id = h.holder_id
        WHERE h.state = 'open'
          AND CASE WHEN o.holder_id IS NULL THEN v_holders AND h.admitted_at < v_now - interval '120 s'
                   ELSE o.fenced_at IS NOT NULL END
        ORDER BY h.tenant_id, h.month, h.request_id LIMIT p_limit FOR UPDATE OF h) AS k;
    holds := cardinality(v_requests);
    more := holds >= p_limit;

    SELECT coalesce(array_agg(k.tenant_id), '{}'), coalesce(array_agg(k.window_id), '{}'),
           coalesce(array_agg(k.holder_id), '{}')
    INTO v_lease_tenants, v_lease_windows, v_lease_holders
    FROM (
        SELECT l.tenant_id, l.window_id, l.holder_id FROM ledger.lease l
        WHERE EXISTS (SELECT FROM ledger.holder o WHERE o.holder_id = l.holder_id AND o.fenced_at IS NOT NULL)
           OR EXISTS (SELECT FROM ledger.budget_window w WHERE w.tenant_id = l.tenant_id AND w.window_id = l.window_id
                                                           AND w.ends_at < v_now - interval '10 s')
        ORDER BY l.tenant_id, l.window_id, l.holder_id FOR UPDATE OF l) AS k;

    PERFORM FROM ledger.budget_window w
    WHERE (w.tenant_id, w.window_id) IN (
        SELECT l.tenant_id, l.window_id FROM ledger.hold_line l
        JOIN unnest(v_tenants, v_requests) AS i (tenant_id, request_id)
          ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id
        UNION ALL
        SELECT i.tenant_id, i.window_id FROM unnest(v_lease_tenants, v_lease_windows) AS i (tenant_id, window_id))
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;

    INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
    SELECT l.tenant_id, l.month, l.request_id, l.window_id, 1000001, 'held', 'suspense', l.held
    FROM ledger.hold_line l
    JOIN unnest(v_tenants, v_requests) AS i (tenant_id, request_id)
      ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id
    WHERE l.held > 0;

    -- `live` stays: it counts what has not ended, and so does `verify`.
    UPDATE ledger.budget_window w SET held = w.held - m.amount, suspense = w.suspense + m.amount
    FROM (
        SELECT l.tenant_id, l.window_id, sum(l.held) AS amount FROM ledger.hold_line l
        JOIN unnest(v_tenants, v_requests) AS i (tenant_id, request_id)
          ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id
        GROUP BY l.tenant_id, l.window_id) AS m
    WHERE w.tenant_id = m.tenant_id AND w.window_id = m.window_id;

    UPDATE ledger.hold h SET state = 'suspense', suspense_at = v_now
    FROM unnest(v_tenants, v_requests) AS i (tenant_id, request_id)
    WHERE h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id;

    PERFORM ledger.set_leases_locked_v1(
        v_lease_tenants, v_lease_windows, v_lease_holders, array_fill(0::numeric, ARRAY[cardinality(v_lease_windows)]));
    DELETE FROM ledger.lease l
    USING unnest(v_lease_tenants, v_lease_windows, v_lease_holders) AS i (tenant_id, window_id, holder_id)
    WHERE l.tenant_id = i.tenant_id AND l.window_id = i.window_id AND l.holder_id = i.holder_id;
END
$$;

-- Write one budget. Its live windows take the new limit at once; a balance above a lowered limit may only fall, and what
-- is free in leases goes back first: it was granted under the old one. A lease that is made at this very moment and used
-- at once can be missed; within a second its holder asks how much it may have, and the answer is nothing.
CREATE OR REPLACE FUNCTION ledger.put_budget_v1(p jsonb) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_old ledger.budget;
    v_new ledger.budget := jsonb_populate_record(NULL::ledger.budget, p);
    v_now timestamptz;
    v_window record;
    v_source uuid := gen_random_uuid();
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY[v_new.tenant_id]);
    SELECT * INTO v_old FROM ledger.budget b
    WHERE b.tenant_id = v_new.tenant_id AND b.budget_id = v_new.budget_id FOR UPDATE;
    IF FOUND AND (v_old.unit, v_old.period, v_old.alignment, v_old.time_zone)
        IS DISTINCT FROM (v_new.unit, v_new.period, v_new.alignment, v_new.time_zone) THEN
        RAISE EXCEPTION 'budget %: unit, period, alignment and time zone are immutable: make a new Budget', v_new.budget_id
            USING ERRCODE = 'check_violation';
    END IF;

    INSERT INTO ledger.budget
        (tenant_id, budget_id, namespace, name, scope, workload_labels, per, unit, token_kind, limit_amount, period,
         alignment, time_zone, enforcement, alert_thresholds, suspended, refusal)
    VALUES (v_new.tenant_id, v_new.budget_id, v_new.namespace, v_new.name, v_new.scope, v_new.workload_labels, v_new.per,
            v_new.unit, v_new.token_kind, v_new.limit_amount, v_new.period, v_new.alignment, v_new.time_zone,
            v_new.enforcement, v_new.alert_thresholds, v_new.suspended, v_new.refusal)
    ON CONFLICT (tenant_id, budget_id) DO UPDATE SET
        scope = excluded.scope, workload_labels = excluded.workload_labels, per = excluded.per,
        token_kind = excluded.token_kind, limit_amount = excluded.limit_amount, enforcement = excluded.enforcement,
        alert_thresholds = excluded.alert_thresholds, suspended = excluded.suspended, refusal = excluded.refusal,
        deleted_at = NULL, generation = ledger.budget.generation + 1;

    v_now := clock_timestamp();
    PERFORM FROM ledger.lease l
    WHERE (l.tenant_id, l.window_id) IN (
        SELECT w.tenant_id, w.window_id FROM ledger.budget_window w
        WHERE w.tenant_id = v_new.tenant_id AND w.budget_id = v_new.budget_id
          AND (w.ends_at IS NULL OR w.ends_at > v_now))
    ORDER BY l.tenant_id, l.window_id, l.holder_id FOR UPDATE;
    FOR v_window IN
        SELECT w.window_id, w.limit_amount, w.spent + w.held + w.suspense AS balance FROM ledger.budget_window w
        WHERE w.tenant_id = v_new.tenant_id AND w.budget_id = v_new.budget_id
          AND (w.ends_at IS NULL OR w.ends_at > v_now)
        ORDER BY w.window_id FOR UPDATE
    LOOP
        UPDATE ledger.budget_window w SET
            limit_amount = v_new.limit_amount,
            ceiling = CASE v_new.enforcement
                WHEN 'hard' THEN greatest(v_new.limit_amount, w.spent + w.held + w.suspense) END
        WHERE w.tenant_id = v_new.tenant_id AND w.window_id = v_window.window_id;
        IF v_new.limit_amount <> v_window.limit_amount THEN
            INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
            VALUES (v_new.tenant_id, date_trunc('month', v_now AT TIME ZONE 'UTC')::date, v_source, v_window.window_id, 0,
                    CASE WHEN v_new.limit_amount > v_window.limit_amount THEN 'funding' ELSE 'available' END,
                    CASE WHEN v_new.limit_amount > v_window.limit_amount THEN 'available' ELSE 'funding' END,
                    abs(v_new.limit_amount - v_window.limit_amount));
        END IF;
        IF v_new.enforcement = 'hard' AND v_window.balance > v_new.limit_amount THEN
            PERFORM FROM ledger.recall_leases_v1(v_new.tenant_id, v_window.window_id, 0);
        END IF;
    END LOOP;
END
$$;
