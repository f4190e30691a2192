-- A correction takes back what is free in leases before it makes an overrun, as a settlement does (0010_settle.sql).

-- Charge an ended request anew: what its lines say is the whole charge from now on. New entries only, on the windows of
-- its admission, whether they are open or closed: of each window the difference moves. More is spent as far as there is
-- room, and overrun beyond; less comes out of the overrun first, and what is left becomes available in that window alone.
-- Returns the number of the correction. The hold and its windows are locked already.
--   p_charge  {outcome, source, requests (0 | 1), facts, lines [{class, quantity, rate_pico, amount_pico, source}]}
CREATE OR REPLACE FUNCTION ledger.correct_one_v1(
    p_tenant text, p_month date, p_request uuid, p_correction text, p_reason text, p_charge jsonb
) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    v_old ledger.request_now;
    v_number integer;
    v_requests integer := p_charge ->> 'requests';
    v_input bigint;
    v_output bigint;
    v_amount numeric;
    v_window record;
    v_room numeric;                             -- what the window has available
    v_spend numeric;                            -- available -> spent; below 0 the other way
    v_overrun numeric;                          -- funding -> overrun; below 0 the other way
BEGIN
    SELECT * INTO STRICT v_old FROM ledger.request_now r
    WHERE r.tenant_id = p_tenant AND r.month = p_month AND r.request_id = p_request;
    v_number := v_old.corrections + 1;
    SELECT coalesce(sum(c.quantity) FILTER (WHERE c.class IN ('input', 'cache_read', 'cache_write', 'audio_input')), 0),
           coalesce(sum(c.quantity) FILTER (WHERE c.class IN ('output', 'reasoning', 'audio_output')), 0),
           coalesce(sum(c.amount_pico), 0)
    INTO v_input, v_output, v_amount
    FROM jsonb_to_recordset(p_charge -> 'lines') AS c (class text, quantity bigint, amount_pico numeric);

    FOR v_window IN
        SELECT w.*, ledger.charge_in_unit_v1(w.unit, w.token_kind, v_amount, v_input, v_output, v_requests)
            - coalesce((SELECT sum(CASE WHEN p.credit IN ('spent', 'overrun') THEN p.amount ELSE 0 END
                                 - CASE WHEN p.debit IN ('spent', 'overrun') THEN p.amount ELSE 0 END)
                        FROM ledger.posting p
                        WHERE p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
                          AND p.window_id = l.window_id), 0) AS change
        FROM ledger.hold_line l JOIN ledger.budget_window w USING (tenant_id, window_id)
        WHERE l.tenant_id = p_tenant AND l.month = p_month AND l.request_id = p_request
        ORDER BY w.window_id
    LOOP
        IF v_window.change >= 0 THEN
            v_room := v_window.limit_amount - v_window.spent - v_window.held - v_window.suspense;
            IF v_window.ceiling IS NOT NULL AND v_window.change > v_room THEN
                SELECT v_room + r.freed INTO v_room
                FROM ledger.recall_leases_v1(p_tenant, v_window.window_id, 0) AS r;
            END IF;
            v_spend := least(v_window.change, CASE WHEN v_window.ceiling IS NOT NULL THEN greatest(v_room, 0) END);
            v_overrun := v_window.change - v_spend;
        ELSE
            v_overrun := greatest(v_window.change, -v_window.overrun);
            v_spend := v_window.change - v_overrun;
        END IF;
        INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
        SELECT p_tenant, p_month, p_request, v_window.window_id, 1000001 + v_number, p.debit, p.credit, p.amount
        FROM (VALUES ('available', 'spent', v_spend), ('spent', 'available', -v_spend),
                     ('funding', 'overrun', v_overrun), ('overrun', 'funding', -v_overrun)) AS p (debit, credit, amount)
        WHERE p.amount > 0;
        UPDATE ledger.budget_window w SET
            spent = w.spent + v_spend,
            overrun = w.overrun + v_overrun,
            ceiling = CASE WHEN w.ceiling IS NOT NULL THEN
                greatest(w.limit_amount, w.spent + v_spend + w.held + w.suspense) END
        WHERE w.tenant_id = p_tenant AND w.window_id = v_window.window_id;
    END LOOP;

    INSERT INTO ledger.usage_line (tenant_id, month, request_id, entry, class, quantity, rate_pico, amount_pico, source)
    SELECT u.tenant_id, u.month, u.request_id, 2 * v_number - 1, u.class, -u.quantity, u.rate_pico, -u.amount_pico, u.source
    FROM ledger.usage_line u
    WHERE u.tenant_id = p_tenant AND u.month = p_month AND u.request_id = p_request AND u.entry = 2 * v_number - 2
    UNION ALL
    SELECT p_tenant, p_month, p_request, 2 * v_number, c.class, c.quantity, c.rate_pico, c.amount_pico, c.source
    FROM jsonb_to_recordset(p_charge -> 'lines')
        AS c (class text, quantity bigint, rate_pico numeric, amount_pico numeric, source text);
    INSERT INTO ledger.correction (tenant_id, month, request_id, number, correction_id, reason, outcome, source,
                                   input_tokens, output_tokens, amount_pico, facts)
    VALUES (p_tenant, p_month, p_request, v_number, p_correction, p_reason, p_charge ->> 'outcome', p_charge ->> 'source',
            v_input, v_output, v_amount, (p_charge -> 'facts') || jsonb_build_object(
                'requests', v_requests, 'corrected', jsonb_strip_nulls(jsonb_build_object(
                    'id', p_correction, 'policy', v_old.facts ->> 'policy', 'amount_pico', v_old.amount_pico::text))));
    UPDATE ledger.hold h SET state = 'corrected'
    WHERE h.tenant_id = p_tenant AND h.month = p_month AND h.request_id = p_request;
    RETURN v_number;
END
$$;
