/// <reference types="vite/client" />
/**
 * A page for the tests in a browser: it runs the snippets of the streaming guide on the unmodified `openai` package, and
 * our own client beside them. A test calls one function of `window.page` for each page that it opens.
 */

import OpenAI from "openai";
import type { ChatCompletionChunk } from "openai/resources/chat/completions";
import { createElement, type ComponentType } from "react";
import { flushSync } from "react-dom";
import { createRoot } from "react-dom/client";

import { Behest, isFatal, streamWithRetry } from "../../src/index.js";
import { markdownToHtml } from "../../src/markdown/index.js";
import { Markdown } from "../../src/react/index.js";
import { DOCUMENTS } from "../documents.js";

/** What a test says: where the gateway is, as whom, and what the simulated provider does. */
interface Given {
  baseURL: string;
  token: string;
  sessionId: string;
  sim?: Record<string, unknown>;
  /** Of a wait between two tries, so that tests are quick. */
  waitsDividedBy?: number;
}

const messages = [{ role: "user" as const, content: "Tell me a story." }];
const modules = import.meta.glob<Record<string, unknown>>(["../live/.made/openai/*.{ts,tsx}", "!**/server.ts"]);
const root = createRoot(document.getElementById("root")!);
const state = { text: "", told: [] as string[], error: "", ended: false, parts: {} as Record<string, unknown> };

/** A `fetch` that tells the simulator what to do: the snippets themselves say nothing of it. */
function simulating(sim: Record<string, unknown>): typeof fetch {
  return (input, init) => {
    if (typeof init?.body !== "string") return fetch(input, init);
    return fetch(input, { ...init, body: JSON.stringify({ ...(JSON.parse(init.body) as object), sim }) });
  };
}

function unmodified({ baseURL, token, sessionId, sim = {} }: Given): OpenAI {
  return new OpenAI({
    apiKey: token,
    baseURL: `${baseURL}/v1`,
    dangerouslyAllowBrowser: true,
    maxRetries: 0,
    defaultHeaders: { "X-Session-Id": sessionId },
    fetch: simulating(sim),
  });
}

const ask = (given: Given, options: OpenAI.RequestOptions = {}): Promise<AsyncIterable<ChatCompletionChunk>> =>
  unmodified(given).chat.completions.create({ model: "gpt-4o-mini", messages, stream: true }, options);

/** Run a snippet, with the names that the guide leaves to its reader. A page can do that once. */
async function snippet(name: string, given: Given, names: Record<string, unknown> = {}): Promise<Record<string, unknown>> {
  const load = modules[`../live/.made/openai/${name}`];
  if (!load) throw new Error(`there is no snippet ${name}`);
  const reader = {
    BEHEST_BASE_URL: given.baseURL,
    messages,
    openai: unmodified(given),
    appendToUI: (text: string) => (state.text += text),
    expose: (parts: Record<string, unknown>) => Object.assign(state.parts, parts),
    fetchBehestToken: async () => given,
    isFatal,
    markdownToHtml,
    render: (chunk: ChatCompletionChunk) => (state.text += chunk.choices[0]?.delta.content ?? ""),
    sleep: (ms: number) => waited(ms, given),
    ...names,
  };
  (globalThis as unknown as { reader: unknown }).reader = reader;
  return load();
}

function waited(ms: number, given: Given): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms / (given.waitsDividedBy ?? 1)));
}

/** Keep how it ended, for the test to look at; it does not wait here. */
function watch(work: Promise<unknown>): void {
  work.catch((error: unknown) => (state.error = String(error))).finally(() => (state.ended = true));
}

const page = {
  state,

  /** "Basic stream": the text. */
  async basic(given: Given): Promise<string> {
    await snippet("basic_stream.ts", given);
    return state.text;
  },

  /** "Cancel a stream": shows the Stop button while the stream runs. */
  async cancel(given: Given): Promise<void> {
    const { Chat } = await snippet("cancel.tsx", given);
    flushSync(() => root.render(createElement(Chat as ComponentType)));
    watch((state.parts["send"] as () => Promise<void>)());
  },

  /** "Cleanup on unmount": a stream runs beside the component; `leave` unmounts it. */
  async unmount(given: Given): Promise<void> {
    const { Leaving } = await snippet("unmount.tsx", given);
    const abortRef = { current: new AbortController() };
    flushSync(() => root.render(createElement(Leaving as ComponentType<{ abortRef: typeof abortRef }>, { abortRef })));
    const stream = await ask(given, { signal: abortRef.current.signal });
    watch(
      (async () => {
        for await (const chunk of stream) state.text += chunk.choices[0]?.delta.content ?? "";
      })(),
    );
  },

  leave(): void {
    root.unmount();
  },

  /** "Reconnect": the text of each connection on its own, over as many as it takes. */
  async reconnect(given: Given, threadId: string, attempts: number): Promise<string[]> {
    const texts: string[] = [""];
    const sleep = (ms: number): Promise<void> => {
      texts.push("");
      return waited(Math.min(ms, 1_000), given);
    };
    const render = (chunk: ChatCompletionChunk): void => {
      texts[texts.length - 1] += chunk.choices[0]?.delta.content ?? "";
    };
    const { streamWithRetry: guided } = await snippet("reconnect.ts", given, { render, sleep });
    await (guided as (...all: unknown[]) => Promise<void>)(unmodified(given), messages, threadId, attempts);
    return texts;
  },

  /** The same with our client, which resumes by the ids of events. */
  async resume(given: Given, threadId: string, attempts: number): Promise<{ text: string; reconnects: number }> {
    const { baseURL, token, sessionId, sim = {} } = given;
    const client = new Behest({ baseURL, getToken: () => ({ token, sessionId, expiresAt: Date.now() + 600_000 }), fetch: simulating(sim) });
    let [text, reconnects] = ["", 0];
    const stream = streamWithRetry(client, { messages }, {
      threadId,
      attempts,
      onReconnect: () => (reconnects += 1),
      sleep: (ms) => waited(ms, given),
    });
    for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
    return { text, reconnects };
  },

  /** "Typewriter smoothing": what was appended, and how much in each call of the snippet's timer. */
  async typewriter(given: Given): Promise<string[]> {
    const appended: string[] = [];
    const names = { stream: await ask(given), appendCharByChar: (text: string) => appended.push(text) };
    const { queue } = await snippet("typewriter.ts", given, names);
    while ((queue as string[]).length > 0) await new Promise((resolve) => setTimeout(resolve, 16));
    return appended;
  },

  /** "Error in the middle of a stream": what the reader was told, and the text before it. */
  async failing(given: Given): Promise<{ told: string[]; text: string; code: unknown; status: unknown }> {
    let error: { code?: unknown; error?: { status?: unknown } } = {};
    const told = (name: string) => (reason: unknown) => {
      state.told.push(name);
      error = typeof reason === "object" ? { ...(reason as object) } : error;
    };
    const stream = await ask(given);
    const kept = async function* (): AsyncGenerator<ChatCompletionChunk> {
      try {
        yield* stream;
      } catch (reason) {
        error = reason as typeof error;
        throw reason;
      }
    };
    const names = { showUpgradeModal: told("upgrade"), backoffToast: told("toast"), renderError: told("error") };
    await snippet("error.ts", given, { ...names, stream: kept() });
    return { told: state.told, text: state.text, code: error.code, status: error.error?.status };
  },

  /** "Progressive rendering": the snippet's component, fed unit by unit; its HTML, and that of the whole text. */
  async progressive(given: Given, source: string): Promise<[string, string]> {
    const { Answer } = await snippet("markdown.tsx", given);
    flushSync(() => root.render(createElement(Answer as ComponentType)));
    for (const unit of source) flushSync(() => (state.parts["loop"] as (delta: string) => void)(unit));
    const whole = document.createElement("div");
    whole.innerHTML = markdownToHtml(source);
    return [document.querySelector("#root > div")!.innerHTML, whole.innerHTML];
  },

  documents: Object.keys(DOCUMENTS),

  /**
   * A document in our renderer, cut behind every byte of its UTF-8: what is wrong, in words. Text that is shown must stay, so it
   * must be a beginning of the text in the end: a mark that vanishes, or a tag that is not one yet, is not.
   */
  cuts(name: string): { cuts: number; wrong: string[] } {
    const bytes = new TextEncoder().encode(DOCUMENTS[name]!);
    const container = document.getElementById("root")!;
    const show = (text: string, streaming: boolean, key: number): void =>
      flushSync(() => root.render(createElement(Markdown, { text, streaming, key })));
    const seen = (): string => container.textContent.replace(/\s+/g, "");
    // Code is shown in pieces, whose bounds say how it came.
    const markup = (): string => container.innerHTML.replace(/<span class="behest-piece">([^<]*)<\/span>/g, "$1");
    show(DOCUMENTS[name]!, false, -1);
    const [end, whole] = [seen(), markup()];
    const wrong: string[] = [];
    for (let cut = 0; cut <= bytes.length; cut++) {
      const decoder = new TextDecoder();
      const first = decoder.decode(bytes.subarray(0, cut), { stream: true });
      show(first, true, cut);
      if (!end.startsWith(seen())) wrong.push(`after byte ${cut}: ${seen().slice(-40)}`);
      show(first + decoder.decode(bytes.subarray(cut)), false, cut);
      if (markup() !== whole) wrong.push(`cut behind byte ${cut}, the end differs`);
    }
    return { cuts: bytes.length + 1, wrong };
  },
};

declare global {
  interface Window {
    page: typeof page;
  }
}
window.page = page;
