/**
 * What can go wrong, as classes. An error before the first byte and one in the middle of a stream have the same class,
 * `status`, `code` and `traceId`: the terminal event of a stream says the status that it would have had.
 */

/** What the gateway says about an error; every member may be absent. */
export interface ErrorFacts {
  /** The HTTP status, or the one that the terminal event of a stream names. */
  status?: number | undefined;
  /** The code of the error, such as `quota_exceeded`. */
  code?: string | undefined;
  /** OpenAI's name for the sort of error, such as `insufficient_quota`. */
  type?: string | undefined;
  /** The member of the request that is at fault. */
  param?: string | undefined;
  /** What the code brings, such as a budget with its limit. */
  details?: Readonly<Record<string, unknown>> | undefined;
  /** The W3C trace id: look for it in your traces. */
  traceId?: string | undefined;
  /** The request's id, which is also its id in the books. */
  requestId?: string | undefined;
  /** Seconds to wait before another try. */
  retryAfter?: number | undefined;
  /** The answer's `x-should-retry`, where it has one. */
  shouldRetry?: boolean | undefined;
  cause?: unknown;
}

/** Every error of this package is one. */
export class BehestError extends Error {
  override name = "BehestError";
  readonly status: number | undefined;
  readonly code: string | undefined;
  readonly type: string | undefined;
  readonly param: string | undefined;
  readonly details: Readonly<Record<string, unknown>> | undefined;
  readonly traceId: string | undefined;
  readonly requestId: string | undefined;
  readonly retryAfter: number | undefined;
  readonly shouldRetry: boolean | undefined;

  constructor(message: string, facts: ErrorFacts = {}) {
    super(message, facts.cause === undefined ? undefined : { cause: facts.cause });
    this.status = facts.status;
    this.code = facts.code;
    this.type = facts.type;
    this.param = facts.param;
    this.details = facts.details;
    this.traceId = facts.traceId;
    this.requestId = facts.requestId;
    this.retryAfter = facts.retryAfter;
    this.shouldRetry = facts.shouldRetry;
  }

  /** `traceId`, as the Python SDK spells it. */
  get trace_id(): string | undefined {
    return this.traceId;
  }

  /** `retryAfter`, as the Python SDK spells it. */
  get retry_after(): number | undefined {
    return this.retryAfter;
  }
}

/** 400, 413, 422: the request is malformed; `param` names the member. */
export class BehestBadRequestError extends BehestError {
  override name = "BehestBadRequestError";
}

/** 401, 403: no token that counts, or one that may not do this. */
export class BehestAuthError extends BehestError {
  override name = "BehestAuthError";
}

/** 402: a budget cannot pay; `details` names it, its limit, what remains and when it begins anew. */
export class BehestQuotaError extends BehestError {
  override name = "BehestQuotaError";
}

/** 429: come again after `retryAfter` seconds. */
export class BehestRateLimitError extends BehestError {
  override name = "BehestRateLimitError";
}

/** 5xx: the gateway or the provider failed. */
export class BehestServerError extends BehestError {
  override name = "BehestServerError";
}

/** The client is set up in a way that cannot work; nothing was sent. */
export class BehestConfigError extends BehestError {
  override name = "BehestConfigError";
}

/** The network failed, or a stream ended without its end (`code` is `stream_cut`). It has no status. */
export class BehestConnectionError extends BehestError {
  override name = "BehestConnectionError";
}

/** The caller's `AbortSignal`. Its name is `AbortError`, or `TimeoutError` where `AbortSignal.timeout` did it. */
export class BehestAbortError extends BehestError {
  override name = "AbortError";

  constructor(signal?: AbortSignal) {
    const reason: unknown = signal?.reason;
    const timedOut = reason instanceof Error && reason.name === "TimeoutError";
    super(timedOut ? "The request took longer than its signal allows." : "The request was aborted.", { cause: reason });
    if (timedOut) this.name = "TimeoutError";
  }
}

/** The class for a status; 404, 405 and 409 are plain `BehestError`s. */
export function errorOf(message: string, facts: ErrorFacts): BehestError {
  const { status } = facts;
  if (status === undefined) return new BehestError(message, facts);
  if (status === 400 || status === 413 || status === 422) return new BehestBadRequestError(message, facts);
  if (status === 401 || status === 403) return new BehestAuthError(message, facts);
  if (status === 402) return new BehestQuotaError(message, facts);
  if (status === 429) return new BehestRateLimitError(message, facts);
  if (status >= 500) return new BehestServerError(message, facts);
  return new BehestError(message, facts);
}

const STATUS_OF_CODE: Readonly<Record<string, number>> = {
  quota_exceeded: 402,
  forbidden: 403,
  rate_limited: 429,
  upstream_error: 502,
  draining: 503,
  ledger_unavailable: 503,
  upstream_timeout: 504,
};

/** What an answer's headers say about its error. */
export function factsOfHeaders(headers: Headers): ErrorFacts {
  const retryAfter = headers.get("retry-after");
  const shouldRetry = headers.get("x-should-retry");
  return {
    traceId: headers.get("x-trace-id") ?? undefined,
    requestId: headers.get("x-request-id") ?? undefined,
    retryAfter: retryAfter !== null && /^\d{1,9}$/.test(retryAfter) ? Number(retryAfter) : undefined,
    shouldRetry: shouldRetry === "true" ? true : shouldRetry === "false" ? false : undefined,
  };
}

/** The error that an envelope (`{"error": {...}}`) tells of; anything else gets a message of its own. */
export function errorOfEnvelope(body: unknown, facts: ErrorFacts): BehestError {
  const error = isRecord(body) && isRecord(body["error"]) ? body["error"] : {};
  const code = text(error["code"]);
  const status = facts.status ?? number(error["status"]) ?? (code === undefined ? undefined : STATUS_OF_CODE[code]);
  const details = isRecord(error["details"]) ? error["details"] : undefined;
  const message = text(error["message"]) ?? `The gateway answered ${status ?? "with an error"}.`;
  return errorOf(message, {
    ...facts,
    status,
    code,
    type: text(error["type"]),
    param: text(error["param"]),
    details,
    retryAfter: facts.retryAfter ?? number(details?.["retry_after"]),
  });
}

export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function text(value: unknown): string | undefined {
  return typeof value === "string" && value !== "" ? value : undefined;
}

function number(value: unknown): number | undefined {
  return typeof value === "number" && Number.isFinite(value) ? value : undefined;
}
