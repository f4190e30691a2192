-- Reading the bill: what was charged in an hour, of every project, is found without reading the rest.
--
-- Who a charge belongs to (namespace, workload, team, cost centre) was fixed at its admission: it is in the attributes of
-- the hold, from there in those of the request, under its seal, and every usage line joins that row. Nothing is said
-- twice, nothing is written here, and a project that changes its team changes no line that was written before.

-- Rows lie in the order in which they were written, so a few bytes a range find them; summed up by autovacuum, not by
-- the statements that settle.
CREATE INDEX request_ended ON ledger.request USING brin (ended_at) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX correction_corrected ON ledger.correction
    USING brin (corrected_at) WITH (pages_per_range = 32, autosummarize = on);
