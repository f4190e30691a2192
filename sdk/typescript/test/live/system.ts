/** The running gateway, as `make test-sdk` names it, and what several tests do with it. */

import { Behest, type ChatCompletionChunk } from "@behest/client-ts";

function named(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set: these tests are started by \`make test-sdk\``);
  return value;
}

export const BASE_URL = named("BEHEST_BASE_URL");
/** Of a project with money, and of one whose sessions have next to none. */
export const RICH_KEY = named("BEHEST_KEY");
export const POOR_KEY = named("POOR_KEY");
export const messages = [{ role: "user" as const, content: "Tell me a story." }];

let users = 0;

/** A user of nobody else's. */
export function newUser(): string {
  return `user-${process.pid}-${Date.now()}-${++users}`;
}

/** A token as an application's backend hands it out. */
export async function tokenFor(user: string, key = RICH_KEY): Promise<{ token: string; sessionId: string }> {
  const answer = await fetch(`${BASE_URL}/v1/auth/mint`, {
    method: "POST",
    headers: { authorization: `Bearer ${key}`, "content-type": "application/json" },
    body: JSON.stringify({ user_id: user }),
  });
  const { jwt, session_id } = (await answer.json()) as { jwt: string; session_id: string };
  return { token: jwt, sessionId: session_id };
}

/** A `fetch` that tells the provider simulator what to do: the snippets themselves say nothing of it. */
export function simulating(sim: Record<string, unknown>): typeof fetch {
  return (input, init) => {
    if (typeof init?.body !== "string") return fetch(input, init);
    return fetch(input, { ...init, body: JSON.stringify({ ...(JSON.parse(init.body) as object), sim }) });
  };
}

export async function textOf(chunks: AsyncIterable<{ choices: { delta: { content?: string | null } }[] }>): Promise<string> {
  let text = "";
  for await (const chunk of chunks) text += chunk.choices[0]?.delta.content ?? "";
  return text;
}

/** Asks until it is so. Vitest ends a test that waits for too long. */
export async function until(isSo: () => unknown): Promise<void> {
  while (!(await isSo())) {
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

export function behest(options: ConstructorParameters<typeof Behest>[0] = {}): Behest {
  return new Behest({ baseURL: BASE_URL, apiKey: RICH_KEY, userId: newUser(), ...options });
}

export type Chunk = ChatCompletionChunk;
