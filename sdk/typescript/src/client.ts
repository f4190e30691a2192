/** The client: chat, threads, usage, budgets, models, in browsers and on servers. */

import { BehestConfigError, BehestConnectionError, BehestError, isRecord } from "./errors.js";
import { jsonOf, send, sleep, type HttpSettings, type Read } from "./http.js";
import { TokenSigner } from "./signing.js";
import { ChatStream } from "./stream.js";
import { GivenToken, KeptTokens, providedTokens, type Token, type TokenAnswer, type TokenSource, type Who } from "./tokens.js";
import type {
  Budget,
  ChatCompletion,
  CreateParams,
  CreateParamsStreaming,
  CreateParamsWhole,
  Model,
  Thread,
  ThreadMessage,
  UsageReport,
} from "./types.js";

/** How to reach the gateway, and as whom. On a server everything may come from the environment. */
export interface BehestOptions {
  /** The gateway's address, with or without `/v1`. Environment: `BEHEST_BASE_URL`. */
  baseURL?: string | undefined;
  /** For browsers: asks your backend for a token, whenever one is needed. */
  getToken?: (() => Promise<TokenAnswer> | TokenAnswer) | undefined;
  /** A token; or, on servers only, an API key (`behest_sk_...`) or a private key (PEM). Environment: `BEHEST_KEY`. */
  apiKey?: string | undefined;
  /** Sent as `X-Session-Id`. Where tokens are minted here: the session that is minted. */
  sessionId?: string | undefined;
  /** Whom calls without `user_id` are for (default `default`). Environment: `BEHEST_USER_ID`. */
  userId?: string | undefined;
  /** Seconds for which a minted or signed token counts (default 3600). Environment: `BEHEST_TTL`. */
  ttl?: number | undefined;
  /** Environment: `BEHEST_TIER`. */
  tier?: number | string | undefined;
  /** For signing with a private key. Environment: `BEHEST_KID`, `BEHEST_TENANT_ID`, `BEHEST_PROJECT_ID`. */
  kid?: string | undefined;
  tenantId?: string | undefined;
  projectId?: string | undefined;
  /** Environment: `BEHEST_ISSUER`, `BEHEST_AUDIENCE` (both default to `behest`). */
  issuer?: string | undefined;
  audience?: string | undefined;
  /** Sent with every call. */
  defaultHeaders?: HeadersInit | undefined;
  /** Further tries of a call that failed before its first byte (default 2), where that cannot be charged twice. */
  maxRetries?: number | undefined;
  /** Milliseconds until an answer is here whole, or the head of a stream (default 10 minutes). */
  timeoutMs?: number | undefined;
  /** Milliseconds without a byte until a stream is taken for dead (default 60 000). */
  idleTimeoutMs?: number | undefined;
  fetch?: typeof globalThis.fetch | undefined;
  /** Understood, and not needed: the `openai` package asks for it. */
  dangerouslyAllowBrowser?: boolean | undefined;
  /** For tests: the clock, in milliseconds since 1970. */
  now?: (() => number) | undefined;
}

/** What may be said of one call. */
export interface RequestOptions {
  signal?: AbortSignal | undefined;
  headers?: HeadersInit | undefined;
  maxRetries?: number | undefined;
  timeoutMs?: number | undefined;
  /** Sent as `X-Thread-Id`. */
  threadId?: string | undefined;
  /** Sent as `Last-Event-ID`: the answer begins behind that event. */
  lastEventId?: string | undefined;
  /** Sent as `Idempotency-Key`: the same key and body are billed once, and so repeated also after the network failed. */
  idempotencyKey?: string | undefined;
}

/** A time, as the gateway reads it: RFC 3339, a date, or a `Date`. */
export type When = string | Date;

interface Call {
  method: "GET" | "POST" | "DELETE";
  path: string;
  body?: unknown;
  who?: Who;
  headers?: Record<string, string>;
}

const OWN_MEMBERS = ["user_id", "session_id", "tier", "thread_id"] as const;

/** A client of the gateway. `new Behest()` takes everything from the environment, on a server. */
export class Behest {
  readonly baseURL: string;
  readonly chat: { readonly completions: Completions };
  readonly threads: Threads;
  readonly usage: UsageReports;
  readonly budgets: Budgets;
  readonly models: Models;
  /** The source of this client's tokens: your own calls of other endpoints may use it. */
  readonly tokens: TokenSource;

  readonly #options: BehestOptions;
  readonly #http: HttpSettings;

  constructor(options: BehestOptions = {}) {
    this.#options = options;
    const baseURL = options.baseURL ?? environment("BEHEST_BASE_URL");
    if (!baseURL) throw new BehestConfigError("No address: set BEHEST_BASE_URL, or give baseURL.");
    if (!/^https?:\/\//.test(baseURL)) throw new BehestConfigError(`baseURL ${baseURL} is no http(s) address.`);
    this.baseURL = baseURL.replace(/\/+$/, "").replace(/\/v1$/, "");
    // Called as a method of another object, a browser's fetch refuses to work.
    const fetch = options.fetch ?? ((input, init) => globalThis.fetch(input, init));
    this.#http = { fetch, sleep, random: Math.random };
    this.tokens = this.#tokenSource();
    this.chat = { completions: new Completions(this) };
    this.threads = new Threads(this);
    this.usage = new UsageReports(this);
    this.budgets = new Budgets(this);
    this.models = new Models(this);
  }

  /** @internal One call of an endpoint, with a token; a token that is refused is renewed once. */
  async request<T>(call: Call, options: RequestOptions, read: Read<T>): Promise<T> {
    const who = call.who ?? {};
    for (let renewed = false; ; renewed = true) {
      const token = await this.tokens.get(who);
      try {
        return await this.#send(call, token, options, read);
      } catch (error) {
        const refused = error instanceof BehestError && error.status === 401 && error.code === "invalid_token";
        if (renewed || !refused || !this.tokens.drop(who, token.token)) throw error;
      }
    }
  }

  /** @internal The JSON of an endpoint. */
  async json<T>(call: Call, options: RequestOptions = {}): Promise<T> {
    const answer = jsonOf(await this.request(call, options, textOf));
    if (answer !== undefined) return answer as T;
    throw new BehestConnectionError(`The answer of ${call.method} ${call.path} is not JSON.`, { code: "bad_answer" });
  }

  /** @internal */
  get idleTimeoutMs(): number {
    return this.#options.idleTimeoutMs ?? 60_000;
  }

  #send<T>(call: Call, token: Token, options: RequestOptions, read: Read<T>): Promise<T> {
    const headers = new Headers(this.#options.defaultHeaders);
    headers.set("authorization", `Bearer ${token.token}`);
    headers.set("accept", "application/json, text/event-stream");
    if (call.body !== undefined) headers.set("content-type", "application/json");
    const sessionId = token.sessionId ?? this.#options.sessionId;
    if (sessionId && !headers.has("x-session-id")) headers.set("x-session-id", sessionId);
    for (const [name, value] of Object.entries(call.headers ?? {})) headers.set(name, value);
    new Headers(options.headers).forEach((value, name) => headers.set(name, value));
    return send(
      {
        method: call.method,
        url: this.baseURL + call.path,
        headers,
        body: call.body === undefined ? undefined : JSON.stringify(call.body),
        signal: options.signal,
        isSafe: call.method === "GET" || headers.has("idempotency-key"),
        retries: options.maxRetries ?? this.#options.maxRetries ?? 2,
        timeoutMs: options.timeoutMs ?? this.#options.timeoutMs ?? 600_000,
      },
      this.#http,
      read,
    );
  }

  #tokenSource(): TokenSource {
    const { getToken, now } = this.#options;
    if (getToken) return providedTokens(getToken, now);
    const key = this.#options.apiKey ?? environment("BEHEST_KEY");
    if (!key) {
      throw new BehestConfigError(
        inBrowser() ? "Give getToken, which asks your backend for a token." : "No key: set BEHEST_KEY, or give apiKey.",
      );
    }
    if (/^[\w-]+\.[\w-]+\.[\w-]+$/.test(key)) return new GivenToken({ token: key });
    if (inBrowser()) {
      throw new BehestConfigError(
        "An API key or private key must never reach a browser: give getToken, which asks your backend for a token.",
      );
    }
    if (key.startsWith("behest_sk_")) return new KeptTokens((who) => this.#mint(key, who), now);
    return this.#signing(key);
  }

  #ttl(): number {
    const ttl = this.#options.ttl ?? Number(environment("BEHEST_TTL") ?? 3600);
    if (!Number.isInteger(ttl) || ttl < 60 || ttl > 86_400) {
      throw new BehestConfigError("ttl (BEHEST_TTL) must be whole seconds, 60 to 86400.");
    }
    return ttl;
  }

  #tier(who: Who): number | string | undefined {
    const tier = who.tier ?? this.#options.tier ?? environment("BEHEST_TIER");
    return typeof tier === "string" && /^\d+$/.test(tier) ? Number(tier) : tier;
  }

  #userId(who: Who): string {
    return who.userId ?? this.#options.userId ?? environment("BEHEST_USER_ID") ?? "default";
  }

  #signing(key: string): TokenSource {
    const read = (given: string | undefined, name: string): string => {
      const value = given ?? environment(name);
      if (!value) throw new BehestConfigError(`Signing with a private key needs ${name}.`);
      return value;
    };
    const tenantId = read(this.#options.tenantId, "BEHEST_TENANT_ID");
    const projectId = read(this.#options.projectId, "BEHEST_PROJECT_ID");
    const issuer = this.#options.issuer ?? environment("BEHEST_ISSUER") ?? "behest";
    const audience = this.#options.audience ?? environment("BEHEST_AUDIENCE") ?? "behest";
    const signer = new TokenSigner(key, read(this.#options.kid, "BEHEST_KID"));
    const now = this.#options.now ?? Date.now;
    const ttl = this.#ttl();
    return new KeptTokens(async (who) => {
      const sessionId = who.sessionId ?? this.#options.sessionId ?? crypto.randomUUID();
      const signedAt = now();
      const whom = { userId: this.#userId(who), sessionId, tier: this.#tier(who) };
      const token = await signer.sign({ tenantId, projectId, issuer, audience, ttl, ...whom }, signedAt);
      return { token, sessionId, expiresAt: signedAt + ttl * 1000 };
    }, now);
  }

  async #mint(key: string, who: Who): Promise<Token> {
    const now = this.#options.now ?? Date.now;
    const asked = now();
    const tier = this.#tier(who);
    const sessionId = who.sessionId ?? this.#options.sessionId;
    const ttl = this.#ttl();
    const text = await send(
      {
        method: "POST",
        url: `${this.baseURL}/v1/auth/mint`,
        headers: new Headers({ authorization: `Bearer ${key}`, "content-type": "application/json" }),
        body: JSON.stringify({
          user_id: this.#userId(who),
          ttl,
          ...(sessionId === undefined ? {} : { session_id: sessionId }),
          ...(tier === undefined ? {} : { tier }),
        }),
        isSafe: true,
        retries: this.#options.maxRetries ?? 2,
        timeoutMs: 30_000,
      },
      this.#http,
      textOf,
    );
    const answer = jsonOf(text);
    if (!isRecord(answer) || typeof answer["jwt"] !== "string") {
      throw new BehestConnectionError("The mint endpoint answered without a token.", { code: "bad_answer" });
    }
    const lives = typeof answer["ttl"] === "number" ? answer["ttl"] : ttl;
    const session = typeof answer["session_id"] === "string" ? answer["session_id"] : undefined;
    return { token: answer["jwt"], sessionId: session, expiresAt: asked + lives * 1000 };
  }
}

/** `behest.chat.completions` */
export class Completions {
  readonly #client: Behest;

  constructor(client: Behest) {
    this.#client = client;
  }

  /** Ask. With `stream: true` the promise is kept when the head of the answer is here. */
  create(params: CreateParamsStreaming, options?: RequestOptions): Promise<ChatStream>;
  create(params: CreateParamsWhole, options?: RequestOptions): Promise<ChatCompletion>;
  create(params: CreateParams, options?: RequestOptions): Promise<ChatStream | ChatCompletion>;
  async create(params: CreateParams, options: RequestOptions = {}): Promise<ChatStream | ChatCompletion> {
    const body: Record<string, unknown> = { ...params };
    for (const member of OWN_MEMBERS) delete body[member];
    const threadId = options.threadId ?? params.thread_id;
    const headers: Record<string, string> = {};
    if (threadId) headers["x-thread-id"] = threadId;
    if (options.lastEventId) headers["last-event-id"] = options.lastEventId;
    // Ids are what a resuming call names; without a thread nothing is kept that could be resumed.
    if (params.stream && (threadId || new Headers(options.headers).has("x-thread-id"))) headers["x-event-ids"] = "1";
    if (options.idempotencyKey) headers["idempotency-key"] = options.idempotencyKey;
    const who: Who = { userId: params.user_id, sessionId: params.session_id, tier: params.tier };
    const call = { method: "POST", path: "/v1/chat/completions", body, who, headers } as const;
    if (!params.stream) return this.#client.json<ChatCompletion>(call, options);
    const abandon = new AbortController();
    const signal = options.signal ? AbortSignal.any([options.signal, abandon.signal]) : abandon.signal;
    return new ChatStream(await this.#client.request(call, { ...options, signal }, (response) => response), {
      abandon,
      signal,
      withUsage: params.stream_options?.include_usage === true,
      choices: params.n ?? 1,
      idleTimeoutMs: this.#client.idleTimeoutMs,
    });
  }
}

/** On a server: whose data are asked for. */
export interface For {
  user_id?: string;
  session_id?: string;
}

function whoOf(options?: For): Who {
  return { userId: options?.user_id, sessionId: options?.session_id };
}

/** `behest.threads`: the conversations that the gateway keeps for a user. */
export class Threads {
  readonly #client: Behest;

  constructor(client: Behest) {
    this.#client = client;
  }

  /** The newest first. `before` is the id of the last one of the page before. */
  list(params: For & { limit?: number; before?: string } = {}, options?: RequestOptions): Promise<Thread[]> {
    const path = "/v1/threads" + query({ limit: params.limit, before: params.before });
    return this.#client.json({ method: "GET", path, who: whoOf(params) }, options);
  }

  get(id: string, params?: For, options?: RequestOptions): Promise<Thread> {
    return this.#client.json({ method: "GET", path: threadPath(id), who: whoOf(params) }, options);
  }

  /** The last ones, in their order; `before` is the number of the first one of the page behind. */
  messages(
    id: string,
    params: For & { limit?: number; before?: number } = {},
    options?: RequestOptions,
  ): Promise<ThreadMessage[]> {
    const path = `${threadPath(id)}/messages` + query({ limit: params.limit, before: params.before });
    return this.#client.json({ method: "GET", path, who: whoOf(params) }, options);
  }

  /** Really deletes it. */
  async delete(id: string, params?: For, options?: RequestOptions): Promise<void> {
    await this.#client.request({ method: "DELETE", path: threadPath(id), who: whoOf(params) }, options ?? {}, textOf);
  }
}

function threadPath(id: string): string {
  return `/v1/threads/${encodeURIComponent(id)}`;
}

/** `behest.usage` */
export class UsageReports {
  readonly #client: Behest;

  constructor(client: Behest) {
    this.#client = client;
  }

  /** What was used, in pieces of time. `of_user` is for tokens of a higher role. */
  get(
    params: For & { from?: When; to?: When; granularity?: "minute" | "hour" | "day"; tz?: string; of_user?: string } = {},
    options?: RequestOptions,
  ): Promise<UsageReport> {
    const { from, to, granularity, tz } = params;
    const path = "/v1/usage" + query({ from, to, granularity, tz, user_id: params.of_user });
    return this.#client.json({ method: "GET", path, who: whoOf(params) }, options);
  }
}

/** `behest.budgets` */
export class Budgets {
  readonly #client: Behest;

  constructor(client: Behest) {
    this.#client = client;
  }

  /** The budgets that bind the caller, with what is left of them. */
  async list(params?: For, options?: RequestOptions): Promise<Budget[]> {
    const call = { method: "GET", path: "/v1/budgets", who: whoOf(params) } as const;
    return (await this.#client.json<{ data: Budget[] }>(call, options)).data;
  }
}

/** `behest.models` */
export class Models {
  readonly #client: Behest;

  constructor(client: Behest) {
    this.#client = client;
  }

  /** The models that the project may use. */
  async list(params?: For, options?: RequestOptions): Promise<Model[]> {
    const call = { method: "GET", path: "/v1/models", who: whoOf(params) } as const;
    return (await this.#client.json<{ data: Model[] }>(call, options)).data;
  }
}

function textOf(response: Response): Promise<string> {
  return response.text();
}

function query(members: Record<string, string | number | Date | undefined>): string {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(members)) {
    if (value !== undefined) search.set(name, value instanceof Date ? value.toISOString() : String(value));
  }
  const text = search.toString();
  return text ? `?${text}` : "";
}

function inBrowser(): boolean {
  // A page or one of its workers; Node, Deno, Bun and edge runtimes have neither.
  const globals = globalThis as { window?: { document?: unknown }; importScripts?: unknown };
  return globals.window?.document !== undefined || typeof globals.importScripts === "function";
}

function environment(name: string): string | undefined {
  const { process } = globalThis as { process?: { env?: Record<string, string | undefined> } };
  return process?.env?.[name] || undefined;
}
