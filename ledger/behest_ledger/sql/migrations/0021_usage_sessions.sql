-- Totals of many sessions without grouping them: most sessions have one row, for they end within their hour.
--
-- Grouping takes longer than all the rest: each of 50,000 groups is hashed, kept, and read again. So a row of a session
-- says whether it is the only one, and those that are go straight into the answer. What it says is cautious: a row
-- that had another one beside it is not alone again, and rows from before this migration are not: that is slower, and
-- the answer is the same.

ALTER TABLE ledger.usage_sum ADD COLUMN alone boolean NOT NULL DEFAULT false;   -- the only row of its session
CREATE INDEX usage_sum_of_session ON ledger.usage_sum (tenant_id, project_id, whose, name, byok, alone)
    WHERE kind = 'session';

-- As before, and besides: rows of sessions say whether they are alone.
CREATE OR REPLACE FUNCTION ledger.roll_usage_v1(p_requests integer, OUT added bigint, OUT more boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET enable_seqscan = off AS $$
DECLARE
    v_progress ledger.seal_progress;
    v_until bigint;
    v_old bigint;                               -- while there are rows that are older than seals
    v_last_tenant text;
    v_last_month date;
    v_last_request uuid;
    v_to timestamptz;
BEGIN
    PERFORM ledger.require_tenants_v1(NULL);
    SELECT * INTO STRICT v_progress FROM ledger.seal_progress FOR UPDATE;
    added := 0;
    more := false;
    IF v_progress.sealed_until < v_progress.began OR v_progress.sealed_until <= v_progress.rolled_until THEN
        RETURN;
    END IF;
    IF v_progress.rolled_until = 0 THEN
        v_old := v_progress.began;
        SELECT r.tenant_id, r.month, r.request_id INTO v_last_tenant, v_last_month, v_last_request
        FROM ledger.request r
        WHERE r.tx < v_old AND (r.tenant_id, r.month, r.request_id)
              > (v_progress.rolled_tenant, v_progress.rolled_month, v_progress.rolled_request)
        ORDER BY r.tenant_id, r.month, r.request_id OFFSET p_requests - 1 LIMIT 1;
        IF NOT FOUND THEN                       -- the last of them
            SELECT r.tenant_id, r.month, r.request_id INTO v_last_tenant, v_last_month, v_last_request
            FROM ledger.request r
            WHERE r.tx < v_old AND (r.tenant_id, r.month, r.request_id)
                  > (v_progress.rolled_tenant, v_progress.rolled_month, v_progress.rolled_request)
            ORDER BY r.tenant_id DESC, r.month DESC, r.request_id DESC LIMIT 1;
            v_until := v_old;
        END IF;
    ELSE
        SELECT s.tx_until INTO v_until FROM ledger.seal s
        WHERE s.tx_from >= v_progress.rolled_until AND s.kind = 'rows' ORDER BY s.tx_from LIMIT 1;
        v_until := least(coalesce(v_until, v_progress.sealed_until), v_progress.sealed_until);
    END IF;

    WITH addend AS MATERIALIZED (
        SELECT * FROM ledger.usage_sums_v1(
            CASE WHEN v_old IS NULL THEN v_progress.rolled_until END, v_until, v_old, v_progress.rolled_tenant,
            v_progress.rolled_month, v_progress.rolled_request, v_last_tenant, v_last_month, v_last_request)
    ), written AS (
        INSERT INTO ledger.usage_sum AS s (tenant_id, month, project_id, kind, whose, begins_at, name, byok, requests,
                                           input_tokens, output_tokens, amount_pico, alone)
        SELECT a.tenant_id, a.month, a.project_id, a.kind, a.whose, a.begins_at, a.name, a.byok, a.requests,
               a.input_tokens, a.output_tokens, a.amount_pico,
               a.kind = 'session' AND NOT EXISTS (
                   SELECT FROM ledger.usage_sum o
                   WHERE o.tenant_id = a.tenant_id AND o.project_id = a.project_id AND o.kind = 'session'
                     AND o.whose = a.whose AND o.name = a.name AND o.byok = a.byok
                     AND (o.begins_at, o.month) <> (a.begins_at, a.month))
               AND count(*) OVER (PARTITION BY a.tenant_id, a.project_id, a.kind, a.whose, a.name, a.byok) = 1
        FROM addend a ORDER BY a.month, a.tenant_id, a.project_id, a.kind, a.whose, a.begins_at, a.name, a.byok
        ON CONFLICT (tenant_id, project_id, kind, whose, begins_at, name, byok, month) DO UPDATE SET
            requests = s.requests + excluded.requests,
            input_tokens = s.input_tokens + excluded.input_tokens,
            output_tokens = s.output_tokens + excluded.output_tokens,
            amount_pico = s.amount_pico + excluded.amount_pico,
            alone = s.alone AND excluded.alone
    ), joined AS (                              -- rows that another one of their session was just written beside
        UPDATE ledger.usage_sum s SET alone = false
        FROM (SELECT DISTINCT a.tenant_id, a.project_id, a.whose, a.name, a.byok FROM addend a
              WHERE a.kind = 'session') AS k
        WHERE s.tenant_id = k.tenant_id AND s.project_id = k.project_id AND s.kind = 'session' AND s.whose = k.whose
          AND s.name = k.name AND s.byok = k.byok AND s.alone
          AND NOT EXISTS (                      -- those are written above; a row is changed once in a statement
              SELECT FROM addend a
              WHERE a.tenant_id = s.tenant_id AND a.month = s.month AND a.project_id = s.project_id
                AND a.kind = 'session' AND a.whose = s.whose AND a.begins_at = s.begins_at AND a.name = s.name
                AND a.byok = s.byok)
    )
    SELECT coalesce(sum(a.requests) FILTER (WHERE a.kind = 'quarter' AND a.whose = '*'), 0), max(a.ended_at)
    INTO added, v_to FROM addend a;
    UPDATE ledger.seal_progress SET
        rolled_until = coalesce(v_until, 0),
        rolled_to = greatest(rolled_to, v_to),
        rolled_tenant = coalesce(v_last_tenant, rolled_tenant),
        rolled_month = coalesce(v_last_month, rolled_month),
        rolled_request = coalesce(v_last_request, rolled_request);
    more := coalesce(v_until, 0) < v_progress.sealed_until;
END
$$;

-- As before; names that need not be shortened are not given to a function, which takes longer than to read their row.
CREATE OR REPLACE FUNCTION ledger.usage_beside_sums_v1(
    p_tenant text, p_project text, p_user text, p_begin timestamptz, p_first timestamptz, p_last timestamptz,
    p_end timestamptz, p_until bigint
) RETURNS TABLE (
    ended_at timestamptz, model text, session_id text, byok boolean, requests bigint, input_tokens bigint,
    output_tokens bigint, amount_pico numeric)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off SET jit = off AS $$
BEGIN
    RETURN QUERY
    WITH beside AS MATERIALIZED (
        SELECT r.* FROM ledger.request r
        WHERE r.tenant_id = p_tenant AND r.project_id = p_project AND (p_user IS NULL OR r.user_id = p_user)
          AND r.ended_at >= p_begin AND r.ended_at < p_first AND r.tx < p_until
        UNION ALL
        SELECT r.* FROM ledger.request r
        WHERE r.tenant_id = p_tenant AND r.project_id = p_project AND (p_user IS NULL OR r.user_id = p_user)
          AND r.ended_at >= p_last AND r.ended_at < p_end AND r.tx < p_until
    ), line AS (
        SELECT b.*, 1::bigint AS counted FROM beside b
        UNION ALL
        SELECT r.*, 1::bigint FROM ledger.request r
        WHERE r.tenant_id = p_tenant AND r.project_id = p_project AND (p_user IS NULL OR r.user_id = p_user)
          AND r.ended_at >= p_begin AND r.ended_at < p_end AND r.tx >= p_until
    ), changed AS (
        SELECT b.*, c.number, c.input_tokens AS new_input, c.output_tokens AS new_output, c.amount_pico AS new_amount
        FROM beside b JOIN ledger.correction c ON c.tenant_id = b.tenant_id AND c.month = b.month
                                              AND c.request_id = b.request_id AND c.tx < p_until
        UNION ALL
        SELECT r.*, c.number, c.input_tokens, c.output_tokens, c.amount_pico
        FROM ledger.correction c JOIN ledger.request r ON r.tenant_id = c.tenant_id AND r.month = c.month
                                                      AND r.request_id = c.request_id
        WHERE c.tenant_id = p_tenant AND c.tx >= p_until AND r.project_id = p_project
          AND (p_user IS NULL OR r.user_id = p_user) AND r.ended_at >= p_begin AND r.ended_at < p_end
    )
    SELECT l.ended_at, CASE WHEN octet_length(l.model) <= 512 THEN l.model ELSE ledger.short_name_v1(l.model) END,
           CASE WHEN octet_length(l.session_id) <= 512 THEN l.session_id ELSE ledger.short_name_v1(l.session_id) END,
           l.byok, l.counted, l.input_tokens, l.output_tokens, l.amount_pico
    FROM line l
    UNION ALL
    SELECT c.ended_at, ledger.short_name_v1(c.model), ledger.short_name_v1(c.session_id), c.byok, 0::bigint,
           c.new_input - coalesce(b.input_tokens, c.input_tokens),
           c.new_output - coalesce(b.output_tokens, c.output_tokens),
           c.new_amount - coalesce(b.amount_pico, c.amount_pico)
    FROM changed c LEFT JOIN ledger.correction b ON b.tenant_id = c.tenant_id AND b.month = c.month
                                                AND b.request_id = c.request_id AND b.number = c.number - 1;
END
$$;

-- As before; sessions of one row, of which nothing is beside the sums, are not grouped.
CREATE OR REPLACE FUNCTION ledger.usage_totals_v1(
    p_tenant text, p_project text, p_user text, p_begin timestamptz, p_end timestamptz, p_sessions integer
) RETURNS TABLE (
    kind text, name text, byok boolean, requests bigint, input_tokens bigint, output_tokens bigint, amount_pico numeric,
    number bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off SET jit = off SET work_mem = '64MB' AS $$
#variable_conflict use_column
DECLARE
    v_whose text := coalesce('=' || p_user, '*');
    v_until bigint;
    v_all boolean;
    v_hour timestamptz := date_bin('1 hour', p_begin + interval '3599999999 us', '2000-01-01T00:00:00Z');
    v_last_hour timestamptz := date_bin('1 hour', p_end, '2000-01-01T00:00:00Z');
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY[p_tenant]);
    SELECT p.rolled_until, p.rolled_to < p_end INTO STRICT v_until, v_all FROM ledger.seal_progress p;
    IF v_all THEN
        v_last_hour := v_last_hour + interval '1 hour';
    END IF;
    IF v_until = 0 OR v_hour >= v_last_hour THEN
        v_hour := p_end;
        v_last_hour := p_end;
    END IF;
    RETURN QUERY
    WITH beside AS MATERIALIZED (
        SELECT * FROM ledger.usage_beside_sums_v1(
            p_tenant, p_project, p_user, p_begin, v_hour, v_last_hour, p_end, v_until)
    ), model AS (
        SELECT t.name, t.byok, ledger.total_v1(t.requests) AS requests, ledger.total_v1(t.input_tokens) AS input_tokens,
               ledger.total_v1(t.output_tokens) AS output_tokens, ledger.total_v1(t.amount_pico) AS amount_pico
        FROM (
            SELECT s.name, s.byok, s.requests, s.input_tokens, s.output_tokens, s.amount_pico FROM ledger.usage_sum s
            WHERE s.tenant_id = p_tenant AND s.project_id = p_project AND s.kind = 'model' AND s.whose = v_whose
              AND s.begins_at >= v_hour AND s.begins_at < v_last_hour
            UNION ALL
            SELECT b.model, b.byok, b.requests, b.input_tokens, b.output_tokens, b.amount_pico FROM beside b) AS t
        GROUP BY 1, 2
    ), touched AS MATERIALIZED (
        SELECT DISTINCT b.session_id AS name, b.byok FROM beside b
    ), again AS MATERIALIZED (                 -- rows that are alone in the sums, and not in all
        SELECT s.name, s.byok, s.requests, s.input_tokens, s.output_tokens, s.amount_pico
        FROM touched o JOIN ledger.usage_sum s USING (name, byok)
        WHERE s.tenant_id = p_tenant AND s.project_id = p_project AND s.kind = 'session' AND s.whose = v_whose
          AND s.begins_at >= v_hour AND s.begins_at < v_last_hour AND s.alone
    ), mixed AS MATERIALIZED (
        SELECT t.name, t.byok, ledger.total_v1(t.requests) AS requests, ledger.total_v1(t.input_tokens) AS input_tokens,
               ledger.total_v1(t.output_tokens) AS output_tokens, ledger.total_v1(t.amount_pico) AS amount_pico
        FROM (
            SELECT s.name, s.byok, s.requests, s.input_tokens, s.output_tokens, s.amount_pico FROM ledger.usage_sum s
            WHERE s.tenant_id = p_tenant AND s.project_id = p_project AND s.kind = 'session' AND s.whose = v_whose
              AND s.begins_at >= v_hour AND s.begins_at < v_last_hour AND NOT s.alone
            UNION ALL
            SELECT g.* FROM again g
            UNION ALL
            SELECT b.session_id, b.byok, b.requests, b.input_tokens, b.output_tokens, b.amount_pico FROM beside b) AS t
        GROUP BY 1, 2
    ), numbers AS MATERIALIZED (
        SELECT count(*) FILTER (WHERE NOT s.byok) + (SELECT count(*) FROM mixed m WHERE NOT m.byok)
               - (SELECT count(*) FROM again g WHERE NOT g.byok) AS platform,
               count(*) FILTER (WHERE s.byok) + (SELECT count(*) FROM mixed m WHERE m.byok)
               - (SELECT count(*) FROM again g WHERE g.byok) AS own
        FROM ledger.usage_sum s
        WHERE s.tenant_id = p_tenant AND s.project_id = p_project AND s.kind = 'session' AND s.whose = v_whose
          AND s.begins_at >= v_hour AND s.begins_at < v_last_hour AND s.alone
    )
    SELECT 'model', m.*, 1::bigint FROM model m
    UNION ALL
    (SELECT 'session', t.name, false, t.requests, t.input_tokens, t.output_tokens, t.amount_pico, n.platform
     FROM numbers n, (
         SELECT m.name, m.requests, m.input_tokens, m.output_tokens, m.amount_pico FROM mixed m WHERE NOT m.byok
         UNION ALL
         -- So many more than are told that enough are left without those that are in `mixed`.
         SELECT a.* FROM (
             SELECT s.name, s.requests, s.input_tokens, s.output_tokens, s.amount_pico FROM ledger.usage_sum s
             WHERE s.tenant_id = p_tenant AND s.project_id = p_project AND s.kind = 'session' AND s.whose = v_whose
               AND s.begins_at >= v_hour AND s.begins_at < v_last_hour AND s.alone AND NOT s.byok
             ORDER BY s.amount_pico DESC, s.name LIMIT p_sessions + (SELECT count(*) FROM again)) AS a
         WHERE NOT EXISTS (SELECT FROM again g WHERE g.name = a.name AND g.byok = false)) AS t
     ORDER BY t.amount_pico DESC, t.name LIMIT p_sessions)
    UNION ALL
    (SELECT 'session', t.name, true, t.requests, t.input_tokens, t.output_tokens, t.amount_pico, n.own
     FROM numbers n, (
         SELECT m.name, m.requests, m.input_tokens, m.output_tokens, m.amount_pico FROM mixed m WHERE m.byok
         UNION ALL
         -- So many more than are told that enough are left without those that are in `mixed`.
         SELECT a.* FROM (
             SELECT s.name, s.requests, s.input_tokens, s.output_tokens, s.amount_pico FROM ledger.usage_sum s
             WHERE s.tenant_id = p_tenant AND s.project_id = p_project AND s.kind = 'session' AND s.whose = v_whose
               AND s.begins_at >= v_hour AND s.begins_at < v_last_hour AND s.alone AND s.byok
             ORDER BY s.amount_pico DESC, s.name LIMIT p_sessions + (SELECT count(*) FROM again)) AS a
         WHERE NOT EXISTS (SELECT FROM again g WHERE g.name = a.name AND g.byok = true)) AS t
     ORDER BY t.amount_pico DESC, t.name LIMIT p_sessions);
END
$$;
