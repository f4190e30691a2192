-- The windows of a budget that have not ended, without reading those that have: of a minute, or of a session, there is a
-- new one all the time, and they stay. They are asked for all the time too: by who looks at budgets, by the keeper for its
-- metrics, and by a change of a limit, which holds up new windows meanwhile. `ends_at` never changes, so balances are
-- still updated in place.

-- Nobody is admitted while it is built, 0.3 s for a million windows. Who cannot have that lock soon steps back.
SET LOCAL lock_timeout = '5s';
CREATE INDEX budget_window_live ON ledger.budget_window (tenant_id, budget_id, coalesce(ends_at, 'infinity'));
ANALYZE ledger.budget_window;                   -- else nobody knows how few have not ended until many have changed

-- As in 0009_leases.sql, by that index.
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
          AND coalesce(w.ends_at, 'infinity') > v_now)
    ORDER BY l.tenant_id, l.window_id, l.holder_id FOR UPDATE;
    FOR v_window IN
        SELECT w.window_id, w.limit_amount, w.spent + w.held + w.suspense AS balance FROM ledger.budget_window w
        WHERE w.tenant_id = v_new.tenant_id AND w.budget_id = v_new.budget_id
          AND coalesce(w.ends_at, 'infinity') > v_now
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
