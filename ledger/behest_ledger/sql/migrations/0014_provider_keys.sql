-- Keys of providers, sealed under their tenant's key: the database never sees one (behest_ledger.sealing).

CREATE TABLE ledger.provider_key (
    tenant_id text NOT NULL,
    place text NOT NULL,                        -- "upstream:<namespace>/<name>", or "project:<namespace>/<name>:<provider>"
    sealed bytea NOT NULL,
    last_four text NOT NULL,                    -- all that is ever shown of it
    written_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, place)
);
INSERT INTO ledger.sidecar_right (kind, name) VALUES ('table', 'provider_key');
