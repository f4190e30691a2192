/** The conversations that the gateway keeps for the user. */

import { useCallback, useEffect, useRef, useState } from "react";

import type { Behest } from "../client.js";
import type { Thread } from "../types.js";

export interface BehestThreads {
  /** The one that was used last comes first. */
  threads: readonly Thread[];
  loading: boolean;
  error: Error | undefined;
  refresh: () => Promise<void>;
  /** Deletes it; it leaves the list at once and comes back if that fails. */
  remove: (id: string) => Promise<void>;
}

export function useBehestThreads({ client, limit = 50 }: { client: Behest; limit?: number }): BehestThreads {
  const [threads, setThreads] = useState<readonly Thread[]>([]);
  const [loading, setLoading] = useState(true);
  const [error, setError] = useState<Error | undefined>(undefined);
  const latest = useRef(0);
  /** What was removed: up to which question an answer may still name it. While the removal runs: all of them. */
  const gone = useRef(new Map<string, number>());
  const mounted = useRef(new AbortController());

  const refresh = useCallback(async (): Promise<void> => {
    const turn = ++latest.current;
    setLoading(true);
    try {
      const found = await client.threads.list({ limit }, { signal: mounted.current.signal });
      if (turn !== latest.current) return; // a later question was asked meanwhile
      for (const [id, last] of gone.current) if (last < turn) gone.current.delete(id);
      setThreads(found.filter((thread) => !gone.current.has(thread.id)));
      setError(undefined);
    } catch (reason) {
      if (turn !== latest.current || mounted.current.signal.aborted) return;
      setError(reason instanceof Error ? reason : new Error(String(reason)));
    }
    setLoading(false);
  }, [client, limit]);

  useEffect(() => {
    mounted.current = new AbortController();
    void refresh();
    return () => mounted.current.abort();
  }, [refresh]);

  const remove = useCallback(
    async (id: string): Promise<void> => {
      setThreads((before) => before.filter((thread) => thread.id !== id));
      gone.current.set(id, Infinity);
      try {
        await client.threads.delete(id);
      } catch (reason) {
        if ((reason as { status?: number }).status !== 404) {
          gone.current.delete(id);
          await refresh();
          throw reason;
        }
      }
      gone.current.set(id, latest.current); // what is asked from now on does not name it
    },
    [client, refresh],
  );

  return { threads, loading, error, refresh, remove };
}
