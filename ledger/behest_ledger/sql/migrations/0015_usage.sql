-- What somebody used is read from indexes alone: who asks for a month of a busy project waits for no table.
-- Nothing of free text but the key is in them: a long model's name must never keep a request from being settled.

DROP INDEX ledger.request_tenant_id_project_id_ended_at_idx;
CREATE INDEX request_of_project ON ledger.request (tenant_id, project_id, ended_at)
    INCLUDE (input_tokens, output_tokens, amount_pico);
CREATE INDEX request_of_user ON ledger.request (tenant_id, project_id, user_id, ended_at)
    INCLUDE (input_tokens, output_tokens, amount_pico);

-- What the tiers' rates among these windows have left, for the headers of an answer. Called in the statement that admits,
-- after it: volatile, so that it sees what was just held. What is free in leases is left too.
CREATE FUNCTION ledger.rates_of_v1(p_tenants text[], p_windows bigint[]) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ledger.require_tenants_v1(p_tenants);
    RETURN (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
            'unit', w.unit, 'limit', w.limit_amount::text, 'resets_at', w.ends_at,
            'remaining', greatest(w.limit_amount - w.spent - w.held - w.suspense + coalesce((
                SELECT sum(l.free) FROM ledger.lease l
                WHERE l.tenant_id = w.tenant_id AND l.window_id = w.window_id), 0), 0)::text)), '[]')
        FROM ledger.budget_window w
        WHERE w.tenant_id = ANY (p_tenants) AND w.window_id = ANY (p_windows) AND w.unit IN ('requests', 'tokens')
          AND w.budget_id LIKE '%/tier:%');
END
$$;
INSERT INTO ledger.sidecar_right (kind, name) VALUES ('function', 'rates_of_v1');
