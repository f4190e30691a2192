/** One HTTP call, with its retries before the first byte, its limits of time, and its errors as classes. */

import {
  BehestAbortError,
  BehestConnectionError,
  BehestError,
  errorOfEnvelope,
  factsOfHeaders,
  isRecord,
  type ErrorFacts,
} from "./errors.js";

export interface HttpCall {
  method: "GET" | "POST" | "DELETE";
  url: string;
  headers: Headers;
  body?: string | undefined;
  signal?: AbortSignal | undefined;
  /** Whether it may be carried out twice: reading, or a call that its idempotency key makes one. */
  isSafe: boolean;
  /** Further tries, of what `mayRetry` allows. */
  retries: number;
  /** Milliseconds until the answer is read. */
  timeoutMs: number;
}

/** Takes of an answer what is wanted of it: its text, or itself where its body is a stream. */
export type Read<T> = (response: Response) => T | Promise<T>;

export interface HttpSettings {
  fetch: typeof globalThis.fetch;
  sleep: (ms: number, signal?: AbortSignal) => Promise<void>;
  random: () => number;
}

const RETRY_AFTER_MAX_S = 60;
/** Node's names for a connection that never stood; browsers do not tell. */
const NEVER_SENT: ReadonlySet<unknown> = new Set(["ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "UND_ERR_CONNECT_TIMEOUT"]);

/** What `read` makes of a 2xx answer, in the time and under the signal of the call. Throws one of the package's errors. */
export async function send<T>(call: HttpCall, settings: HttpSettings, read: Read<T>): Promise<T> {
  for (let attempt = 0; ; attempt++) {
    try {
      return await sendOnce(call, settings, read);
    } catch (error) {
      if (attempt >= call.retries || !(error instanceof BehestError) || !mayRetry(error, call.isSafe)) throw error;
      await settings.sleep(waitMs(error, attempt, settings.random), call.signal);
    }
  }
}

/**
 * Whether the same call may be sent once more: the network, 5xx, and 429 that says when. Where the first one may have
 * been carried out and nobody says how that went (the network, a proxy's page), only a call that `isSafe`.
 */
export function mayRetry(error: BehestError, isSafe: boolean): boolean {
  if (error instanceof BehestAbortError) return false;
  if (error.shouldRetry !== undefined) return error.shouldRetry && (error.retryAfter ?? 0) <= RETRY_AFTER_MAX_S;
  if (error instanceof BehestConnectionError) return isSafe || wasNeverSent(error);
  if (error.status === 429 || error.code === "in_progress") {
    return error.retryAfter !== undefined && error.retryAfter <= RETRY_AFTER_MAX_S;
  }
  const isGateways = error.code !== undefined;
  return error.status !== undefined && error.status >= 500 && (isSafe || isGateways);
}

function wasNeverSent(error: BehestConnectionError): boolean {
  const inner = error.cause instanceof Error ? error.cause.cause : undefined;
  return isRecord(inner) && NEVER_SENT.has(inner["code"]);
}

/** Half a second, one, two ... and never before `Retry-After`; spread, so that a crowd does not come back at once. */
export function waitMs(error: BehestError, attempt: number, random: () => number): number {
  const backoff = Math.min(500 * 2 ** attempt, 8_000);
  return Math.max(backoff, (error.retryAfter ?? 0) * 1000) * (1 + random() / 4);
}

async function sendOnce<T>(call: HttpCall, settings: HttpSettings, read: Read<T>): Promise<T> {
  if (call.signal?.aborted) throw new BehestAbortError(call.signal);
  const own = new AbortController();
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    own.abort();
  }, call.timeoutMs);
  let response: Response | undefined;
  try {
    response = await settings.fetch(call.url, {
      method: call.method,
      headers: call.headers,
      body: call.body ?? null,
      // The caller's own signal stays with a stream; ours ends with what is read here.
      signal: call.signal ? AbortSignal.any([call.signal, own.signal]) : own.signal,
    });
    if (response.ok) return await read(response);
    // Awaited here: an error's body has no more time than another one.
    const error = await errorOfResponse(response);
    throw call.signal?.aborted ? new BehestAbortError(call.signal) : error;
  } catch (cause) {
    if (cause instanceof BehestError) throw cause;
    if (call.signal?.aborted) throw new BehestAbortError(call.signal);
    const host = hostOf(call.url);
    if (late) throw new BehestConnectionError(`${host} gave no answer within ${call.timeoutMs} ms.`, { code: "timeout", cause });
    const happened = response ? "broke off its answer" : "could not be reached";
    throw new BehestConnectionError(`${host} ${happened}: ${reasonOf(cause)}`, { code: "connection_error", cause });
  } finally {
    clearTimeout(timer);
  }
}

async function errorOfResponse(response: Response): Promise<BehestError> {
  const facts: ErrorFacts = { ...factsOfHeaders(response.headers), status: response.status };
  // A proxy's page, or nothing: the status says enough.
  return errorOfEnvelope(jsonOf(await response.text().catch(() => "")), facts);
}

/** `undefined` is no JSON. */
export function jsonOf(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

export function reasonOf(cause: unknown): string {
  if (!(cause instanceof Error)) return String(cause);
  const inner = cause.cause; // Node's fetch says "fetch failed" and keeps the reason inside
  return inner instanceof Error && inner.message ? inner.message : cause.message;
}

function hostOf(url: string): string {
  try {
    return new URL(url).origin;
  } catch {
    return url;
  }
}

/** Waits; an abort ends the wait with an `AbortError`. */
export function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) {
      reject(new BehestAbortError(signal));
      return;
    }
    const abort = (): void => {
      clearTimeout(timer);
      reject(new BehestAbortError(signal));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", abort);
      resolve();
    }, ms);
    signal?.addEventListener("abort", abort, { once: true });
  });
}
