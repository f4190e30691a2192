/** Streams that survive a broken network: the gateway keeps the reply of a thread, and goes on where it broke. */

import type { Behest, RequestOptions } from "./client.js";
import { BehestConnectionError, BehestError, isRecord } from "./errors.js";
import { sleep as realSleep, waitMs } from "./http.js";
import type { ChatCompletionChunk, CreateParamsBase } from "./types.js";

const FATAL: ReadonlySet<number> = new Set([400, 401, 402, 403, 404, 405, 409, 413, 422]);
const RETRY_AFTER_MAX_S = 60;

/**
 * Whether another try would end the same way: 400, 401, 402, 403, 404, 405, 409, 413, 422, an abort, a mistake of the
 * program, and 429 that says no time or one beyond a minute. 409 `in_progress` is not fatal: it says when to come again.
 * Errors of the `openai` package are understood too.
 */
export function isFatal(error: unknown): boolean {
  if (!(error instanceof Error)) return true;
  if (error.name === "AbortError" || error.name === "TimeoutError" || error.name === "APIUserAbortError") return true;
  const known = error as { status?: unknown; error?: unknown; code?: unknown; retryAfter?: unknown; shouldRetry?: unknown };
  // In the middle of a stream the `openai` package keeps the status inside.
  const inner = isRecord(known.error) ? known.error["status"] : undefined;
  const status = [known.status, inner].find((found) => typeof found === "number");
  const retryAfter = typeof known.retryAfter === "number" ? known.retryAfter : undefined;
  if (known.code === "in_progress") return false;
  if (status === undefined) return !(error instanceof BehestConnectionError) && !isNetworkError(error);
  if (status === 429) return known.shouldRetry === false || (retryAfter ?? Infinity) > RETRY_AFTER_MAX_S;
  return FATAL.has(status);
}

/** By what an error has, not by the name of its class: a bundler takes that away. The `openai` package's have `requestID`. */
function isNetworkError(error: Error): boolean {
  if (error.name === "TypeError") return true;
  return "requestID" in error && !("code" in error && error.code !== undefined) && error.message !== "Request was aborted.";
}

export interface StreamWithRetryOptions extends RequestOptions {
  /** The thread that keeps the conversation; chosen by the client, such as a UUID. */
  threadId: string;
  /** Tries in a row without a new chunk, before the error is thrown (default 2). */
  attempts?: number;
  /** Told before each wait: which try this is, in how many milliseconds it begins, and why. */
  onReconnect?: (event: { attempt: number; delayMs: number; error: BehestError }) => void;
  /** Told the id of each event: with it as `lastEventId` a later call goes on where this one was left. */
  onEventId?: (id: string) => void;
  /** Told when a connection stands. */
  onConnect?: () => void;
  /** For tests. */
  sleep?: (ms: number, signal?: AbortSignal) => Promise<void>;
  random?: () => number;
}

/**
 * The chunks of one answer over as many connections as it takes: 500 ms after a break, then 1 s, 2 s ..., and never
 * before a `Retry-After`. What was received already is not received again, and nothing is missing between.
 *
 * Throws what `isFatal` calls fatal, and the last error where the tries are used up.
 */
export async function* streamWithRetry(
  client: Behest,
  params: CreateParamsBase & { stream?: true },
  options: StreamWithRetryOptions,
): AsyncGenerator<ChatCompletionChunk, void, undefined> {
  const { attempts = 2, onReconnect, onConnect, onEventId, sleep = realSleep, random = Math.random, ...request } = options;
  let lastEventId = request.lastEventId ?? "";
  let failed = 0;
  // Until the first event there is no place to name: the key is what makes a repeated call the same call.
  let key = request.idempotencyKey ?? newKey();
  for (;;) {
    try {
      const stream = await client.chat.completions.create(
        { ...params, stream: true },
        { ...request, maxRetries: 0, ...(lastEventId ? { lastEventId } : { idempotencyKey: key }) },
      );
      onConnect?.();
      const seen = lastEventId;
      for await (const chunk of stream) {
        if (isRepeated(stream.lastEventId, seen)) continue;
        lastEventId = stream.lastEventId || lastEventId;
        failed = 0;
        if (lastEventId) onEventId?.(lastEventId);
        yield chunk;
      }
      return;
    } catch (error) {
      if (isFatal(error) || !(error instanceof BehestError) || failed >= attempts) throw error;
      const delayMs = waitMs(error, failed, random);
      failed += 1;
      // An answer with a status was an answer: the next call is another one. "It runs elsewhere" was none yet.
      if (error.status !== undefined && error.code !== "in_progress") key = newKey();
      onReconnect?.({ attempt: failed, delayMs, error });
      await sleep(delayMs, request.signal);
    }
  }
}

function newKey(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // `randomUUID` is there on https and localhost only
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Whether an event was received before the break; ids are `<generation>-<number>`, counted within a generation. */
function isRepeated(id: string, seen: string): boolean {
  const [a, b] = [parts(id), parts(seen)];
  return a !== undefined && b !== undefined && a.generation === b.generation && a.number <= b.number;
}

function parts(id: string): { generation: string; number: number } | undefined {
  const match = /^(.+)-(\d{1,15})$/.exec(id);
  return match?.[1] !== undefined ? { generation: match[1], number: Number(match[2]) } : undefined;
}
