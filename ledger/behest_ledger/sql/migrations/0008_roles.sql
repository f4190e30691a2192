-- Who may do what: the owner of the schema everything, a sidecar's role only what it needs, and that for its own tenants.
--
-- Nothing here makes a role: roles belong to the whole server, and the owner of this schema may lack the right to make
-- them. `behest ledger role` makes them and writes them down in `tenant_role`.
--
-- For every function that a sidecar calls: it is SECURITY DEFINER with a search_path of its own, it begins with
-- require_tenants_v1 (and require_holder_v1 where it is told a holder), and its name is in `sidecar_right`.

CREATE TABLE ledger.tenant_role (
    role_name name NOT NULL,
    tenant_id text,                             -- NULL: every tenant of this ledger
    UNIQUE NULLS NOT DISTINCT (role_name, tenant_id)
);

-- What is granted to the roles of sidecars: SELECT on tables, EXECUTE on functions, all overloads. A migration that adds
-- something for sidecars adds its name here.
CREATE TABLE ledger.sidecar_right (
    kind text NOT NULL CHECK (kind IN ('table', 'function')),
    name name NOT NULL,
    PRIMARY KEY (kind, name)
);

-- Raise insufficient_privilege unless the role that logged in may act for every one of these tenants. The session's role
-- is asked for, because the current one is the owner inside of a SECURITY DEFINER function. NULL among them asks for
-- the right to act for all tenants.
CREATE FUNCTION ledger.require_tenants_v1(p_tenants text[]) RETURNS void
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_tenant text;
BEGIN
    IF pg_has_role(session_user, current_user, 'USAGE') THEN
        RETURN;
    END IF;
    SELECT t.tenant_id INTO v_tenant FROM unnest(coalesce(p_tenants, '{NULL}')) AS t (tenant_id)
    WHERE NOT EXISTS (SELECT FROM ledger.tenant_role r
                      WHERE r.role_name = session_user AND (r.tenant_id IS NULL OR r.tenant_id = t.tenant_id))
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'role % may not act for %', session_user, coalesce('tenant ' || v_tenant, 'all tenants')
            USING ERRCODE = 'insufficient_privilege';
    END IF;
END
$$;

-- The tenants that the session's role may act for: NULL all of them, '{}' none.
CREATE FUNCTION ledger.session_tenants_v1() RETURNS text[]
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN NOT (pg_has_role(session_user, current_user, 'USAGE') OR EXISTS (
        SELECT FROM ledger.tenant_role r WHERE r.role_name = session_user AND r.tenant_id IS NULL)) THEN (
            SELECT coalesce(array_agg(r.tenant_id ORDER BY r.tenant_id), '{}')
            FROM ledger.tenant_role r WHERE r.role_name = session_user) END;
$$;

-- Make the rules of this file true for everything that is there, also for what later migrations brought: guard what is
-- insert-only, take from PUBLIC what PostgreSQL gives it (functions may be executed by everybody), hide every
-- tenant's rows from others, and give the roles of sidecars what `sidecar_right` says, and no more. Called after
-- migrations, and whenever a role is made.
CREATE FUNCTION ledger.grant_rights_v1() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_table regclass;
    v_roles text;
    v_objects text;
BEGIN
    PERFORM ledger.guard_insert_only_v1();
    REVOKE ALL ON SCHEMA ledger FROM PUBLIC;
    REVOKE ALL ON ALL TABLES IN SCHEMA ledger FROM PUBLIC;
    REVOKE ALL ON ALL SEQUENCES IN SCHEMA ledger FROM PUBLIC;
    REVOKE ALL ON ALL ROUTINES IN SCHEMA ledger FROM PUBLIC;

    FOR v_table IN
        SELECT c.oid FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'tenant_id'
        WHERE c.relnamespace = 'ledger'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
          AND NOT c.relrowsecurity
        ORDER BY c.relname
    LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format(
            'CREATE POLICY tenants_of_session ON %s FOR SELECT USING ((SELECT ledger.session_tenants_v1()) IS NULL '
            'OR tenant_id = ANY ((SELECT ledger.session_tenants_v1())::text[]))', v_table);
    END LOOP;

    SELECT string_agg(DISTINCT quote_ident(t.role_name), ', ') INTO v_roles
    FROM ledger.tenant_role t JOIN pg_roles r ON r.rolname = t.role_name;
    IF v_roles IS NULL THEN
        RETURN;
    END IF;
    EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA ledger FROM %s', v_roles);
    EXECUTE format('REVOKE ALL ON ALL SEQUENCES IN SCHEMA ledger FROM %s', v_roles);
    EXECUTE format('REVOKE ALL ON ALL ROUTINES IN SCHEMA ledger FROM %s', v_roles);
    EXECUTE format('GRANT USAGE ON SCHEMA ledger TO %s', v_roles);
    SELECT string_agg(c.oid::regclass::text, ', ') INTO v_objects
    FROM ledger.sidecar_right s JOIN pg_class c ON c.relname = s.name AND c.relnamespace = 'ledger'::regnamespace
    WHERE s.kind = 'table';
    EXECUTE format('GRANT SELECT ON TABLE %s TO %s', v_objects, v_roles);
    SELECT string_agg(p.oid::regprocedure::text, ', ') INTO v_objects
    FROM ledger.sidecar_right s JOIN pg_proc p ON p.proname = s.name AND p.pronamespace = 'ledger'::regnamespace
    WHERE s.kind = 'function';
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', v_objects, v_roles);
END
$$;

-- Rows of nobody in particular: keys that sign for every tenant are believed by everybody.
ALTER TABLE ledger.signing_key ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenants_of_session ON ledger.signing_key FOR SELECT USING (
    tenant_id IS NULL OR (SELECT ledger.session_tenants_v1()) IS NULL
    OR tenant_id = ANY ((SELECT ledger.session_tenants_v1())::text[]));

INSERT INTO ledger.sidecar_right (kind, name) VALUES
    ('table', 'schema_migration'), ('table', 'configuration_version'), ('table', 'price_book'),
    ('table', 'project'), ('table', 'upstream'), ('table', 'tier'), ('table', 'budget'),
    ('table', 'api_key'), ('table', 'signing_key'),
    ('table', 'budget_subject'), ('table', 'budget_window'), ('table', 'hold'), ('table', 'hold_line'),
    ('table', 'posting'), ('table', 'request'), ('table', 'usage_line'),
    ('function', 'session_tenants_v1'), ('function', 'put_signing_key_v1'),
    ('function', 'register_holder_v1'), ('function', 'renew_holder_v1'), ('function', 'unregister_holder_v1'),
    ('function', 'admit_v1'), ('function', 'extend_batch_v1'), ('function', 'settle_batch_v1'),
    ('function', 'checkpoint_batch_v1'), ('function', 'budgets_of_v1');

-- Holders

-- A holder belongs to the role that registered it.
ALTER TABLE ledger.holder ADD COLUMN role_name name NOT NULL DEFAULT session_user;

-- Raise insufficient_privilege where the holder is another role's, or the session's role may act for no tenant at all. A
-- holder that nobody registered is nobody's.
CREATE FUNCTION ledger.require_holder_v1(p_holder uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF pg_has_role(session_user, current_user, 'USAGE') THEN
        RETURN;
    ELSIF NOT EXISTS (SELECT FROM ledger.tenant_role r WHERE r.role_name = session_user) THEN
        RAISE EXCEPTION 'role % may act for no tenant', session_user USING ERRCODE = 'insufficient_privilege';
    ELSIF EXISTS (SELECT FROM ledger.holder h WHERE h.holder_id = p_holder AND h.role_name <> session_user) THEN
        RAISE EXCEPTION 'holder % is another role''s', p_holder USING ERRCODE = 'insufficient_privilege';
    END IF;
END
$$;

-- As in 0007_holders.sql; and another role's holder may be given nothing.
CREATE OR REPLACE FUNCTION ledger.holder_may_admit_v1(p_holder uuid) RETURNS boolean
LANGUAGE sql VOLATILE AS $$
    SELECT coalesce((SELECT (h.role_name = session_user OR pg_has_role(session_user, current_user, 'USAGE'))
                            AND ledger.holder_lives_v1(h) FROM ledger.holder h WHERE h.holder_id = p_holder),
                    NOT EXISTS (SELECT FROM ledger.holder));
$$;

-- As in 0007_holders.sql, for the roles of sidecars. The name is for people and for logs; nobody may be believed to live
-- for as long as he likes.
CREATE OR REPLACE FUNCTION ledger.register_holder_v1(
    p_holder uuid, p_name text, p_ttl interval DEFAULT '120 s'
) RETURNS timestamptz
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
DECLARE
    v_expires timestamptz;
BEGIN
    PERFORM ledger.require_holder_v1(p_holder);
    IF p_ttl IS NULL OR p_ttl <= '0 s' OR p_ttl > '1 hour' THEN
        RAISE EXCEPTION 'a holder''s ttl is at most an hour, not %', p_ttl USING ERRCODE = 'invalid_parameter_value';
    END IF;
    INSERT INTO ledger.holder AS h (holder_id, name, ttl, expires_at)
    VALUES (p_holder, left(regexp_replace(p_name, '[[:cntrl:]]', '?', 'g'), 128), p_ttl, clock_timestamp() + p_ttl)
    ON CONFLICT (holder_id) DO UPDATE SET
        renewed_at = clock_timestamp(), expires_at = greatest(h.expires_at, excluded.expires_at), ttl = excluded.ttl
        WHERE ledger.holder_lives_v1(h)
    RETURNING h.expires_at INTO v_expires;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'holder % has ended: a process registers under an id of its own', p_holder
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN v_expires;
END
$$;

CREATE OR REPLACE FUNCTION ledger.renew_holder_v1(p_holder uuid, p_ttl interval DEFAULT '120 s') RETURNS timestamptz
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
DECLARE
    v_expires timestamptz;
BEGIN
    PERFORM ledger.require_holder_v1(p_holder);
    IF p_ttl IS NULL OR p_ttl <= '0 s' OR p_ttl > '1 hour' THEN
        RAISE EXCEPTION 'a holder''s ttl is at most an hour, not %', p_ttl USING ERRCODE = 'invalid_parameter_value';
    END IF;
    UPDATE ledger.holder h
    SET renewed_at = clock_timestamp(), expires_at = greatest(h.expires_at, clock_timestamp() + p_ttl), ttl = p_ttl
    WHERE h.holder_id = p_holder AND ledger.holder_lives_v1(h)
    RETURNING h.expires_at INTO v_expires;
    RETURN v_expires;
END
$$;

-- What the roles of sidecars call

CREATE OR REPLACE FUNCTION ledger.checkpoint_batch_v1(
    p_tenants text[], p_requests uuid[], p_input_tokens bigint[], p_output_tokens bigint[], p_amounts numeric[],
    p_lines jsonb[]
) RETURNS SETOF uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_item record;
    v_state text;
BEGIN
    PERFORM ledger.require_tenants_v1(p_tenants);
    -- One after the other by key, and by nothing but the key: joined, or with a state to look for, this is now and then
    -- planned as a scan of all that is open.
    FOR v_item IN
        SELECT i.*, ledger.month_of_v1(i.request_id) AS month
        FROM unnest(p_tenants, p_requests, p_input_tokens, p_output_tokens, p_amounts, p_lines)
            AS i (tenant_id, request_id, input_tokens, output_tokens, amount, lines)
    LOOP
        -- Who settles or extends has the hold for a moment. Nobody waits for that with other holds in hand.
        SELECT h.state INTO v_state FROM ledger.hold h
        WHERE h.tenant_id = v_item.tenant_id AND h.month = v_item.month AND h.request_id = v_item.request_id
        FOR UPDATE SKIP LOCKED;
        IF v_state = 'open' THEN
            UPDATE ledger.hold h SET
                checkpoint_at = clock_timestamp(), checkpoint_input_tokens = v_item.input_tokens,
                checkpoint_output_tokens = v_item.output_tokens, checkpoint_amount_pico = v_item.amount,
                checkpoint_lines = v_item.lines
            WHERE h.tenant_id = v_item.tenant_id AND h.month = v_item.month AND h.request_id = v_item.request_id
              AND v_item.input_tokens >= h.checkpoint_input_tokens
              AND v_item.output_tokens >= h.checkpoint_output_tokens AND v_item.amount >= h.checkpoint_amount_pico;
        ELSIF v_state IS NULL THEN
            SELECT h.state INTO v_state FROM ledger.hold h
            WHERE h.tenant_id = v_item.tenant_id AND h.month = v_item.month AND h.request_id = v_item.request_id;
            IF v_state = 'open' THEN
                RETURN NEXT v_item.request_id;
            END IF;
        END IF;
    END LOOP;
END
$$;

CREATE OR REPLACE FUNCTION ledger.budgets_of_v1(p_tenant text, p_attributes jsonb)
RETURNS TABLE (budget_id text, unit text, limit_amount numeric, spent numeric, held numeric, remaining numeric,
               period text, enforcement text, suspended boolean, resets_at timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY[p_tenant]);
    RETURN QUERY
    SELECT b.budget_id, b.unit, b.limit_amount, coalesce(w.spent, 0), coalesce(w.held + w.suspense, 0),
           greatest(b.limit_amount - coalesce(w.spent + w.held + w.suspense, 0), 0),
           b.period, b.enforcement, b.suspended,
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

-- Register a public key under its kid, or change the state of the one there. A kid belongs to whom it was registered for
-- first. Answers "added", "changed", "same"; "conflict": the kid is another key's, or another tenant's; "revoked": and
-- stays so.
CREATE FUNCTION ledger.put_signing_key_v1(
    p_kid text, p_tenant text, p_kind text, p_algorithm text, p_public_pem text, p_state text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_known ledger.signing_key;
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY[p_tenant]);
    -- Whoever serves all tenants reads all keys: no tenant may make that a burden.
    IF length(p_kid) > 128 OR length(p_public_pem) > 16384 THEN
        RAISE EXCEPTION 'a kid has at most 128 characters, a key 16384' USING ERRCODE = 'invalid_parameter_value';
    ELSIF NOT pg_has_role(session_user, current_user, 'USAGE')
          AND NOT EXISTS (SELECT FROM ledger.signing_key k WHERE k.kid = p_kid)
          AND (SELECT count(*) FROM ledger.signing_key k WHERE k.tenant_id = p_tenant) >= 100 THEN
        RAISE EXCEPTION 'tenant % has 100 signing keys: delete those that are not used any more', p_tenant
            USING ERRCODE = 'program_limit_exceeded';
    END IF;
    INSERT INTO ledger.signing_key (kid, tenant_id, kind, algorithm, public_pem, state)
    VALUES (p_kid, p_tenant, p_kind, p_algorithm, p_public_pem, p_state) ON CONFLICT (kid) DO NOTHING;
    IF FOUND THEN
        PERFORM ledger.bump_configuration_v1(p_tenant);
        RETURN 'added';
    END IF;
    SELECT * INTO STRICT v_known FROM ledger.signing_key k WHERE k.kid = p_kid FOR UPDATE;
    IF (v_known.tenant_id, v_known.kind, v_known.algorithm, btrim(v_known.public_pem, E' \n\r\t'))
        IS DISTINCT FROM (p_tenant, p_kind, p_algorithm, btrim(p_public_pem, E' \n\r\t')) THEN
        RETURN 'conflict';
    ELSIF v_known.state = p_state THEN
        RETURN 'same';
    ELSIF v_known.state = 'revoked' THEN
        RETURN 'revoked';
    END IF;
    UPDATE ledger.signing_key k SET state = p_state WHERE k.kid = p_kid;
    PERFORM ledger.bump_configuration_v1(p_tenant);
    RETURN 'changed';
END
$$;

-- Insert-only, also against TRUNCATE: every table that refuses changes of its rows refuses that too. A trigger of a
-- statement is not passed on to partitions, so each gets its own.
CREATE FUNCTION ledger.guard_insert_only_v1() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_table regclass;
BEGIN
    FOR v_table IN
        SELECT DISTINCT g.tgrelid FROM pg_trigger g
        WHERE g.tgfoid = 'ledger.refuse_change_v1'::regproc
          AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = g.tgrelid AND t.tgname = 'no_truncate')
    LOOP
        EXECUTE format('CREATE TRIGGER no_truncate BEFORE TRUNCATE ON %s '
                       'FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change_v1()', v_table);
    END LOOP;
END
$$;

-- As in 0002_books.sql, with guards.
CREATE OR REPLACE FUNCTION ledger.make_partitions_v1(p_from date, p_months integer) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    v_table text;
    v_month date;
    v_name text;
    v_made integer := 0;
    v_astray boolean;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['hold', 'hold_line', 'posting', 'request', 'usage_line'] LOOP
        EXECUTE format('CREATE TABLE IF NOT EXISTS ledger.%I PARTITION OF ledger.%I DEFAULT',
                       v_table || '_default', v_table);
        FOR i IN 0 .. p_months - 1 LOOP
            v_month := date_trunc('month', p_from)::date + make_interval(months => i);
            v_name := v_table || to_char(v_month, '_YYYY_MM');
            EXECUTE format('SELECT EXISTS (SELECT FROM ledger.%I WHERE month >= %L AND month < %L)',
                           v_table || '_default', v_month, (v_month + interval '1 month')::date) INTO v_astray;
            IF to_regclass('ledger.' || quote_ident(v_name)) IS NULL AND NOT v_astray THEN
                EXECUTE format('CREATE TABLE ledger.%I PARTITION OF ledger.%I FOR VALUES FROM (%L) TO (%L)',
                               v_name, v_table, v_month, (v_month + interval '1 month')::date);
                IF v_table = 'hold' THEN        -- checkpoints are written in place (HOT): leave room
                    EXECUTE format('ALTER TABLE ledger.%I SET (fillfactor = 70)', v_name);
                END IF;
                v_made := v_made + 1;
            END IF;
        END LOOP;
    END LOOP;
    PERFORM ledger.guard_insert_only_v1();
    RETURN v_made;
END
$$;

-- A sidecar's word is taken for what a request cost, but not where it would give a window back more than was held.
ALTER TABLE ledger.request
    ADD CONSTRAINT requests_are_counted CHECK ((facts ->> 'requests')::numeric >= 0),
    ADD CONSTRAINT amount_is_a_number CHECK (amount_pico <> 'NaN');
ALTER TABLE ledger.hold_line ADD CONSTRAINT held_is_a_number CHECK (held <> 'NaN');
