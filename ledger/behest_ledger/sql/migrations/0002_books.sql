-- The books: windows with their balances, holds, postings, requests, usage lines.
-- Amounts are whole numbers of the window's unit: pico-USD, tokens or requests.

CREATE TABLE ledger.budget_subject (
    tenant_id text NOT NULL,
    budget_id text NOT NULL,
    subject jsonb NOT NULL,                     -- values of the budget's `per` attributes; [] is the budget itself
    window_id bigint,                           -- the one current window; only the database moves it
    PRIMARY KEY (tenant_id, budget_id, subject)
);

CREATE SEQUENCE ledger.window_id_seq;

CREATE TABLE ledger.budget_window (
    tenant_id text NOT NULL,
    window_id bigint NOT NULL DEFAULT nextval('ledger.window_id_seq'),
    budget_id text NOT NULL,
    subject jsonb NOT NULL,
    unit text NOT NULL,
    token_kind text NOT NULL,
    starts_at timestamptz NOT NULL,
    ends_at timestamptz,                        -- NULL: lifetime
    limit_amount numeric(38, 0) NOT NULL CHECK (limit_amount >= 0),
    ceiling numeric(38, 0),                     -- NULL: soft, counts and never stops
    spent numeric(38, 0) NOT NULL DEFAULT 0 CHECK (spent >= 0),
    held numeric(38, 0) NOT NULL DEFAULT 0 CHECK (held >= 0),
    suspense numeric(38, 0) NOT NULL DEFAULT 0 CHECK (suspense >= 0),
    overrun numeric(38, 0) NOT NULL DEFAULT 0 CHECK (overrun >= 0),
    live integer NOT NULL DEFAULT 0 CHECK (live >= 0),
    PRIMARY KEY (tenant_id, window_id),
    UNIQUE (tenant_id, budget_id, subject, starts_at),
    -- The ceiling itself. The code tests `limit_amount` and never tries to pass this.
    CONSTRAINT ceiling_holds CHECK (ceiling IS NULL OR spent + held + suspense <= ceiling)
) WITH (fillfactor = 70);                       -- balances are updated in place (HOT): leave room

CREATE TABLE ledger.holder (
    holder_id uuid PRIMARY KEY,                 -- one per sidecar process
    name text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    renewed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL
);

-- The tables that grow are partitioned by the month inside the request id, never by insertion time:
-- a replay across midnight must meet the row that it repeats.
CREATE TABLE ledger.hold (
    tenant_id text NOT NULL,
    month date NOT NULL,
    request_id uuid NOT NULL,
    state text NOT NULL CHECK (state IN
        ('open',                                -- -> settled | void | suspense
         'void',                                -- nothing charged; also the tombstone of an id never admitted
         'settled',
         'suspense',                            -- -> settled | charged_by_policy
         'charged_by_policy')),                 -- -> corrected by new entries
    holder_id uuid,
    attributes jsonb NOT NULL DEFAULT '{}',
    price_key text NOT NULL DEFAULT '',
    output_rate_pico numeric(38, 0) NOT NULL DEFAULT 0,
    granted_output_tokens bigint NOT NULL DEFAULT 0,
    last_seq integer NOT NULL DEFAULT 0,
    answer jsonb,                               -- the admission's answer, repeated to whoever asks again; NULL: never admitted
    extension jsonb,                            -- the answer to the extension `last_seq`
    admitted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz,
    PRIMARY KEY (tenant_id, month, request_id)
) PARTITION BY RANGE (month);

CREATE TABLE ledger.hold_line (
    tenant_id text NOT NULL,
    month date NOT NULL,
    request_id uuid NOT NULL,
    window_id bigint NOT NULL,
    held numeric(38, 0) NOT NULL CHECK (held >= 0),
    PRIMARY KEY (tenant_id, month, request_id, window_id)
) PARTITION BY RANGE (month);

CREATE TABLE ledger.posting (
    tenant_id text NOT NULL,
    month date NOT NULL,
    source_id uuid NOT NULL,                    -- the request, or the act of configuration
    window_id bigint NOT NULL,
    seq integer NOT NULL,                       -- 0 admission, 1.. extensions, 1000000 settle
    debit text NOT NULL,
    credit text NOT NULL,
    amount numeric(38, 0) NOT NULL CHECK (amount > 0),
    posted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, month, source_id, window_id, seq, debit, credit),
    CHECK (debit <> credit),
    CHECK (debit IN ('funding', 'available', 'held', 'spent', 'suspense', 'overrun')),
    CHECK (credit IN ('funding', 'available', 'held', 'spent', 'suspense', 'overrun'))
) PARTITION BY RANGE (month);

CREATE TABLE ledger.request (
    tenant_id text NOT NULL,
    month date NOT NULL,
    request_id uuid NOT NULL,
    project_id text NOT NULL,
    namespace text NOT NULL,
    user_id text NOT NULL,
    session_id text NOT NULL,
    model text NOT NULL,                        -- as asked, after the default
    attributes jsonb NOT NULL,                  -- the rest of the attribution: tier, upstream, provider, workload, team ...
    outcome text NOT NULL,
    source text NOT NULL,                       -- who counted: provider, local, estimate, none
    input_tokens bigint NOT NULL CHECK (input_tokens >= 0),
    output_tokens bigint NOT NULL CHECK (output_tokens >= 0),
    amount_pico numeric(38, 0) NOT NULL CHECK (amount_pico >= 0),
    price_key text NOT NULL,
    byok boolean NOT NULL DEFAULT false,
    facts jsonb NOT NULL,                       -- chunks, finish reasons, times: what explains the charge
    admitted_at timestamptz NOT NULL,
    ended_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, month, request_id)
) PARTITION BY RANGE (month);
CREATE INDEX ON ledger.request (tenant_id, project_id, ended_at);
CREATE INDEX ON ledger.hold (tenant_id, admitted_at) WHERE state = 'open';

CREATE TABLE ledger.usage_line (
    tenant_id text NOT NULL,
    month date NOT NULL,
    request_id uuid NOT NULL,
    entry integer NOT NULL,                     -- 0 is the settle; corrections count up
    class text NOT NULL,
    quantity bigint NOT NULL,                   -- tokens, or requests for the class "request"
    rate_pico numeric(38, 0) NOT NULL,
    amount_pico numeric(38, 0) NOT NULL,
    source text NOT NULL,
    PRIMARY KEY (tenant_id, month, request_id, entry, class),
    CHECK (amount_pico = quantity * rate_pico)
) PARTITION BY RANGE (month);

-- The month of a UUIDv7: its first 48 bits are milliseconds since 1970 (RFC 9562, section 5.7).
CREATE FUNCTION ledger.month_of_v1(p_request uuid) RETURNS date
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT date_trunc('month', to_timestamp(
        ('x' || lpad(left(replace(p_request::text, '-', ''), 12), 16, '0'))::bit(64)::bigint / 1000.0
    ) AT TIME ZONE 'UTC')::date;
$$;

-- Partitions for the months from p_from on. Rows of other months go to the default partitions, never astray; a month
-- that has rows there already stays there, for PostgreSQL makes no partition beside them.
CREATE FUNCTION ledger.make_partitions_v1(p_from date, p_months integer) RETURNS integer
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
    RETURN v_made;
END
$$;

CREATE FUNCTION ledger.refuse_change_v1() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'ledger.% is insert-only: write a correction instead', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END
$$;
CREATE TRIGGER posting_is_insert_only BEFORE UPDATE OR DELETE ON ledger.posting
    FOR EACH ROW EXECUTE FUNCTION ledger.refuse_change_v1();
CREATE TRIGGER usage_line_is_insert_only BEFORE UPDATE OR DELETE ON ledger.usage_line
    FOR EACH ROW EXECUTE FUNCTION ledger.refuse_change_v1();
