/**
 * Makes modules out of the snippets of the streaming guide (`tests/typescript/guide`), which stay as they are written: around
 * them comes what the guide leaves to its reader. For `behest` the package "openai" is this one.
 *
 *     node compose.mjs behest|openai      writes test/live/.made/<client>/
 */

import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const guide = join(here, "../../../../tests/typescript/guide");

/** `at`: what is put before a line of the snippet, which itself stays as it is. */
export const SNIPPETS = {
  "basic_stream.ts": {
    before: 'import { appendToUI, BEHEST_BASE_URL, fetchBehestToken, messages } from "./reader.js";\n',
    after: "export {};\n",
  },
  "cancel.tsx": {
    before:
      'import { useRef } from "react";\nimport { expose, messages, openai, render } from "./reader.js";\nexport function Chat() {\n',
    at: ["<button", "expose({ send });\nreturn "],
    after: "}\n",
  },
  "unmount.tsx": {
    before:
      'import { useEffect, type RefObject } from "react";\n' +
      "export function Leaving({ abortRef }: { abortRef: RefObject<AbortController | null> }) {\n",
    after: "return null;\n}\n",
  },
  "reconnect.ts": {
    before: 'import type OpenAI from "openai";\nimport { isFatal, render, sleep, type Msg } from "./reader.js";\n',
    after: "export { streamWithRetry };\n",
  },
  "typewriter.ts": {
    before: 'import { appendCharByChar, stream } from "./reader.js";\n',
    after: "export { flushTimer, queue };\n",
  },
  "error.ts": {
    before: 'import { backoffToast, render, renderError, showUpgradeModal, stream } from "./reader.js";\n',
    after: "export {};\n",
  },
  "markdown.tsx": {
    before:
      'import { useMemo, useState } from "react";\nimport { expose, markdownToHtml } from "./reader.js";\n' +
      "export function Answer() {\n",
    at: ["// In the loop:", "const loop = (delta: string): void => {\n"],
    after: "};\nexpose({ loop });\nreturn <div dangerouslySetInnerHTML={{ __html: rendered }} />;\n}\n",
  },
  "server.ts": { before: 'import { messages, user_id } from "./reader.js";\n', after: "export { out };\n" },
};

/** The names that the guide leaves to its reader; a test gives them by `globalThis.reader`. */
const READER = `
import type OpenAI from "openai";
import type { ChatCompletionChunk } from "openai/resources/chat/completions";

export type Msg = { role: "user"; content: string };
type Stream = AsyncIterable<ChatCompletionChunk>;
interface Reader {
  appendCharByChar(text: string, ms: number): void;
  appendToUI(text: string): void;
  backoffToast(error: unknown): void;
  BEHEST_BASE_URL: string;
  expose(parts: Record<string, unknown>): void;
  fetchBehestToken(): Promise<{ token: string; sessionId: string }>;
  isFatal(error: unknown): boolean;
  markdownToHtml(source: string): string;
  messages: Msg[];
  openai: OpenAI;
  render(chunk: ChatCompletionChunk): void;
  renderError(text: string): void;
  showUpgradeModal(error: unknown): void;
  sleep(ms: number): Promise<void>;
  stream: Stream;
  user_id: string;
}
export const {
  appendCharByChar, appendToUI, backoffToast, BEHEST_BASE_URL, expose, fetchBehestToken, isFatal, markdownToHtml, messages,
  openai, render, renderError, showUpgradeModal, sleep, stream, user_id,
} = (globalThis as unknown as { reader: Reader }).reader;
`;

const TYPES_OF_OURS = 'import type { ChatCompletionChunk } from "@behest/client-ts";';

/** Write the modules, and a tsconfig that checks them. */
export function compose(client) {
  const folder = join(here, ".made", client);
  mkdirSync(folder, { recursive: true });
  const types = 'import type { ChatCompletionChunk } from "openai/resources/chat/completions";';
  writeFileSync(join(folder, "reader.ts"), client === "behest" ? READER.replace(types, TYPES_OF_OURS) : READER);
  for (const [name, { before, at, after }] of Object.entries(SNIPPETS)) {
    let text = readFileSync(join(guide, name), "utf8");
    if (at) text = text.replace(at[0], at[1] + at[0]);
    writeFileSync(join(folder, name), before + text + after);
  }
  const ours = ["../../../../dist/index.d.ts"];
  const paths = { "@behest/client-ts": ours, ...(client === "behest" ? { openai: ours } : {}) };
  const compilerOptions = { module: "ESNext", moduleResolution: "Bundler", paths, noUnusedLocals: false, noEmit: true };
  const config = { extends: "../../../../tsconfig.json", compilerOptions, include: ["."] };
  writeFileSync(join(folder, "tsconfig.json"), JSON.stringify(config, null, 2));
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) compose(process.argv[2] ?? "behest");
