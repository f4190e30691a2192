-- What somebody used is read from indexes alone: who asks for a month of a busy project waits for no table.
-- Nothing of free text but the key is in them: a long model's name must never keep a request from being settled.

DROP INDEX ledger.request_tenant_id_project_id_ended_at_idx;
CREATE INDEX request_of_project ON ledger.request (tenant_id, project_id, ended_at)
    INCLUDE (input_tokens, output_tokens, amount_pico);
CREATE INDEX request_of_user ON ledger.request (tenant_id, project_id, user_id, ended_at)
    INCLUDE (input_tokens, output_tokens, amount_pico);
