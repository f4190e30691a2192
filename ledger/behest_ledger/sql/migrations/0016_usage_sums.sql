-- Sums of usage, so that a question over a million requests reads some thousand rows.
--
-- What is summed is what is sealed: rows of transactions below `rolled_until`, which never passes `sealed_until`. So no
-- row can come to be below the mark, and a question is answered by the sums below it and by the rows above it, in one
-- snapshot. The keeper adds; who settles a request knows nothing of it. `behest ledger verify` adds up everything anew.

CREATE TABLE ledger.usage_sum (
    tenant_id text NOT NULL,
    month date NOT NULL,                        -- of the requests: sums leave with them when a month is put away
    project_id text NOT NULL,
    kind text NOT NULL CHECK (kind IN
        ('minute', 'quarter',                   -- by time: a minute, a quarter of an hour
         'model', 'session')),                  -- by the hour, for each model or session
    whose text NOT NULL,                        -- '*' everybody of the project, '=ann' the user ann
    begins_at timestamptz NOT NULL,             -- of the time in which the requests ended
    name text NOT NULL,                         -- the model or session, '' otherwise
    byok boolean NOT NULL,                      -- false where it is by time
    requests bigint NOT NULL,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    amount_pico numeric NOT NULL,
    PRIMARY KEY (tenant_id, project_id, kind, whose, begins_at, name, byok, month)
) PARTITION BY RANGE (month);

-- Quarters of an hour, because every time zone's hours and days begin with one (the last that did not was Liberia's, 1972).

ALTER TABLE ledger.seal_progress
    ADD COLUMN rolled_until bigint NOT NULL DEFAULT 0,      -- rows of transactions below are in the sums
    ADD COLUMN rolled_to timestamptz NOT NULL DEFAULT '-infinity',  -- no request in the sums ended later
    -- Rows that are older than seals have no transaction: they are added by their key, up to this one, and all of them
    -- before the first other. Until then `rolled_until` is 0, and nobody looks at the sums.
    ADD COLUMN rolled_tenant text NOT NULL DEFAULT '',
    ADD COLUMN rolled_month date NOT NULL DEFAULT '0001-01-01',
    ADD COLUMN rolled_request uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000';

-- As in 0011_seals.sql.
CREATE OR REPLACE FUNCTION ledger.monthly_tables_v1() RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT '{hold,hold_line,posting,request,usage_line,correction,seal_source,usage_sum}'::text[];
$$;
DO $$
BEGIN
    PERFORM ledger.make_partitions_v1(to_date(right(c.relname, 7), 'YYYY_MM'), 1)
    FROM pg_catalog.pg_class c
    WHERE c.relnamespace = 'ledger'::regnamespace AND c.relname ~ '^hold_[0-9]{4}_[0-9]{2}$';
END
$$;

-- A name that an index takes, and that is still of one model only.
CREATE FUNCTION ledger.short_name_v1(p_name text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN octet_length(p_name) <= 512 THEN p_name
                ELSE left(p_name, 100) || '... ' || encode(sha256(convert_to(p_name, 'UTF8')), 'hex') END;
$$;

-- The sums of the requests of some transactions, [p_from, p_until), with what corrections of some transactions changed;
-- and of the requests before transaction p_old whose keys are in (after, last]. What is in `usage_sum` is this.
CREATE FUNCTION ledger.usage_sums_v1(
    p_from bigint, p_until bigint, p_old bigint, p_after_tenant text, p_after_month date, p_after_request uuid,
    p_last_tenant text, p_last_month date, p_last_request uuid
) RETURNS TABLE (
    tenant_id text, month date, project_id text, kind text, whose text, begins_at timestamptz, name text, byok boolean,
    requests bigint, input_tokens bigint, output_tokens bigint, amount_pico numeric, ended_at timestamptz)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
    WITH line AS (
        SELECT r.tenant_id, r.month, r.project_id, r.user_id, r.ended_at, r.model, r.session_id, r.byok, 1 AS requests,
               r.input_tokens, r.output_tokens, r.amount_pico
        FROM ledger.request r WHERE p_from IS NOT NULL AND r.tx >= p_from AND r.tx < p_until
        UNION ALL
        SELECT r.tenant_id, r.month, r.project_id, r.user_id, r.ended_at, r.model, r.session_id, r.byok, 1,
               r.input_tokens, r.output_tokens, r.amount_pico
        FROM ledger.request r
        WHERE p_old IS NOT NULL AND r.tx < p_old
          AND (r.tenant_id, r.month, r.request_id) > (p_after_tenant, p_after_month, p_after_request)
          AND (r.tenant_id, r.month, r.request_id) <= (p_last_tenant, p_last_month, p_last_request)
        UNION ALL
        SELECT r.tenant_id, r.month, r.project_id, r.user_id, r.ended_at, r.model, r.session_id, r.byok, 0,
               c.input_tokens - coalesce(b.input_tokens, r.input_tokens),
               c.output_tokens - coalesce(b.output_tokens, r.output_tokens),
               c.amount_pico - coalesce(b.amount_pico, r.amount_pico)
        FROM ledger.correction c
        JOIN ledger.request r USING (tenant_id, month, request_id)
        LEFT JOIN ledger.correction b ON b.tenant_id = c.tenant_id AND b.month = c.month
                                     AND b.request_id = c.request_id AND b.number = c.number - 1
        WHERE p_from IS NOT NULL AND c.tx >= p_from AND c.tx < p_until
    ), shortest AS (                            -- so that the many lines are split for fewer sums
        SELECT l.tenant_id, l.month, l.project_id, l.user_id, date_trunc('minute', l.ended_at, 'UTC') AS minute,
               ledger.short_name_v1(l.model) AS model, ledger.short_name_v1(l.session_id) AS session_id, l.byok,
               sum(l.requests) AS requests, sum(l.input_tokens) AS input_tokens, sum(l.output_tokens) AS output_tokens,
               sum(l.amount_pico) AS amount_pico, max(l.ended_at) AS ended_at
        FROM line l GROUP BY 1, 2, 3, 4, 5, 6, 7, 8
    )
    SELECT s.tenant_id, s.month, s.project_id, k.kind, w.whose, k.begins_at, k.name, k.byok, sum(s.requests)::bigint,
           sum(s.input_tokens)::bigint, sum(s.output_tokens)::bigint, sum(s.amount_pico), max(s.ended_at)
    FROM shortest s
    CROSS JOIN LATERAL (VALUES
        ('minute', s.minute, '', false),
        ('quarter', date_bin('15 min', s.minute, '2000-01-01T00:00:00Z'), '', false),
        ('model', date_trunc('hour', s.minute, 'UTC'), s.model, s.byok),
        ('session', date_trunc('hour', s.minute, 'UTC'), s.session_id, s.byok)) AS k (kind, begins_at, name, byok)
    CROSS JOIN LATERAL (VALUES ('*'), ('=' || s.user_id)) AS w (whose)
    GROUP BY 1, 2, 3, 4, 5, 6, 7, 8;
$$;

-- Add the next batch to the sums: what one step of sealing sealed, or p_requests of the requests that are older than
-- seals. `more`: there is more that could be added.
CREATE FUNCTION ledger.roll_usage_v1(p_requests integer, OUT added bigint, OUT more boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
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
                                           input_tokens, output_tokens, amount_pico)
        SELECT a.tenant_id, a.month, a.project_id, a.kind, a.whose, a.begins_at, a.name, a.byok, a.requests,
               a.input_tokens, a.output_tokens, a.amount_pico
        FROM addend a ORDER BY a.month, a.tenant_id, a.project_id, a.kind, a.whose, a.begins_at, a.name, a.byok
        ON CONFLICT (tenant_id, project_id, kind, whose, begins_at, name, byok, month) DO UPDATE SET
            requests = s.requests + excluded.requests,
            input_tokens = s.input_tokens + excluded.input_tokens,
            output_tokens = s.output_tokens + excluded.output_tokens,
            amount_pico = s.amount_pico + excluded.amount_pico
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

-- The requests of a question that are not in its sums, as they cost now: those that ended in [p_begin, p_first) or
-- [p_last, p_end), and all of [p_begin, p_end) that are above the mark; with what corrections above the mark changed of
-- others.
CREATE FUNCTION ledger.usage_beside_sums_v1(
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
    SELECT l.ended_at, ledger.short_name_v1(l.model), ledger.short_name_v1(l.session_id), l.byok, l.counted,
           l.input_tokens, l.output_tokens, l.amount_pico
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

-- Sums for very many groups of few rows each: PostgreSQL's own keep a wider number for each group, which takes three times
-- as long. Beyond nine quintillion tokens this one refuses.
CREATE AGGREGATE ledger.total_v1(bigint) (SFUNC = int8pl, STYPE = bigint, PARALLEL = SAFE);
CREATE AGGREGATE ledger.total_v1(numeric) (SFUNC = numeric_add, STYPE = numeric, PARALLEL = SAFE);

-- The requests of a project, or of one user of it, that ended in [p_begin, p_end), by the minutes, hours or days of a zone.
CREATE FUNCTION ledger.usage_bins_v1(
    p_tenant text, p_project text, p_user text, p_begin timestamptz, p_end timestamptz, p_piece text, p_zone text
) RETURNS TABLE (
    begins_at timestamptz, requests bigint, input_tokens bigint, output_tokens bigint, amount_pico numeric)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
    v_whose text := coalesce('=' || p_user, '*');
    v_until bigint;
    v_all boolean;                              -- nothing in the sums ended at p_end or later
    -- [begin, minute) by requests, [minute, quarter) by minutes, [quarter, last quarter) by quarters, and back again.
    v_minute timestamptz := date_bin('1 min', p_begin + interval '59999999 us', '2000-01-01T00:00:00Z');
    v_quarter timestamptz := date_bin('15 min', p_begin + interval '899999999 us', '2000-01-01T00:00:00Z');
    v_last_quarter timestamptz := date_bin('15 min', p_end, '2000-01-01T00:00:00Z');
    v_last_minute timestamptz := date_bin('1 min', p_end, '2000-01-01T00:00:00Z');
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY[p_tenant]);
    SELECT p.rolled_until, p.rolled_to < p_end INTO STRICT v_until, v_all FROM ledger.seal_progress p;
    IF v_all THEN
        v_last_quarter := v_last_quarter + interval '15 min';
        v_last_minute := v_last_minute + interval '1 min';
    END IF;
    IF v_until = 0 OR v_minute >= v_last_minute THEN
        v_minute := p_end;
        v_last_minute := p_end;
    END IF;
    IF p_piece = 'minute' OR v_quarter >= v_last_quarter OR v_minute = p_end THEN
        v_quarter := v_last_minute;
        v_last_quarter := v_last_minute;
    END IF;
    RETURN QUERY
    SELECT date_trunc(p_piece, t.at, p_zone), ledger.total_v1(t.requests), ledger.total_v1(t.input_tokens),
           ledger.total_v1(t.output_tokens), ledger.total_v1(t.amount_pico)
    FROM (
        SELECT s.begins_at AS at, s.requests, s.input_tokens, s.output_tokens, s.amount_pico FROM ledger.usage_sum s
        WHERE s.tenant_id = p_tenant AND s.project_id = p_project AND s.kind = 'quarter' AND s.whose = v_whose
          AND s.begins_at >= v_quarter AND s.begins_at < v_last_quarter
        UNION ALL
        SELECT s.begins_at, s.requests, s.input_tokens, s.output_tokens, s.amount_pico FROM ledger.usage_sum s
        WHERE s.tenant_id = p_tenant AND s.project_id = p_project AND s.kind = 'minute' AND s.whose = v_whose
          AND s.begins_at >= v_minute AND s.begins_at < v_quarter
        UNION ALL
        SELECT s.begins_at, s.requests, s.input_tokens, s.output_tokens, s.amount_pico FROM ledger.usage_sum s
        WHERE s.tenant_id = p_tenant AND s.project_id = p_project AND s.kind = 'minute' AND s.whose = v_whose
          AND s.begins_at >= v_last_quarter AND s.begins_at < v_last_minute
        UNION ALL
        SELECT b.ended_at, b.requests, b.input_tokens, b.output_tokens, b.amount_pico
        FROM ledger.usage_beside_sums_v1(
            p_tenant, p_project, p_user, p_begin, v_minute, v_last_minute, p_end, v_until) AS b) AS t
    GROUP BY 1 ORDER BY 1;
END
$$;

-- The same requests by model, and by session: of those the p_sessions that cost most, for each of whose key paid.
-- `number` says how many there are.
CREATE FUNCTION ledger.usage_totals_v1(
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
    ), session AS MATERIALIZED (
        SELECT t.name, t.byok, ledger.total_v1(t.requests) AS requests, ledger.total_v1(t.input_tokens) AS input_tokens,
               ledger.total_v1(t.output_tokens) AS output_tokens, ledger.total_v1(t.amount_pico) AS amount_pico
        FROM (
            SELECT s.name, s.byok, s.requests, s.input_tokens, s.output_tokens, s.amount_pico FROM ledger.usage_sum s
            WHERE s.tenant_id = p_tenant AND s.project_id = p_project AND s.kind = 'session' AND s.whose = v_whose
              AND s.begins_at >= v_hour AND s.begins_at < v_last_hour
            UNION ALL
            SELECT b.session_id, b.byok, b.requests, b.input_tokens, b.output_tokens, b.amount_pico FROM beside b) AS t
        GROUP BY 1, 2
    ), numbers AS MATERIALIZED (
        SELECT count(*) FILTER (WHERE NOT s.byok) AS platform, count(*) FILTER (WHERE s.byok) AS own FROM session s
    )
    SELECT 'model', m.*, 1::bigint FROM model m
    UNION ALL
    (SELECT 'session', s.*, n.platform FROM session s, numbers n WHERE NOT s.byok
     ORDER BY s.amount_pico DESC, s.name LIMIT p_sessions)
    UNION ALL
    (SELECT 'session', s.*, n.own FROM session s, numbers n WHERE s.byok
     ORDER BY s.amount_pico DESC, s.name LIMIT p_sessions);
END
$$;

REVOKE ALL ON FUNCTION ledger.usage_bins_v1(text, text, text, timestamptz, timestamptz, text, text),
    ledger.usage_totals_v1(text, text, text, timestamptz, timestamptz, integer), ledger.roll_usage_v1(integer) FROM PUBLIC;
INSERT INTO ledger.sidecar_right (kind, name) VALUES ('function', 'usage_bins_v1'), ('function', 'usage_totals_v1');
