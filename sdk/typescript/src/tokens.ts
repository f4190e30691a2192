/**
 * Where tokens come from: minted with an API key, signed here, fetched by the application, or given. Tokens are kept
 * for each user and renewed a minute before they end; however many calls wait, one of them asks.
 */

import { BehestConfigError, BehestError, isRecord } from "./errors.js";

/** For whom a token is. */
export interface Who {
  userId?: string | undefined;
  sessionId?: string | undefined;
  tier?: number | string | undefined;
}

/** A token and what is known of it. */
export interface Token {
  token: string;
  /** Sent as `X-Session-Id`. */
  sessionId?: string | undefined;
  /** Milliseconds since 1970; absent: the token's own `exp`. */
  expiresAt?: number | undefined;
}

export interface TokenSource {
  /** A token that counts for at least a while. */
  get(who: Who): Promise<Token>;
  /** Forget this token: the gateway refused it. Says whether another one can be had. */
  drop(who: Who, token: string): boolean;
}

const RENEW_BEFORE_MS = 60_000;
/** Beyond so many users the one that was not asked for longest is forgotten. */
const KEPT_MAX = 10_000;

interface Kept {
  current: Token | undefined;
  renewAt: number;
  expiresAt: number;
  renewing: Promise<Token> | undefined;
}

/** Tokens by user, session and tier. */
export class KeptTokens implements TokenSource {
  readonly #fetch: (who: Who) => Promise<Token>;
  readonly #now: () => number;
  readonly #kept = new Map<string, Kept>();

  constructor(fetch: (who: Who) => Promise<Token>, now: () => number = Date.now) {
    this.#fetch = fetch;
    this.#now = now;
  }

  async get(who: Who): Promise<Token> {
    const kept = this.#entry(keyOf(who));
    const now = this.#now();
    if (kept.current && now < kept.renewAt) return kept.current;
    kept.renewing ??= this.#renew(who, kept);
    try {
      return await kept.renewing;
    } catch (error) {
      // While the old one still counts, a gateway that cannot mint at the moment stops nobody.
      const mayPass = !(error instanceof BehestError) || error.status === undefined || error.status >= 429;
      if (kept.current && mayPass && this.#now() < kept.expiresAt - 1_000) return kept.current;
      throw error;
    }
  }

  drop(who: Who, token: string): boolean {
    const kept = this.#kept.get(keyOf(who));
    if (kept?.current?.token === token) kept.current = undefined;
    return true;
  }

  async #renew(who: Who, kept: Kept): Promise<Token> {
    try {
      const token = await this.#fetch(who);
      kept.expiresAt = token.expiresAt ?? expiryOf(token.token) ?? Number.POSITIVE_INFINITY;
      // One that lives for a minute would be renewed for every call: it is used for half of its life.
      kept.renewAt = kept.expiresAt - Math.min(RENEW_BEFORE_MS, (kept.expiresAt - this.#now()) / 2);
      kept.current = token;
      return token;
    } finally {
      kept.renewing = undefined;
    }
  }

  #entry(key: string): Kept {
    let kept = this.#kept.get(key);
    if (kept) this.#kept.delete(key);
    else kept = { current: undefined, renewAt: 0, expiresAt: 0, renewing: undefined };
    this.#kept.set(key, kept); // a Map keeps the order of insertion: the first is the one asked for longest ago
    if (this.#kept.size > KEPT_MAX) {
      const oldest = this.#kept.keys().next();
      if (!oldest.done) this.#kept.delete(oldest.value);
    }
    return kept;
  }
}

/** One token that somebody else made: it is for one user, and when it ends, it ends. */
export class GivenToken implements TokenSource {
  readonly #token: Token;

  constructor(token: Token) {
    this.#token = token;
  }

  get(who: Who): Promise<Token> {
    refuseUsers(who, "a token");
    return Promise.resolve(this.#token);
  }

  drop(): boolean {
    return false;
  }
}

/** What the application's backend answers: a token, or an object with one under any of its usual names. */
export type TokenAnswer =
  | string
  | {
      token?: string;
      jwt?: string;
      access_token?: string;
      sessionId?: string;
      session_id?: string;
      /** Milliseconds since 1970, a `Date`, or RFC 3339. */
      expiresAt?: number | string | Date;
    };

/** Tokens by the application's own function. */
export function providedTokens(getToken: () => Promise<TokenAnswer> | TokenAnswer, now?: () => number): TokenSource {
  const tokens = new KeptTokens(async () => {
    const answer = await getToken();
    if (typeof answer === "string") return { token: answer };
    const token = answer.token ?? answer.jwt ?? answer.access_token;
    if (!token) throw new BehestConfigError("getToken answered without `token`.");
    const { expiresAt } = answer;
    const sessionId = answer.sessionId ?? answer.session_id;
    return { token, sessionId, expiresAt: expiresAt === undefined ? undefined : new Date(expiresAt).getTime() };
  }, now);
  return {
    get: (who) => {
      refuseUsers(who, "getToken");
      return tokens.get({});
    },
    drop: (_who, token) => tokens.drop({}, token),
  };
}

function refuseUsers(who: Who, what: string): void {
  if (who.userId === undefined && who.tier === undefined) return;
  throw new BehestConfigError(`user_id and tier need an API key or a signing key: ${what} is for one user already.`);
}

function keyOf(who: Who): string {
  return JSON.stringify([who.userId, who.sessionId, who.tier]);
}

/** When a JWT ends, by its own word (nothing is verified here), in milliseconds since 1970. */
export function expiryOf(token: string): number | undefined {
  try {
    const payload = (token.split(".")[1] ?? "").replaceAll("-", "+").replaceAll("_", "/");
    const claims: unknown = JSON.parse(atob(payload));
    return isRecord(claims) && typeof claims["exp"] === "number" ? claims["exp"] * 1000 : undefined;
  } catch {
    return undefined;
  }
}
