-- Seals over what was written, corrections of what was charged, and months that are put away.
--
-- What is sealed is insert-only: postings, usage lines, requests and corrections. Each row knows the transaction that
-- inserted it (`tx`), because rows can be sealed only when no older transaction can still add one: below the oldest
-- transaction that runs. An id or a time says nothing about that: a long transaction commits behind them.

-- Which transactions are sealed. `tx` counts on over a restore into another cluster, whose transactions begin anew:
-- what the old one had is added (rebase_tx_v1).
CREATE TABLE ledger.seal_progress (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    sealed_until bigint NOT NULL,               -- every row below is under a seal
    began bigint NOT NULL,                      -- rows below are older than seals are
    tx_added bigint NOT NULL                    -- tx = transaction + this
);
INSERT INTO ledger.seal_progress (sealed_until, began, tx_added) VALUES (0, txid_current(), 0);

-- A charge that was changed after the request had ended: by an invoice, or by a settlement that came after the policy.
-- What it says is the whole charge as it is since then. Of its lines, entry 2 x number - 1 takes back what was charged
-- before, and entry 2 x number is what is charged now.
CREATE TABLE ledger.correction (
    tenant_id text NOT NULL,
    month date NOT NULL,
    request_id uuid NOT NULL,
    number integer NOT NULL CHECK (number > 0),
    correction_id text NOT NULL,                -- the caller's: the same one is applied to a request once
    reason text NOT NULL,
    outcome text NOT NULL,
    source text NOT NULL,
    input_tokens bigint NOT NULL CHECK (input_tokens >= 0),
    output_tokens bigint NOT NULL CHECK (output_tokens >= 0),
    amount_pico numeric(38, 0) NOT NULL CHECK (amount_pico >= 0),
    facts jsonb NOT NULL,
    corrected_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, month, request_id, number),
    UNIQUE (tenant_id, month, request_id, correction_id)
) PARTITION BY RANGE (month);

-- One link of a tenant's chain. kind "rows": a closed batch of one month's rows. kind "opening": the balances that a
-- month left behind when it was put away; its rows cannot be recomputed any more.
CREATE TABLE ledger.seal (
    tenant_id text NOT NULL,
    number bigint NOT NULL CHECK (number > 0),
    month date NOT NULL,
    kind text NOT NULL CHECK (kind IN ('rows', 'opening')),
    tx_from bigint NOT NULL,
    tx_until bigint NOT NULL,                   -- not included
    row_count bigint NOT NULL,
    content bytea NOT NULL,                     -- of `rows`: over its line of seal_source; of `opening`: over its balances
    previous bytea NOT NULL,                    -- the hash of the seal before; of the first one empty
    sealed_at timestamptz NOT NULL,
    hash bytea NOT NULL,
    PRIMARY KEY (tenant_id, number)
);
CREATE INDEX ON ledger.seal (tx_from);
CREATE INDEX ON ledger.seal (tenant_id, month) WHERE kind = 'opening';

-- What a seal says of each source (a request, or an act of configuration), so that `verify` can name the one that
-- differs: how many rows, and the SHA-256 over them.
CREATE TABLE ledger.seal_source (
    tenant_id text NOT NULL,
    month date NOT NULL,
    number bigint NOT NULL,
    sources uuid[] NOT NULL,
    row_counts bigint[] NOT NULL,
    digests bytea[] NOT NULL,
    PRIMARY KEY (tenant_id, month, number)
) PARTITION BY RANGE (month);
ALTER TABLE ledger.seal_source ALTER COLUMN sources SET STORAGE EXTERNAL, ALTER COLUMN digests SET STORAGE EXTERNAL;

-- What the postings of a month that was put away had come to: with them every balance is still a sum.
CREATE TABLE ledger.opening_balance (
    tenant_id text NOT NULL,
    month date NOT NULL,
    window_id bigint NOT NULL,
    account text NOT NULL,
    amount numeric(38, 0) NOT NULL CHECK (amount <> 0),
    PRIMARY KEY (tenant_id, month, window_id, account)
);

-- Zero for what is there already, without writing it anew; the transaction for what comes.
ALTER TABLE ledger.posting ADD COLUMN tx bigint NOT NULL DEFAULT 0;
ALTER TABLE ledger.request ADD COLUMN tx bigint NOT NULL DEFAULT 0;
ALTER TABLE ledger.usage_line ADD COLUMN tx bigint NOT NULL DEFAULT 0;
ALTER TABLE ledger.correction ADD COLUMN tx bigint NOT NULL DEFAULT 0;

-- Rows lie in the order of their transactions, so a few bytes a range find them; written by autovacuum, not by inserts.
CREATE INDEX posting_tx ON ledger.posting USING brin (tx) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX request_tx ON ledger.request USING brin (tx) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX usage_line_tx ON ledger.usage_line USING brin (tx) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX correction_tx ON ledger.correction USING brin (tx) WITH (pages_per_range = 32, autosummarize = on);

CREATE TRIGGER request_is_insert_only BEFORE UPDATE OR DELETE ON ledger.request
    FOR EACH ROW EXECUTE FUNCTION ledger.refuse_change_v1();
CREATE TRIGGER correction_is_insert_only BEFORE UPDATE OR DELETE ON ledger.correction
    FOR EACH ROW EXECUTE FUNCTION ledger.refuse_change_v1();
CREATE TRIGGER seal_is_insert_only BEFORE UPDATE OR DELETE ON ledger.seal
    FOR EACH ROW EXECUTE FUNCTION ledger.refuse_change_v1();
CREATE TRIGGER seal_source_is_insert_only BEFORE UPDATE OR DELETE ON ledger.seal_source
    FOR EACH ROW EXECUTE FUNCTION ledger.refuse_change_v1();
CREATE TRIGGER opening_balance_is_insert_only BEFORE UPDATE OR DELETE ON ledger.opening_balance
    FOR EACH ROW EXECUTE FUNCTION ledger.refuse_change_v1();

-- Every request as it is charged now: its row says how it ended, its last correction what it costs since then.
CREATE VIEW ledger.request_now WITH (security_invoker = true) AS
SELECT r.tenant_id, r.month, r.request_id, r.project_id, r.namespace, r.user_id, r.session_id, r.model, r.attributes,
       coalesce(c.outcome, r.outcome) AS outcome, coalesce(c.source, r.source) AS source,
       coalesce(c.input_tokens, r.input_tokens) AS input_tokens,
       coalesce(c.output_tokens, r.output_tokens) AS output_tokens,
       coalesce(c.amount_pico, r.amount_pico) AS amount_pico,
       r.price_key, r.byok, coalesce(c.facts, r.facts) AS facts, r.admitted_at, r.ended_at,
       coalesce(c.number, 0) AS corrections
FROM ledger.request r LEFT JOIN (
    SELECT DISTINCT ON (tenant_id, month, request_id) * FROM ledger.correction
    ORDER BY tenant_id, month, request_id, number DESC) AS c USING (tenant_id, month, request_id);

INSERT INTO ledger.sidecar_right (kind, name) VALUES ('table', 'correction'), ('table', 'request_now');

-- As in 0008_roles.sql, for all tables with a partition a month.
CREATE OR REPLACE FUNCTION ledger.make_partitions_v1(p_from date, p_months integer) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_table text;
    v_month date;
    v_name text;
    v_made integer := 0;
    v_astray boolean;
BEGIN
    FOREACH v_table IN ARRAY ledger.monthly_tables_v1() LOOP
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
REVOKE ALL ON FUNCTION ledger.make_partitions_v1(date, integer) FROM PUBLIC;

-- The tables with a partition a month.
CREATE FUNCTION ledger.monthly_tables_v1() RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT '{hold,hold_line,posting,request,usage_line,correction,seal_source}'::text[];
$$;

-- The months that are there already, for the new tables.
DO $$
BEGIN
    PERFORM ledger.make_partitions_v1(to_date(right(c.relname, 7), 'YYYY_MM'), 1)
    FROM pg_catalog.pg_class c
    WHERE c.relnamespace = 'ledger'::regnamespace AND c.relname ~ '^hold_[0-9]{4}_[0-9]{2}$';
END
$$;

-- Sealing

-- The number of a transaction in this ledger, from now on.
CREATE FUNCTION ledger.write_tx_default_v1(p_added bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_table text;
BEGIN
    FOREACH v_table IN ARRAY '{posting,request,usage_line,correction}'::text[] LOOP
        EXECUTE format('ALTER TABLE ledger.%I ALTER COLUMN tx SET DEFAULT (txid_current() + %s)', v_table, p_added);
    END LOOP;
    UPDATE ledger.seal_progress SET tx_added = p_added;
END
$$;
SELECT ledger.write_tx_default_v1(0);

-- After a restore from a dump the transactions of this cluster are younger than those that are sealed already. Then let
-- them count on from there. True: that was so. To be called before anything is written (`behest ledger migrate` does).
CREATE FUNCTION ledger.rebase_tx_v1() RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
DECLARE
    v_progress ledger.seal_progress;
    v_last bigint;
BEGIN
    PERFORM ledger.require_tenants_v1(NULL);
    SELECT * INTO STRICT v_progress FROM ledger.seal_progress FOR UPDATE;
    IF txid_current() + v_progress.tx_added >= v_progress.sealed_until THEN
        RETURN false;
    END IF;
    SELECT greatest(v_progress.sealed_until, max(t.tx)) INTO v_last FROM (
        SELECT max(tx) AS tx FROM ledger.posting UNION ALL SELECT max(tx) FROM ledger.request
        UNION ALL SELECT max(tx) FROM ledger.usage_line UNION ALL SELECT max(tx) FROM ledger.correction) AS t;
    PERFORM ledger.write_tx_default_v1(v_last + 1 - txid_current());
    RETURN true;
END
$$;
REVOKE ALL ON FUNCTION ledger.write_tx_default_v1(bigint), ledger.rebase_tx_v1() FROM PUBLIC;

-- The canonical text of every row of some transactions, by batch and source: how many rows, and the SHA-256 over them in
-- the order of their texts. p_bounds are the first transactions of the batches, and the one after the last. The settings
-- make the texts the same in every session. A column that is added to a table later must not be added here: then old
-- seals would not be found again.
CREATE FUNCTION ledger.sealed_rows_v1(p_bounds bigint[])
RETURNS TABLE (tenant_id text, month date, tx_from bigint, source_id uuid, row_count bigint, digest bytea)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO, YMD' AS $$
    SELECT t.tenant_id, t.month, p_bounds[t.batch], t.source_id, count(*),
           sha256(convert_to(string_agg(t.told, E'\n' ORDER BY t.told COLLATE "C"), 'UTF8'))
    FROM (
        SELECT p.tenant_id, p.month, width_bucket(p.tx, p_bounds) AS batch, p.source_id,
               'posting' || ROW(p.window_id, p.seq, p.debit, p.credit, p.amount, p.posted_at, p.tx)::text AS told
        FROM ledger.posting p
        WHERE p.tx >= p_bounds[1] AND p.tx < p_bounds[cardinality(p_bounds)]
        UNION ALL
        SELECT u.tenant_id, u.month, width_bucket(u.tx, p_bounds), u.request_id,
               'usage_line' || ROW(u.entry, u.class, u.quantity, u.rate_pico, u.amount_pico, u.source, u.tx)::text
        FROM ledger.usage_line u
        WHERE u.tx >= p_bounds[1] AND u.tx < p_bounds[cardinality(p_bounds)]
        UNION ALL
        SELECT r.tenant_id, r.month, width_bucket(r.tx, p_bounds), r.request_id,
               'request' || ROW(r.project_id, r.namespace, r.user_id, r.session_id, r.model, r.attributes, r.outcome,
                                r.source, r.input_tokens, r.output_tokens, r.amount_pico, r.price_key, r.byok, r.facts,
                                r.admitted_at, r.ended_at, r.tx)::text
        FROM ledger.request r
        WHERE r.tx >= p_bounds[1] AND r.tx < p_bounds[cardinality(p_bounds)]
        UNION ALL
        SELECT c.tenant_id, c.month, width_bucket(c.tx, p_bounds), c.request_id,
               'correction' || ROW(c.number, c.correction_id, c.reason, c.outcome, c.source, c.input_tokens,
                                   c.output_tokens, c.amount_pico, c.facts, c.corrected_at, c.tx)::text
        FROM ledger.correction c
        WHERE c.tx >= p_bounds[1] AND c.tx < p_bounds[cardinality(p_bounds)]) AS t
    GROUP BY t.tenant_id, t.month, t.batch, t.source_id;
$$;

-- The hash over what a seal says of its sources.
CREATE FUNCTION ledger.seal_content_v1(p_sources uuid[], p_row_counts bigint[], p_digests bytea[]) RETURNS bytea
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
    SELECT sha256(convert_to(coalesce(string_agg(
        s.source || ' ' || s.row_count || ' ' || encode(s.digest, 'hex'), E'\n' ORDER BY s.place), ''), 'UTF8'))
    FROM unnest(p_sources, p_row_counts, p_digests) WITH ORDINALITY AS s (source, row_count, digest, place);
$$;

-- The hash over the balances that a month left behind.
CREATE FUNCTION ledger.opening_content_v1(p_tenant text, p_month date) RETURNS bytea
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT sha256(convert_to(coalesce(string_agg(
        o.window_id || ' ' || o.account || ' ' || o.amount, E'\n' ORDER BY o.window_id, o.account COLLATE "C"), ''), 'UTF8'))
    FROM ledger.opening_balance o WHERE o.tenant_id = p_tenant AND o.month = p_month;
$$;

-- The hash of a seal: over all that it says, and the hash before it.
CREATE FUNCTION ledger.seal_hash_v1(p_seal ledger.seal) RETURNS bytea
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO, YMD' AS $$
    SELECT sha256(convert_to(ROW(
        p_seal.tenant_id, p_seal.number, p_seal.month, p_seal.kind, p_seal.tx_from, p_seal.tx_until, p_seal.row_count,
        encode(p_seal.content, 'hex'), encode(p_seal.previous, 'hex'), p_seal.sealed_at)::text, 'UTF8'));
$$;

-- How a person names a seal.
CREATE FUNCTION ledger.seal_name_v1(p_seal ledger.seal) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format('seal %s of %s in %s', p_seal.number, p_seal.tenant_id, to_char(p_seal.month, 'YYYY-MM'));
$$;

-- Add one link to a tenant's chain and return its number. Who calls holds the lock of seal_progress.
CREATE FUNCTION ledger.write_seal_v1(
    p_tenant text, p_month date, p_kind text, p_from bigint, p_until bigint, p_rows bigint, p_content bytea
) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_seal ledger.seal;
BEGIN
    SELECT s.number, s.hash INTO v_seal.number, v_seal.previous FROM ledger.seal s
    WHERE s.tenant_id = p_tenant ORDER BY s.number DESC LIMIT 1;
    v_seal := ROW(p_tenant, coalesce(v_seal.number, 0) + 1, p_month, p_kind, p_from, p_until, p_rows, p_content,
                  coalesce(v_seal.previous, ''::bytea), clock_timestamp(), NULL);
    v_seal.hash := ledger.seal_hash_v1(v_seal);
    INSERT INTO ledger.seal SELECT v_seal.*;
    RETURN v_seal.number;
END
$$;

-- Seal the rows of at most p_span transactions after those that are sealed, as far as no older transaction still runs:
-- one seal for every tenant and month that has some. `more`: there are transactions left that could be sealed.
CREATE FUNCTION ledger.seal_v1(p_span bigint, OUT seals bigint, OUT sealed_rows bigint, OUT more boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
DECLARE
    v_progress ledger.seal_progress;
    v_oldest bigint;
    v_until bigint;
    v_batch record;
    v_number bigint;
BEGIN
    PERFORM ledger.require_tenants_v1(NULL);
    PERFORM ledger.rebase_tx_v1();
    SELECT * INTO STRICT v_progress FROM ledger.seal_progress FOR UPDATE;
    -- In this order: the rows are read by a later snapshot than the one that says which transactions have ended.
    v_oldest := txid_snapshot_xmin(txid_current_snapshot()) + v_progress.tx_added;
    v_until := least(v_oldest, greatest(v_progress.sealed_until + p_span, v_progress.began));
    seals := 0;
    sealed_rows := 0;
    more := false;
    IF v_until <= v_progress.sealed_until THEN
        RETURN;
    END IF;
    FOR v_batch IN
        SELECT r.tenant_id, r.month, sum(r.row_count)::bigint AS row_count,
               array_agg(r.source_id ORDER BY r.source_id) AS sources,
               array_agg(r.row_count ORDER BY r.source_id) AS row_counts,
               array_agg(r.digest ORDER BY r.source_id) AS digests
        FROM ledger.sealed_rows_v1(ARRAY[v_progress.sealed_until, v_until]) r
        GROUP BY r.tenant_id, r.month ORDER BY r.tenant_id, r.month
    LOOP
        v_number := ledger.write_seal_v1(
            v_batch.tenant_id, v_batch.month, 'rows', v_progress.sealed_until, v_until, v_batch.row_count,
            ledger.seal_content_v1(v_batch.sources, v_batch.row_counts, v_batch.digests));
        INSERT INTO ledger.seal_source (tenant_id, month, number, sources, row_counts, digests)
        VALUES (v_batch.tenant_id, v_batch.month, v_number, v_batch.sources, v_batch.row_counts, v_batch.digests)
        ON CONFLICT DO NOTHING;                 -- somebody took seals away: `verify` says so, sealing goes on
        seals := seals + 1;
        sealed_rows := sealed_rows + v_batch.row_count;
    END LOOP;
    UPDATE ledger.seal_progress SET sealed_until = v_until;
    more := v_until < v_oldest;
END
$$;
REVOKE ALL ON FUNCTION
    ledger.write_seal_v1(text, date, text, bigint, bigint, bigint, bytea), ledger.seal_v1(bigint) FROM PUBLIC;

-- Corrections

-- Charge an ended request anew: what its lines say is the whole charge from now on. New entries only, on the windows of
-- its admission, whether they are open or closed: of each window the difference moves. More is spent as far as there is
-- room, and overrun beyond; less comes out of the overrun first, and what is left becomes available in that window alone.
-- Returns the number of the correction. The hold and its windows are locked already.
--   p_charge  {outcome, source, requests (0 | 1), facts, lines [{class, quantity, rate_pico, amount_pico, source}]}
CREATE FUNCTION ledger.correct_one_v1(
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
            v_spend := least(v_window.change, CASE WHEN v_window.ceiling IS NOT NULL THEN
                greatest(v_window.limit_amount - v_window.spent - v_window.held - v_window.suspense, 0) END);
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

-- A settlement that comes after its hold was charged by policy is a correction like any other.
-- The holds and windows are locked already (settle_batch_v1).
CREATE OR REPLACE FUNCTION ledger.correct_locked_v1(p_items jsonb, p_late uuid[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_item record;
BEGIN
    FOR v_item IN
        SELECT DISTINCT ON (h.tenant_id, h.request_id) h.tenant_id, h.month, h.request_id, e.item
        FROM jsonb_array_elements(p_items) WITH ORDINALITY AS e (item, place)
        JOIN ledger.hold h ON h.tenant_id = e.item ->> 'tenant_id'
                          AND h.month = ledger.month_of_v1((e.item ->> 'request_id')::uuid)
                          AND h.request_id = (e.item ->> 'request_id')::uuid
        WHERE h.request_id = ANY (p_late) AND h.state = 'charged_by_policy'
        ORDER BY h.tenant_id, h.request_id, e.place
    LOOP
        PERFORM ledger.correct_one_v1(v_item.tenant_id, v_item.month, v_item.request_id, 'late settlement',
                                      'the settlement came after the policy', v_item.item);
    END LOOP;
END
$$;

-- Correct ended requests. p_items is a JSON array; an item has
--   tenant_id, request_id, correction_id, reason, source, lines [{class, quantity, rate_pico, amount_pico, source}]
-- Its lines are the whole charge as it should be. The outcome stays what it was. A provider that bills a request that was
-- believed unsent has received it: then its unit of `requests` is spent too.
-- Answers one row an item, in their order: "corrected" (moved now), "already" (this correction was applied before; nothing
-- moved), "unchanged" (it is charged so), and where nothing can be moved "unknown", "open" (not ended yet) or "put away"
-- (its month is). Who wants all or nothing looks at the answers before committing.
CREATE FUNCTION ledger.correct_v1(p_items jsonb)
RETURNS TABLE (request_id uuid, result text, number integer, overrun boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
#variable_conflict use_column
DECLARE
    v_item record;
    v_hold ledger.hold;
    v_now ledger.request_now;
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY(
        SELECT DISTINCT i.tenant_id FROM jsonb_to_recordset(p_items) AS i (tenant_id text)));
    -- Locks in the one order that everybody keeps: holds by key, then windows by key.
    PERFORM FROM ledger.hold h
    JOIN jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid)
      ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id
    ORDER BY h.tenant_id, h.month, h.request_id FOR UPDATE OF h;
    PERFORM FROM ledger.budget_window w
    WHERE (w.tenant_id, w.window_id) IN (
        SELECT l.tenant_id, l.window_id FROM ledger.hold_line l
        JOIN jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid)
          ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id)
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;

    FOR v_item IN
        SELECT i.*, ledger.month_of_v1(i.request_id) AS month
        FROM jsonb_array_elements(p_items) WITH ORDINALITY AS e (item, place)
        CROSS JOIN LATERAL jsonb_to_record(e.item) AS i (
            tenant_id text, request_id uuid, correction_id text, reason text, source text, lines jsonb)
        ORDER BY e.place
    LOOP
        request_id := v_item.request_id;
        number := NULL;
        overrun := false;
        SELECT * INTO v_hold FROM ledger.hold h
        WHERE h.tenant_id = v_item.tenant_id AND h.month = v_item.month AND h.request_id = v_item.request_id;
        SELECT * INTO v_now FROM ledger.request_now r
        WHERE r.tenant_id = v_item.tenant_id AND r.month = v_item.month AND r.request_id = v_item.request_id;
        IF EXISTS (SELECT FROM ledger.seal s
                   WHERE s.tenant_id = v_item.tenant_id AND s.month = v_item.month AND s.kind = 'opening') THEN
            result := 'put away';
        ELSIF v_hold.state IN ('open', 'suspense') THEN
            result := 'open';
        ELSIF v_now.request_id IS NULL THEN
            result := 'unknown';
        ELSIF EXISTS (SELECT FROM ledger.correction c
                      WHERE c.tenant_id = v_item.tenant_id AND c.month = v_item.month
                        AND c.request_id = v_item.request_id AND c.correction_id = v_item.correction_id) THEN
            result := 'already';
        ELSIF ledger.charged_so_v1(v_now, v_item.lines) THEN
            result := 'unchanged';
        ELSE
            result := 'corrected';
            number := ledger.correct_one_v1(
                v_item.tenant_id, v_item.month, v_item.request_id, v_item.correction_id, v_item.reason,
                jsonb_build_object(
                    'outcome', v_now.outcome, 'source', v_item.source, 'lines', v_item.lines, 'facts', v_now.facts,
                    'requests', CASE WHEN v_item.lines = '[]' THEN (v_now.facts ->> 'requests')::integer ELSE 1 END));
            overrun := EXISTS (
                SELECT FROM ledger.posting p
                WHERE p.tenant_id = v_item.tenant_id AND p.month = v_item.month AND p.source_id = v_item.request_id
                  AND p.seq = 1000001 + number AND p.credit = 'overrun');
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Whether a request is charged by exactly these lines.
CREATE FUNCTION ledger.charged_so_v1(p_now ledger.request_now, p_lines jsonb) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT NOT EXISTS (
        SELECT FROM (
            SELECT u.class, u.quantity, u.rate_pico FROM ledger.usage_line u
            WHERE u.tenant_id = p_now.tenant_id AND u.month = p_now.month AND u.request_id = p_now.request_id
              AND u.entry = 2 * p_now.corrections) AS old
        FULL JOIN jsonb_to_recordset(p_lines) AS given (class text, quantity bigint, rate_pico numeric)
            USING (class, quantity, rate_pico)
        WHERE old.class IS NULL OR given.class IS NULL);
$$;
REVOKE ALL ON FUNCTION
    ledger.correct_one_v1(text, date, uuid, text, text, jsonb), ledger.correct_locked_v1(jsonb, uuid[]),
    ledger.correct_v1(jsonb) FROM PUBLIC;

-- Putting months away

-- Why a month cannot be put away, NULL where it can. p_until: up to where everything is sealed.
CREATE FUNCTION ledger.month_in_use_v1(p_month date, p_until bigint) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_table text;
    v_astray boolean;
BEGIN
    IF p_month >= date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC') THEN
        RETURN 'it has not ended';
    ELSIF EXISTS (SELECT FROM ledger.hold h WHERE h.month = p_month AND h.state IN ('open', 'suspense')) THEN
        RETURN 'it has requests that have not ended';
    ELSIF EXISTS (SELECT FROM ledger.lease l JOIN ledger.posting p
                  ON p.tenant_id = l.tenant_id AND p.month = p_month AND p.source_id = l.holder_id
                 AND p.window_id = l.window_id) THEN
        RETURN 'it has movements of leases that live';
    ELSIF EXISTS (SELECT FROM ledger.posting p WHERE p.month = p_month AND p.tx >= p_until)
       OR EXISTS (SELECT FROM ledger.usage_line u WHERE u.month = p_month AND u.tx >= p_until)
       OR EXISTS (SELECT FROM ledger.request r WHERE r.month = p_month AND r.tx >= p_until)
       OR EXISTS (SELECT FROM ledger.correction c WHERE c.month = p_month AND c.tx >= p_until) THEN
        RETURN 'it has rows that are not sealed yet';
    END IF;
    FOREACH v_table IN ARRAY ledger.monthly_tables_v1() LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM ledger.%I d WHERE d.month = $1)', v_table || '_default')
            INTO v_astray USING p_month;
        IF v_astray THEN
            RETURN format('it has rows in %s_default', v_table);
        END IF;
    END LOOP;
    RETURN NULL;
END
$$;

-- Put a month away: seal what its postings have come to as opening balances, and take its partitions out of the tables.
-- They stay as tables of their own, <name>_detached, or are dropped. Answers 'detached', 'dropped', 'nothing there', or why
-- the month stays.
--
-- Not CONCURRENTLY: PostgreSQL does that neither beside a default partition nor inside of a transaction, and then the
-- balances could not appear in the same moment. So the sums are made first, under no lock that anybody notices; then all
-- tables are locked, for the few milliseconds that detaching takes. Whoever waits for that waits behind it: at most 50 ms
-- at a time, then it steps back and tries again. What was written meanwhile is found, and nothing is done then.
CREATE FUNCTION ledger.put_month_away_v1(p_month date, p_drop boolean DEFAULT false) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
DECLARE
    v_month date := date_trunc('month', p_month)::date;
    v_tables text[];
    v_table text;
    v_name text;
    v_until bigint;
    v_why text;
    v_tenant text;
    v_locked boolean := false;
BEGIN
    PERFORM ledger.require_tenants_v1(NULL);
    SELECT array_agg(t.name ORDER BY t.place) INTO v_tables
    FROM unnest(ledger.monthly_tables_v1()) WITH ORDINALITY AS t (name, place)
    JOIN pg_class c ON c.relname = t.name || to_char(v_month, '_YYYY_MM')
                   AND c.relnamespace = 'ledger'::regnamespace AND c.relispartition;
    IF v_tables IS NULL THEN
        RETURN 'nothing there';
    END IF;
    SELECT p.sealed_until INTO STRICT v_until FROM ledger.seal_progress p FOR UPDATE;
    v_why := ledger.month_in_use_v1(v_month, v_until);
    IF v_why IS NOT NULL THEN
        RETURN v_why;
    END IF;

    INSERT INTO ledger.opening_balance (tenant_id, month, window_id, account, amount)
    SELECT p.tenant_id, v_month, p.window_id, a.account, sum(a.amount)
    FROM ledger.posting p CROSS JOIN LATERAL (VALUES (p.credit, p.amount), (p.debit, -p.amount)) AS a (account, amount)
    WHERE p.month = v_month
    GROUP BY p.tenant_id, p.window_id, a.account HAVING sum(a.amount) <> 0;
    FOR v_tenant IN
        SELECT DISTINCT s.tenant_id FROM ledger.seal s WHERE s.month = v_month AND s.kind = 'rows' ORDER BY 1
    LOOP
        PERFORM ledger.write_seal_v1(
            v_tenant, v_month, 'opening', v_until, v_until,
            (SELECT count(*) FROM ledger.opening_balance o WHERE o.tenant_id = v_tenant AND o.month = v_month),
            ledger.opening_content_v1(v_tenant, v_month));
    END LOOP;

    PERFORM set_config('lock_timeout', '50ms', true);
    FOR i IN 1 .. 20 LOOP
        BEGIN
            EXECUTE 'LOCK TABLE ' || (SELECT string_agg(format('ledger.%I', t), ', ') FROM unnest(v_tables) AS t)
                || ' IN ACCESS EXCLUSIVE MODE';
            v_locked := true;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.1);
        END;
    END LOOP;
    v_why := CASE WHEN v_locked THEN ledger.month_in_use_v1(v_month, v_until) ELSE 'its tables are busy' END;
    IF v_why IS NOT NULL THEN
        RAISE EXCEPTION 'month % stays: %', to_char(v_month, 'YYYY-MM'), v_why USING ERRCODE = 'lock_not_available';
    END IF;
    FOREACH v_table IN ARRAY v_tables LOOP
        v_name := v_table || to_char(v_month, '_YYYY_MM');
        EXECUTE format('ALTER TABLE ledger.%I DETACH PARTITION ledger.%I', v_table, v_name);
        IF p_drop THEN
            EXECUTE format('DROP TABLE ledger.%I', v_name);
        ELSE
            EXECUTE format('ALTER TABLE ledger.%I RENAME TO %I', v_name, v_name || '_detached');
            IF v_table NOT IN ('hold', 'hold_line') THEN
                -- The trigger of the partitioned table went with it.
                EXECUTE format('CREATE TRIGGER is_insert_only BEFORE UPDATE OR DELETE ON ledger.%I '
                               'FOR EACH ROW EXECUTE FUNCTION ledger.refuse_change_v1()', v_name || '_detached');
            END IF;
        END IF;
    END LOOP;
    RETURN CASE WHEN p_drop THEN 'dropped' ELSE 'detached' END;
END
$$;

-- The months that are older than so many whole months before this one, and not put away.
CREATE FUNCTION ledger.old_months_v1(p_kept integer) RETURNS SETOF date
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT m.month FROM (
        SELECT DISTINCT to_date(right(c.relname, 7), 'YYYY_MM') AS month FROM pg_class c
        WHERE c.relnamespace = 'ledger'::regnamespace AND c.relispartition AND c.relkind = 'r'
          AND c.relname ~ '^(hold|posting|request|usage_line)_[0-9]{4}_[0-9]{2}$') AS m
    WHERE m.month < date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC') - make_interval(months => p_kept)
    ORDER BY m.month;
$$;
REVOKE ALL ON FUNCTION
    ledger.month_in_use_v1(date, bigint), ledger.put_month_away_v1(date, boolean), ledger.old_months_v1(integer) FROM PUBLIC;
