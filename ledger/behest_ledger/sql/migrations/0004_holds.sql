-- Holds: money leaves `available` before it can be spent. One admission is one call, all windows or none.

-- What one window must hold for some input and output: amounts in the window's unit.
CREATE FUNCTION ledger.input_part_v1(p_unit text, p_kind text, p_input_tokens bigint, p_input_amount numeric)
RETURNS numeric LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE p_unit
        WHEN 'usd' THEN p_input_amount
        WHEN 'requests' THEN 1
        ELSE CASE WHEN p_kind = 'output' THEN 0 ELSE p_input_tokens END
    END;
$$;

CREATE FUNCTION ledger.output_rate_v1(p_unit text, p_kind text, p_output_rate_pico numeric)
RETURNS numeric LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE p_unit
        WHEN 'usd' THEN p_output_rate_pico
        WHEN 'requests' THEN 0
        ELSE CASE WHEN p_kind = 'input' THEN 0 ELSE 1 END
    END;
$$;

-- The refusal that a caller is shown: which budget, and its balances apart from each other.
CREATE FUNCTION ledger.refusal_v1(p_reason text, p_budget ledger.budget, p_window ledger.budget_window) RETURNS jsonb
LANGUAGE sql VOLATILE AS $$
    SELECT jsonb_build_object(
        'verdict', 'refused', 'reason', p_reason, 'budget', p_budget.budget_id, 'scope', p_budget.scope,
        'subject', p_window.subject, 'unit', p_budget.unit, 'window_id', p_window.window_id,
        'limit', p_window.limit_amount::text, 'spent', p_window.spent::text,
        'held', (p_window.held + p_window.suspense)::text,
        'remaining', greatest(p_window.limit_amount - p_window.spent - p_window.held - p_window.suspense, 0)::text,
        'resets_at', p_window.ends_at,
        'retry_after_s', CASE WHEN p_window.ends_at IS NOT NULL THEN
            greatest(ceil(extract(epoch FROM p_window.ends_at - clock_timestamp())), 1)::integer END);
$$;

-- How many output tokens a window grants: what can be afforded, at most the wish, and of the rest only a share,
-- so that a stream that comes later finds something too. Never less than the need (-1: cannot be afforded).
CREATE FUNCTION ledger.grant_v1(
    p_available numeric, p_rate numeric, p_need bigint, p_want bigint, p_shares integer, p_live integer
) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN p_available < p_need * p_rate OR p_available < 0 THEN -1
        WHEN p_rate = 0 THEN greatest(p_want, p_need)
        ELSE least(greatest(p_want, p_need)::numeric, div(p_available, p_rate),
                   greatest(p_need::numeric, 16, div(p_available, p_rate * p_shares * p_live)))::bigint
    END;
$$;

-- Admit one request against every budget that matches its verified attributes.
--   p_attributes  namespace, project, user, session, model, tier, ... as the caller's credentials and routing say
--   p_need        output tokens without which it is not worth to begin; p_want: the wish
--   p_shares      the grant is at most 1/(p_shares x live) of what a window has left
-- Answers {"verdict": "granted" | "refused" | "void", ...}. Asking again with the same id gives the first answer while
-- the hold is open, and "void" when it has ended, or when the holder has (0007_holders.sql).
CREATE FUNCTION ledger.admit_v1(
    p_tenant text, p_request uuid, p_holder uuid, p_attributes jsonb, p_price_key text,
    p_input_tokens bigint, p_input_amount numeric, p_output_rate numeric,
    p_need bigint, p_want bigint, p_shares integer
) RETURNS jsonb
LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
DECLARE
    v_month date := ledger.month_of_v1(p_request);
    v_now timestamptz := clock_timestamp();
    v_hold ledger.hold;
    v_budget ledger.budget;
    v_budgets ledger.budget[] := '{}';
    v_windows bigint[] := '{}';
    v_window ledger.budget_window;
    v_subject jsonb;
    v_id bigint;
    v_grant bigint := greatest(p_want, p_need);
    v_possible bigint;
    v_refusal jsonb;
    v_bound_by jsonb;                           -- the window that granted less than the wish
    v_suspended boolean;
    v_answer jsonb;
BEGIN
    SELECT * INTO v_hold FROM ledger.hold h
    WHERE h.tenant_id = p_tenant AND h.month = v_month AND h.request_id = p_request FOR UPDATE;
    IF FOUND THEN
        RETURN CASE WHEN v_hold.state = 'open' THEN v_hold.answer ELSE '{"verdict": "void"}' END;
    END IF;
    IF NOT ledger.holder_may_admit_v1(p_holder) THEN
        RETURN '{"verdict": "void"}';
    END IF;

    SELECT p.suspended INTO v_suspended FROM ledger.project p
    WHERE p.tenant_id = p_tenant AND p.project_id = p_attributes ->> 'project';
    IF v_suspended THEN
        RETURN jsonb_build_object('verdict', 'refused', 'reason', 'suspended', 'what', 'project',
                                  'name', p_attributes ->> 'project');
    END IF;

    -- Which budgets, in the order in which everyone locks their subjects.
    FOR v_budget IN
        SELECT * FROM ledger.budget b
        WHERE b.tenant_id = p_tenant AND b.deleted_at IS NULL
          AND NOT EXISTS (SELECT FROM jsonb_each_text(b.scope) s
                          WHERE coalesce(p_attributes ->> s.key, '') NOT LIKE s.value)
          AND (b.workload_labels IS NULL OR p_attributes -> 'labels' @> b.workload_labels)
        ORDER BY b.budget_id
    LOOP
        IF v_budget.suspended THEN
            RETURN jsonb_build_object('verdict', 'refused', 'reason', 'suspended', 'what', 'budget',
                                      'name', v_budget.budget_id);
        END IF;
        v_subject := ledger.subject_v1(v_budget.per, p_attributes);
        SELECT w.window_id INTO v_id
        FROM ledger.budget_subject s JOIN ledger.budget_window w USING (tenant_id, window_id)
        WHERE s.tenant_id = p_tenant AND s.budget_id = v_budget.budget_id AND s.subject = v_subject
          AND (w.ends_at IS NULL OR w.ends_at > v_now);
        IF NOT FOUND THEN
            v_id := ledger.open_window_v1(p_tenant, v_budget.budget_id, v_subject);
        END IF;
        v_windows := v_windows || v_id;
        v_budgets := v_budgets || v_budget;
    END LOOP;

    -- Lock, then look: money before rates, and of several refusals the first by window.
    FOR v_window IN
        SELECT * FROM ledger.budget_window w
        WHERE w.tenant_id = p_tenant AND w.window_id = ANY (v_windows)
        ORDER BY w.window_id FOR UPDATE
    LOOP
        CONTINUE WHEN v_window.ceiling IS NULL;
        v_budget := v_budgets[array_position(v_windows, v_window.window_id)];
        v_possible := ledger.grant_v1(
            v_window.limit_amount - v_window.spent - v_window.held - v_window.suspense
                - ledger.input_part_v1(v_window.unit, v_window.token_kind, p_input_tokens, p_input_amount),
            ledger.output_rate_v1(v_window.unit, v_window.token_kind, p_output_rate),
            p_need, p_want, p_shares, v_window.live + 1);
        IF v_possible >= v_grant THEN
            CONTINUE;
        ELSIF v_possible >= 0 THEN
            v_grant := v_possible;
            v_bound_by := ledger.refusal_v1(v_budget.refusal, v_budget, v_window);
        ELSIF v_refusal IS NULL OR (v_refusal ->> 'reason' = 'rate' AND v_budget.refusal = 'quota') THEN
            v_refusal := ledger.refusal_v1(v_budget.refusal, v_budget, v_window);
        END IF;
    END LOOP;
    IF v_refusal IS NOT NULL THEN
        RETURN v_refusal;
    END IF;

    v_answer := jsonb_build_object('verdict', 'granted', 'output_tokens', v_grant, 'windows', v_windows,
                                   'bound_by', v_bound_by);
    INSERT INTO ledger.hold (tenant_id, month, request_id, state, holder_id, attributes, price_key, output_rate_pico,
                             granted_output_tokens, answer, input_tokens, input_amount_pico)
    VALUES (p_tenant, v_month, p_request, 'open', p_holder, p_attributes, p_price_key, p_output_rate, v_grant, v_answer,
            p_input_tokens, p_input_amount)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        -- The same id came twice at once, or its void overtook it: what is there counts, and nothing has moved here.
        SELECT * INTO STRICT v_hold FROM ledger.hold h
        WHERE h.tenant_id = p_tenant AND h.month = v_month AND h.request_id = p_request;
        RETURN CASE WHEN v_hold.state = 'open' THEN v_hold.answer ELSE '{"verdict": "void"}' END;
    END IF;
    INSERT INTO ledger.hold_line (tenant_id, month, request_id, window_id, held)
    SELECT p_tenant, v_month, p_request, w.window_id,
           ledger.input_part_v1(w.unit, w.token_kind, p_input_tokens, p_input_amount)
               + v_grant * ledger.output_rate_v1(w.unit, w.token_kind, p_output_rate)
    FROM ledger.budget_window w
    WHERE w.tenant_id = p_tenant AND w.window_id = ANY (v_windows);
    INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
    SELECT l.tenant_id, l.month, l.request_id, l.window_id, 0, 'available', 'held', l.held
    FROM ledger.hold_line l
    WHERE l.tenant_id = p_tenant AND l.month = v_month AND l.request_id = p_request AND l.held > 0;
    UPDATE ledger.budget_window w SET held = w.held + l.held, live = w.live + 1
    FROM ledger.hold_line l
    WHERE l.tenant_id = p_tenant AND l.month = v_month AND l.request_id = p_request
      AND w.tenant_id = l.tenant_id AND w.window_id = l.window_id;
    RETURN v_answer;
END
$$;

-- More output tokens for one open hold whose windows are locked already.
CREATE FUNCTION ledger.extend_locked_v1(
    p_tenant text, p_month date, p_request uuid, p_seq integer, p_need bigint, p_want bigint, p_shares integer
) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    v_hold ledger.hold;
    v_budget ledger.budget;
    v_window ledger.budget_window;
    v_rate numeric;
    v_grant bigint := greatest(p_want, p_need);
    v_possible bigint;
    v_refusal jsonb;
    v_answer jsonb;
BEGIN
    SELECT * INTO v_hold FROM ledger.hold h
    WHERE h.tenant_id = p_tenant AND h.month = p_month AND h.request_id = p_request;
    IF NOT FOUND OR v_hold.state <> 'open' THEN
        RETURN '{"verdict": "void"}';
    ELSIF p_seq <= v_hold.last_seq THEN
        RETURN coalesce(v_hold.extension, v_hold.answer);
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
        CONTINUE WHEN v_window.ceiling IS NULL OR v_rate = 0;
        v_possible := ledger.grant_v1(
            v_window.limit_amount - v_window.spent - v_window.held - v_window.suspense, v_rate, p_need,
            p_want, p_shares, greatest(v_window.live, 1));
        IF v_possible >= 0 THEN
            v_grant := least(v_grant, v_possible);
        ELSIF v_refusal IS NULL THEN
            v_refusal := ledger.refusal_v1(v_budget.refusal, v_budget, v_window);
        END IF;
    END LOOP;

    IF v_refusal IS NULL THEN
        v_answer := jsonb_build_object('verdict', 'granted', 'output_tokens', v_grant);
        INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
        SELECT l.tenant_id, l.month, l.request_id, l.window_id, p_seq, 'available', 'held',
               v_grant * ledger.output_rate_v1(w.unit, w.token_kind, v_hold.output_rate_pico)
        FROM ledger.hold_line l JOIN ledger.budget_window w USING (tenant_id, window_id)
        WHERE l.tenant_id = p_tenant AND l.month = p_month AND l.request_id = p_request
          AND v_grant * ledger.output_rate_v1(w.unit, w.token_kind, v_hold.output_rate_pico) > 0;
        UPDATE ledger.hold_line l SET held = l.held + p.amount FROM ledger.posting p
        WHERE p.tenant_id = p_tenant AND p.month = p_month AND p.source_id = p_request AND p.seq = p_seq
          AND l.tenant_id = p.tenant_id AND l.month = p.month AND l.request_id = p.source_id
          AND l.window_id = p.window_id;
        UPDATE ledger.budget_window w SET held = w.held + p.amount FROM ledger.posting p
        WHERE p.tenant_id = p_tenant AND p.month = p_month AND p.source_id = p_request AND p.seq = p_seq
          AND w.tenant_id = p.tenant_id AND w.window_id = p.window_id;
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
CREATE FUNCTION ledger.extend_batch_v1(
    p_tenants text[], p_requests uuid[], p_seqs integer[], p_needs bigint[], p_wants bigint[], p_shares integer
) RETURNS TABLE (request_id uuid, answer jsonb)
LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
#variable_conflict use_column
DECLARE
    v_item record;
BEGIN
    PERFORM FROM ledger.hold h
    JOIN unnest(p_tenants, p_requests) AS i (tenant_id, request_id)
      ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id
    ORDER BY h.tenant_id, h.month, h.request_id FOR UPDATE OF h;
    PERFORM FROM ledger.budget_window w
    WHERE (w.tenant_id, w.window_id) IN (
        SELECT l.tenant_id, l.window_id FROM ledger.hold_line l
        JOIN unnest(p_tenants, p_requests) AS i (tenant_id, request_id)
          ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id)
         AND l.request_id = i.request_id)
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;
    FOR v_item IN
        SELECT * FROM unnest(p_tenants, p_requests, p_seqs, p_needs, p_wants)
            AS i (tenant_id, request_id, seq, need, want)
    LOOP
        request_id := v_item.request_id;
        answer := ledger.extend_locked_v1(v_item.tenant_id, ledger.month_of_v1(v_item.request_id), v_item.request_id,
                                          v_item.seq, v_item.need, v_item.want, p_shares);
        RETURN NEXT;
    END LOOP;
END
$$;
