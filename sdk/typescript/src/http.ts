/** One HTTP call, with its retries before the first byte, its limits of time, and its errors as classes. */

import {
  BehestAbortError,
  BehestConnectionError,
  BehestError,
  errorOfEnvelope,
  factsOfHeaders,
  type ErrorFacts,
} from "./errors.js";

export interface HttpCall {
  method: "GET" | "POST" | "DELETE";
  url: string;
  headers: Headers;
  body?: string | undefined;
  signal?: AbortSignal | undefined;
  /** Further tries before the first byte, of what `mayRetry` allows. */
  retries: number;
  /** Milliseconds until the head of the answer. */
  timeoutMs: number;
}

export interface HttpSettings {
  fetch: typeof globalThis.fetch;
  sleep: (ms: number, signal?: AbortSignal) => Promise<void>;
  random: () => number;
}

const RETRY_AFTER_MAX_S = 60;

/** The answer with its 2xx head. Throws one of the package's errors. */
export async function send(call: HttpCall, settings: HttpSettings): Promise<Response> {
  for (let attempt = 0; ; attempt++) {
    try {
      return await sendOnce(call, settings);
    } catch (error) {
      if (attempt >= call.retries || !(error instanceof BehestError) || !mayRetry(error)) throw error;
      await settings.sleep(waitMs(error, attempt, settings.random), call.signal);
    }
  }
}

/** Whether the same call may be sent once more: the network, 5xx, and 429 that says when. */
export function mayRetry(error: BehestError): boolean {
  if (error instanceof BehestAbortError) return false;
  if (error.shouldRetry !== undefined) return error.shouldRetry && (error.retryAfter ?? 0) <= RETRY_AFTER_MAX_S;
  if (error instanceof BehestConnectionError) return true;
  if (error.status === 429 || error.code === "in_progress") {
    return error.retryAfter !== undefined && error.retryAfter <= RETRY_AFTER_MAX_S;
  }
  return error.status !== undefined && error.status >= 500;
}

/** Half a second, one, two ... and never before `Retry-After`; spread, so that a crowd does not come back at once. */
export function waitMs(error: BehestError, attempt: number, random: () => number): number {
  const backoff = Math.min(500 * 2 ** attempt, 8_000);
  return Math.max(backoff, (error.retryAfter ?? 0) * 1000) * (1 + random() / 4);
}

async function sendOnce(call: HttpCall, settings: HttpSettings): Promise<Response> {
  if (call.signal?.aborted) throw new BehestAbortError(call.signal);
  const own = new AbortController();
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    own.abort();
  }, call.timeoutMs);
  let response: Response;
  try {
    response = await settings.fetch(call.url, {
      method: call.method,
      headers: call.headers,
      body: call.body ?? null,
      // The caller's own signal stays with the body; ours ends with the head.
      signal: call.signal ? AbortSignal.any([call.signal, own.signal]) : own.signal,
    });
    if (response.ok) return response;
  } catch (cause) {
    if (call.signal?.aborted) throw new BehestAbortError(call.signal);
    const what = late ? `no answer within ${call.timeoutMs} ms` : reasonOf(cause);
    const code = late ? "timeout" : "connection_error";
    throw new BehestConnectionError(`${hostOf(call.url)} could not be reached: ${what}`, { code, cause });
  } finally {
    clearTimeout(timer);
  }
  throw await errorOfResponse(response);
}

async function errorOfResponse(response: Response): Promise<BehestError> {
  const facts: ErrorFacts = { ...factsOfHeaders(response.headers), status: response.status };
  let body: unknown;
  try {
    body = JSON.parse(await response.text());
  } catch {
    body = undefined; // a proxy's page, or nothing: the status says enough
  }
  return errorOfEnvelope(body, facts);
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
