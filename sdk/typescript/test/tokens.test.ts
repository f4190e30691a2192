import { generateKeyPairSync, createPublicKey, verify } from "node:crypto";

import { describe, expect, it } from "vitest";

import { Behest, BehestAuthError, BehestConfigError } from "../src/index.js";
import { failed, Gateway, json, minted, type Answer } from "./gateway.js";

const KEY = "behest_sk_live_" + "0".repeat(32);
const MODELS = json(200, { data: [] });

class Clock {
  ms = 1_700_000_000_000;
  readonly now = (): number => this.ms;
}

/** A gateway that mints `t1`, `t2` ... and counts. */
function minting(clock: Clock, ttl = 3600, mint?: (number: number) => Answer | undefined): { gateway: Gateway; mints: () => number; behest: Behest } {
  let mints = 0;
  const gateway = new Gateway((seen, signal) => {
    if (seen.path !== "/v1/auth/mint") return MODELS(seen, signal);
    mints += 1;
    return (mint?.(mints) ?? minted(`t.${mints}.x`, ttl))(seen, signal);
  });
  const behest = new Behest({ baseURL: "http://gateway.test", apiKey: KEY, fetch: gateway.fetch, now: clock.now, maxRetries: 0, ttl });
  return { gateway, mints: () => mints, behest };
}

const bearer = (gateway: Gateway): string | null | undefined => gateway.seen.at(-1)?.headers.get("authorization");

describe("minted tokens", () => {
  it("are kept for each user and renewed a minute before they end", async () => {
    const clock = new Clock();
    const { gateway, mints, behest } = minting(clock);
    await behest.models.list({ user_id: "ada" });
    await behest.models.list({ user_id: "ada" });
    expect([mints(), bearer(gateway)]).toEqual([1, "Bearer t.1.x"]);
    await behest.models.list({ user_id: "bob" });
    expect(mints()).toBe(2);
    clock.ms += (3600 - 61) * 1000;
    await behest.models.list({ user_id: "ada" });
    expect(mints()).toBe(2);
    clock.ms += 1_000;
    await behest.models.list({ user_id: "ada" });
    expect([mints(), bearer(gateway)]).toEqual([3, "Bearer t.3.x"]);
  });

  it("are asked for once, however many wait", async () => {
    const { mints, behest } = minting(new Clock());
    await Promise.all(Array.from({ length: 50 }, () => behest.models.list({ user_id: "ada" })));
    expect(mints()).toBe(1);
  });

  it("that live for a minute are used for half of it", async () => {
    const clock = new Clock();
    const { mints, behest } = minting(clock, 60);
    await behest.models.list();
    clock.ms += 29_000;
    await behest.models.list();
    expect(mints()).toBe(1);
    clock.ms += 2_000;
    await behest.models.list();
    expect(mints()).toBe(2);
  });

  it("that still count are used while the gateway cannot mint; a refusal is told", async () => {
    const clock = new Clock();
    let answer: Answer | undefined;
    const { gateway, behest } = minting(clock, 3600, (number) => (number === 1 ? undefined : answer));
    await behest.models.list();
    clock.ms += 3_550_000;
    answer = failed(503, "ledger_unavailable");
    await behest.models.list();
    expect(bearer(gateway)).toBe("Bearer t.1.x");
    answer = failed(401, "invalid_token");
    await expect(behest.models.list()).rejects.toBeInstanceOf(BehestAuthError);
    answer = failed(503, "ledger_unavailable");
    clock.ms += 50_000;
    await expect(behest.models.list()).rejects.toMatchObject({ status: 503 });
    answer = minted("t.new.x");
    await behest.models.list();
    expect(bearer(gateway)).toBe("Bearer t.new.x");
  });

  it("that are refused are renewed, once", async () => {
    const refused = failed(401, "invalid_token");
    const gateway = new Gateway(minted("t.1.x"), refused, minted("t.2.x"), MODELS);
    const behest = new Behest({ baseURL: "http://gateway.test", apiKey: KEY, fetch: gateway.fetch });
    await behest.models.list();
    expect(gateway.seen.map((seen) => seen.path)).toEqual(["/v1/auth/mint", "/v1/models", "/v1/auth/mint", "/v1/models"]);
    const never = new Gateway(minted("t.1.x"), refused, minted("t.2.x"), refused);
    await expect(new Behest({ baseURL: "http://gateway.test", apiKey: KEY, fetch: never.fetch }).models.list()).rejects.toBeInstanceOf(BehestAuthError);
    expect(never.seen.length).toBe(4);
  });

  it("ask for a session and tier that are named", async () => {
    const { gateway, mints, behest } = minting(new Clock());
    await behest.chat.completions.create({ messages: [], user_id: "ada", session_id: "s-1", tier: "pro" });
    expect(gateway.seen[0]?.body).toEqual({ user_id: "ada", ttl: 3600, session_id: "s-1", tier: "pro" });
    expect(gateway.seen[1]?.body).toEqual({ messages: [] });
    await behest.chat.completions.create({ messages: [], user_id: "ada", session_id: "s-2", tier: "pro" });
    expect(mints()).toBe(2);
  });
});

describe("tokens of the application's backend", () => {
  const jwt = (exp: number): string => `x.${Buffer.from(JSON.stringify({ exp })).toString("base64url")}.y`;

  it("are asked for when they end, by their own word", async () => {
    const clock = new Clock();
    let asked = 0;
    const gateway = new Gateway(MODELS);
    const getToken = async (): Promise<{ token: string; sessionId: string }> => ({ token: jwt(clock.ms / 1000 + 600), sessionId: `s${++asked}` });
    const behest = new Behest({ baseURL: "http://gateway.test", getToken, fetch: gateway.fetch, now: clock.now });
    await Promise.all([behest.models.list(), behest.models.list()]);
    expect(asked).toBe(1);
    clock.ms += 541_000;
    await behest.models.list();
    expect([asked, gateway.seen.at(-1)?.headers.get("x-session-id")]).toEqual([2, "s2"]);
  });

  it("are for one user", async () => {
    const behest = new Behest({ baseURL: "http://gateway.test", getToken: () => "a.b.c", fetch: new Gateway(MODELS).fetch });
    await expect(behest.models.list({ user_id: "ada" })).rejects.toBeInstanceOf(BehestConfigError);
  });
});

describe("signed tokens", () => {
  const { privateKey, publicKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });
  const pkcs8 = privateKey.export({ type: "pkcs8", format: "pem" }) as string;
  const pkcs1 = privateKey.export({ type: "pkcs1", format: "pem" }) as string;

  it.each([
    ["PKCS #8", pkcs8],
    ["PKCS #1", pkcs1],
    ["base64 of it", Buffer.from(pkcs8).toString("base64")],
    ["behest_pk_ and PEM", `behest_pk_${pkcs8}`],
    ["one line", pkcs8.replaceAll("\n", "\\n")],
  ])("of %s are RS256 with the claims in their order", async (_name, apiKey) => {
    const clock = new Clock();
    const gateway = new Gateway(MODELS);
    const signing = { tenantId: "demo", projectId: "default/demo", kid: "k-1", issuer: "https://api.behest.ai", tier: "2" };
    const behest = new Behest({ baseURL: "http://gateway.test", apiKey, fetch: gateway.fetch, now: clock.now, ...signing });
    await behest.models.list({ user_id: "ada" });
    const token = bearer(gateway)?.replace("Bearer ", "") ?? "";
    const [header = "", payload = "", signature = ""] = token.split(".");
    expect(verify("sha256", Buffer.from(`${header}.${payload}`), createPublicKey(publicKey.export({ type: "spki", format: "pem" })), Buffer.from(signature, "base64url"))).toBe(true);
    expect(JSON.parse(Buffer.from(header, "base64url").toString())).toEqual({ alg: "RS256", typ: "JWT", kid: "k-1" });
    const claims = JSON.parse(Buffer.from(payload, "base64url").toString()) as Record<string, unknown>;
    expect(Object.keys(claims)).toEqual(["tid", "pid", "uid", "role", "scp", "iss", "aud", "iat", "nbf", "exp", "jti", "sid", "tier"]);
    expect(claims).toMatchObject({ tid: "demo", pid: "default/demo", uid: "ada", role: "user", iss: "https://api.behest.ai", aud: "behest", iat: clock.ms / 1000, exp: clock.ms / 1000 + 3600, tier: 2 });
    expect(gateway.seen[0]?.headers.get("x-session-id")).toBe(claims["sid"]);
    await behest.models.list({ user_id: "ada" });
    expect(bearer(gateway)).toBe(`Bearer ${token}`);
  });

  it("need an RSA key", async () => {
    const pem = generateKeyPairSync("ed25519").privateKey.export({ type: "pkcs8", format: "pem" }) as string;
    const behest = new Behest({ baseURL: "http://gateway.test", apiKey: pem, tenantId: "t", projectId: "p", kid: "k" });
    await expect(behest.models.list()).rejects.toBeInstanceOf(BehestConfigError);
  });
});
