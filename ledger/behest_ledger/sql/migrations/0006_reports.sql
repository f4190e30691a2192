-- Reading the books.

-- The budgets that can bind a request with these attributes, with the balances of the current window (or of the one that
-- would be opened). Only an attribute that is given and does not fit leaves a budget out.
CREATE FUNCTION ledger.budgets_of_v1(p_tenant text, p_attributes jsonb)
RETURNS TABLE (budget_id text, unit text, limit_amount numeric, spent numeric, held numeric, remaining numeric,
               period text, enforcement text, suspended boolean, resets_at timestamptz)
LANGUAGE sql STABLE AS $$
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
$$;
