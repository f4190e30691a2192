-- Threads, the chunks of replies for those who lost their connection, and idempotency keys. No money is moved here.
--
-- A generation is one reply of the assistant with all its attempts: its events are numbered from 1 over all of them.
-- Who writes one shows its epoch; who takes one over raises it, and the writer before learns of it at its next write.
-- What was said is sealed by the sidecar, where it has a key: nothing of it can be read or compared here.

CREATE TABLE ledger.thread (
    tenant_id text NOT NULL,
    thread_key uuid NOT NULL,                   -- made of tenant, project, user and thread_id
    project_id text NOT NULL,
    user_id text NOT NULL,
    thread_id text NOT NULL,                    -- the client's own word for it
    messages integer NOT NULL DEFAULT 0,        -- also the number of the last one
    size_bytes bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, thread_key)
);
CREATE INDEX thread_of_user ON ledger.thread (tenant_id, project_id, user_id, updated_at, thread_key);
CREATE INDEX thread_by_age ON ledger.thread (updated_at);

CREATE TABLE ledger.generation (
    tenant_id text NOT NULL,
    generation_id uuid NOT NULL,                -- the id of the request that began it
    thread_key uuid,                            -- NULL: kept for an idempotency key alone
    state text NOT NULL CHECK (state IN ('running', 'broken', 'whole')),
    epoch integer NOT NULL DEFAULT 1,           -- attempts so far: who shows a lower one was taken over
    wanted boolean NOT NULL DEFAULT false,      -- somebody waits for its writer to stop
    holder_id uuid NOT NULL,
    events integer NOT NULL DEFAULT 0,
    size_bytes bigint NOT NULL DEFAULT 0,
    ending bytea,                               -- what came behind the events, or a whole answer's status and body
    written_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, generation_id),
    FOREIGN KEY (tenant_id, thread_key) REFERENCES ledger.thread ON DELETE CASCADE
);
CREATE INDEX generation_of_thread ON ledger.generation (tenant_id, thread_key);
CREATE INDEX generation_by_age ON ledger.generation (written_at);

CREATE TABLE ledger.thread_message (
    tenant_id text NOT NULL,
    thread_key uuid NOT NULL,
    number integer NOT NULL,
    role text NOT NULL,
    content bytea,                              -- the whole message; NULL: a reply that has not ended, see its chunks
    generation_id uuid,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, thread_key, number),
    FOREIGN KEY (tenant_id, thread_key) REFERENCES ledger.thread ON DELETE CASCADE
);
CREATE INDEX message_of_generation ON ledger.thread_message (tenant_id, generation_id) WHERE generation_id IS NOT NULL;

CREATE TABLE ledger.generation_chunk (
    tenant_id text NOT NULL,
    generation_id uuid NOT NULL,
    first_event integer NOT NULL,
    events integer NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (tenant_id, generation_id, first_event),
    FOREIGN KEY (tenant_id, generation_id) REFERENCES ledger.generation ON DELETE CASCADE
);

CREATE TABLE ledger.idempotency_key (
    tenant_id text NOT NULL,
    project_id text NOT NULL,
    user_id text NOT NULL,
    key_sha256 bytea NOT NULL,
    request_sha256 bytea NOT NULL,
    generation_id uuid NOT NULL,
    after_event integer NOT NULL DEFAULT 0,     -- the answer to this key begins behind it
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, project_id, user_id, key_sha256),
    FOREIGN KEY (tenant_id, generation_id) REFERENCES ledger.generation ON DELETE CASCADE
);
CREATE INDEX key_of_generation ON ledger.idempotency_key (tenant_id, generation_id);

INSERT INTO ledger.sidecar_right (kind, name) VALUES
    ('table', 'thread'), ('table', 'generation'), ('table', 'thread_message'), ('table', 'generation_chunk'),
    ('table', 'idempotency_key'),
    ('function', 'keep_turn_v1'), ('function', 'write_generations_v1'), ('function', 'claim_generation_v1'),
    ('function', 'delete_thread_v1'), ('function', 'claim_key_v1'), ('function', 'release_key_v1');

-- Keep a caller's new messages and make room for the reply to them. The thread is made where there is none. Answers
-- "kept", "messages", "bytes" or "threads": the limit that stands against it. Asking again keeps nothing twice.
CREATE FUNCTION ledger.keep_turn_v1(
    p_tenant text, p_project text, p_user text, p_thread text, p_key uuid, p_roles text[], p_contents bytea[],
    p_generation uuid, p_holder uuid, p_messages_max integer, p_bytes_max bigint, p_threads_max integer
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
DECLARE
    v_thread ledger.thread;
    v_bytes bigint;
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY[p_tenant]);
    SELECT coalesce(sum(length(c)), 0) INTO v_bytes FROM unnest(p_contents) AS c;
    IF NOT EXISTS (SELECT FROM ledger.thread t WHERE t.tenant_id = p_tenant AND t.thread_key = p_key) THEN
        IF (SELECT count(*) FROM (
                SELECT FROM ledger.thread t
                WHERE t.tenant_id = p_tenant AND t.project_id = p_project AND t.user_id = p_user
                LIMIT p_threads_max) AS few) >= p_threads_max THEN
            RETURN 'threads';
        END IF;
        INSERT INTO ledger.thread (tenant_id, thread_key, project_id, user_id, thread_id)
        VALUES (p_tenant, p_key, p_project, p_user, p_thread) ON CONFLICT DO NOTHING;
    END IF;
    SELECT * INTO v_thread FROM ledger.thread t WHERE t.tenant_id = p_tenant AND t.thread_key = p_key FOR UPDATE;
    IF EXISTS (SELECT FROM ledger.generation g WHERE g.tenant_id = p_tenant AND g.generation_id = p_generation
                                               AND g.thread_key IS NOT NULL) THEN
        RETURN 'kept';
    ELSIF v_thread.messages + cardinality(p_contents) + 1 > p_messages_max THEN
        RETURN 'messages';
    ELSIF v_thread.size_bytes + v_bytes > p_bytes_max THEN
        RETURN 'bytes';
    END IF;
    -- The generation may be there already, for an idempotency key.
    INSERT INTO ledger.generation AS g (tenant_id, generation_id, thread_key, state, holder_id)
    VALUES (p_tenant, p_generation, p_key, 'running', p_holder)
    ON CONFLICT (tenant_id, generation_id) DO UPDATE SET thread_key = excluded.thread_key;
    INSERT INTO ledger.thread_message (tenant_id, thread_key, number, role, content)
    SELECT p_tenant, p_key, v_thread.messages + m.number, m.role, m.content
    FROM unnest(p_roles, p_contents) WITH ORDINALITY AS m (role, content, number);
    INSERT INTO ledger.thread_message (tenant_id, thread_key, number, role, generation_id)
    VALUES (p_tenant, p_key, v_thread.messages + cardinality(p_contents) + 1, 'assistant', p_generation);
    UPDATE ledger.thread t
    SET messages = t.messages + cardinality(p_contents) + 1, size_bytes = t.size_bytes + v_bytes,
        updated_at = clock_timestamp()
    WHERE t.tenant_id = p_tenant AND t.thread_key = p_key;
    RETURN 'kept';
END
$$;

-- Write further events of replies, and how some of them ended: p_states says "running" or how; p_contents is the message
-- that the reply is now, p_endings what came behind its events. Writing the same again changes nothing. For each of them
-- "kept", "wanted" (somebody waits for its writer to stop), "lost" (another attempt has taken it over) or "gone".
CREATE FUNCTION ledger.write_generations_v1(
    p_tenants text[], p_generations uuid[], p_epochs integer[], p_first_events integer[], p_events integer[],
    p_data bytea[], p_states text[], p_contents bytea[], p_endings bytea[]
) RETURNS TABLE (tenant_id text, generation_id uuid, verdict text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
#variable_conflict use_column
DECLARE
    v_item record;
    v_generation ledger.generation;
    v_bytes bigint;
BEGIN
    PERFORM ledger.require_tenants_v1(p_tenants);
    FOR v_item IN
        SELECT i.* FROM unnest(p_tenants, p_generations, p_epochs, p_first_events, p_events, p_data, p_states, p_contents,
                               p_endings)
            AS i (tenant_id, generation_id, epoch, first_event, events, data, state, content, ending)
        ORDER BY i.tenant_id, i.generation_id
    LOOP
        tenant_id := v_item.tenant_id;
        generation_id := v_item.generation_id;
        SELECT * INTO v_generation FROM ledger.generation g
        WHERE g.tenant_id = v_item.tenant_id AND g.generation_id = v_item.generation_id FOR UPDATE;
        IF NOT FOUND THEN
            verdict := 'gone';
        ELSIF v_generation.epoch <> v_item.epoch OR (v_generation.state <> 'running' AND v_item.state = 'running') THEN
            verdict := 'lost';
        ELSE
            v_bytes := 0;
            IF v_item.events > 0 THEN
                -- What was tried before with an unknown result comes again, with more behind it.
                INSERT INTO ledger.generation_chunk AS c (tenant_id, generation_id, first_event, events, data)
                VALUES (v_item.tenant_id, v_item.generation_id, v_item.first_event, v_item.events, v_item.data)
                ON CONFLICT (tenant_id, generation_id, first_event) DO UPDATE
                SET events = excluded.events, data = excluded.data WHERE excluded.events > c.events;
                v_bytes := length(v_item.data);
            END IF;
            UPDATE ledger.generation g
            SET events = greatest(g.events, v_item.first_event + v_item.events - 1), size_bytes = g.size_bytes + v_bytes,
                state = v_item.state, ending = coalesce(v_item.ending, g.ending), written_at = clock_timestamp(),
                wanted = g.wanted AND v_item.state = 'running'
            WHERE g.tenant_id = v_item.tenant_id AND g.generation_id = v_item.generation_id;
            IF v_item.content IS NOT NULL THEN
                UPDATE ledger.thread t
                SET size_bytes = t.size_bytes + length(v_item.content) - coalesce(length(m.content), 0),
                    updated_at = clock_timestamp()
                FROM ledger.thread_message m
                WHERE m.tenant_id = v_item.tenant_id AND m.generation_id = v_item.generation_id
                  AND t.tenant_id = m.tenant_id AND t.thread_key = m.thread_key;
                UPDATE ledger.thread_message m SET content = v_item.content
                WHERE m.tenant_id = v_item.tenant_id AND m.generation_id = v_item.generation_id;
            END IF;
            verdict := CASE WHEN v_generation.wanted AND v_item.state = 'running' THEN 'wanted' ELSE 'kept' END;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Take over a reply that did not come to its end, for another attempt. One that still runs is only wanted, unless p_force
-- says that it was waited for. The idempotency key of p_instead stands for it from then on, where its answer begins behind
-- p_after, else behind the last event. Answers its state: "claimed" with the new epoch, "running", "whole", or no row.
CREATE FUNCTION ledger.claim_generation_v1(
    p_tenant text, p_generation uuid, p_holder uuid, p_force boolean, p_instead uuid, p_after integer
) RETURNS TABLE (state text, epoch integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
#variable_conflict use_column
DECLARE
    v_generation ledger.generation;
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY[p_tenant]);
    SELECT * INTO v_generation FROM ledger.generation g
    WHERE g.tenant_id = p_tenant AND g.generation_id = p_generation FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    ELSIF v_generation.state = 'whole' THEN
        RETURN QUERY SELECT 'whole', v_generation.epoch;
    ELSIF v_generation.state = 'running' AND NOT p_force THEN
        UPDATE ledger.generation g SET wanted = true WHERE g.tenant_id = p_tenant AND g.generation_id = p_generation;
        RETURN QUERY SELECT 'running', v_generation.epoch;
    ELSE
        UPDATE ledger.generation g
        SET state = 'running', epoch = g.epoch + 1, wanted = false, holder_id = p_holder, ending = NULL,
            written_at = clock_timestamp()
        WHERE g.tenant_id = p_tenant AND g.generation_id = p_generation;
        IF p_instead <> p_generation THEN
            UPDATE ledger.idempotency_key k
            SET generation_id = p_generation, after_event = coalesce(p_after, v_generation.events)
            WHERE k.tenant_id = p_tenant AND k.generation_id = p_instead;
            DELETE FROM ledger.generation g
            WHERE g.tenant_id = p_tenant AND g.generation_id = p_instead AND g.thread_key IS NULL;
        END IF;
        RETURN QUERY SELECT 'claimed', v_generation.epoch + 1;
    END IF;
END
$$;

-- Delete a thread with all that was said in it. False: there is none.
CREATE FUNCTION ledger.delete_thread_v1(p_tenant text, p_key uuid) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY[p_tenant]);
    DELETE FROM ledger.thread t WHERE t.tenant_id = p_tenant AND t.thread_key = p_key;
    RETURN FOUND;
END
$$;

-- Take an idempotency key for a request, or say what became of it. Answers "new" (it is ours now), "conflict" (it was
-- another request), "keys" (the user has too many), or the state of its generation. A key whose sidecar died is new again,
-- unless a thread has its reply.
CREATE FUNCTION ledger.claim_key_v1(
    p_tenant text, p_project text, p_user text, p_key bytea, p_request bytea, p_generation uuid, p_holder uuid,
    p_keys_max integer
) RETURNS TABLE (state text, generation_id uuid, after_event integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
#variable_conflict use_column
DECLARE
    v_key ledger.idempotency_key;
    v_generation ledger.generation;
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY[p_tenant]);
    -- One at a time for a key, also for one that is not there yet.
    PERFORM pg_advisory_xact_lock(hashtextextended(p_tenant || encode(p_key, 'hex') || p_user, 0));
    SELECT * INTO v_key FROM ledger.idempotency_key k
    WHERE k.tenant_id = p_tenant AND k.project_id = p_project AND k.user_id = p_user AND k.key_sha256 = p_key;
    IF FOUND AND v_key.created_at > clock_timestamp() - interval '24 hours' THEN
        IF v_key.request_sha256 <> p_request THEN
            RETURN QUERY SELECT 'conflict', v_key.generation_id, 0;
            RETURN;
        END IF;
        SELECT * INTO v_generation FROM ledger.generation g
        WHERE g.tenant_id = p_tenant AND g.generation_id = v_key.generation_id;
        IF v_generation.state <> 'running' THEN
            RETURN QUERY SELECT v_generation.state, v_key.generation_id, v_key.after_event;
            RETURN;
        ELSIF EXISTS (SELECT FROM ledger.holder h
                      WHERE h.holder_id = v_generation.holder_id AND ledger.holder_lives_v1(h)) THEN
            RETURN QUERY SELECT 'running', v_key.generation_id, v_key.after_event;
            RETURN;
        ELSIF v_generation.thread_key IS NOT NULL THEN
            -- Its sidecar died, and its thread has what it said: it may go on.
            RETURN QUERY SELECT 'broken', v_key.generation_id, v_key.after_event;
            RETURN;
        END IF;
    END IF;
    IF v_key.generation_id IS NOT NULL THEN
        DELETE FROM ledger.idempotency_key k
        WHERE k.tenant_id = p_tenant AND k.project_id = p_project AND k.user_id = p_user AND k.key_sha256 = p_key;
    END IF;
    IF (SELECT count(*) FROM (
            SELECT FROM ledger.idempotency_key k
            WHERE k.tenant_id = p_tenant AND k.project_id = p_project AND k.user_id = p_user
            LIMIT p_keys_max) AS few) >= p_keys_max THEN
        RETURN QUERY SELECT 'keys', NULL::uuid, 0;
        RETURN;
    END IF;
    INSERT INTO ledger.generation (tenant_id, generation_id, state, holder_id)
    VALUES (p_tenant, p_generation, 'running', p_holder);
    INSERT INTO ledger.idempotency_key (tenant_id, project_id, user_id, key_sha256, request_sha256, generation_id)
    VALUES (p_tenant, p_project, p_user, p_key, p_request, p_generation);
    RETURN QUERY SELECT 'new', p_generation, 0;
END
$$;

-- Forget the key of a request that came to nothing: it may be asked again.
CREATE FUNCTION ledger.release_key_v1(p_tenant text, p_generation uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
BEGIN
    PERFORM ledger.require_tenants_v1(ARRAY[p_tenant]);
    DELETE FROM ledger.idempotency_key k WHERE k.tenant_id = p_tenant AND k.generation_id = p_generation;
    DELETE FROM ledger.generation g
    WHERE g.tenant_id = p_tenant AND g.generation_id = p_generation AND g.thread_key IS NULL;
END
$$;

-- Forget what is old enough, at most p_limit of each: threads by their project's memory.retentionDays, else p_days; keys
-- and chunks after a day. For the keeper.
CREATE FUNCTION ledger.prune_threads_v1(p_days integer, p_limit integer)
RETURNS TABLE (threads bigint, keys bigint, generations bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    v_day constant interval := '24 hours';
BEGIN
    -- By the shortest retention of all first: the index is by age alone.
    WITH days AS (
        SELECT p.tenant_id, p.project_id, (p.spec -> 'memory' ->> 'retentionDays')::integer AS days FROM ledger.project p
    ), old AS (
        SELECT t.tenant_id, t.thread_key FROM ledger.thread t
        LEFT JOIN days d ON d.tenant_id = t.tenant_id AND d.project_id = t.project_id
        WHERE t.updated_at < clock_timestamp() - v_day * (SELECT least(p_days, min(e.days)) FROM days e)
          AND t.updated_at < clock_timestamp() - v_day * coalesce(d.days, p_days)
        LIMIT p_limit
    )
    DELETE FROM ledger.thread t USING old o WHERE t.tenant_id = o.tenant_id AND t.thread_key = o.thread_key;
    GET DIAGNOSTICS threads = ROW_COUNT;
    DELETE FROM ledger.idempotency_key k WHERE k.ctid = ANY (ARRAY(
        SELECT i.ctid FROM ledger.idempotency_key i WHERE i.created_at < clock_timestamp() - v_day LIMIT p_limit));
    GET DIAGNOSTICS keys = ROW_COUNT;
    -- A reply of a thread stays in its message; of one without a thread nothing stays.
    DELETE FROM ledger.generation_chunk c USING (
        SELECT g.tenant_id, g.generation_id FROM ledger.generation g
        WHERE g.written_at < clock_timestamp() - v_day AND g.state <> 'running' AND g.thread_key IS NOT NULL
          AND EXISTS (SELECT FROM ledger.generation_chunk e
                      WHERE e.tenant_id = g.tenant_id AND e.generation_id = g.generation_id)
        LIMIT p_limit) AS o
    WHERE c.tenant_id = o.tenant_id AND c.generation_id = o.generation_id;
    DELETE FROM ledger.generation g WHERE g.ctid = ANY (ARRAY(
        SELECT i.ctid FROM ledger.generation i
        WHERE i.written_at < clock_timestamp() - v_day AND i.thread_key IS NULL
          AND NOT EXISTS (SELECT FROM ledger.idempotency_key k
                          WHERE k.tenant_id = i.tenant_id AND k.generation_id = i.generation_id)
        LIMIT p_limit));
    GET DIAGNOSTICS generations = ROW_COUNT;
    RETURN NEXT;
END
$$;
