/** The snippets of the streaming guide, as they are written, against a running gateway. */

import "./dom.js";

import { act, cleanup, fireEvent, render as show } from "@testing-library/react";
import OpenAI from "openai";
import type { ComponentType } from "react";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";

import { isFatal } from "../../src/index.js";
import { markdownToHtml } from "../../src/markdown/index.js";
import { BASE_URL, messages, newUser, POOR_KEY, RICH_KEY, simulating, textOf, tokenFor, until, type Chunk } from "./system.js";

const CLIENT = process.env["CLIENT"] === "openai" ? "openai" : "behest";
const isOurs = CLIENT === "behest";

interface Reader {
  [name: string]: unknown;
  parts: Record<string, unknown>;
  text: string;
}

let reader: Reader;

/** Run a snippet: a fresh module, with the reader's names as the test gives them. */
async function run(name: string, names: Record<string, unknown> = {}): Promise<Record<string, unknown>> {
  Object.assign(reader, names);
  vi.resetModules();
  return (await import(/* @vite-ignore */ `./.made/${CLIENT}/${name}`)) as Record<string, unknown>;
}

async function client(sim: Record<string, unknown> = {}, key = RICH_KEY): Promise<OpenAI> {
  const { token } = await tokenFor(newUser(), key);
  return new OpenAI({ apiKey: token, baseURL: `${BASE_URL}/v1`, dangerouslyAllowBrowser: true, fetch: simulating(sim), maxRetries: 0 });
}

const ask = async (made: OpenAI, more = {}): Promise<AsyncIterable<Chunk>> =>
  (await made.chat.completions.create({ model: "gpt-4o-mini", messages, stream: true, ...more })) as unknown as AsyncIterable<Chunk>;

beforeEach(() => {
  reader = {
    parts: {},
    text: "",
    BEHEST_BASE_URL: BASE_URL,
    messages,
    appendToUI: (text: string) => (reader.text += text),
    expose: (parts: Record<string, unknown>) => Object.assign(reader.parts, parts),
    fetchBehestToken: () => tokenFor(newUser()),
    isFatal,
    markdownToHtml,
    render: (chunk: Chunk) => (reader.text += chunk.choices[0]?.delta.content ?? ""),
    sleep: (ms: number) => new Promise((resolve) => setTimeout(resolve, ms / 10)),
  };
  (globalThis as unknown as { reader: Reader }).reader = reader;
});
afterEach(cleanup);

it("Basic stream", async () => {
  await run("basic_stream.ts");
  expect(reader.text).toMatch(/^This is simulated text/);
  expect(reader.text.length).toBeGreaterThan(100);
});

describe("Cancel a stream", () => {
  const slow = { output_tokens: 5000, chunk_interval_ms: 5 };

  it("stops by the button, in the middle", async () => {
    const { Chat } = await run("cancel.tsx", { openai: await client(slow) });
    const Component = Chat as ComponentType;
    const { getByText } = show(<Component />);
    const sent = (reader.parts["send"] as () => Promise<void>)();
    await until(() => reader.text.length > 30);
    fireEvent.click(getByText("Stop"));
    await sent; // the snippet takes an AbortError for the user's wish, and the end of the loop as well
    const length = reader.text.length;
    await new Promise((resolve) => setTimeout(resolve, 100));
    expect(reader.text.length).toBe(length);
  });

  it("before the first byte: an AbortError of ours, an APIUserAbortError of the openai package", async () => {
    const abort = new AbortController();
    const made = await client({ head_delay_ms: 5000 });
    const work = made.chat.completions.create({ model: "gpt-4o-mini", messages, stream: true }, { signal: abort.signal });
    setTimeout(() => abort.abort(), 50);
    const error = await work.then(() => undefined, (reason: Error) => reason);
    expect(error?.constructor.name).toBe(isOurs ? "BehestAbortError" : "APIUserAbortError");
    expect(error?.name === "AbortError").toBe(isOurs);
  });

  it("later: an AbortError of ours, a silent end of the openai package", async () => {
    const abort = new AbortController();
    const made = await client(slow);
    const stream = await made.chat.completions.create({ model: "gpt-4o-mini", messages, stream: true }, { signal: abort.signal });
    const error = await (async () => {
      for await (const _ of stream) abort.abort();
    })().then(() => undefined, (reason: Error) => reason);
    expect(error?.name).toBe(isOurs ? "AbortError" : undefined);
  });
});

it("Cleanup on unmount", async () => {
  const { Leaving } = await run("unmount.tsx");
  const Component = Leaving as ComponentType<{ abortRef: { current: AbortController } }>;
  const abortRef = { current: new AbortController() };
  const made = await client({ output_tokens: 5000, chunk_interval_ms: 5 });
  const stream = await made.chat.completions.create({ model: "gpt-4o-mini", messages, stream: true }, { signal: abortRef.current.signal });
  const { unmount } = show(<Component abortRef={abortRef} />);
  let chunks = 0;
  const read = (async () => {
    for await (const _ of stream) if (++chunks === 5) unmount();
  })().catch((error: Error) => error.name);
  expect(await read).toBe(isOurs ? "AbortError" : undefined);
  expect(chunks).toBeLessThan(1000); // of 5000: what has arrived already may still be given out, and a busy machine is late
});

describe("Reconnect", () => {
  type Retry = (openai: OpenAI, said: typeof messages, threadId: string, attempts?: number) => Promise<void>;

  it("asks once where all goes well", async () => {
    const { streamWithRetry } = await run("reconnect.ts");
    await (streamWithRetry as Retry)(await client({ output_tokens: 20 }), messages, newUser());
    expect(reader.text).toMatch(/^This is simulated text/);
  });

  it("tries again after 5xx, and not after 402", async () => {
    const { streamWithRetry } = await run("reconnect.ts");
    let calls = 0;
    const counting = (status: number) => async (): Promise<Response> => {
      calls += 1;
      return new Response(JSON.stringify({ error: { code: "x", message: "m" } }), { status, headers: { "x-should-retry": "false" } });
    };
    for (const [status, expected] of [[503, 3], [402, 1]] as const) {
      calls = 0;
      const made = new OpenAI({ apiKey: "a.b.c", baseURL: BASE_URL, dangerouslyAllowBrowser: true, fetch: counting(status), maxRetries: 0 });
      await expect((streamWithRetry as Retry)(made, messages, "t")).rejects.toMatchObject({ status });
      expect(calls).toBe(expected);
    }
  });
});

it("Typewriter smoothing", async () => {
  const made = await client({ output_tokens: 30 });
  const whole = await textOf(await ask(made));
  const appended: string[] = [];
  const names = { stream: await ask(made), appendCharByChar: (text: string, ms: number) => appended.push(text) && expect(ms).toBe(8) };
  const { flushTimer, queue } = await run("typewriter.ts", names);
  await until(() => (queue as string[]).length === 0);
  clearInterval(flushTimer as ReturnType<typeof setInterval>);
  expect(appended.join("")).toBe(whole);
});

describe("Error in the middle of a stream", () => {
  it("402 opens the upgrade dialog with what came before it still there", async () => {
    const poor = await client({ output_tokens: 4000 }, POOR_KEY);
    const told: string[] = [];
    let error: unknown;
    await run("error.ts", {
      stream: await ask(poor),
      showUpgradeModal: (reason: unknown) => told.push("upgrade") && (error = reason),
      backoffToast: () => told.push("toast"),
      renderError: () => told.push("error"),
    });
    expect(reader.text).toMatch(/^This is simulated text/);
    // The openai package leaves `status` empty here: there one has to look at `code`.
    expect(told).toEqual([isOurs ? "upgrade" : "error"]);
    if (isOurs) expect(error).toMatchObject({ name: "BehestQuotaError", status: 402, code: "quota_exceeded", traceId: expect.any(String) as string });
  });

  it("has its code and, inside, its status in the openai package too", async () => {
    const poor = await client({ output_tokens: 4000 }, POOR_KEY);
    const error = await textOf(await ask(poor)).then(() => undefined, (reason: unknown) => reason as Record<string, unknown>);
    expect(error?.["code"]).toBe("quota_exceeded");
    expect(error?.["status"]).toBe(isOurs ? 402 : undefined);
    if (!isOurs) expect(error?.["error"]).toMatchObject({ status: 402 });
  });
});

it("Progressive rendering for Markdown", async () => {
  const { Answer } = await run("markdown.tsx");
  const Component = Answer as ComponentType;
  const { container } = show(<Component />);
  const loop = reader.parts["loop"] as (delta: string) => void;
  const text = "# Title\n\nSome `code` and **bold** <b>text</b>.\n";
  for (const unit of text) act(() => loop(unit));
  expect(container.innerHTML).toBe(`<div>${markdownToHtml(text)}</div>`);
});

it("Server-to-server streaming", async () => {
  vi.stubGlobal("window", undefined); // a server has none
  const { out } = await run("server.ts", { user_id: newUser() }).finally(() => vi.unstubAllGlobals());
  expect(out).toMatch(/^This is simulated text/);
});
