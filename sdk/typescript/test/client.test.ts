import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";

import { afterEach, describe, expect, it, vi } from "vitest";

import Default, {
  Behest,
  BehestAuthError,
  BehestBadRequestError,
  BehestConfigError,
  BehestConnectionError,
  BehestError,
  BehestQuotaError,
  BehestRateLimitError,
  BehestServerError,
  type ChatCompletionChunk,
} from "../src/index.js";
import { chunk, DONE, event, failed, Gateway, json, minted, stream, type Answer } from "./gateway.js";

const messages = [{ role: "user" as const, content: "Hello" }];
const TOKEN = "aaa.bbb.ccc";

function client(gateway: Gateway, more = {}): Behest {
  return new Behest({ baseURL: "http://gateway.test/v1/", apiKey: TOKEN, fetch: gateway.fetch, maxRetries: 0, ...more });
}

async function textOf(chunks: AsyncIterable<ChatCompletionChunk>): Promise<string> {
  let text = "";
  for await (const piece of chunks) text += piece.choices[0]?.delta.content ?? "";
  return text;
}

/** A network that fails as Node's `fetch` tells it; browsers' tell no more than that. */
function network(code?: string): Answer {
  return () => {
    throw new TypeError("fetch failed", code === undefined ? undefined : { cause: Object.assign(new Error(`connect ${code}`), { code }) });
  };
}

/** An answer whose body never ends. */
function stalled(status: number): Answer {
  return (seen, signal) => {
    const { body } = stream(["{"], "never")(seen, signal) as Response;
    return new Response(body, { status });
  };
}

async function failure(work: Promise<unknown>): Promise<BehestError> {
  const error: unknown = await work.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(BehestError);
  return error as BehestError;
}

afterEach(() => vi.unstubAllEnvs());

describe("asking", () => {
  it("sends what it was given, but for its own members, and reads the stream", async () => {
    const gateway = new Gateway(stream([event(chunk("Hel")), event(chunk("lo", "stop")), DONE]));
    const made = await client(gateway).chat.completions.create({ messages, stream: true, temperature: 0.5, sim: { seed: 1 } });
    expect(await textOf(made)).toBe("Hello");
    expect([made.traceId, made.requestId]).toEqual(["trace-1", "request-1"]);
    const [seen] = gateway.seen;
    expect([seen?.method, seen?.path]).toEqual(["POST", "/v1/chat/completions"]);
    expect(seen?.body).toEqual({ messages, stream: true, temperature: 0.5, sim: { seed: 1 } });
    expect(seen?.headers.get("authorization")).toBe(`Bearer ${TOKEN}`);
    expect(seen?.headers.get("x-event-ids")).toBeNull();
  });

  it("names thread, session, place and key in headers, and asks for ids where there is a thread", async () => {
    const gateway = new Gateway(stream([event(chunk("x", "stop")), DONE]));
    const options = { threadId: "t-1", lastEventId: "g-7", idempotencyKey: "k", headers: { "X-Mine": "1" } };
    await client(gateway, { sessionId: "s-1" }).chat.completions.create({ messages, stream: true }, options);
    const headers = gateway.seen[0]?.headers;
    const sent = ["x-thread-id", "last-event-id", "idempotency-key", "x-session-id", "x-event-ids", "x-mine"];
    expect(sent.map((name) => headers?.get(name))).toEqual(["t-1", "g-7", "k", "s-1", "1", "1"]);
  });

  it("gives a whole answer where none is streamed", async () => {
    const answer = { id: "c", choices: [{ index: 0, message: { role: "assistant", content: "Hi" }, finish_reason: "stop" }] };
    const completion = await client(new Gateway(json(200, answer))).chat.completions.create({ messages });
    expect(completion.choices[0]?.message.content).toBe("Hi");
  });

  it("skips chunks without choices unless usage was asked for", async () => {
    const usage = JSON.stringify({ id: "c", choices: [], usage: { prompt_tokens: 1, completion_tokens: 2, total_tokens: 3 } });
    const gateway = new Gateway(stream([event(chunk("a", "stop")), event(usage), DONE]));
    const count = async (more: object): Promise<number> => {
      let seen = 0;
      for await (const _ of await client(gateway).chat.completions.create({ messages, stream: true, ...more })) seen += 1;
      return seen;
    };
    expect(await count({})).toBe(1);
    expect(await count({ stream_options: { include_usage: true } })).toBe(2);
  });

  it("reads threads, usage, budgets and models", async () => {
    const gateway = new Gateway(json(200, [{ id: "a/b" }]), json(200, [{ role: "user", content: "x" }]), () => new Response(null, { status: 204 }), json(200, { totals: {}, breakdown: [] }), json(200, { data: [{ budget: "d" }] }), json(200, { data: [{ id: "m" }] }));
    const behest = client(gateway);
    expect(await behest.threads.list({ limit: 5 })).toEqual([{ id: "a/b" }]);
    expect(await behest.threads.messages("a/b", { before: 9 })).toHaveLength(1);
    await behest.threads.delete("a/b");
    await behest.usage.get({ from: new Date(0), granularity: "day", tz: "Europe/Berlin" });
    expect(await behest.budgets.list()).toEqual([{ budget: "d" }]);
    expect(await behest.models.list()).toEqual([{ id: "m" }]);
    expect(gateway.seen.map((seen) => `${seen.method} ${seen.path}`)).toEqual([
      "GET /v1/threads?limit=5",
      "GET /v1/threads/a%2Fb/messages?before=9",
      "DELETE /v1/threads/a%2Fb",
      "GET /v1/usage?from=1970-01-01T00%3A00%3A00.000Z&granularity=day&tz=Europe%2FBerlin",
      "GET /v1/budgets",
      "GET /v1/models",
    ]);
  });
});

describe("errors", () => {
  it.each([
    [400, "validation_error", BehestBadRequestError],
    [401, "invalid_token", BehestAuthError],
    [402, "quota_exceeded", BehestQuotaError],
    [403, "forbidden", BehestAuthError],
    [404, "not_found", BehestError],
    [409, "conflict", BehestError],
    [413, "request_too_large", BehestBadRequestError],
    [429, "rate_limited", BehestRateLimitError],
    [502, "server_error", BehestServerError],
    [503, "ledger_unavailable", BehestServerError],
    [504, "upstream_timeout", BehestServerError],
  ])("%i %s has its class, before and in the middle of a stream", async (status, code, type) => {
    const headers = { "x-trace-id": "trace-1", "x-request-id": "request-1", "retry-after": "7" };
    const details = { budget: "default/day" };
    const before = await failure(client(new Gateway(failed(status, code, headers, { details }))).chat.completions.create({ messages, stream: true }));
    const terminal = JSON.stringify({ error: { code, message: `${code}!`, type: "t", param: null, details, status }, choices: [] });
    const streamed = new Gateway(stream([event(chunk("so far")), event(terminal), DONE]));
    let text = "";
    const during = await failure(
      (async () => {
        const made = await client(streamed).chat.completions.create({ messages, stream: true });
        for await (const piece of made) text += piece.choices[0]?.delta.content ?? "";
      })(),
    );
    expect(text).toBe("so far");
    for (const error of [before, during]) {
      expect(error).toBeInstanceOf(type);
      expect(error.constructor).toBe(type);
      expect(error.name).toBe(type.name);
      expect([error.status, error.code, error.message]).toEqual([status, code, `${code}!`]);
      expect([error.traceId, error.trace_id, error.requestId]).toEqual(["trace-1", "trace-1", "request-1"]);
      expect(error.details).toEqual(details);
    }
    expect([before.retryAfter, before.retry_after]).toEqual([7, 7]);
  });

  it("knows the status of an event that has only a code, as documents show it", async () => {
    const terminal = '{"error":{"code":"quota_exceeded","message":"..."}}';
    const made = await client(new Gateway(stream([event(terminal), DONE]))).chat.completions.create({ messages, stream: true });
    expect(await failure(textOf(made))).toMatchObject({ name: "BehestQuotaError", status: 402 });
  });

  it("makes something of a proxy's page", async () => {
    const page: Answer = () => new Response("<html>Bad gateway</html>", { status: 502 });
    const error = await failure(client(new Gateway(page)).chat.completions.create({ messages }));
    expect(error).toMatchObject({ name: "BehestServerError", status: 502, code: undefined });
  });

  it.each([
    ["ends early", ["clean", []]],
    ["breaks", ["error", []]],
    ["says no JSON", ["clean", ["data: {nonsense\n\n"]]],
    ["ends inside of an event", ["clean", ["data: " + chunk("x", "stop") + "\n"]]],
  ] as const)("a stream that %s is no success", async (_name, [end, more]) => {
    const gateway = new Gateway(stream([event(chunk("a")), ...more], end));
    const made = await client(gateway).chat.completions.create({ messages, stream: true });
    const error = await failure(textOf(made));
    expect(error).toBeInstanceOf(BehestConnectionError);
    expect(error).toMatchObject({ code: "stream_cut", status: undefined, traceId: "trace-1" });
  });

  it("a clean end behind the finish of every choice is one, without [DONE]", async () => {
    const both = [event(chunk("a", "stop", 0)), event(chunk("b", "stop", 1))];
    const ask = async (pieces: string[]): Promise<string> =>
      textOf(await client(new Gateway(stream(pieces))).chat.completions.create({ messages, stream: true, n: 2 }));
    expect(await ask(both)).toBe("ab");
    expect(await failure(ask(both.slice(0, 1)))).toMatchObject({ code: "stream_cut" });
  });

  it("a connection that says nothing any more is dead", async () => {
    const gateway = new Gateway(stream([event(chunk("a"))], "never"));
    const made = await client(gateway, { idleTimeoutMs: 20 }).chat.completions.create({ messages, stream: true });
    expect(await failure(textOf(made))).toMatchObject({ code: "stream_cut" });
  });
});

it("a stream that is read late is still there: Node cancels the body of an answer that nobody holds", async () => {
  setFlagsFromString("--expose-gc");
  const collect = runInNewContext("gc") as () => void;
  const server = createServer((_request, response) => {
    response.writeHead(200, { "content-type": "text/event-stream" }).write(event(chunk("a")));
    setTimeout(() => response.end(event(chunk("b", "stop")) + DONE), 100);
  });
  await once(server.listen(0, "127.0.0.1"), "listening");
  try {
    const behest = new Behest({ baseURL: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, apiKey: TOKEN });
    const made = await behest.chat.completions.create({ messages, stream: true });
    for (let round = 0; round < 3; round++) {
      await sleep(10);
      collect();
    }
    expect(await textOf(made)).toBe("ab");
  } finally {
    server.close().closeAllConnections();
  }
});

describe("a whole answer", () => {
  it("that stalls is late", async () => {
    const ask = (status: number): Promise<unknown> => client(new Gateway(stalled(status)), { timeoutMs: 20 }).chat.completions.create({ messages });
    expect(await failure(ask(200))).toMatchObject({ name: "BehestConnectionError", code: "timeout" });
    expect(await failure(ask(503))).toMatchObject({ name: "BehestServerError", status: 503 }); // its head said enough
  });

  it("that breaks is a network error, and another try may be whole", async () => {
    const breaks = stream(['{"data": ['], "error");
    expect(await failure(client(new Gateway(breaks)).models.list())).toMatchObject({ name: "BehestConnectionError", code: "connection_error" });
    const again = client(new Gateway(breaks, json(200, { data: [{ id: "m" }] })), { maxRetries: 1 });
    expect(await again.models.list()).toEqual([{ id: "m" }]);
  });

  it("that is no JSON is a bad one, and is not asked for again", async () => {
    const gateway = new Gateway(stream(["<html>"]));
    expect(await failure(client(gateway, { maxRetries: 1 }).models.list())).toMatchObject({ name: "BehestConnectionError", code: "bad_answer" });
    expect(gateway.seen.length).toBe(1);
  });
});

describe("aborting", () => {
  it("is an AbortError before the head", async () => {
    const abort = new AbortController();
    const hangs: Answer = (_seen, signal) => new Promise((_resolve, reject) => signal?.addEventListener("abort", () => reject(signal.reason as Error)));
    const work = client(new Gateway(hangs)).chat.completions.create({ messages, stream: true }, { signal: abort.signal });
    setTimeout(() => abort.abort(), 5);
    expect((await failure(work)).name).toBe("AbortError");
    expect((await failure(client(new Gateway(hangs)).chat.completions.create({ messages }, { signal: abort.signal }))).name).toBe("AbortError");
  });

  it("is an AbortError in the middle, and the request is cancelled", async () => {
    const abort = new AbortController();
    let signalled: AbortSignal | null = null;
    const answer: Answer = (seen, signal) => {
      signalled = signal;
      return stream([event(chunk("a")), event(chunk("b"))], "never")(seen, signal);
    };
    const made = await client(new Gateway(answer)).chat.completions.create({ messages, stream: true }, { signal: abort.signal });
    let seen = "";
    const error = await failure(
      (async () => {
        for await (const piece of made) {
          seen += piece.choices[0]?.delta.content ?? "";
          if (seen === "ab") abort.abort();
        }
      })(),
    );
    expect([seen, error.name, (signalled as AbortSignal | null)?.aborted]).toEqual(["ab", "AbortError", true]);
  });

  it("nothing more is given after the abort, also of what is here already", async () => {
    const abort = new AbortController();
    const gateway = new Gateway(stream([event(chunk("a")) + event(chunk("b")) + event(chunk("c", "stop")) + DONE]));
    const made = await client(gateway).chat.completions.create({ messages, stream: true }, { signal: abort.signal });
    let seen = "";
    await failure(
      (async () => {
        for await (const piece of made) {
          seen += piece.choices[0]?.delta.content ?? "";
          abort.abort();
        }
      })(),
    );
    expect(seen).toBe("a");
  });

  it("by a time is a TimeoutError", async () => {
    const made = await client(new Gateway(stream([event(chunk("a"))], "never"))).chat.completions.create({ messages, stream: true }, { signal: AbortSignal.timeout(20) });
    expect((await failure(textOf(made))).name).toBe("TimeoutError");
  });

  it.each(["before the loop", "inside of the loop"])("of the stream, %s, cancels the request though nobody waits for it", async (when) => {
    let signalled: AbortSignal | null = null;
    const answer: Answer = (seen, signal) => {
      signalled = signal;
      return stream([event(chunk("a"))], "never")(seen, signal);
    };
    const made = await client(new Gateway(answer)).chat.completions.create({ messages, stream: true });
    const isCancelled = (): boolean => (signalled as AbortSignal | null)?.aborted === true;
    if (when === "before the loop") {
      made.abort();
      expect(isCancelled()).toBe(true);
    }
    const error = await failure(
      (async () => {
        for await (const _ of made) {
          made.abort();
          expect(isCancelled()).toBe(true);
        }
      })(),
    );
    expect(error.name).toBe("AbortError");
  });

  it("is an AbortError inside of a whole answer, and of an error's", async () => {
    for (const status of [200, 503]) {
      const abort = new AbortController();
      const work = client(new Gateway(stalled(status))).chat.completions.create({ messages }, { signal: abort.signal });
      setTimeout(() => abort.abort(), 5);
      expect(await failure(work)).toMatchObject({ name: "AbortError" });
    }
  });

  it("leaving the loop cancels the request", async () => {
    let cancelled = false;
    const answer: Answer = () => new Response(new ReadableStream({ pull: (controller) => controller.enqueue(new TextEncoder().encode(event(chunk("a")))), cancel: () => void (cancelled = true) }));
    for await (const _ of await client(new Gateway(answer)).chat.completions.create({ messages, stream: true })) break;
    expect(cancelled).toBe(true);
  });
});

describe("trying again", () => {
  const whole = json(200, { choices: [] });

  it.each([
    ["502", failed(502, "server_error"), 2],
    ["429 that says when", failed(429, "rate_limited", { "retry-after": "0" }), 2],
    ["429 that does not", failed(429, "rate_limited"), 1],
    ["429 for tomorrow", failed(429, "rate_limited", { "retry-after": "40000" }), 1],
    ["503 that must not be", failed(503, "server_error", { "x-should-retry": "false" }), 1],
    ["402", failed(402, "quota_exceeded"), 1],
    ["409", failed(409, "conflict"), 1],
    ["409 in progress", failed(409, "in_progress", { "retry-after": "0" }), 2],
    ["a proxy's page", () => new Response("<html>Gateway timeout</html>", { status: 504 }), 1],
    ["the network", network(), 1],
    ["the network, before anything was sent", network("ECONNREFUSED"), 2],
    ["the network, after it", network("ECONNRESET"), 1],
  ] as const)("%s", async (_name, answer, calls) => {
    const gateway = new Gateway(answer, whole);
    await client(gateway, { maxRetries: 1 }).chat.completions.create({ messages }).catch(() => undefined);
    expect(gateway.seen.length).toBe(calls);
  });

  it.each([
    ["reading", "the network", (behest: Behest) => behest.threads.list(), network(), 2],
    ["reading", "a proxy's page", (behest: Behest) => behest.threads.list(), () => new Response("", { status: 502 }), 2],
    ["deleting", "the network", (behest: Behest) => behest.threads.delete("t"), network(), 1],
    ["asking under a key", "the network", (behest: Behest) => behest.chat.completions.create({ messages }, { idempotencyKey: "k" }), network(), 2],
    ["asking under a key in a header", "the network", (behest: Behest) => behest.chat.completions.create({ messages }, { headers: { "Idempotency-Key": "k" } }), network(), 2],
    ["asking under a key", "a late answer", (behest: Behest) => behest.chat.completions.create({ messages }, { idempotencyKey: "k" }), stalled(200), 2],
    ["asking", "a late answer", (behest: Behest) => behest.chat.completions.create({ messages }), stalled(200), 1],
    ["a stream", "the network", (behest: Behest) => behest.chat.completions.create({ messages, stream: true }), network(), 1],
  ] as const)("%s, %s: what could be paid twice is not repeated", async (_call, _failure, work, answer, calls) => {
    const gateway = new Gateway(answer, whole);
    await work(client(gateway, { maxRetries: 1, timeoutMs: 20 })).catch(() => undefined);
    expect(gateway.seen.length).toBe(calls);
  });

  it("a mint is repeated", async () => {
    const gateway = new Gateway(network(), minted(), json(200, { data: [] }));
    await client(gateway, { apiKey: "behest_sk_live_" + "0".repeat(32), maxRetries: 1 }).models.list();
    expect(gateway.seen.map((seen) => seen.path)).toEqual(["/v1/auth/mint", "/v1/auth/mint", "/v1/models"]);
  });

  it("waits as long as it is told", async () => {
    const gateway = new Gateway(failed(429, "rate_limited", { "retry-after": "1" }), whole);
    const begun = performance.now();
    await client(gateway, { maxRetries: 1 }).chat.completions.create({ messages });
    expect(performance.now() - begun).toBeGreaterThanOrEqual(990);
  });
});

describe("setting up", () => {
  it("takes everything from the environment", async () => {
    vi.stubEnv("BEHEST_KEY", "behest_sk_live_" + "0".repeat(32));
    vi.stubEnv("BEHEST_BASE_URL", "http://gateway.test");
    vi.stubEnv("BEHEST_USER_ID", "somebody");
    vi.stubEnv("BEHEST_TTL", "120");
    vi.stubEnv("BEHEST_TIER", "2");
    const gateway = new Gateway(minted(), json(200, { data: [] }));
    vi.stubGlobal("fetch", gateway.fetch);
    try {
      await new Behest().models.list();
    } finally {
      vi.unstubAllGlobals();
    }
    expect(gateway.seen[0]?.body).toEqual({ user_id: "somebody", ttl: 120, tier: 2 });
    expect(gateway.seen[1]?.headers.get("x-session-id")).toBe("session of a.b.c");
  });

  it.each([
    ["no address", {}, "BEHEST_BASE_URL"],
    ["no http", { baseURL: "ftp://x", apiKey: TOKEN }, "no http(s)"],
    ["no key", { baseURL: "http://x" }, "BEHEST_KEY"],
    ["nonsense for a key", { baseURL: "http://x", apiKey: "nonsense", kid: "k", tenantId: "t", projectId: "p" }, "neither"],
    ["a private key alone", { baseURL: "http://x", apiKey: "-----BEGIN PRIVATE KEY-----" }, "BEHEST_TENANT_ID"],
    ["a ttl out of bounds", { baseURL: "http://x", apiKey: "-----BEGIN PRIVATE KEY-----", tenantId: "t", projectId: "p", kid: "k", ttl: 5 }, "60 to 86400"],
  ])("refuses %s", (_name, options, message) => {
    for (const name of ["BEHEST_KEY", "BEHEST_BASE_URL"]) vi.stubEnv(name, "");
    expect(() => new Behest(options)).toThrow(message);
    expect(() => new Behest(options)).toThrow(BehestConfigError);
  });

  it("lets no API key into a browser", () => {
    vi.stubGlobal("window", { document: {} });
    try {
      expect(() => new Behest({ baseURL: "http://x", apiKey: "behest_sk_live_0" })).toThrow(/browser/);
      expect(() => new Behest({ baseURL: "http://x" })).toThrow(/getToken/);
      expect(new Behest({ baseURL: "http://x", apiKey: TOKEN, dangerouslyAllowBrowser: true }).baseURL).toBe("http://x");
    } finally {
      vi.unstubAllGlobals();
    }
  });

  it("is the default export too", () => expect(Default).toBe(Behest));
});
