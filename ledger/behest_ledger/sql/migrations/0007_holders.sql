-- Holders: who holds money, until when, and what becomes of it when the holder is gone.
--
-- A holder is one sidecar process under an id that it never uses again. It renews its row each second; the row says until
-- when it may be believed to live. When that has passed, the keeper fences it for good and moves its open holds to
-- suspense: still not available to anybody, waiting for the holder's journal. What no journal settles within the period
-- of grace is charged by policy; a journal that comes later still corrects that.
--
-- Locks, in the one order that everybody keeps: holders, holds by key, windows by key.

ALTER TABLE ledger.holder
    ADD COLUMN ttl interval NOT NULL DEFAULT '120 s',
    ADD COLUMN fenced_at timestamptz;           -- set once: this id never comes back

ALTER TABLE ledger.hold
    DROP CONSTRAINT hold_state_check,
    ADD CONSTRAINT hold_state_check CHECK (state IN
        ('open', 'void', 'settled', 'suspense', 'charged_by_policy', 'corrected')),
    ADD COLUMN input_tokens bigint NOT NULL DEFAULT 0,                  -- what the admission held for the input
    ADD COLUMN input_amount_pico numeric(38, 0) NOT NULL DEFAULT 0,
    ADD COLUMN checkpoint_at timestamptz,                               -- what was charged if it ended there
    ADD COLUMN checkpoint_input_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN checkpoint_output_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN checkpoint_amount_pico numeric(38, 0) NOT NULL DEFAULT 0,
    ADD COLUMN checkpoint_lines jsonb NOT NULL DEFAULT '[]',            -- [{class, quantity, rate_pico}]
    ADD COLUMN suspense_at timestamptz;
CREATE INDEX ON ledger.hold (suspense_at) WHERE state = 'suspense';

-- Whether a holder is believed to live. Nobody is dead within one TTL after the database started: before that it could
-- not renew.
CREATE FUNCTION ledger.holder_lives_v1(p_holder ledger.holder) RETURNS boolean
LANGUAGE sql VOLATILE AS $$
    SELECT p_holder.fenced_at IS NULL
       AND greatest(p_holder.expires_at, pg_postmaster_start_time() + p_holder.ttl) > clock_timestamp();
$$;

-- Whether a holder may be given money. One plain read without a lock: an admission that passes beside the fence is found
-- by the next reap. A ledger that never saw a holder asks nobody for one; the last row is kept for that (prune_holders_v1).
CREATE FUNCTION ledger.holder_may_admit_v1(p_holder uuid) RETURNS boolean
LANGUAGE sql VOLATILE AS $$
    SELECT coalesce((SELECT ledger.holder_lives_v1(h) FROM ledger.holder h WHERE h.holder_id = p_holder),
                    NOT EXISTS (SELECT FROM ledger.holder));
$$;

-- Begin to live, and until when. Asking again is a renewal; an id that was fenced is refused.
CREATE FUNCTION ledger.register_holder_v1(p_holder uuid, p_name text, p_ttl interval DEFAULT '120 s') RETURNS timestamptz
LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
DECLARE
    v_expires timestamptz;
BEGIN
    INSERT INTO ledger.holder AS h (holder_id, name, ttl, expires_at)
    VALUES (p_holder, p_name, p_ttl, clock_timestamp() + p_ttl)
    ON CONFLICT (holder_id) DO UPDATE SET
        renewed_at = clock_timestamp(), expires_at = greatest(h.expires_at, excluded.expires_at), ttl = excluded.ttl
        WHERE ledger.holder_lives_v1(h)
    RETURNING h.expires_at INTO v_expires;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'holder % has ended: a process registers under an id of its own', p_holder
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN v_expires;
END
$$;

-- Live on: until when. NULL: the holder is unknown, fenced, or was silent for too long; it must end its streams. What was
-- promised once is never shortened.
CREATE FUNCTION ledger.renew_holder_v1(p_holder uuid, p_ttl interval DEFAULT '120 s') RETURNS timestamptz
LANGUAGE sql VOLATILE SET lock_timeout = '2s' AS $$
    UPDATE ledger.holder h
    SET renewed_at = clock_timestamp(), expires_at = greatest(h.expires_at, clock_timestamp() + p_ttl), ttl = p_ttl
    WHERE h.holder_id = p_holder AND ledger.holder_lives_v1(h)
    RETURNING h.expires_at;
$$;

-- A clean end. False: the holder still holds something; its row stays, and expires.
CREATE FUNCTION ledger.unregister_holder_v1(p_holder uuid) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
BEGIN
    UPDATE ledger.holder h SET fenced_at = clock_timestamp()
    WHERE h.holder_id = p_holder AND h.fenced_at IS NULL
      AND NOT EXISTS (SELECT FROM ledger.hold o WHERE o.state = 'open' AND o.holder_id = p_holder);
    RETURN FOUND OR NOT EXISTS (
        SELECT FROM ledger.holder h WHERE h.holder_id = p_holder AND h.fenced_at IS NULL);
END
$$;

-- Forget holders that ended long ago and hold nothing. The newest stays: it says that admissions need a holder.
CREATE FUNCTION ledger.prune_holders_v1(p_age interval DEFAULT '7 days') RETURNS integer
LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
DECLARE
    v_pruned integer;
BEGIN
    DELETE FROM ledger.holder h
    WHERE h.fenced_at < clock_timestamp() - p_age
      AND (h.started_at, h.holder_id) < (SELECT n.started_at, n.holder_id FROM ledger.holder n
                                         ORDER BY n.started_at DESC, n.holder_id DESC LIMIT 1)
      AND NOT EXISTS (SELECT FROM ledger.hold o
                      WHERE o.state IN ('open', 'suspense') AND o.holder_id = h.holder_id);
    GET DIAGNOSTICS v_pruned = ROW_COUNT;
    RETURN v_pruned;
END
$$;

-- How far open requests have come: what each would be charged if its holder were gone now. Parallel arrays, an item each;
-- p_lines are arrays of {class, quantity, rate_pico}, whose sum is the amount. Holds only, never windows, and never less
-- than before.
-- Answers the requests whose hold was busy at this moment: their checkpoint was not written and should come again.
CREATE FUNCTION ledger.checkpoint_batch_v1(
    p_tenants text[], p_requests uuid[], p_input_tokens bigint[], p_output_tokens bigint[], p_amounts numeric[],
    p_lines jsonb[]
) RETURNS SETOF uuid
LANGUAGE plpgsql AS $$
DECLARE
    v_item record;
    v_state text;
BEGIN
    -- One after the other by key, and by nothing but the key: joined, or with a state to look for, this is now and then
    -- planned as a scan of all that is open.
    FOR v_item IN
        SELECT i.*, ledger.month_of_v1(i.request_id) AS month
        FROM unnest(p_tenants, p_requests, p_input_tokens, p_output_tokens, p_amounts, p_lines)
            AS i (tenant_id, request_id, input_tokens, output_tokens, amount, lines)
    LOOP
        -- Who settles or extends has the hold for a moment. Nobody waits for that with other holds in hand.
        SELECT h.state INTO v_state FROM ledger.hold h
        WHERE h.tenant_id = v_item.tenant_id AND h.month = v_item.month AND h.request_id = v_item.request_id
        FOR UPDATE SKIP LOCKED;
        IF v_state = 'open' THEN
            UPDATE ledger.hold h SET
                checkpoint_at = clock_timestamp(), checkpoint_input_tokens = v_item.input_tokens,
                checkpoint_output_tokens = v_item.output_tokens, checkpoint_amount_pico = v_item.amount,
                checkpoint_lines = v_item.lines
            WHERE h.tenant_id = v_item.tenant_id AND h.month = v_item.month AND h.request_id = v_item.request_id
              AND v_item.input_tokens >= h.checkpoint_input_tokens
              AND v_item.output_tokens >= h.checkpoint_output_tokens AND v_item.amount >= h.checkpoint_amount_pico;
        ELSIF v_state IS NULL THEN
            SELECT h.state INTO v_state FROM ledger.hold h
            WHERE h.tenant_id = v_item.tenant_id AND h.month = v_item.month AND h.request_id = v_item.request_id;
            IF v_state = 'open' THEN
                RETURN NEXT v_item.request_id;
            END IF;
        END IF;
    END LOOP;
END
$$;

-- Fence the holders that are dead, and move what fenced holders still have open to suspense: at most p_limit holds, the
-- rest at the next call (`more`). p_since: since when the caller has seen this database take writes; a holder counts as
-- dead only when it could have renewed for one TTL since then (a promotion leaves no trace that could be read here).
-- Also taken are open holds of nobody that is known, of 120 s and older, once there are holders at all: they were
-- admitted before the first of them.
CREATE FUNCTION ledger.reap_v1(
    p_limit integer, p_since timestamptz DEFAULT '-infinity',
    OUT fenced text[], OUT holds integer, OUT more boolean
) LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_tenants text[];
    v_requests uuid[];
    v_holders boolean := EXISTS (SELECT FROM ledger.holder);
BEGIN
    WITH dead AS (
        UPDATE ledger.holder h SET fenced_at = v_now
        WHERE h.holder_id IN (
            SELECT d.holder_id FROM ledger.holder d
            WHERE d.fenced_at IS NULL AND NOT ledger.holder_lives_v1(d) AND p_since + d.ttl < v_now
            ORDER BY d.holder_id FOR UPDATE)
        RETURNING h.name || ' ' || h.holder_id AS told
    )
    SELECT coalesce(array_agg(d.told ORDER BY d.told), '{}') INTO fenced FROM dead d;

    SELECT coalesce(array_agg(k.tenant_id), '{}'), coalesce(array_agg(k.request_id), '{}') INTO v_tenants, v_requests
    FROM (
        SELECT h.tenant_id, h.request_id FROM ledger.hold h LEFT JOIN ledger.holder o ON o.holder_id = h.holder_id
        WHERE h.state = 'open'
          AND CASE WHEN o.holder_id IS NULL THEN v_holders AND h.admitted_at < v_now - interval '120 s'
                   ELSE o.fenced_at IS NOT NULL END
        ORDER BY h.tenant_id, h.month, h.request_id LIMIT p_limit FOR UPDATE OF h) AS k;
    holds := cardinality(v_requests);
    more := holds >= p_limit;

    PERFORM FROM ledger.budget_window w
    WHERE (w.tenant_id, w.window_id) IN (
        SELECT l.tenant_id, l.window_id FROM ledger.hold_line l
        JOIN unnest(v_tenants, v_requests) AS i (tenant_id, request_id)
          ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id)
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;

    INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
    SELECT l.tenant_id, l.month, l.request_id, l.window_id, 1000001, 'held', 'suspense', l.held
    FROM ledger.hold_line l
    JOIN unnest(v_tenants, v_requests) AS i (tenant_id, request_id)
      ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id
    WHERE l.held > 0;

    -- `live` stays: it counts what has not ended, and so does `verify`.
    UPDATE ledger.budget_window w SET held = w.held - m.amount, suspense = w.suspense + m.amount
    FROM (
        SELECT l.tenant_id, l.window_id, sum(l.held) AS amount FROM ledger.hold_line l
        JOIN unnest(v_tenants, v_requests) AS i (tenant_id, request_id)
          ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id
        GROUP BY l.tenant_id, l.window_id) AS m
    WHERE w.tenant_id = m.tenant_id AND w.window_id = m.window_id;

    UPDATE ledger.hold h SET state = 'suspense', suspense_at = v_now
    FROM unnest(v_tenants, v_requests) AS i (tenant_id, request_id)
    WHERE h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id;
END
$$;

-- The lines that a policy charges for a hold, cut so that no window pays more than it holds.
CREATE FUNCTION ledger.policy_lines_v1(p_hold ledger.hold, p_policy text) RETURNS jsonb
LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_pico numeric;                             -- what is left of the hold, by unit; NULL: no such window
    v_input numeric;
    v_output numeric;
    v_both numeric;
    v_rate numeric := coalesce(div(p_hold.input_amount_pico, nullif(p_hold.input_tokens, 0)), 0);
    v_line record;
    v_is_input boolean;
    v_is_output boolean;
    v_quantity numeric;
    v_lines jsonb := '[]';
BEGIN
    SELECT min(l.held) FILTER (WHERE w.unit = 'usd'),
           min(l.held) FILTER (WHERE w.unit = 'tokens' AND w.token_kind = 'input'),
           min(l.held) FILTER (WHERE w.unit = 'tokens' AND w.token_kind = 'output'),
           min(l.held) FILTER (WHERE w.unit = 'tokens' AND w.token_kind NOT IN ('input', 'output'))
    INTO v_pico, v_input, v_output, v_both
    FROM ledger.hold_line l JOIN ledger.budget_window w USING (tenant_id, window_id)
    WHERE l.tenant_id = p_hold.tenant_id AND l.month = p_hold.month AND l.request_id = p_hold.request_id;

    -- The hold itself as lines: what the input's amount is more than a whole rate is a fee.
    FOR v_line IN
        SELECT c.class, c.quantity, c.rate_pico
        FROM jsonb_to_recordset(p_hold.checkpoint_lines) AS c (class text, quantity numeric, rate_pico numeric)
        WHERE p_policy = 'checkpoint'
        UNION ALL
        SELECT c.class, c.quantity, c.rate_pico
        FROM (VALUES ('input', p_hold.input_tokens::numeric, v_rate),
                     ('request', 1, p_hold.input_amount_pico - p_hold.input_tokens * v_rate),
                     ('output', p_hold.granted_output_tokens, p_hold.output_rate_pico)) AS c (class, quantity, rate_pico)
        WHERE p_policy = 'hold' AND (c.class <> 'request' OR c.rate_pico > 0)
    LOOP
        v_is_input := v_line.class IN ('input', 'cache_read', 'cache_write', 'audio_input');
        v_is_output := v_line.class IN ('output', 'reasoning', 'audio_output');
        v_quantity := least(v_line.quantity, div(v_pico, nullif(v_line.rate_pico, 0)),
                            CASE WHEN v_is_input THEN v_input WHEN v_is_output THEN v_output END,
                            CASE WHEN v_is_input OR v_is_output THEN v_both END);
        CONTINUE WHEN v_quantity <= 0 OR v_lines @> jsonb_build_array(jsonb_build_object('class', v_line.class));
        v_pico := v_pico - v_quantity * v_line.rate_pico;
        v_input := v_input - CASE WHEN v_is_input THEN v_quantity ELSE 0 END;
        v_output := v_output - CASE WHEN v_is_output THEN v_quantity ELSE 0 END;
        v_both := v_both - CASE WHEN v_is_input OR v_is_output THEN v_quantity ELSE 0 END;
        v_lines := v_lines || jsonb_build_object(
            'class', v_line.class, 'quantity', v_quantity, 'rate_pico', v_line.rate_pico,
            'amount_pico', v_quantity * v_line.rate_pico,
            'source', CASE p_policy WHEN 'hold' THEN 'estimate' ELSE 'local' END);
    END LOOP;
    RETURN v_lines;
END
$$;

-- Charge what has been in suspense for longer than the grace, at most p_limit holds, and release the rest of them.
-- Policy "checkpoint": what the last checkpoint says, nothing where there is none. "hold": all that was held.
CREATE FUNCTION ledger.charge_by_policy_v1(
    p_grace interval DEFAULT '24 hours', p_policy text DEFAULT 'checkpoint', p_limit integer DEFAULT 200
) RETURNS TABLE (tenant_id text, request_id uuid, amount_pico numeric)
LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
#variable_conflict use_column
DECLARE
    v_hold ledger.hold;
    v_lines jsonb;
    v_items jsonb := '[]';
BEGIN
    IF p_policy NOT IN ('checkpoint', 'hold') THEN
        RAISE EXCEPTION 'there is no policy %: checkpoint or hold', p_policy USING ERRCODE = 'invalid_parameter_value';
    END IF;
    FOR v_hold IN
        SELECT * FROM ledger.hold h WHERE h.state = 'suspense' AND h.suspense_at <= clock_timestamp() - p_grace
        ORDER BY h.tenant_id, h.month, h.request_id LIMIT p_limit FOR UPDATE
    LOOP
        v_lines := ledger.policy_lines_v1(v_hold, p_policy);
        v_items := v_items || (
            SELECT jsonb_build_object(
                'tenant_id', v_hold.tenant_id, 'request_id', v_hold.request_id, 'state', 'charged_by_policy',
                'outcome', 'crashed', 'requests', 1, 'lines', v_lines, 'facts', jsonb_build_object('policy', p_policy),
                'source', CASE WHEN v_lines = '[]' THEN 'none' WHEN p_policy = 'hold' THEN 'estimate' ELSE 'local' END,
                'amount_pico', coalesce(sum(c.amount_pico), 0),
                'input_tokens', coalesce(sum(c.quantity) FILTER (
                    WHERE c.class IN ('input', 'cache_read', 'cache_write', 'audio_input')), 0),
                'output_tokens', coalesce(sum(c.quantity) FILTER (
                    WHERE c.class IN ('output', 'reasoning', 'audio_output')), 0))
            FROM jsonb_to_recordset(v_lines) AS c (class text, quantity numeric, amount_pico numeric));
    END LOOP;
    PERFORM FROM ledger.settle_batch_v1(v_items);
    RETURN QUERY
    SELECT i.tenant_id, i.request_id, i.amount_pico
    FROM jsonb_to_recordset(v_items) AS i (tenant_id text, request_id uuid, amount_pico numeric);
END
$$;

-- A settlement that comes after its hold was charged by policy: new entries, on the windows of its admission. Entry 1 of
-- its lines takes back what the policy charged, entry 2 charges what the settlement says. Of each window the difference
-- moves: more is spent as far as there is room and overrun beyond, less comes out of the overrun first.
-- The holds and windows are locked already (settle_batch_v1).
CREATE FUNCTION ledger.correct_locked_v1(p_items jsonb, p_late uuid[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_item record;
    v_window record;
    v_spend numeric;                            -- available -> spent; below 0 the other way
    v_overrun numeric;                          -- funding -> overrun; below 0 the other way
BEGIN
    FOR v_item IN
        SELECT DISTINCT ON (h.tenant_id, h.request_id) h.month, i.*
        FROM jsonb_array_elements(p_items) WITH ORDINALITY AS e (item, place)
        CROSS JOIN LATERAL jsonb_to_record(e.item) AS i (
            tenant_id text, request_id uuid, outcome text, source text, requests integer, input_tokens bigint,
            output_tokens bigint, amount_pico numeric, facts jsonb, lines jsonb)
        JOIN ledger.hold h ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id)
                          AND h.request_id = i.request_id
        WHERE h.request_id = ANY (p_late) AND h.state = 'charged_by_policy'
        ORDER BY h.tenant_id, h.request_id, e.place
    LOOP
        FOR v_window IN
            SELECT w.*, ledger.charge_in_unit_v1(w.unit, w.token_kind, v_item.amount_pico, v_item.input_tokens,
                                                 v_item.output_tokens, v_item.requests)
                - coalesce((SELECT sum(p.amount) FROM ledger.posting p
                            WHERE p.tenant_id = l.tenant_id AND p.month = l.month AND p.source_id = l.request_id
                              AND p.window_id = l.window_id AND p.seq = 1000000
                              AND p.credit IN ('spent', 'overrun')), 0) AS change
            FROM ledger.hold_line l JOIN ledger.budget_window w USING (tenant_id, window_id)
            WHERE l.tenant_id = v_item.tenant_id AND l.month = v_item.month AND l.request_id = v_item.request_id
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
            SELECT v_item.tenant_id, v_item.month, v_item.request_id, v_window.window_id, 1000002, p.debit, p.credit,
                   p.amount
            FROM (VALUES ('available', 'spent', v_spend), ('spent', 'available', -v_spend),
                         ('funding', 'overrun', v_overrun), ('overrun', 'funding', -v_overrun))
                AS p (debit, credit, amount)
            WHERE p.amount > 0;
            UPDATE ledger.budget_window w SET
                spent = w.spent + v_spend,
                overrun = w.overrun + v_overrun,
                ceiling = CASE WHEN w.ceiling IS NOT NULL THEN
                    greatest(w.limit_amount, w.spent + v_spend + w.held + w.suspense) END
            WHERE w.tenant_id = v_item.tenant_id AND w.window_id = v_window.window_id;
        END LOOP;

        INSERT INTO ledger.usage_line
            (tenant_id, month, request_id, entry, class, quantity, rate_pico, amount_pico, source)
        SELECT u.tenant_id, u.month, u.request_id, 1, u.class, -u.quantity, u.rate_pico, -u.amount_pico, u.source
        FROM ledger.usage_line u
        WHERE u.tenant_id = v_item.tenant_id AND u.month = v_item.month AND u.request_id = v_item.request_id
          AND u.entry = 0
        UNION ALL
        SELECT v_item.tenant_id, v_item.month, v_item.request_id, 2, c.class, c.quantity, c.rate_pico, c.amount_pico,
               c.source
        FROM jsonb_to_recordset(v_item.lines)
            AS c (class text, quantity bigint, rate_pico numeric, amount_pico numeric, source text);
        UPDATE ledger.request r SET
            outcome = v_item.outcome, source = v_item.source, input_tokens = v_item.input_tokens,
            output_tokens = v_item.output_tokens, amount_pico = v_item.amount_pico,
            facts = v_item.facts || jsonb_build_object('requests', v_item.requests, 'corrected', jsonb_build_object(
                'policy', r.facts ->> 'policy', 'amount_pico', r.amount_pico::text))
        WHERE r.tenant_id = v_item.tenant_id AND r.month = v_item.month AND r.request_id = v_item.request_id;
        UPDATE ledger.hold h SET state = 'corrected'
        WHERE h.tenant_id = v_item.tenant_id AND h.month = v_item.month AND h.request_id = v_item.request_id;
    END LOOP;
END
$$;
