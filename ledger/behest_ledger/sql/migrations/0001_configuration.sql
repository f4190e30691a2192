-- What is configured: projects, upstreams, tiers, budgets, prices, keys.
-- Every key starts with tenant_id and nothing joins across tenants.

CREATE TABLE ledger.configuration_version (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    version bigint NOT NULL                     -- sidecars poll it: a change means "read again"
);
INSERT INTO ledger.configuration_version (version) VALUES (1);

CREATE TABLE ledger.project (
    tenant_id text NOT NULL,
    project_id text NOT NULL,                   -- "<namespace>/<name>"
    namespace text NOT NULL,
    name text NOT NULL,
    spec jsonb NOT NULL,
    suspended boolean NOT NULL DEFAULT false,
    PRIMARY KEY (tenant_id, project_id)
);

CREATE TABLE ledger.upstream (
    tenant_id text NOT NULL,
    namespace text NOT NULL,
    name text NOT NULL,
    spec jsonb NOT NULL,
    PRIMARY KEY (tenant_id, namespace, name)
);

CREATE TABLE ledger.tier (
    tenant_id text NOT NULL,
    namespace text NOT NULL,
    name text NOT NULL,
    spec jsonb NOT NULL,
    PRIMARY KEY (tenant_id, namespace, name)
);

CREATE TABLE ledger.budget (
    tenant_id text NOT NULL,
    budget_id text NOT NULL,                    -- "<namespace>/<name>"
    namespace text NOT NULL,
    name text NOT NULL,
    scope jsonb NOT NULL,                       -- attribute -> LIKE pattern; an absent attribute matches all
    workload_labels jsonb,
    per text[] NOT NULL,                        -- attributes whose values name a subject
    unit text NOT NULL CHECK (unit IN ('usd', 'tokens', 'requests')),
    token_kind text NOT NULL DEFAULT 'both' CHECK (token_kind IN ('both', 'input', 'output')),
    limit_amount numeric(38, 0) NOT NULL CHECK (limit_amount >= 0),  -- pico-USD, tokens or requests
    period text NOT NULL CHECK (period IN ('lifetime', 'minute', 'hour', 'day', 'week', 'month')),
    alignment text NOT NULL CHECK (alignment IN ('calendar', 'rolling')),
    time_zone text NOT NULL,
    enforcement text NOT NULL CHECK (enforcement IN ('hard', 'soft')),
    alert_thresholds integer[] NOT NULL DEFAULT '{}',
    suspended boolean NOT NULL DEFAULT false,
    refusal text NOT NULL DEFAULT 'quota' CHECK (refusal IN ('quota', 'rate')),
    generation bigint NOT NULL DEFAULT 1,
    deleted_at timestamptz,
    PRIMARY KEY (tenant_id, budget_id)
);

CREATE TABLE ledger.price_book (
    version text PRIMARY KEY,
    source text NOT NULL,
    document jsonb NOT NULL,                    -- the compiled book, integers only
    created_at timestamptz NOT NULL DEFAULT now(),
    effective_from timestamptz NOT NULL
);

CREATE TABLE ledger.api_key (
    tenant_id text NOT NULL,
    project_id text NOT NULL,
    key_id text PRIMARY KEY,
    sha256 bytea NOT NULL UNIQUE,               -- found by this
    argon2 text NOT NULL,                       -- verified by this
    role text NOT NULL,
    name text NOT NULL,
    last_four text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);

CREATE TABLE ledger.signing_key (
    kid text PRIMARY KEY,
    tenant_id text,                             -- NULL: signs for every tenant of this ledger
    kind text NOT NULL CHECK (kind IN ('own', 'tenant')),
    algorithm text NOT NULL,
    public_pem text NOT NULL,
    state text NOT NULL CHECK (state IN ('current', 'previous', 'revoked')),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Tell every sidecar to read its configuration again.
CREATE FUNCTION ledger.bump_configuration_v1(p_tenant text) RETURNS bigint
LANGUAGE sql AS $$
    UPDATE ledger.configuration_version SET version = version + 1 RETURNING version;
$$;
