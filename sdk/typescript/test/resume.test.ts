import OpenAI from "openai";
import { describe, expect, it } from "vitest";

import { Behest, BehestConfigError, BehestConnectionError, BehestError, BehestRateLimitError, BehestServerError, isFatal, streamWithRetry, type StreamWithRetryOptions } from "../src/index.js";
import { chunk, DONE, event, failed, Gateway, stream, type Answer } from "./gateway.js";

const messages = [{ role: "user" as const, content: "Hello" }];

interface Played {
  text: string;
  waits: number[];
  gateway: Gateway;
  error: unknown;
}

async function play(answers: Answer[], more: Partial<StreamWithRetryOptions> = {}): Promise<Played> {
  const gateway = new Gateway(...answers);
  const behest = new Behest({ baseURL: "http://gateway.test", apiKey: "a.b.c", fetch: gateway.fetch });
  const played: Played = { text: "", waits: [], gateway, error: undefined };
  const sleep = async (ms: number): Promise<void> => void played.waits.push(ms);
  try {
    for await (const piece of streamWithRetry(behest, { messages }, { threadId: "t-1", sleep, random: () => 0, ...more })) {
      played.text += piece.choices[0]?.delta.content ?? "";
    }
  } catch (error) {
    played.error = error;
  }
  return played;
}

const words = Array.from({ length: 40 }, (_, index) => `w${index} `);

/** A gateway with a memory: it sends what comes behind Last-Event-ID, and breaks where it is told, also inside of an event. */
function remembering(breaks: number[]): Answer {
  const last = words.length;
  return (seen, signal) => {
    const after = Number(/-(\d+)$/.exec(seen.headers.get("last-event-id") ?? "")?.[1] ?? 0);
    const events = words.map((word, index) => event(chunk(word, index + 1 === last ? "stop" : null), `g-${index + 1}`)).slice(after);
    const bytes = new TextEncoder().encode(events.join("") + DONE);
    const cut = breaks.shift();
    return stream(cut === undefined ? [bytes] : [bytes.slice(0, cut % bytes.length)], cut === undefined ? "clean" : cut % 2 ? "error" : "clean")(seen, signal);
  };
}

describe("streamWithRetry", () => {
  it("gives the whole text, once, over any cuts", async () => {
    let state = 7;
    for (let round = 0; round < 200; round++) {
      const cuts = Array.from({ length: 1 + (round % 4) }, () => (state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0));
      const played = await play([remembering(cuts)], { attempts: 5 });
      expect(played.error).toBeUndefined();
      expect(played.text).toBe(words.join(""));
    }
  });

  it("asks for ids, names the thread and the place, and waits half a second, then one, then two", async () => {
    const broken = stream([event(chunk("a"), "g-1")], "error");
    const down = failed(503, "draining");
    const played = await play([broken, down, down, stream([event(chunk("b", "stop"), "g-2"), DONE])], { attempts: 3 });
    expect(played.text).toBe("ab");
    expect(played.waits).toEqual([500, 1000, 2000]);
    const sent = played.gateway.seen.map((seen) => [seen.headers.get("x-thread-id"), seen.headers.get("x-event-ids"), seen.headers.get("last-event-id")]);
    expect(sent).toEqual([["t-1", "1", null], ["t-1", "1", "g-1"], ["t-1", "1", "g-1"], ["t-1", "1", "g-1"]]);
    expect(new Set(played.gateway.seen.map((seen) => JSON.stringify(seen.body))).size).toBe(1);
  });

  it("skips what it has, should it come again", async () => {
    const again = stream([event(chunk("a"), "g-1"), event(chunk("b"), "g-2"), event(chunk("c", "stop"), "g-3"), DONE]);
    const played = await play([stream([event(chunk("a"), "g-1"), event(chunk("b"), "g-2")], "error"), again]);
    expect(played.text).toBe("abc");
  });

  it("gives up after so many tries without a chunk, with the last error; a chunk begins the count anew", async () => {
    const network: Answer = () => { throw new TypeError("fetch failed"); };
    const all = await play([network]);
    expect(all.error).toBeInstanceOf(BehestConnectionError);
    expect(all.gateway.seen.length).toBe(3);
    const slow = await play(words.map((word, index) => stream([event(chunk(word, index + 1 === words.length ? "stop" : null), `g-${index + 1}`)], "error")));
    expect(slow.text).toBe(words.join(""));
  });

  it.each([400, 401, 402, 403, 404, 409, 413])("never repeats %i, before the stream or inside of it", async (status) => {
    const before = await play([failed(status, "some_code")]);
    const inside = await play([stream([event(chunk("a"), "g-1"), event(`{"error":{"code":"x","message":"m","status":${status}},"choices":[]}`, "g-2"), DONE])]);
    for (const played of [before, inside]) expect(played.error).toMatchObject({ status });
    // A refused token is renewed once by the client itself, where it can be: this one cannot.
    expect([before.gateway.seen.length, inside.gateway.seen.length]).toEqual([1, 1]);
    expect(inside.text).toBe("a");
  });

  it("repeats 429 only after its time", async () => {
    const played = await play([failed(429, "rate_limited", { "retry-after": "9" }), stream([event(chunk("a", "stop")), DONE])]);
    expect([played.text, played.waits]).toEqual(["a", [9000]]);
    expect((await play([failed(429, "rate_limited")])).gateway.seen.length).toBe(1);
  });

  it("repeats an error of the provider inside of the stream", async () => {
    const played = await play([stream([event(chunk("a"), "g-1"), event('{"error":{"code":"upstream_error","message":"m","status":502},"choices":[]}'), DONE]), stream([event(chunk("b", "stop"), "g-2"), DONE])]);
    expect(played.text).toBe("ab");
  });

  it("ends with an abort, also while it waits", async () => {
    const abort = new AbortController();
    const sleep = async (_ms: number, signal?: AbortSignal): Promise<void> => {
      abort.abort();
      signal?.throwIfAborted();
    };
    const played = await play([stream([], "error")], { signal: abort.signal, sleep });
    expect(played.error).toMatchObject({ name: "AbortError" });
    expect(played.gateway.seen.length).toBe(1);
  });

  it("repeats a call that nobody answered under its key, and another one after an answer", async () => {
    const network: Answer = () => { throw new TypeError("fetch failed"); };
    const played = await play([network, network, failed(503, "draining"), stream([event(chunk("a"), "g-1")], "error"), stream([event(chunk("b", "stop"), "g-2"), DONE])], { attempts: 4 });
    expect(played.text).toBe("ab");
    const [first, second, third, fourth, fifth] = played.gateway.seen.map((seen) => seen.headers.get("idempotency-key"));
    expect(first).toMatch(/^[0-9a-f]{32}$/);
    expect([second, third, fourth === first, fifth]).toEqual([first, first, false, null]);
  });

  it.each([undefined, "the-callers-own"])("asks under the same key (%s) while its first call runs elsewhere", async (idempotencyKey) => {
    const network: Answer = () => { throw new TypeError("fetch failed"); };
    const elsewhere = failed(409, "in_progress", { "retry-after": "1" });
    const played = await play([network, elsewhere, stream([event(chunk("a", "stop")), DONE])], idempotencyKey ? { idempotencyKey } : {});
    expect([played.text, played.waits]).toEqual(["a", [500, 1000]]);
    const keys = played.gateway.seen.map((seen) => seen.headers.get("idempotency-key"));
    expect(keys).toEqual(Array(3).fill(idempotencyKey ?? keys[0]));
  });

  it("tells what it does", async () => {
    const told: string[] = [];
    await play([stream([], "error"), stream([event(chunk("a", "stop")), DONE])], {
      onConnect: () => told.push("connected"),
      onReconnect: ({ attempt, delayMs, error }) => told.push(`${attempt} ${delayMs} ${error.code}`),
    });
    expect(told).toEqual(["connected", "1 500 stream_cut", "connected"]);
  });
});

describe("isFatal", () => {
  it.each([
    [new BehestError("x", { status: 409, code: "conflict" }), true],
    [new BehestError("x", { status: 409, code: "in_progress", retryAfter: 1 }), false],
    [new BehestServerError("x", { status: 503 }), false],
    [new BehestRateLimitError("x", { status: 429, retryAfter: 1 }), false],
    [new BehestRateLimitError("x", { status: 429, retryAfter: 1, shouldRetry: false }), true],
    [new BehestRateLimitError("x", { status: 429 }), true],
    [new BehestConnectionError("x"), false],
    [new BehestConfigError("x"), true],
    [new TypeError("Failed to fetch"), false],
    [new RangeError("a mistake"), true],
    [Object.assign(new Error("x"), { status: 402 }), true],
    [Object.assign(new Error("x"), { status: 500 }), false],
    ["nothing", true],
    [new OpenAI.APIConnectionError({ message: "Connection error." }), false],
    [new OpenAI.APIConnectionTimeoutError(), false],
    [new OpenAI.APIUserAbortError(), true],
    [new OpenAI.APIError(undefined, { code: "quota_exceeded", status: 402 }, undefined, undefined), true],
    [new OpenAI.APIError(undefined, { code: "upstream_error", status: 502 }, undefined, undefined), false],
  ])("%o: %s", (error, expected) => expect(isFatal(error)).toBe(expected));
});
