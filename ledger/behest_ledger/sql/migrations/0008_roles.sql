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

-- A holder belongs to the role that registered it.
ALTER TABLE ledger.holder ADD COLUMN role_name name NOT NULL DEFAULT session_user;

-- Raise insufficient_privilege where the holder is another role's. One that nobody registered is nobody's.
CREATE FUNCTION ledger.require_holder_v1(p_holder uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT pg_has_role(session_user, current_user, 'USAGE')
       AND EXISTS (SELECT FROM ledger.holder h WHERE h.holder_id = p_holder AND h.role_name <> session_user) THEN
        RAISE EXCEPTION 'holder % is another role''s', p_holder USING ERRCODE = 'insufficient_privilege';
    END IF;
END
$$;
