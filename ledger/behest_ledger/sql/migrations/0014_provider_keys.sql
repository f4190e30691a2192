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

-- Logins are rotated under a sidecar that runs, so a holder belongs to every role that may act for all the tenants that
-- the role which registered it may act for. As in 0008_roles.sql but for that.
CREATE FUNCTION ledger.holder_is_ours_v1(p_holder ledger.holder) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT pg_has_role(session_user, current_user, 'USAGE') OR p_holder.role_name = session_user
        OR (EXISTS (SELECT FROM ledger.tenant_role r WHERE r.role_name = p_holder.role_name)
            AND NOT EXISTS (
                SELECT FROM ledger.tenant_role r WHERE r.role_name = p_holder.role_name
                  AND NOT EXISTS (SELECT FROM ledger.tenant_role s
                                  WHERE s.role_name = session_user
                                    AND (s.tenant_id IS NULL OR s.tenant_id = r.tenant_id))));
$$;

CREATE OR REPLACE FUNCTION ledger.require_holder_v1(p_holder uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF pg_has_role(session_user, current_user, 'USAGE') THEN
        RETURN;
    ELSIF NOT EXISTS (SELECT FROM ledger.tenant_role r WHERE r.role_name = session_user) THEN
        RAISE EXCEPTION 'role % may act for no tenant', session_user USING ERRCODE = 'insufficient_privilege';
    ELSIF EXISTS (SELECT FROM ledger.holder h WHERE h.holder_id = p_holder AND NOT ledger.holder_is_ours_v1(h)) THEN
        RAISE EXCEPTION 'holder % is another tenant''s', p_holder USING ERRCODE = 'insufficient_privilege';
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION ledger.holder_may_admit_v1(p_holder uuid) RETURNS boolean
LANGUAGE sql VOLATILE AS $$
    SELECT coalesce((SELECT ledger.holder_is_ours_v1(h) AND ledger.holder_lives_v1(h)
                     FROM ledger.holder h WHERE h.holder_id = p_holder),
                    NOT EXISTS (SELECT FROM ledger.holder));
$$;
