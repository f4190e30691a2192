/** Other people's clients, unmodified: the helpers of the `openai` package, and Vercel's `ai`. */

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { beforeAll, describe, expect, it } from "vitest";

import { BASE_URL, messages, newUser, POOR_KEY, simulating, tokenFor } from "./system.js";

// By its path: under its own name the other tests find this package there.
const { default: OpenAI } = (await import("../../node_modules/openai/index.mjs")) as unknown as typeof import("openai");

describe("openai: chat.completions.stream()", () => {
  it("collects the whole message and its usage", async () => {
    const { token, sessionId } = await tokenFor(newUser());
    const client = new OpenAI({ apiKey: token, baseURL: `${BASE_URL}/v1`, defaultHeaders: { "X-Session-Id": sessionId } });
    const runner = client.chat.completions.stream({ model: "gpt-4o-mini", messages, stream_options: { include_usage: true } });
    let text = "";
    runner.on("content", (delta) => (text += delta));
    expect(await runner.finalContent()).toBe(text);
    expect(text).toMatch(/^This is simulated text/);
    expect((await runner.totalUsage()).completion_tokens).toBe(64);
  });

  it("fails where the stream does", async () => {
    const { token } = await tokenFor(newUser());
    const client = new OpenAI({ apiKey: token, baseURL: `${BASE_URL}/v1`, maxRetries: 0, fetch: simulating({ output_tokens: 20, error_event_after_chunks: 2 }) });
    const runner = client.chat.completions.stream({ model: "gpt-4o-mini", messages });
    await expect(runner.finalContent()).rejects.toMatchObject({ code: "upstream_error" });
  });
});

describe("ai, with @ai-sdk/openai-compatible", () => {
  let model: ReturnType<ReturnType<typeof createOpenAICompatible>>;
  beforeAll(async () => {
    const { token } = await tokenFor(newUser());
    model = createOpenAICompatible({ name: "behest", baseURL: `${BASE_URL}/v1`, apiKey: token, includeUsage: true })("gpt-4o-mini");
  });

  it("streams text and counts tokens", async () => {
    const result = streamText({ model, prompt: "Tell me a story." });
    let text = "";
    for await (const piece of result.textStream) text += piece;
    expect(text).toMatch(/^This is simulated text/);
    expect((await result.usage).outputTokens).toBe(64);
    expect(await result.finishReason).toMatch(/stop|length/);
  });

  it("generates whole text", async () => {
    expect((await generateText({ model, prompt: "Tell me a story." })).text).toMatch(/^This is simulated text/);
  });

  it("sees a budget's end", async () => {
    const { token } = await tokenFor(newUser(), POOR_KEY);
    const poor = createOpenAICompatible({ name: "behest", baseURL: `${BASE_URL}/v1`, apiKey: token, fetch: simulating({ output_tokens: 4000 }) })("gpt-4o-mini");
    const errors: unknown[] = [];
    const result = streamText({ model: poor, prompt: "Tell me a story.", maxRetries: 0, onError: ({ error }) => void errors.push(error) });
    let text = "";
    for await (const piece of result.textStream) text += piece;
    expect(text).toMatch(/^This is simulated text/);
    expect(JSON.stringify(errors)).toContain("quota_exceeded");
  });
});
