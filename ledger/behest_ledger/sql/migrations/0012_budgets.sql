-- Budgets in their breadth: how many requests at once, alerts, and soft budgets that say by how much they were passed.

-- How many at once ---------------------------------------------------------------------------------------------------
-- A fourth unit. A request holds 1 while it is open and is charged 0: the window of such a budget never ends, and what
-- ends gives its place to the next one. Only tiers have such budgets.

ALTER TABLE ledger.budget
    DROP CONSTRAINT budget_unit_check,
    ADD CONSTRAINT budget_unit_check CHECK (unit IN ('usd', 'tokens', 'requests', 'concurrency')),
    ADD CONSTRAINT concurrency_has_no_period CHECK (unit <> 'concurrency' OR period = 'lifetime');

CREATE OR REPLACE FUNCTION ledger.input_part_v1(
    p_unit text, p_kind text, p_input_tokens bigint, p_input_amount numeric
) RETURNS numeric LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE p_unit
        WHEN 'usd' THEN p_input_amount
        WHEN 'requests' THEN 1
        WHEN 'concurrency' THEN 1
        ELSE CASE WHEN p_kind = 'output' THEN 0 ELSE p_input_tokens END
    END;
$$;

CREATE OR REPLACE FUNCTION ledger.output_rate_v1(p_unit text, p_kind text, p_output_rate_pico numeric)
RETURNS numeric LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE p_unit
        WHEN 'usd' THEN p_output_rate_pico
        WHEN 'requests' THEN 0
        WHEN 'concurrency' THEN 0
        ELSE CASE WHEN p_kind = 'input' THEN 0 ELSE 1 END
    END;
$$;

CREATE OR REPLACE FUNCTION ledger.charge_in_unit_v1(
    p_unit text, p_kind text, p_amount_pico numeric, p_input_tokens bigint, p_output_tokens bigint, p_requests integer
) RETURNS numeric LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE p_unit
        WHEN 'usd' THEN p_amount_pico
        WHEN 'requests' THEN p_requests
        WHEN 'concurrency' THEN 0
        ELSE CASE p_kind WHEN 'input' THEN p_input_tokens WHEN 'output' THEN p_output_tokens
                         ELSE p_input_tokens + p_output_tokens END
    END;
$$;

-- Give back the places of requests in suspense. Their money waits for a journal, a day if need be; their streams have
-- ended for certain, and a user whose sidecar died would be refused all that time for streams that nobody has.
-- At most p_limit holds that came into suspense since p_since; the answer is how many places were given back.
CREATE FUNCTION ledger.free_concurrency_v1(p_limit integer, p_since timestamptz DEFAULT '-infinity') RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenants text[];
    v_requests uuid[];
BEGIN
    PERFORM ledger.require_tenants_v1(NULL);
    SELECT coalesce(array_agg(k.tenant_id), '{}'), coalesce(array_agg(k.request_id), '{}') INTO v_tenants, v_requests
    FROM (
        SELECT h.tenant_id, h.request_id FROM ledger.hold h
        WHERE h.state = 'suspense' AND h.suspense_at >= p_since AND EXISTS (
            SELECT FROM ledger.hold_line l JOIN ledger.budget_window w USING (tenant_id, window_id)
            WHERE l.tenant_id = h.tenant_id AND l.month = h.month AND l.request_id = h.request_id
              AND l.held > 0 AND w.unit = 'concurrency')
        ORDER BY h.tenant_id, h.month, h.request_id LIMIT p_limit FOR UPDATE OF h) AS k;

    PERFORM FROM ledger.budget_window w
    WHERE w.unit = 'concurrency' AND (w.tenant_id, w.window_id) IN (
        SELECT l.tenant_id, l.window_id FROM ledger.hold_line l
        JOIN unnest(v_tenants, v_requests) AS i (tenant_id, request_id)
          ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id)
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;

    WITH freed AS (
        UPDATE ledger.hold_line l SET held = 0
        FROM unnest(v_tenants, v_requests) AS i (tenant_id, request_id), ledger.budget_window w
        WHERE l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id
          AND w.tenant_id = l.tenant_id AND w.window_id = l.window_id AND w.unit = 'concurrency' AND l.held > 0
        RETURNING l.tenant_id, l.month, l.request_id, l.window_id
    ), posted AS (
        INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
        SELECT f.tenant_id, f.month, f.request_id, f.window_id, 1000001, 'suspense', 'available', 1 FROM freed f
        RETURNING tenant_id, window_id, amount
    ), moved AS (
        SELECT p.tenant_id, p.window_id, sum(p.amount) AS amount FROM posted p GROUP BY p.tenant_id, p.window_id
    )
    UPDATE ledger.budget_window w SET
        suspense = w.suspense - m.amount,
        ceiling = CASE WHEN w.ceiling IS NOT NULL THEN
            greatest(w.limit_amount, w.spent + w.held + w.suspense - m.amount) END
    FROM moved m WHERE w.tenant_id = m.tenant_id AND w.window_id = m.window_id;
    RETURN cardinality(v_requests);
END
$$;

-- Alerts -------------------------------------------------------------------------------------------------------------
-- A threshold is reached by what was charged (spent + overrun), not by what is held: a hold comes and goes.
--
-- Nobody looks for windows that have reached one: there may be a million of them. Each window knows what its charges
-- have to reach next (`alert_at`), and the update that reaches it leaves a note in `alert_due`, in the transaction that
-- moves the money, so none is lost. For every other update that costs one comparison. The column is in no index and no
-- index has it in its condition, so that balances are still updated in place. The keeper turns notes into alerts.

ALTER TABLE ledger.budget_window ADD COLUMN alert_at numeric(38, 0);    -- NULL: no threshold is left

CREATE TABLE ledger.budget_alert (
    tenant_id text NOT NULL,
    window_id bigint NOT NULL,
    percent integer NOT NULL,
    budget_id text NOT NULL,
    subject jsonb NOT NULL,
    used numeric(38, 0) NOT NULL,               -- spent + overrun when it was told
    limit_amount numeric(38, 0) NOT NULL,
    reached_at timestamptz NOT NULL,            -- when the window passed it, or the limit came down to it
    PRIMARY KEY (tenant_id, window_id, percent) -- once for a window, also where the limit is raised and reached again
);
CREATE INDEX ON ledger.budget_alert (tenant_id, budget_id, reached_at);
CREATE TRIGGER budget_alert_is_insert_only BEFORE UPDATE OR DELETE ON ledger.budget_alert
    FOR EACH ROW EXECUTE FUNCTION ledger.refuse_change_v1();

CREATE TABLE ledger.alert_due (
    tenant_id text NOT NULL,
    window_id bigint NOT NULL,
    due_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, window_id)
);

-- What a window's charges must reach for so many percent of its limit.
CREATE FUNCTION ledger.alert_amount_v1(p_limit numeric, p_percent integer) RETURNS numeric
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT greatest(div(p_limit * p_percent + 99, 100), 1);
$$;

-- The least of a window's thresholds that was not told yet; NULL: none is left.
CREATE FUNCTION ledger.next_alert_v1(p_window ledger.budget_window) RETURNS numeric
LANGUAGE sql STABLE AS $$
    SELECT min(ledger.alert_amount_v1(p_window.limit_amount, t.percent))
    FROM ledger.budget b CROSS JOIN LATERAL unnest(b.alert_thresholds) AS t (percent)
    WHERE b.tenant_id = p_window.tenant_id AND b.budget_id = p_window.budget_id AND NOT EXISTS (
        SELECT FROM ledger.budget_alert a
        WHERE a.tenant_id = p_window.tenant_id AND a.window_id = p_window.window_id AND a.percent = t.percent);
$$;

CREATE FUNCTION ledger.set_alert_v1() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.alert_at := ledger.next_alert_v1(NEW);
    IF NEW.spent + NEW.overrun >= NEW.alert_at THEN
        INSERT INTO ledger.alert_due (tenant_id, window_id) VALUES (NEW.tenant_id, NEW.window_id)
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER alert_follows_limit BEFORE INSERT OR UPDATE OF limit_amount ON ledger.budget_window
    FOR EACH ROW EXECUTE FUNCTION ledger.set_alert_v1();

CREATE FUNCTION ledger.note_alert_v1() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO ledger.alert_due (tenant_id, window_id) VALUES (NEW.tenant_id, NEW.window_id) ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;
CREATE TRIGGER alert_is_due AFTER UPDATE OF spent, overrun ON ledger.budget_window
    FOR EACH ROW WHEN (NEW.alert_at IS NOT NULL AND NEW.spent + NEW.overrun >= NEW.alert_at)
    EXECUTE FUNCTION ledger.note_alert_v1();

UPDATE ledger.budget_window w SET limit_amount = w.limit_amount
WHERE w.ends_at IS NULL OR w.ends_at > clock_timestamp();

-- Turn at most p_limit notes into alerts and answer those that are new. The windows are locked before their notes go:
-- who charges a window has it locked while it leaves a note.
CREATE FUNCTION ledger.tell_alerts_v1(p_limit integer, OUT told jsonb, OUT more boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenants text[];
    v_windows bigint[];
    v_window ledger.budget_window;
    v_new jsonb;
BEGIN
    PERFORM ledger.require_tenants_v1(NULL);
    told := '[]';
    SELECT coalesce(array_agg(d.tenant_id), '{}'), coalesce(array_agg(d.window_id), '{}') INTO v_tenants, v_windows
    FROM (SELECT a.tenant_id, a.window_id FROM ledger.alert_due a ORDER BY a.due_at LIMIT p_limit) AS d;
    more := cardinality(v_windows) >= p_limit;

    FOR v_window IN
        SELECT w.* FROM ledger.budget_window w
        JOIN unnest(v_tenants, v_windows) AS i (tenant_id, window_id) USING (tenant_id, window_id)
        ORDER BY w.tenant_id, w.window_id FOR UPDATE OF w
    LOOP
        WITH reached AS (
            INSERT INTO ledger.budget_alert
                (tenant_id, window_id, percent, budget_id, subject, used, limit_amount, reached_at)
            SELECT v_window.tenant_id, v_window.window_id, t.percent, v_window.budget_id, v_window.subject,
                   v_window.spent + v_window.overrun, v_window.limit_amount, d.due_at
            FROM ledger.budget b CROSS JOIN LATERAL unnest(b.alert_thresholds) AS t (percent)
            JOIN ledger.alert_due d ON d.tenant_id = v_window.tenant_id AND d.window_id = v_window.window_id
            WHERE b.tenant_id = v_window.tenant_id AND b.budget_id = v_window.budget_id
              AND v_window.spent + v_window.overrun >= ledger.alert_amount_v1(v_window.limit_amount, t.percent)
            ON CONFLICT DO NOTHING
            RETURNING *
        )
        SELECT coalesce(jsonb_agg(jsonb_build_object(
                   'tenant_id', r.tenant_id, 'budget_id', r.budget_id, 'subject', r.subject, 'unit', v_window.unit,
                   'percent', r.percent, 'used', r.used::text, 'limit', r.limit_amount::text,
                   'reached_at', r.reached_at) ORDER BY r.percent), '[]')
        INTO v_new FROM reached r;
        told := told || v_new;
        UPDATE ledger.budget_window w SET alert_at = ledger.next_alert_v1(v_window)
        WHERE w.tenant_id = v_window.tenant_id AND w.window_id = v_window.window_id;
    END LOOP;
    DELETE FROM ledger.alert_due d USING unnest(v_tenants, v_windows) AS i (tenant_id, window_id)
    WHERE d.tenant_id = i.tenant_id AND d.window_id = i.window_id;
END
$$;

-- How budgets stand --------------------------------------------------------------------------------------------------

-- As budgets_of_v1, and besides: what is needed to say in a word how the budget stands. Of a soft budget `remaining`
-- may be below zero, by as much as its limit was passed.
CREATE FUNCTION ledger.budgets_of_v2(p_tenant text, p_attributes jsonb)
RETURNS TABLE (budget_id text, unit text, limit_amount numeric, spent numeric, held numeric, overrun numeric,
               remaining numeric, period text, enforcement text, alert_thresholds integer[], suspended boolean,
               resets_at timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY[p_tenant]);
    RETURN QUERY
    SELECT b.budget_id, b.unit, b.limit_amount, coalesce(w.spent, 0), coalesce(w.held + w.suspense, 0),
           coalesce(w.overrun, 0),
           CASE b.enforcement WHEN 'soft' THEN b.limit_amount - coalesce(w.spent + w.held + w.suspense, 0)
               ELSE greatest(b.limit_amount - coalesce(w.spent + w.held + w.suspense, 0), 0) END,
           b.period, b.enforcement, b.alert_thresholds, b.suspended,
           CASE WHEN w.window_id IS NOT NULL THEN w.ends_at
                WHEN b.alignment = 'calendar' THEN
                    (ledger.window_bounds_v1(b.period, b.alignment, b.time_zone, now())).ends_at END
    FROM ledger.budget b
    LEFT JOIN ledger.budget_subject s ON s.tenant_id = b.tenant_id AND s.budget_id = b.budget_id
                                     AND s.subject = ledger.subject_v1(b.per, p_attributes)
    LEFT JOIN ledger.budget_window w ON w.tenant_id = s.tenant_id AND w.window_id = s.window_id
                                    AND (w.ends_at IS NULL OR w.ends_at > now())
    WHERE b.tenant_id = p_tenant AND b.deleted_at IS NULL
      AND NOT EXISTS (SELECT FROM jsonb_each_text(b.scope) m
                      WHERE p_attributes ? m.key AND coalesce(p_attributes ->> m.key, '') NOT LIKE m.value)
      AND (b.workload_labels IS NULL OR p_attributes -> 'labels' @> b.workload_labels)
    ORDER BY b.budget_id;
END
$$;

INSERT INTO ledger.sidecar_right (kind, name) VALUES ('function', 'budgets_of_v2');

-- As before, and besides: where midnight comes twice (a clock that goes back from one to zero), the day begins with the
-- second one, as PostgreSQL reads it; the hour before still belongs to the day before, and is no longer given a window
-- that has not begun.
CREATE OR REPLACE FUNCTION ledger.window_bounds_v1(
    p_period text, p_alignment text, p_zone text, p_at timestamptz,
    OUT starts_at timestamptz, OUT ends_at timestamptz
) LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_local timestamp;
    v_length interval := CASE WHEN p_period <> 'lifetime' THEN ('1 ' || p_period)::interval END;
BEGIN
    IF p_period = 'lifetime' THEN
        starts_at := p_at;
        ends_at := NULL;
    ELSIF p_period IN ('minute', 'hour') THEN
        starts_at := CASE p_alignment WHEN 'rolling' THEN p_at ELSE date_trunc(p_period, p_at, p_zone) END;
        ends_at := starts_at + v_length;
    ELSE
        -- Days are added to the local date: a day with a clock change has 23 or 25 hours. From the local time, not
        -- back from `starts_at`: where the clock changes at midnight, a day begins at one.
        v_local := p_at AT TIME ZONE p_zone;
        IF p_alignment = 'rolling' THEN
            starts_at := p_at;
        ELSE
            v_local := date_trunc(p_period, v_local);
            IF v_local AT TIME ZONE p_zone > p_at THEN
                v_local := v_local - v_length;
            END IF;
            starts_at := v_local AT TIME ZONE p_zone;
        END IF;
        ends_at := (v_local + v_length) AT TIME ZONE p_zone;
    END IF;
END
$$;
