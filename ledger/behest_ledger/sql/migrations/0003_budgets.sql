-- Budgets become windows: opened on first use by the database's own clock, under the subject's lock.

-- The bounds of the window of a period that contains p_at.
CREATE FUNCTION ledger.window_bounds_v1(
    p_period text, p_alignment text, p_zone text, p_at timestamptz,
    OUT starts_at timestamptz, OUT ends_at timestamptz
) LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_local timestamp;
BEGIN
    IF p_period = 'lifetime' THEN
        starts_at := p_at;
        ends_at := NULL;
    ELSIF p_period IN ('minute', 'hour') THEN
        starts_at := CASE p_alignment WHEN 'rolling' THEN p_at ELSE date_trunc(p_period, p_at, p_zone) END;
        ends_at := starts_at + ('1 ' || p_period)::interval;
    ELSE
        -- Days are added to the local date: a day with a clock change has 23 or 25 hours. From the local time, not
        -- back from `starts_at`: where the clock changes at midnight, a day begins at one.
        v_local := p_at AT TIME ZONE p_zone;
        IF p_alignment = 'calendar' THEN
            v_local := date_trunc(p_period, v_local);
        END IF;
        starts_at := CASE p_alignment WHEN 'rolling' THEN p_at ELSE v_local AT TIME ZONE p_zone END;
        ends_at := (v_local + ('1 ' || p_period)::interval) AT TIME ZONE p_zone;
    END IF;
END
$$;

-- The subject of a budget for some attributes: the values of its `per` list. A session belongs to its user and
-- project: another user's session of the same name is another one.
CREATE FUNCTION ledger.subject_v1(p_per text[], p_attributes jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(jsonb_agg(CASE k.key
        WHEN 'session' THEN jsonb_build_array(
            p_attributes ->> 'project', p_attributes ->> 'user', p_attributes ->> 'session')
        ELSE to_jsonb(coalesce(p_attributes ->> k.key, '')) END ORDER BY k.place), '[]')
    FROM unnest(p_per) WITH ORDINALITY AS k (key, place);
$$;

-- The current window of a subject, opened where there is none or the last has ended.
-- "Insert nothing on conflict", lock, look: in one statement the losers of a race would not see the winner's row.
CREATE FUNCTION ledger.open_window_v1(p_tenant text, p_budget text, p_subject jsonb) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_window bigint;
    v_ends timestamptz;
    v_budget ledger.budget;
    v_now timestamptz;
    v_bounds record;
BEGIN
    INSERT INTO ledger.budget_subject (tenant_id, budget_id, subject)
    VALUES (p_tenant, p_budget, p_subject) ON CONFLICT DO NOTHING;

    SELECT s.window_id INTO v_window FROM ledger.budget_subject s
    WHERE s.tenant_id = p_tenant AND s.budget_id = p_budget AND s.subject = p_subject FOR UPDATE;

    v_now := clock_timestamp();
    IF v_window IS NOT NULL THEN
        SELECT w.ends_at INTO v_ends FROM ledger.budget_window w
        WHERE w.tenant_id = p_tenant AND w.window_id = v_window;
        IF v_ends IS NULL OR v_ends > v_now THEN
            RETURN v_window;
        END IF;
    END IF;

    -- FOR SHARE: a limit that is being changed is read after the change, never beside it.
    SELECT * INTO STRICT v_budget FROM ledger.budget b
    WHERE b.tenant_id = p_tenant AND b.budget_id = p_budget FOR SHARE;
    v_bounds := ledger.window_bounds_v1(v_budget.period, v_budget.alignment, v_budget.time_zone, v_now);

    INSERT INTO ledger.budget_window
        (tenant_id, budget_id, subject, unit, token_kind, starts_at, ends_at, limit_amount, ceiling)
    VALUES (p_tenant, p_budget, p_subject, v_budget.unit, v_budget.token_kind, v_bounds.starts_at, v_bounds.ends_at,
            v_budget.limit_amount, CASE v_budget.enforcement WHEN 'hard' THEN v_budget.limit_amount END)
    RETURNING window_id INTO v_window;
    IF v_budget.limit_amount > 0 THEN
        INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
        VALUES (p_tenant, date_trunc('month', v_now AT TIME ZONE 'UTC')::date, gen_random_uuid(), v_window, 0,
                'funding', 'available', v_budget.limit_amount);
    END IF;
    UPDATE ledger.budget_subject s SET window_id = v_window
    WHERE s.tenant_id = p_tenant AND s.budget_id = p_budget AND s.subject = p_subject;
    RETURN v_window;
END
$$;

-- Write one budget. Its live windows take the new limit at once; a balance above a lowered limit may only fall.
CREATE FUNCTION ledger.put_budget_v1(p jsonb) RETURNS void
LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
DECLARE
    v_old ledger.budget;
    v_new ledger.budget := jsonb_populate_record(NULL::ledger.budget, p);
    v_now timestamptz;
    v_window record;
    v_source uuid := gen_random_uuid();
BEGIN
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
    FOR v_window IN
        SELECT w.window_id, w.limit_amount FROM ledger.budget_window w
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
    END LOOP;
END
$$;
