-- What a sidecar says is bounded at the door, and what one tenant wrote stops nobody else.
--
-- Balances are whole numbers. A part of a unit was rounded in the lines of holds but summed up in their windows, so the two
-- differed, and who moved what the lines said broke a window: the keeper could reap nobody's holds any more. A number too
-- large for its column, or text in its place, did the same to the charges by policy and to the sums of usage.

CREATE DOMAIN ledger.token_count AS bigint CONSTRAINT at_most_a_trillion CHECK (VALUE BETWEEN 0 AND 1000000000000);
CREATE DOMAIN ledger.share_count AS integer CONSTRAINT at_least_one CHECK (VALUE >= 1);
-- 1000 USD a token. With the next one it keeps every sum of holds far below the 1e38 that a balance can be.
CREATE DOMAIN ledger.pico_rate AS numeric
    CONSTRAINT whole_and_at_most_1e15 CHECK (VALUE BETWEEN 0 AND 1e15 AND VALUE = trunc(VALUE));
CREATE DOMAIN ledger.whole_amount AS numeric
    CONSTRAINT whole_and_at_most_1e30 CHECK (VALUE BETWEEN 0 AND 1e30 AND VALUE = trunc(VALUE));
CREATE DOMAIN ledger.usage_class AS text CONSTRAINT known_class CHECK (VALUE IS NOT NULL AND VALUE IN
    ('input', 'cache_read', 'cache_write', 'output', 'reasoning', 'audio_input', 'audio_output', 'request'));
-- Names of sums of usage must fit into an index. (Models and sessions are shortened there: 0016_usage_sums.sql.)
CREATE DOMAIN ledger.attribution AS jsonb CONSTRAINT object_of_short_names CHECK (
    jsonb_typeof(VALUE) = 'object' AND octet_length(coalesce(VALUE ->> 'project', '')) <= 512
                                   AND octet_length(coalesce(VALUE ->> 'user', '')) <= 1024);

-- So an admission is refused as it is read.
ALTER TYPE ledger.admission
    ALTER ATTRIBUTE attributes TYPE ledger.attribution,
    ALTER ATTRIBUTE input_tokens TYPE ledger.token_count,
    ALTER ATTRIBUTE input_amount_pico TYPE ledger.whole_amount,
    ALTER ATTRIBUTE output_rate_pico TYPE ledger.pico_rate,
    ALTER ATTRIBUTE need_tokens TYPE ledger.token_count,
    ALTER ATTRIBUTE want_tokens TYPE ledger.token_count,
    ALTER ATTRIBUTE shares TYPE ledger.share_count;

-- A request of a month that begins in more than a day has no id of now. In a default partition it would keep that month
-- from ever getting a partition of its own. Holds are written first: nothing else can be of a month that has none.
CREATE FUNCTION ledger.refuse_future_v1() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'request % is of %, which has not begun: is a clock wrong?', NEW.request_id,
        to_char(NEW.month, 'YYYY-MM') USING ERRCODE = 'check_violation';
END
$$;
CREATE TRIGGER hold_is_of_now BEFORE INSERT ON ledger.hold FOR EACH ROW
    WHEN (NEW.month > (now() + interval '1 day') AT TIME ZONE 'UTC') EXECUTE FUNCTION ledger.refuse_future_v1();

-- As in 0009_leases.sql, for wishes that are numbers of tokens.
--
-- Extend several holds in one commit. Parallel arrays, an item each; answers come in any order.
-- As with admissions, a window is not locked of which the holder of all these holds has a lease that can pay all that is
-- wished of it; but a lease ends with its window, extensions do not.
CREATE OR REPLACE FUNCTION ledger.extend_batch_v1(
    p_tenants text[], p_requests uuid[], p_seqs integer[], p_needs bigint[], p_wants bigint[], p_shares integer
) RETURNS TABLE (request_id uuid, answer jsonb)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET join_collapse_limit = 1 SET random_page_cost = 0.1 SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_item record;
    v_tenants text[];
    v_windows bigint[];
    v_holders uuid[];
    v_wishes numeric[];
    v_leased bigint[];
BEGIN
    PERFORM ledger.require_tenants_v1(p_tenants);
    PERFORM p_needs::ledger.token_count[], p_wants::ledger.token_count[], p_shares::ledger.share_count;
    PERFORM FROM unnest(p_tenants, p_requests) AS i (tenant_id, request_id)
    JOIN ledger.hold h
      ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id
    ORDER BY h.tenant_id, h.month, h.request_id FOR UPDATE OF h;

    SELECT array_agg(n.tenant_id), array_agg(n.window_id), array_agg(n.holder_id), array_agg(n.wish)
    INTO v_tenants, v_windows, v_holders, v_wishes
    FROM (
        SELECT l.tenant_id, l.window_id, sum(greatest(i.want, i.need) * r.rate) AS wish,
               CASE WHEN min(h.holder_id::text) = max(h.holder_id::text) AND bool_and(w.ends_at > clock_timestamp()) IS NOT FALSE
                   THEN min(h.holder_id::text)::uuid END AS holder_id
        FROM unnest(p_tenants, p_requests, p_seqs, p_needs, p_wants) AS i (tenant_id, request_id, seq, need, want)
        JOIN ledger.hold h
          ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id
        JOIN ledger.hold_line l ON l.tenant_id = h.tenant_id AND l.month = h.month AND l.request_id = h.request_id
        JOIN ledger.budget_window w ON w.tenant_id = l.tenant_id AND w.window_id = l.window_id
        CROSS JOIN LATERAL (
            SELECT ledger.output_rate_v1(w.unit, w.token_kind, h.output_rate_pico) AS rate) AS r
        WHERE h.state = 'open' AND i.seq > h.last_seq AND r.rate > 0
        GROUP BY l.tenant_id, l.window_id) AS n;
    SELECT coalesce(array_agg(k.window_id) FILTER (WHERE k.free >= k.wish), '{}') INTO v_leased
    FROM (
        SELECT l.window_id, l.free, n.wish
        FROM unnest(v_tenants, v_windows, v_holders, v_wishes) AS n (tenant_id, window_id, holder_id, wish)
        JOIN ledger.lease l USING (tenant_id, window_id, holder_id)
        ORDER BY l.tenant_id, l.window_id, l.holder_id FOR UPDATE OF l) AS k;
    PERFORM FROM ledger.budget_window w
    WHERE w.tenant_id = ANY (v_tenants) AND w.window_id = ANY (v_windows) AND w.window_id <> ALL (v_leased)
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;

    FOR v_item IN
        SELECT * FROM unnest(p_tenants, p_requests, p_seqs, p_needs, p_wants)
            AS i (tenant_id, request_id, seq, need, want)
    LOOP
        request_id := v_item.request_id;
        answer := ledger.extend_locked_v1(v_item.tenant_id, ledger.month_of_v1(v_item.request_id), v_item.request_id,
                                          v_item.seq, v_item.need, v_item.want, p_shares, v_leased);
        RETURN NEXT;
    END LOOP;
END
$$;

-- As in 0009_leases.sql, for wishes that are whole numbers.
-- Bring the leases of a holder in these tenants to what it wants of each window, and give up those that it does not name.
-- Parallel arrays, an item each. Answers each lease with what is free in it now.
--
-- A lease is at most a quarter of the holder's fair share of what its window has left, and nothing at all where that is
-- far below the wish: at the end of a window everybody takes from the window itself, and the last of it is found by whoever
-- asks. A holder that is not believed to live gets nothing; neither does anybody of a window that has ended, nor of one that
-- counts what runs at once. Of a soft window it is the wish, within the limit.
CREATE OR REPLACE FUNCTION ledger.lease_batch_v1(p_holder uuid, p_tenants text[], p_windows bigint[], p_wants numeric[])
RETURNS TABLE (tenant_id text, window_id bigint, free numeric)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET join_collapse_limit = 1 SET random_page_cost = 0.1 SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_tenants text[];
    v_windows bigint[];
    v_slices numeric[];
BEGIN
    PERFORM ledger.require_tenants_v1(p_tenants);
    PERFORM ledger.require_holder_v1(p_holder);
    PERFORM p_wants::ledger.whole_amount[];
    -- Nobody fences the holder while it is given money.
    PERFORM FROM ledger.holder h WHERE h.holder_id = p_holder AND ledger.holder_lives_v1(h) FOR SHARE;
    IF NOT FOUND THEN
        RETURN;
    END IF;

    INSERT INTO ledger.lease (tenant_id, window_id, holder_id)
    SELECT DISTINCT w.tenant_id, w.window_id, p_holder
    FROM unnest(p_tenants, p_windows, p_wants) AS i (tenant_id, window_id, want)
    JOIN ledger.budget_window w USING (tenant_id, window_id)
    WHERE i.want > 0 AND (w.ends_at IS NULL OR w.ends_at > v_now) AND w.unit <> 'concurrency'
    ORDER BY 1, 2 ON CONFLICT DO NOTHING;
    SELECT coalesce(array_agg(k.tenant_id), '{}'), coalesce(array_agg(k.window_id), '{}') INTO v_tenants, v_windows
    FROM (
        SELECT l.tenant_id, l.window_id FROM ledger.lease l
        WHERE l.holder_id = p_holder AND l.tenant_id = ANY (p_tenants)
        ORDER BY l.tenant_id, l.window_id FOR UPDATE) AS k;
    PERFORM FROM ledger.budget_window w
    WHERE w.tenant_id = ANY (v_tenants) AND w.window_id = ANY (v_windows)
    ORDER BY w.tenant_id, w.window_id FOR UPDATE;

    SELECT coalesce(array_agg(s.tenant_id), '{}'), coalesce(array_agg(s.window_id), '{}'),
           coalesce(array_agg(CASE
               WHEN s.ends_at <= v_now THEN 0
               WHEN s.ceiling IS NULL THEN least(s.want, s.limit_amount)
               WHEN least(s.want, s.fair) * 4 >= s.want THEN least(s.want, s.fair)
               ELSE 0 END), '{}')
    INTO v_tenants, v_windows, v_slices
    FROM (
        SELECT w.*, coalesce(i.want, 0) AS want,
               div(greatest(w.limit_amount - w.spent - w.held - w.suspense + l.free, 0),
                   4 * (SELECT count(*) FROM ledger.lease o
                        WHERE o.tenant_id = l.tenant_id AND o.window_id = l.window_id
                          AND (o.free > 0 OR o.holder_id = p_holder))) AS fair
        FROM ledger.lease l
        JOIN ledger.budget_window w USING (tenant_id, window_id)
        LEFT JOIN (
            SELECT x.tenant_id, x.window_id, max(x.want) AS want
            FROM unnest(p_tenants, p_windows, p_wants) AS x (tenant_id, window_id, want)
            WHERE x.want > 0 GROUP BY 1, 2) AS i USING (tenant_id, window_id)
        WHERE l.holder_id = p_holder AND l.tenant_id = ANY (v_tenants) AND l.window_id = ANY (v_windows)) AS s;
    PERFORM ledger.set_leases_locked_v1(v_tenants, v_windows, array_fill(p_holder, ARRAY[cardinality(v_windows)]), v_slices);

    DELETE FROM ledger.lease l
    WHERE l.holder_id = p_holder AND l.tenant_id = ANY (v_tenants) AND l.window_id = ANY (v_windows)
      AND EXISTS (SELECT FROM ledger.budget_window w
                  WHERE w.tenant_id = l.tenant_id AND w.window_id = l.window_id AND w.ends_at <= v_now);
    RETURN QUERY
    SELECT l.tenant_id, l.window_id, l.free FROM ledger.lease l
    WHERE l.holder_id = p_holder AND l.tenant_id = ANY (v_tenants) AND l.window_id = ANY (v_windows);
END
$$;

-- As in 0008_roles.sql, for lines that can be charged.
CREATE OR REPLACE FUNCTION ledger.checkpoint_batch_v1(
    p_tenants text[], p_requests uuid[], p_input_tokens bigint[], p_output_tokens bigint[], p_amounts numeric[],
    p_lines jsonb[]
) RETURNS SETOF uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET join_collapse_limit = 1 SET random_page_cost = 0.1 SET jit = off
AS $$
DECLARE
    v_item record;
    v_state text;
BEGIN
    PERFORM ledger.require_tenants_v1(p_tenants);
    IF EXISTS (
        SELECT FROM unnest(p_input_tokens::ledger.token_count[], p_output_tokens::ledger.token_count[],
                           p_amounts::ledger.whole_amount[], p_lines) AS i (input_tokens, output_tokens, amount, lines)
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(c.quantity) FILTER (
                       WHERE c.class IN ('input', 'cache_read', 'cache_write', 'audio_input')), 0) AS input_tokens,
                   coalesce(sum(c.quantity) FILTER (
                       WHERE c.class IN ('output', 'reasoning', 'audio_output')), 0) AS output_tokens,
                   coalesce(sum(c.quantity * c.rate_pico), 0) AS amount,
                   count(*) - count(c.quantity * c.rate_pico) AS gaps
            FROM jsonb_to_recordset(i.lines)
                AS c (class ledger.usage_class, quantity ledger.token_count, rate_pico ledger.whole_amount)) AS s
        WHERE (i.input_tokens, i.output_tokens, i.amount, 0)
            IS DISTINCT FROM (s.input_tokens, s.output_tokens, s.amount, s.gaps))
    THEN
        RAISE EXCEPTION 'a checkpoint is not the sum of its lines' USING ERRCODE = 'check_violation';
    END IF;
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

-- As in 0010_settle.sql, for amounts that are whole and can be summed up.
CREATE OR REPLACE FUNCTION ledger.settle_batch_v1(p_items jsonb)
RETURNS TABLE (request_id uuid, result text, overrun boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET join_collapse_limit = 1 SET random_page_cost = 0.1 SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_known uuid[];                             -- requests that have a hold, locked now
    -- Those whose hold is not ended: what is settled, and what the hold said. Parallel arrays, an element each.
    v_tenants text[];
    v_months date[];
    v_requests uuid[];
    v_states text[];                            -- of the holds, until now
    v_ends text[];                              -- and from now on
    v_outcomes text[];
    v_sources text[];
    v_counts integer[];
    v_inputs bigint[];
    v_outputs bigint[];
    v_amounts numeric[];
    v_facts jsonb[];
    v_lines jsonb[];
    v_attributes jsonb[];
    v_prices text[];
    v_admitted timestamptz[];
    -- Those whose hold was charged by policy meanwhile.
    v_late_tenants text[];
    v_late_months date[];
    v_late uuid[];
    v_window_tenants text[];                    -- of the windows that are locked
    v_windows bigint[];
    v_short record;                             -- a window that cannot pay what goes beyond its holds
    v_overrun uuid[];
    v_unknown integer;
    v_tombstones integer;
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY(
        SELECT DISTINCT i.item ->> 'tenant_id' FROM jsonb_array_elements(p_items) AS i (item)));

    -- Locks in the one order that everybody keeps: holds by key, then windows by key. The month grows with the id of
    -- the request, so the order by tenant and request is the one by key.
    SELECT coalesce(array_agg(k.request_id), '{}'),
           array_agg(k.tenant_id) FILTER (WHERE k.moves), array_agg(k.month) FILTER (WHERE k.moves),
           coalesce(array_agg(k.request_id) FILTER (WHERE k.moves), '{}'), array_agg(k.was) FILTER (WHERE k.moves),
           array_agg(k.state) FILTER (WHERE k.moves), array_agg(k.outcome) FILTER (WHERE k.moves),
           array_agg(k.source) FILTER (WHERE k.moves), array_agg(k.requests) FILTER (WHERE k.moves),
           array_agg(k.input_tokens) FILTER (WHERE k.moves), array_agg(k.output_tokens) FILTER (WHERE k.moves),
           array_agg(k.amount_pico) FILTER (WHERE k.moves), array_agg(k.facts) FILTER (WHERE k.moves),
           array_agg(k.lines) FILTER (WHERE k.moves), array_agg(k.attributes) FILTER (WHERE k.moves),
           array_agg(k.price_key) FILTER (WHERE k.moves), array_agg(k.admitted_at) FILTER (WHERE k.moves),
           coalesce(array_agg(k.tenant_id) FILTER (WHERE k.was = 'charged_by_policy'), '{}'),
           coalesce(array_agg(k.month) FILTER (WHERE k.was = 'charged_by_policy'), '{}'),
           coalesce(array_agg(k.request_id) FILTER (WHERE k.was = 'charged_by_policy'), '{}')
    INTO v_known, v_tenants, v_months, v_requests, v_states, v_ends, v_outcomes, v_sources, v_counts, v_inputs,
         v_outputs, v_amounts, v_facts, v_lines, v_attributes, v_prices, v_admitted,
         v_late_tenants, v_late_months, v_late
    FROM (
        SELECT i.*, h.month, h.state AS was, h.state IN ('open', 'suspense') AS moves, h.attributes, h.price_key,
               h.admitted_at
        FROM (
            SELECT DISTINCT ON (e.tenant_id, e.request_id) e.*
            FROM ROWS FROM (jsonb_to_recordset(p_items) AS (
                tenant_id text, request_id uuid, state text, outcome text, source text, requests integer,
                input_tokens bigint, output_tokens bigint, amount_pico numeric, facts jsonb, lines jsonb
            )) WITH ORDINALITY AS e (tenant_id, request_id, state, outcome, source, requests, input_tokens,
                                     output_tokens, amount_pico, facts, lines, place)
            ORDER BY e.tenant_id, e.request_id, e.place) AS i
        JOIN ledger.hold h ON h.tenant_id = i.tenant_id AND h.month = ledger.month_of_v1(i.request_id)
                          AND h.request_id = i.request_id
        ORDER BY i.tenant_id, i.request_id FOR UPDATE OF h) AS k;
    PERFORM v_inputs::ledger.token_count[], v_outputs::ledger.token_count[], v_amounts::ledger.whole_amount[];

    SELECT array_agg(k.tenant_id), array_agg(k.window_id) INTO v_window_tenants, v_windows
    FROM (
        SELECT w.tenant_id, w.window_id FROM ledger.budget_window w
        WHERE (w.tenant_id, w.window_id) IN (
            SELECT l.tenant_id, l.window_id
            FROM unnest(v_tenants || v_late_tenants, v_months || v_late_months, v_requests || v_late)
                AS i (tenant_id, month, request_id)
            JOIN ledger.hold_line l ON l.tenant_id = i.tenant_id AND l.month = i.month AND l.request_id = i.request_id)
        ORDER BY w.tenant_id, w.window_id FOR UPDATE) AS k;

    -- Nothing is an overrun that money in leases could pay: what is free in them comes back first.
    IF EXISTS (SELECT FROM unnest(v_window_tenants, v_windows) AS k (tenant_id, window_id)
               JOIN ledger.lease l ON l.tenant_id = k.tenant_id AND l.window_id = k.window_id WHERE l.free > 0) THEN
        FOR v_short IN
            SELECT l.tenant_id, l.window_id
            FROM unnest(v_tenants, v_months, v_requests, v_amounts, v_inputs, v_outputs, v_counts)
                AS i (tenant_id, month, request_id, amount_pico, input_tokens, output_tokens, requests)
            JOIN ledger.hold_line l ON l.tenant_id = i.tenant_id AND l.month = i.month AND l.request_id = i.request_id
            JOIN ledger.budget_window w ON w.tenant_id = l.tenant_id AND w.window_id = l.window_id
            CROSS JOIN LATERAL (SELECT ledger.charge_in_unit_v1(
                w.unit, w.token_kind, i.amount_pico, i.input_tokens, i.output_tokens, i.requests) AS due) AS c
            WHERE w.ceiling IS NOT NULL
            GROUP BY l.tenant_id, l.window_id, w.limit_amount, w.spent, w.held, w.suspense
            HAVING sum(greatest(c.due - l.held, 0))
                 > greatest(w.limit_amount - w.spent - w.held - w.suspense + sum(greatest(l.held - c.due, 0)), 0)
            ORDER BY l.tenant_id, l.window_id
        LOOP
            PERFORM ledger.recall_leases_v1(v_short.tenant_id, v_short.window_id, 0);
        END LOOP;
    END IF;

    -- Split every charge: from the hold, from the window's room in the order of the requests' ids, beyond it. By the
    -- same numbers the postings are made and the balances moved. One statement may do both: those before it locked all
    -- that it reads.
    WITH charge AS (
        SELECT l.tenant_id, l.month, l.request_id, l.window_id, l.held, w.limit_amount, w.ceiling IS NULL AS soft,
               CASE i.state WHEN 'suspense' THEN 'suspense' ELSE 'held' END AS account,
               ledger.charge_in_unit_v1(w.unit, w.token_kind, i.amount_pico, i.input_tokens, i.output_tokens,
                                        i.requests) AS due,
               w.spent + w.held + w.suspense AS balance
        FROM unnest(v_tenants, v_months, v_requests, v_states, v_amounts, v_inputs, v_outputs, v_counts)
            AS i (tenant_id, month, request_id, state, amount_pico, input_tokens, output_tokens, requests)
        JOIN ledger.hold_line l ON l.tenant_id = i.tenant_id AND l.month = i.month AND l.request_id = i.request_id
        JOIN ledger.budget_window w ON w.tenant_id = l.tenant_id AND w.window_id = l.window_id
    ), ordered AS (
        SELECT c.*, least(c.due, c.held) AS from_hold, greatest(c.due - c.held, 0) AS excess,
               greatest(c.limit_amount - c.balance
                   + sum(greatest(c.held - c.due, 0)) OVER (PARTITION BY c.tenant_id, c.window_id), 0) AS room,
               coalesce(sum(greatest(c.due - c.held, 0)) OVER (
                   PARTITION BY c.tenant_id, c.window_id ORDER BY c.request_id
                   ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS excess_before
        FROM charge c
    ), split AS MATERIALIZED (
        SELECT o.*, CASE WHEN o.soft THEN o.excess
                         ELSE least(o.excess, greatest(o.room - o.excess_before, 0)) END AS from_room
        FROM ordered o
    ), posted AS (
        INSERT INTO ledger.posting (tenant_id, month, source_id, window_id, seq, debit, credit, amount)
        SELECT s.tenant_id, s.month, s.request_id, s.window_id, 1000000, p.debit, p.credit, p.amount
        FROM split s CROSS JOIN LATERAL (VALUES
            (s.account, 'spent', s.from_hold),
            (s.account, 'available', s.held - s.from_hold),
            ('available', 'spent', s.from_room),
            ('funding', 'overrun', s.excess - s.from_room)) AS p (debit, credit, amount)
        WHERE p.amount > 0
    ), moved AS (
        SELECT s.tenant_id, s.window_id, count(*)::integer AS holds, sum(s.from_hold + s.from_room) AS spent,
               coalesce(sum(s.held) FILTER (WHERE s.account = 'held'), 0) AS released,
               coalesce(sum(s.held) FILTER (WHERE s.account = 'suspense'), 0) AS cleared,
               sum(s.excess - s.from_room) AS overrun
        FROM split s GROUP BY s.tenant_id, s.window_id
    ), balanced AS (
        UPDATE ledger.budget_window w SET
            spent = w.spent + m.spent,
            held = w.held - m.released,
            suspense = w.suspense - m.cleared,
            overrun = w.overrun + m.overrun,
            live = w.live - m.holds,
            -- A ceiling above a lowered limit falls with every release, never below the limit.
            ceiling = CASE WHEN w.ceiling IS NOT NULL THEN
                greatest(w.limit_amount, w.spent + m.spent + w.held - m.released + w.suspense - m.cleared) END
        FROM moved m WHERE w.tenant_id = m.tenant_id AND w.window_id = m.window_id
    )
    SELECT coalesce(array_agg(s.request_id), '{}') INTO v_overrun FROM split s WHERE s.excess > s.from_room;

    INSERT INTO ledger.request (tenant_id, month, request_id, project_id, namespace, user_id, session_id, model,
                                attributes, outcome, source, input_tokens, output_tokens, amount_pico, price_key, byok,
                                facts, admitted_at, ended_at)
    SELECT i.tenant_id, i.month, i.request_id, coalesce(i.attributes ->> 'project', ''),
           coalesce(i.attributes ->> 'namespace', ''), coalesce(i.attributes ->> 'user', ''),
           coalesce(i.attributes ->> 'session', ''), coalesce(i.attributes ->> 'model', ''),
           i.attributes - '{project,namespace,user,session,model}'::text[],
           i.outcome, i.source, i.input_tokens, i.output_tokens, i.amount_pico, i.price_key,
           i.attributes @> '{"byok": true}',
           i.facts || jsonb_build_object('requests', i.requests), i.admitted_at, v_now
    FROM unnest(v_tenants, v_months, v_requests, v_attributes, v_outcomes, v_sources, v_inputs, v_outputs, v_amounts,
                v_prices, v_facts, v_counts, v_admitted)
        AS i (tenant_id, month, request_id, attributes, outcome, source, input_tokens, output_tokens, amount_pico,
              price_key, facts, requests, admitted_at);

    INSERT INTO ledger.usage_line (tenant_id, month, request_id, entry, class, quantity, rate_pico, amount_pico, source)
    SELECT i.tenant_id, i.month, i.request_id, 0, l.class, l.quantity, l.rate_pico, l.amount_pico, l.source
    FROM unnest(v_tenants, v_months, v_requests, v_lines) AS i (tenant_id, month, request_id, lines)
    CROSS JOIN LATERAL jsonb_to_recordset(i.lines)
        AS l (class text, quantity ledger.token_count, rate_pico ledger.whole_amount, amount_pico ledger.whole_amount,
              source text);

    UPDATE ledger.hold h SET state = i.state, ended_at = v_now
    FROM unnest(v_tenants, v_months, v_requests, v_ends) AS i (tenant_id, month, request_id, state)
    WHERE h.tenant_id = i.tenant_id AND h.month = i.month AND h.request_id = i.request_id;

    IF cardinality(v_requests) = jsonb_array_length(p_items) THEN
        RETURN QUERY
        SELECT i.request_id, 'settled', i.request_id = ANY (v_overrun) FROM unnest(v_requests) AS i (request_id);
        RETURN;
    END IF;

    -- Seldom: a batch that comes again, or with requests that are not known or were charged by policy.
    IF v_late <> '{}' THEN
        PERFORM ledger.correct_locked_v1(p_items, v_late);
    END IF;

    -- Tombstones last: who admits holds windows when it writes its hold, so nobody may wait for windows after them.
    SELECT count(DISTINCT (i.tenant_id, i.request_id)) INTO v_unknown
    FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid) WHERE i.request_id <> ALL (v_known);
    IF v_unknown > 0 THEN
        INSERT INTO ledger.hold (tenant_id, month, request_id, state, ended_at)
        SELECT DISTINCT i.tenant_id, ledger.month_of_v1(i.request_id), i.request_id, 'void', v_now
        FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid)
        WHERE i.request_id <> ALL (v_known)
        ORDER BY 1, 2, 3
        ON CONFLICT DO NOTHING;
        GET DIAGNOSTICS v_tombstones = ROW_COUNT;
        IF v_tombstones < v_unknown THEN
            RAISE EXCEPTION 'a request was admitted while it was settled' USING ERRCODE = 'serialization_failure';
        END IF;
    END IF;

    RETURN QUERY
    SELECT i.request_id,
           CASE WHEN i.request_id <> ALL (v_known) THEN 'unknown'
                WHEN i.request_id = ANY (v_requests) THEN 'settled'
                WHEN i.request_id = ANY (v_late) THEN 'corrected'
                ELSE 'already' END,
           EXISTS (SELECT FROM ledger.posting p
                   WHERE p.tenant_id = i.tenant_id AND p.month = ledger.month_of_v1(i.request_id)
                     AND p.source_id = i.request_id AND p.seq >= 1000000 AND p.credit = 'overrun')
    FROM jsonb_to_recordset(p_items) AS i (tenant_id text, request_id uuid);
END
$$;

-- As in 0011_seals.sql, for such amounts too.
--
CREATE OR REPLACE FUNCTION ledger.correct_locked_v1(p_items jsonb, p_late uuid[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_item record;
BEGIN
    FOR v_item IN
        SELECT DISTINCT ON (h.tenant_id, h.request_id) h.tenant_id, h.month, h.request_id, e.item
        FROM jsonb_array_elements(p_items) WITH ORDINALITY AS e (item, place)
        JOIN ledger.hold h ON h.tenant_id = e.item ->> 'tenant_id'
                          AND h.month = ledger.month_of_v1((e.item ->> 'request_id')::uuid)
                          AND h.request_id = (e.item ->> 'request_id')::uuid
        WHERE h.request_id = ANY (p_late) AND h.state = 'charged_by_policy'
        ORDER BY h.tenant_id, h.request_id, e.place
    LOOP
        PERFORM sum(l.quantity)::bigint::ledger.token_count, sum(l.amount_pico)::ledger.whole_amount
        FROM jsonb_to_recordset(v_item.item -> 'lines') AS l (
            quantity ledger.token_count, rate_pico ledger.whole_amount, amount_pico ledger.whole_amount)
        HAVING count(*) > 0;
        PERFORM ledger.correct_one_v1(v_item.tenant_id, v_item.month, v_item.request_id, 'late settlement',
                                      'the settlement came after the policy', v_item.item);
    END LOOP;
END
$$;

-- The settlement of a hold by a policy.
CREATE FUNCTION ledger.policy_item_v1(p_hold ledger.hold, p_policy text, p_lines jsonb) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_build_object(
        'tenant_id', p_hold.tenant_id, 'request_id', p_hold.request_id, 'state', 'charged_by_policy',
        'outcome', 'crashed', 'requests', 1, 'lines', p_lines, 'facts', jsonb_build_object('policy', p_policy),
        'source', CASE WHEN p_lines = '[]' THEN 'none' WHEN p_policy = 'hold' THEN 'estimate' ELSE 'local' END,
        'amount_pico', coalesce(sum(c.amount_pico), 0)::ledger.whole_amount,
        'input_tokens', coalesce(sum(c.quantity) FILTER (
            WHERE c.class IN ('input', 'cache_read', 'cache_write', 'audio_input')), 0)::bigint::ledger.token_count,
        'output_tokens', coalesce(sum(c.quantity) FILTER (
            WHERE c.class IN ('output', 'reasoning', 'audio_output')), 0)::bigint::ledger.token_count)
    FROM jsonb_to_recordset(p_lines) AS c (
        class ledger.usage_class, quantity ledger.token_count, rate_pico ledger.whole_amount,
        amount_pico ledger.whole_amount);
$$;

-- Charge what has been in suspense for longer than the grace, at most p_limit holds, and release the rest of them.
-- Policy "checkpoint": what the last checkpoint says, nothing where there is none. "hold": all that was held.
--
-- A hold that cannot be charged so stops none of the others; `problem` says why. Where it is its checkpoint that cannot be
-- charged, the checkpoint is forgotten and nothing is charged. Where the end of the request cannot be written at all
-- (`amount_pico` is NULL), it stays in suspense for another grace.
DROP FUNCTION ledger.charge_by_policy_v1(interval, text, integer);
CREATE FUNCTION ledger.charge_by_policy_v1(
    p_grace interval DEFAULT '24 hours', p_policy text DEFAULT 'checkpoint', p_limit integer DEFAULT 200
) RETURNS TABLE (tenant_id text, request_id uuid, amount_pico numeric, problem text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
#variable_conflict use_column
DECLARE
    v_hold ledger.hold;
    v_items jsonb := '[]';
    v_item jsonb;
    v_problems text[] := '{}';                  -- by place
    v_problem text;
BEGIN
    IF p_policy NOT IN ('checkpoint', 'hold') THEN
        RAISE EXCEPTION 'there is no policy %: checkpoint or hold', p_policy USING ERRCODE = 'invalid_parameter_value';
    END IF;
    FOR v_hold IN
        SELECT * FROM ledger.hold h WHERE h.state = 'suspense' AND h.suspense_at <= clock_timestamp() - p_grace
        ORDER BY h.tenant_id, h.month, h.request_id LIMIT p_limit FOR UPDATE
    LOOP
        v_problem := NULL;
        BEGIN
            v_item := ledger.policy_item_v1(v_hold, p_policy, ledger.policy_lines_v1(v_hold, p_policy));
        EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
            v_problem := SQLERRM;
            v_item := ledger.policy_item_v1(v_hold, p_policy, '[]');
            UPDATE ledger.hold h SET checkpoint_lines = '[]', checkpoint_input_tokens = 0, checkpoint_output_tokens = 0,
                                     checkpoint_amount_pico = 0
            WHERE h.tenant_id = v_hold.tenant_id AND h.month = v_hold.month AND h.request_id = v_hold.request_id;
        END;
        v_items := v_items || v_item;
        v_problems := v_problems || v_problem;
    END LOOP;

    BEGIN
        PERFORM FROM ledger.settle_batch_v1(v_items);
    EXCEPTION WHEN data_exception OR integrity_constraint_violation OR program_limit_exceeded THEN
        -- One after the other then, with all their windows locked in the order that everybody keeps.
        PERFORM FROM ledger.budget_window w
        WHERE (w.tenant_id, w.window_id) IN (
            SELECT l.tenant_id, l.window_id FROM ledger.hold_line l
            JOIN jsonb_to_recordset(v_items) AS i (tenant_id text, request_id uuid)
              ON l.tenant_id = i.tenant_id AND l.month = ledger.month_of_v1(i.request_id) AND l.request_id = i.request_id)
        ORDER BY w.tenant_id, w.window_id FOR UPDATE;
        FOR v_place IN 1 .. jsonb_array_length(v_items) LOOP
            v_item := v_items -> (v_place - 1);
            BEGIN
                PERFORM FROM ledger.settle_batch_v1(jsonb_build_array(v_item));
            EXCEPTION WHEN data_exception OR integrity_constraint_violation OR program_limit_exceeded THEN
                v_problems[v_place] := SQLERRM;
                v_items := jsonb_set(v_items, ARRAY[(v_place - 1)::text, 'amount_pico'], 'null');
                UPDATE ledger.hold h SET suspense_at = clock_timestamp()
                WHERE h.tenant_id = v_item ->> 'tenant_id'
                  AND h.month = ledger.month_of_v1((v_item ->> 'request_id')::uuid)
                  AND h.request_id = (v_item ->> 'request_id')::uuid;
            END;
        END LOOP;
    END;
    RETURN QUERY
    SELECT i.tenant_id, i.request_id, i.amount_pico, v_problems[i.place]
    FROM ROWS FROM (jsonb_to_recordset(v_items) AS (tenant_id text, request_id uuid, amount_pico numeric))
        WITH ORDINALITY AS i (tenant_id, request_id, amount_pico, place);
END
$$;
REVOKE ALL ON FUNCTION ledger.policy_item_v1(ledger.hold, text, jsonb),
    ledger.charge_by_policy_v1(interval, text, integer), ledger.refuse_future_v1() FROM PUBLIC;
