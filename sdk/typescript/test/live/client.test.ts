/** This client against a running gateway. */

import { createServer, request as httpRequest, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { afterAll, describe, expect, it } from "vitest";

import { BehestAuthError, BehestBadRequestError, BehestConnectionError, BehestQuotaError, BehestServerError, streamWithRetry } from "@behest/client-ts";
import { BASE_URL, behest, messages, newUser, POOR_KEY, textOf, until } from "./system.js";

const servers: Server[] = [];
afterAll(() => servers.forEach((server) => server.close()));

/** A network that breaks: each answer is cut after so many bytes, while there are numbers. */
async function cutting(cuts: number[]): Promise<string> {
  const server = createServer((incoming: IncomingMessage, outgoing: ServerResponse) => {
    const onward = httpRequest(BASE_URL + (incoming.url ?? ""), { method: incoming.method, headers: { ...incoming.headers, host: new URL(BASE_URL).host } }, (answer) => {
      let left = incoming.url === "/v1/chat/completions" ? cuts.shift() : undefined;
      outgoing.writeHead(answer.statusCode ?? 502, answer.headers);
      let isCut = false;
      answer.on("data", (bytes: Buffer) => {
        if (isCut) return;
        outgoing.write(left === undefined ? bytes : bytes.subarray(0, left));
        if (left !== undefined && (left -= bytes.length) <= 0) {
          isCut = true;
          onward.destroy();
          setTimeout(() => outgoing.destroy(), 5);
        }
      });
      answer.on("end", () => outgoing.end());
      answer.on("error", () => outgoing.destroy());
    });
    onward.on("error", () => outgoing.destroy());
    outgoing.on("close", () => onward.destroy());
    incoming.pipe(onward);
  });
  servers.push(server);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

describe("chat", () => {
  it("streams without a model, for a user of its own", async () => {
    const stream = await behest().chat.completions.create({ messages, stream: true, user_id: newUser() });
    expect(await textOf(stream)).toMatch(/^This is simulated text/);
    expect(stream.traceId).toMatch(/^[0-9a-f]{32}$/);
  });

  it("gives a whole answer, and usage with its cost", async () => {
    const client = behest();
    const whole = await client.chat.completions.create({ messages, sim: { output_tokens: 12 } });
    expect(whole.usage?.completion_tokens).toBe(12);
    let cost = 0;
    for await (const chunk of await client.chat.completions.create({ messages, stream: true, stream_options: { include_usage: true } })) {
      cost = chunk.usage?.cost_usd ?? cost;
    }
    expect(cost).toBeGreaterThan(0);
  });
});

describe("errors have their class", () => {
  it("before the stream", async () => {
    const client = behest({ maxRetries: 0 });
    await expect(client.chat.completions.create({ messages, n: 0 })).rejects.toMatchObject({ name: "BehestBadRequestError", status: 400, code: "validation_error", param: "n" });
    await expect(client.chat.completions.create({ messages, n: 0 })).rejects.toBeInstanceOf(BehestBadRequestError);
    await expect(behest({ apiKey: "aaa.bbb.ccc", userId: undefined }).models.list()).rejects.toBeInstanceOf(BehestAuthError);
    await expect(client.threads.get("none")).rejects.toMatchObject({ name: "BehestError", status: 404, code: "not_found" });
    const nowhere = behest({ baseURL: "http://127.0.0.1:9", apiKey: "aaa.bbb.ccc", maxRetries: 0 });
    await expect(nowhere.models.list()).rejects.toBeInstanceOf(BehestConnectionError);
  });

  it.each([
    ["upstream_error", { output_tokens: 20, error_event_after_chunks: 2 }, 502, BehestServerError],
    ["upstream_error", { output_tokens: 20, reset_after_chunks: 2 }, 502, BehestServerError],
  ])("in the middle: %s", async (code, sim, status, type) => {
    const stream = await behest().chat.completions.create({ messages, stream: true, sim });
    const error: unknown = await textOf(stream).then(() => undefined, (reason: unknown) => reason);
    expect(error).toBeInstanceOf(type);
    expect(error).toMatchObject({ code, status, traceId: stream.traceId, requestId: stream.requestId });
  });

  it("at a budget's end, in the middle and then before", async () => {
    const client = behest({ apiKey: POOR_KEY });
    const ask = async (): Promise<string> => textOf(await client.chat.completions.create({ messages, stream: true, sim: { output_tokens: 4000 } }));
    const first: unknown = await ask().catch((reason: unknown) => reason);
    expect(first).toBeInstanceOf(BehestQuotaError);
    expect(first).toMatchObject({ status: 402, details: { unit: "usd" } });
    const second: unknown = await ask().catch((reason: unknown) => reason);
    expect(second).toBeInstanceOf(BehestQuotaError);
    const [budget] = await client.budgets.list();
    expect(Number(budget?.remaining)).toBeLessThan(Number(budget?.limit));
  });
});

describe("what is left and what was used", () => {
  it("budgets, usage, models, threads", async () => {
    const client = behest();
    await client.chat.completions.create({ messages });
    expect((await client.budgets.list()).map((budget) => budget.unit)).toContain("usd");
    expect((await client.models.list()).map((model) => model.id)).toContain("gpt-4o-mini");
    expect(await client.threads.list()).toEqual([]);
    await until(async () => (await client.usage.get({ granularity: "hour", tz: "Europe/Berlin" })).totals.requests === 1);
  });
});

describe("threads", () => {
  it("keep what was said, until they are deleted", async () => {
    const user_id = newUser();
    const client = behest();
    const answer = await client.chat.completions.create({ messages, user_id }, { threadId: "a/b?c" });
    expect(await client.threads.list({ user_id })).toMatchObject([{ id: "a/b?c", messages: 2 }]);
    const said = await client.threads.messages("a/b?c", { user_id });
    expect(said.map(({ id, role, content, complete }) => [id, role, content, complete])).toEqual([
      [1, "user", "Tell me a story.", true],
      [2, "assistant", answer.choices[0]?.message.content, true],
    ]);
    expect(await client.threads.messages("a/b?c", { user_id, before: 2 })).toHaveLength(1);
    await client.threads.delete("a/b?c", { user_id });
    await expect(client.threads.get("a/b?c", { user_id })).rejects.toMatchObject({ status: 404 });
  });
});

describe("streamWithRetry over a network that breaks", () => {
  const sim = { output_tokens: 200, seed: 5, continue_assistant: true };

  it.each([
    ["before the first byte", [0, 0]],
    ["once", [3_000]],
    ["three times, inside of events", [1_111, 2_345, 777]],
    ["near the end", [39_000, 500]],
  ])("%s: the text has no gap and no repetition, and its output is billed once", async (_name, cuts) => {
    const whole = await textOf(await behest().chat.completions.create({ messages, stream: true, sim }));
    const user = newUser();
    const { token } = await behest().tokens.get({ userId: user });
    const client = behest({ baseURL: await cutting([...cuts]), apiKey: token, userId: undefined });
    const sleep = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 50));
    expect(await textOf(streamWithRetry(client, { messages, sim }, { threadId: newUser(), sleep, attempts: 5 }))).toBe(whole);
    await until(async () => (await client.usage.get()).totals.output_tokens >= 200);
    expect((await client.usage.get()).totals.output_tokens).toBe(200);
  });

  it("an answer that was stopped goes on where it was left", async () => {
    const whole = await textOf(await behest().chat.completions.create({ messages, stream: true, sim }));
    const { token } = await behest().tokens.get({ userId: newUser() });
    const client = behest({ apiKey: token, userId: undefined });
    const threadId = newUser();
    const abort = new AbortController();
    let text = "";
    let lastEventId = "";
    const slow = { ...sim, chunk_interval_ms: 5 };
    const options = { threadId, onEventId: (id: string) => (lastEventId = id) };
    const stopped = (async () => {
      for await (const chunk of streamWithRetry(client, { messages, sim: slow }, { ...options, signal: abort.signal })) {
        text += chunk.choices[0]?.delta.content ?? "";
        if (text.length > 100) abort.abort();
      }
    })();
    await expect(stopped).rejects.toMatchObject({ name: "AbortError" });
    text += await textOf(streamWithRetry(client, { messages, sim: slow }, { ...options, lastEventId }));
    expect(text).toBe(whole);
  });
});
