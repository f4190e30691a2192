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
        SELECT array_agg(k.holder_id), coalesce(sum(k.free), 0), coalesce(sum(k.new_live), 0)
        INTO v_holders, freed, told_live
        FROM (
            SELECT l.holder_id, l.free, l.new_live FROM ledger.lease l
            WHERE l.tenant_id = p_tenant AND l.window_id = p_window AND l.free > 0
            FOR UPDATE SKIP LOCKED) AS k;
        PERFORM ledger.set_leases_locked_v1(
            array_fill(p_tenant, ARRAY[cardinality(v_holders)]), array_fill(p_window, ARRAY[cardinality(v_holders)]),
            v_holders, array_fill(0::numeric, ARRAY[cardinality(v_holders)]))
        WHERE v_holders IS NOT NULL;
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
CREATE FUNCTION ledger.admit_batch_v1(p_holder uuid, p_items jsonb) RETURNS TABLE (request_id uuid, answer jsonb)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
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
