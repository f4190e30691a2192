/** The list of conversations: the gateway knows which there are, this browser what they began with. */

import type { Thread } from "@behest/client-ts";

export interface Conversation {
  id: string;
  title: string;
  /** Milliseconds since 1970. */
  usedAt: number;
}

const KEY = "conversations";
const KEPT_MAX = 200;
const TITLE_LENGTH_MAX = 60;

export type Titles = Readonly<Record<string, Conversation>>;

export function remembered(): Titles {
  try {
    return JSON.parse(localStorage.getItem(KEY) ?? "{}") as Titles;
  } catch {
    return {};
  }
}

function write(titles: Titles): Titles {
  const kept = Object.values(titles).sort((a, b) => b.usedAt - a.usedAt).slice(0, KEPT_MAX);
  const written = Object.fromEntries(kept.map((conversation) => [conversation.id, conversation]));
  localStorage.setItem(KEY, JSON.stringify(written));
  return written;
}

/** The first question is the title. */
export function remember(id: string, question: string): Titles {
  const titles = remembered();
  const title = titles[id]?.title ?? question.trim().replace(/\s+/g, " ").slice(0, TITLE_LENGTH_MAX);
  return write({ ...titles, [id]: { id, title, usedAt: Date.now() } });
}

export function forget(id: string): Titles {
  const { [id]: _, ...rest } = remembered();
  return write(rest);
}

/** Both together, the one that was used last first. */
export function listed(threads: readonly Thread[], titles: Titles): Conversation[] {
  const all = new Map(Object.values(titles).map((conversation) => [conversation.id, conversation]));
  for (const thread of threads) {
    const title = all.get(thread.id)?.title ?? thread.title ?? "Chat";
    all.set(thread.id, { id: thread.id, title, usedAt: timeOf(thread.updated_at) ?? all.get(thread.id)?.usedAt ?? 0 });
  }
  return [...all.values()].sort((a, b) => b.usedAt - a.usedAt);
}

function timeOf(value: string | number | undefined): number | undefined {
  const time = typeof value === "number" ? value * 1000 : Date.parse(value ?? "");
  return Number.isNaN(time) ? undefined : time;
}

/** The conversation that the page's address names, so that it is there again when the page is loaded anew. */
export function threadOfAddress(): string | undefined {
  return /^#([\w-]{1,64})$/.exec(location.hash)?.[1];
}

export function setAddress(id: string | undefined): void {
  history.replaceState(null, "", location.pathname + location.search + (id ? `#${id}` : ""));
}

/** "Today", "Yesterday", "Earlier". */
export function dayOf(usedAt: number, now = new Date()): string {
  // Not 24 hours before: where clocks are changed a day has one more, or one less.
  const midnight = (daysAgo: number): number => new Date(now.getFullYear(), now.getMonth(), now.getDate() - daysAgo).getTime();
  if (usedAt >= midnight(0)) return "Today";
  return usedAt >= midnight(1) ? "Yesterday" : "Earlier";
}
