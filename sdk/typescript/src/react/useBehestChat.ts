/** A conversation: send, stream, stop, reconnect, try again. */

import { useCallback, useEffect, useRef, useState } from "react";

import type { Behest } from "../client.js";
import { BehestError } from "../errors.js";
import { streamWithRetry } from "../resume.js";
import type { ChatMessage, ThreadMessage } from "../types.js";
import { Typewriter } from "../typewriter.js";

export interface UiMessage {
  id: string;
  role: "user" | "assistant";
  content: string;
  /** Of an answer: `stopped` by the reader, `failed` by an error; what came stays in both. */
  state: "streaming" | "done" | "stopped" | "failed";
  /** Of an answer that broke off: where `retry` goes on, also after the page was loaded anew. */
  lastEventId?: string;
}

/** `connecting` until the first chunk; `reconnecting` after a break. */
export type ChatStatus = "idle" | "connecting" | "streaming" | "reconnecting";

export interface UseBehestChatOptions {
  client: Behest;
  /** Keeps the conversation on the gateway. Another one begins another conversation. */
  threadId: string;
  /** What was said before: see `uiMessages`. */
  initialMessages?: readonly UiMessage[];
  /** Sent before everything, and not shown. */
  system?: string;
  model?: string;
  /** Further members of the request. */
  params?: Readonly<Record<string, unknown>>;
  /** Show text evenly (default true). */
  smooth?: boolean;
  /** Tries in a row, without a chunk, until a break is an error (default 4). */
  attempts?: number;
  /** Told when an answer has ended, in whatever way. */
  onEnd?: (message: UiMessage) => void;
}

export interface BehestChat {
  messages: readonly UiMessage[];
  status: ChatStatus;
  /** Why the last answer failed, until the next one begins or it is dismissed. */
  error: BehestError | Error | undefined;
  /** Of a reconnect: which try it is. */
  attempt: number;
  /** Ask; `params` are further members of this request, and of its repetitions. */
  send: (content: string, params?: Readonly<Record<string, unknown>>) => void;
  stop: () => void;
  /**
   * Ask again what failed or was stopped: on the gateway the broken answer goes on. `params` are those of the last `send`,
   * unless others are given, such as after the page was loaded anew.
   */
  retry: (params?: Readonly<Record<string, unknown>>) => void;
  dismissError: () => void;
}

interface State {
  threadId: string;
  messages: readonly UiMessage[];
  status: ChatStatus;
  error: BehestError | Error | undefined;
  attempt: number;
}

/** A conversation with the gateway. Leaving the page, or another `threadId`, cancels what runs. */
export function useBehestChat(options: UseBehestChatOptions): BehestChat {
  const { threadId } = options;
  const begin = (): State => ({ threadId, messages: options.initialMessages ?? [], status: "idle", error: undefined, attempt: 0 });
  const [state, setState] = useState<State>(begin);
  const latest = useRef(options);
  latest.current = options;
  const current = useRef(state);
  const running = useRef<AbortController | undefined>(undefined);
  const asked = useRef<Readonly<Record<string, unknown>> | undefined>(undefined);

  // Callbacks come between renders: the truth is here, and React is told of it.
  const update = useCallback((change: (before: State) => State): void => {
    current.current = change(current.current);
    setState(current.current);
  }, []);

  if (current.current.threadId !== threadId) {
    running.current?.abort();
    running.current = undefined;
    current.current = begin();
    setState(current.current);
  }
  useEffect(
    () => () => {
      running.current?.abort();
      running.current = undefined;
    },
    [],
  );

  const answer = useCallback(
    async (history: readonly UiMessage[], from = { content: "", lastEventId: "" }): Promise<void> => {
      running.current?.abort();
      const abort = new AbortController();
      running.current = abort;
      const isCurrent = (): boolean => running.current === abort;
      const reply: UiMessage = { id: newId(), role: "assistant", content: from.content, state: "streaming" };
      const patch = (change: Partial<State>, message: Partial<UiMessage> = {}): void => {
        if (!isCurrent()) return;
        update((before) => ({ ...before, ...change, messages: replaced(before.messages, reply.id, message) }));
      };
      update((before) => ({ ...before, messages: [...history, reply], status: "connecting", error: undefined, attempt: 0 }));
      let shown = from.content;
      let { lastEventId } = from;
      const show = (text: string): void => {
        shown += text;
        patch({}, { content: shown });
      };
      const typewriter = new Typewriter({ onText: show, ...(latest.current.smooth === false ? { instant: true } : {}) });
      let end: Pick<UiMessage, "state"> = { state: "done" };
      let error: Error | undefined;
      try {
        const { client, model, params, attempts = 4, system } = latest.current;
        const request = { ...params, ...asked.current, ...(model ? { model } : {}), messages: requestMessages(history, system) };
        const stream = streamWithRetry(client, request, {
          threadId: latest.current.threadId,
          signal: abort.signal,
          attempts,
          ...(lastEventId ? { lastEventId } : {}),
          onEventId: (id) => (lastEventId = id),
          onReconnect: ({ attempt }) => patch({ status: "reconnecting", attempt }),
        });
        for await (const chunk of stream) {
          if (current.current.status !== "streaming" && isCurrent()) patch({ status: "streaming", attempt: 0 });
          typewriter.push(chunk.choices[0]?.delta.content ?? "");
        }
        await typewriter.finish();
      } catch (reason) {
        const stopped = reason instanceof Error && reason.name === "AbortError";
        end = { state: stopped ? "stopped" : "failed" };
        if (!stopped) error = reason instanceof Error ? reason : new Error(String(reason));
      }
      typewriter.flush();
      if (!isCurrent()) return;
      // What cannot go on (409) begins anew the next time.
      const canGoOn = end.state !== "done" && lastEventId !== "" && (error as { status?: number } | undefined)?.status !== 409;
      const ended: UiMessage = { ...reply, content: shown, ...end, ...(canGoOn ? { lastEventId } : {}) };
      patch({ status: "idle", error, attempt: 0 }, ended);
      running.current = undefined;
      latest.current.onEnd?.(ended);
    },
    [update],
  );

  const send = useCallback(
    (content: string, params?: Readonly<Record<string, unknown>>): void => {
      if (content.trim() === "" || current.current.status !== "idle") return;
      asked.current = params;
      const question: UiMessage = { id: newId(), role: "user", content, state: "done" };
      void answer([...current.current.messages, question]);
    },
    [answer],
  );
  const stop = useCallback((): void => running.current?.abort(), []);
  const retry = useCallback((params?: Readonly<Record<string, unknown>>): void => {
    const { messages, status } = current.current;
    const last = messages.findLastIndex((message) => message.role === "user");
    if (last < 0 || status !== "idle") return;
    if (params) asked.current = params;
    const { content = "", lastEventId = "" } = messages[last + 1] ?? {};
    void answer(messages.slice(0, last + 1), lastEventId ? { content, lastEventId } : undefined);
  }, [answer]);
  const dismissError = useCallback((): void => update((before) => ({ ...before, error: undefined })), [update]);

  const { messages, status, error, attempt } = state.threadId === threadId ? state : current.current;
  return { messages, status, error, attempt, send, stop, retry, dismissError };
}

/**
 * What `client.threads.messages` gives, as `initialMessages`. An answer that broke off is `failed`; the last one has the
 * place where `retry` goes on. What is no text is left out.
 */
export function uiMessages(messages: readonly ThreadMessage[]): UiMessage[] {
  return messages.flatMap(({ id, role, content, complete, last_event_id: lastEventId }, index) => {
    if ((role !== "user" && role !== "assistant") || (typeof content !== "string" && complete !== false)) return [];
    const isLast = index === messages.length - 1;
    const message: UiMessage = { id: `kept-${id ?? index}`, role, content: typeof content === "string" ? content : "", state: complete === false ? "failed" : "done" };
    return [lastEventId && isLast ? { ...message, lastEventId } : message];
  });
}

/** What the gateway is sent: all that was said, without answers that never came. */
function requestMessages(history: readonly UiMessage[], system: string | undefined): ChatMessage[] {
  const said = history.filter((message) => message.content !== "").map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

function replaced(messages: readonly UiMessage[], id: string, change: Partial<UiMessage>): readonly UiMessage[] {
  return messages.map((message) => (message.id === id ? { ...message, ...change } : message));
}

function newId(): string {
  // `randomUUID` is there on https and localhost only.
  return typeof crypto.randomUUID === "function" ? crypto.randomUUID() : `${Date.now()}-${Math.random()}`;
}
