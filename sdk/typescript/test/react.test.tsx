// @vitest-environment happy-dom
import { act, cleanup, configure, render, renderHook, waitFor } from "@testing-library/react";
import { afterEach, describe, expect, it, vi } from "vitest";

import { Behest } from "../src/index.js";
import { htmlOf, MarkdownStream } from "../src/markdown/index.js";
import { Markdown, uiMessages, useBehestChat, useBehestThreads } from "../src/react/index.js";
import { DOCUMENTS } from "./documents.js";
import { chunk, DONE, event, failed, Gateway, json, stream, type Answer } from "./gateway.js";

configure({ asyncUtilTimeout: 20_000 }); // its own second is short on a busy machine
afterEach(cleanup);

/** A promise, and what keeps it. */
function kept(): { promise: Promise<void>; keep: () => void } {
  let keep = (): void => undefined;
  return { promise: new Promise((resolve) => (keep = resolve)), keep: () => keep() };
}

function client(...answers: Answer[]): { behest: Behest; gateway: Gateway } {
  const gateway = new Gateway(...answers);
  return { gateway, behest: new Behest({ baseURL: "http://gateway.test", apiKey: "a.b.c", fetch: gateway.fetch, maxRetries: 0 }) };
}

function chat(behest: Behest, more = {}) {
  return renderHook((props: { threadId: string }) => useBehestChat({ client: behest, smooth: false, ...more, ...props }), { initialProps: { threadId: "t-1" } });
}

describe("useBehestChat", () => {
  it("sends, streams, and remembers", async () => {
    const { behest, gateway } = client(stream([event(chunk("Hel")), event(chunk("lo", "stop")), DONE]));
    const { result } = chat(behest, { system: "Be brief." });
    act(() => result.current.send("Hi"));
    expect([result.current.status, result.current.messages.length]).toEqual(["connecting", 2]);
    await waitFor(() => expect(result.current.status).toBe("idle"));
    expect(result.current.messages.map(({ role, content, state }) => [role, content, state])).toEqual([["user", "Hi", "done"], ["assistant", "Hello", "done"]]);
    act(() => result.current.send("More"));
    await waitFor(() => expect(result.current.status).toBe("idle"));
    expect(gateway.seen[1]?.body["messages"]).toEqual([
      { role: "system", content: "Be brief." },
      { role: "user", content: "Hi" },
      { role: "assistant", content: "Hello" },
      { role: "user", content: "More" },
    ]);
    expect(gateway.seen[1]?.headers.get("x-thread-id")).toBe("t-1");
  });

  it("stops, and keeps what came", async () => {
    const { behest } = client(stream([event(chunk("so far"))], "never"));
    const { result } = chat(behest);
    act(() => result.current.send("Hi"));
    await waitFor(() => expect(result.current.messages[1]?.content).toBe("so far"));
    act(() => result.current.stop());
    await waitFor(() => expect(result.current.status).toBe("idle"));
    expect([result.current.messages[1]?.state, result.current.messages[1]?.content, result.current.error]).toEqual(["stopped", "so far", undefined]);
  });

  it("keeps the text at a budget's end, says why, and asks again for the same", async () => {
    const end = event('{"error":{"code":"quota_exceeded","message":"m","status":402},"choices":[]}') + DONE;
    const { behest, gateway } = client(stream([event(chunk("so far")), end]), stream([event(chunk("whole", "stop")), DONE]));
    const { result } = chat(behest);
    act(() => result.current.send("Hi", { seed: 7 }));
    await waitFor(() => expect(result.current.error).toMatchObject({ status: 402 }));
    expect([result.current.messages[1]?.content, result.current.messages[1]?.state]).toEqual(["so far", "failed"]);
    act(() => result.current.retry());
    await waitFor(() => expect(result.current.messages[1]?.state).toBe("done"));
    expect(result.current.error).toBeUndefined();
    expect(gateway.seen[1]?.body).toEqual(gateway.seen[0]?.body);
    expect(gateway.seen[0]?.body["seed"]).toBe(7);
  });

  it("goes on, where a stopped answer has a place to go on at", async () => {
    const { behest, gateway } = client(stream([event(chunk("so "), "g-1")], "never"), stream([event(chunk("far", "stop"), "g-2"), DONE]));
    const { result } = chat(behest);
    act(() => result.current.send("Hi"));
    await waitFor(() => expect(result.current.messages[1]?.content).toBe("so "));
    act(() => result.current.stop());
    await waitFor(() => expect(result.current.status).toBe("idle"));
    act(() => result.current.retry());
    expect(result.current.messages[1]?.content).toBe("so ");
    await waitFor(() => expect(result.current.messages[1]).toMatchObject({ content: "so far", state: "done" }));
    expect(gateway.seen[1]?.headers.get("last-event-id")).toBe("g-1");
  });

  it("goes on where an answer broke off before the page was loaded", async () => {
    const { behest, gateway } = client(stream([event(chunk("far", "stop"), "g-3"), DONE]));
    const before = uiMessages([
      { id: 1, role: "user", content: "Hi", complete: true },
      { id: 2, role: "assistant", content: "so ", complete: false, last_event_id: "g-2" },
    ]);
    expect(before[1]).toMatchObject({ content: "so ", state: "failed", lastEventId: "g-2" });
    const { result } = chat(behest, { initialMessages: before });
    act(() => result.current.retry());
    expect(result.current.messages.map(({ content }) => content)).toEqual(["Hi", "so "]);
    await waitFor(() => expect(result.current.messages[1]).toMatchObject({ content: "so far", state: "done" }));
    expect(gateway.seen[0]?.headers.get("last-event-id")).toBe("g-2");
    expect(gateway.seen[0]?.body["messages"]).toEqual([{ role: "user", content: "Hi" }]);
    expect(result.current.messages[1]).not.toHaveProperty("lastEventId");
  });

  it("shows what was said before, but nothing that it cannot show", () => {
    const shown = uiMessages([
      { role: "system", content: "Be brief." },
      { id: 1, role: "user", content: "Hi" },
      { id: 2, role: "assistant", content: "so", complete: false, last_event_id: "g-2" },
      { id: 3, role: "user", content: [{ type: "image_url" }] },
      { id: 4, role: "assistant", content: null, complete: false },
    ]);
    expect(shown).toEqual([
      { id: "kept-1", role: "user", content: "Hi", state: "done" },
      { id: "kept-2", role: "assistant", content: "so", state: "failed" },
      { id: "kept-4", role: "assistant", content: "", state: "failed" },
    ]);
  });

  it("says that it reconnects", async () => {
    const seen = kept();
    const rest = stream([event(chunk("b", "stop"), "g-2"), DONE]);
    const { behest } = client(stream([event(chunk("a"), "g-1")], "error"), async (...asked) => seen.promise.then(() => rest(...asked)));
    const { result } = chat(behest);
    act(() => result.current.send("Hi"));
    await waitFor(() => expect([result.current.status, result.current.attempt]).toEqual(["reconnecting", 1]));
    seen.keep();
    await waitFor(() => expect(result.current.status).toBe("idle"));
    expect(result.current.messages[1]?.content).toBe("ab");
  });

  it("cancels when its component or its thread goes", async () => {
    let signals: (AbortSignal | null)[] = [];
    const answer: Answer = (seen, signal) => {
      signals = [...signals, signal];
      return stream([event(chunk("a"))], "never")(seen, signal);
    };
    const { behest } = client(answer);
    const { result, rerender, unmount } = chat(behest);
    act(() => result.current.send("Hi"));
    await waitFor(() => expect(result.current.status).toBe("streaming"));
    rerender({ threadId: "t-2" });
    expect([result.current.messages.length, result.current.status, signals[0]?.aborted]).toEqual([0, "idle", true]);
    act(() => result.current.send("Hi"));
    await waitFor(() => expect(result.current.status).toBe("streaming"));
    unmount();
    expect(signals[1]?.aborted).toBe(true);
  });
});

describe("useBehestThreads", () => {
  it("lists, deletes, and tells errors", async () => {
    const { behest, gateway } = client(json(200, [{ id: "a" }, { id: "b" }]), () => new Response(null, { status: 204 }), failed(503, "ledger_unavailable"));
    const { result } = renderHook(() => useBehestThreads({ client: behest }));
    await waitFor(() => expect(result.current.threads).toHaveLength(2));
    await act(() => result.current.remove("a"));
    expect(result.current.threads).toEqual([{ id: "b" }]);
    await act(() => result.current.refresh());
    expect(result.current.error).toMatchObject({ status: 503 });
    expect(result.current.threads).toEqual([{ id: "b" }]);
    expect(gateway.seen.map((seen) => seen.method)).toEqual(["GET", "DELETE", "GET"]);
  });

  it("does not show again what was removed while a list was on its way", async () => {
    const both = json(200, [{ id: "a" }, { id: "b" }]);
    const [list, removal] = [kept(), kept()];
    const { behest } = client(
      both,
      async (...asked) => list.promise.then(() => both(...asked)),
      async () => removal.promise.then(() => new Response(null, { status: 204 })),
      both,
      both,
    );
    const { result } = renderHook(() => useBehestThreads({ client: behest }));
    await waitFor(() => expect(result.current.threads).toHaveLength(2));
    let refreshed = Promise.resolve();
    let removed = Promise.resolve();
    act(() => void (refreshed = result.current.refresh()));
    act(() => void (removed = result.current.remove("a")));
    list.keep(); // asked before the removal, answered while it runs
    await act(() => refreshed);
    expect(result.current.threads).toEqual([{ id: "b" }]);
    await act(() => result.current.refresh()); // asked while it runs
    expect(result.current.threads).toEqual([{ id: "b" }]);
    removal.keep();
    await act(() => removed);
    await act(() => result.current.refresh()); // a new thread may have its id
    expect(result.current.threads).toEqual([{ id: "a" }, { id: "b" }]);
  });
});

describe("Markdown", () => {
  const squeezed = (html: string): string => html.replace(/<div class="behest-(?:group|block|table)"[^>]*>|<\/div>| (?:tabindex|scope|readonly|aria-label|checked|disabled)="[^"]*"|<span class="behest-piece">|<\/span>/g, "").replace(/style="text-align: ?(\w+);?"/g, 'style="text-align:$1"');

  it.each(Object.entries(DOCUMENTS))("%s has the same elements as its HTML", (_name, source) => {
    const whole = new MarkdownStream();
    whole.append(source);
    whole.end();
    const { container, rerender } = render(<Markdown text="" streaming />);
    for (let cut = 1; cut < source.length; cut += 17) rerender(<Markdown text={source.slice(0, cut)} streaming />);
    rerender(<Markdown text={source} />);
    const expected = document.createElement("div");
    expected.innerHTML = whole.blocks().map((block) => htmlOf(block.nodes)).join("");
    expect(container.textContent?.replace(/\s+/g, "")).toBe(expected.textContent?.replace(/\s+/g, ""));
    const tags = (root: Element): string[] => [...root.querySelectorAll("*:not(div):not(span)")].map((element) => element.tagName);
    expect(tags(container)).toEqual(tags(expected));
    expect(squeezed(container.innerHTML).length).toBeGreaterThan(0);
  });

  it("leaves finished blocks alone, in 50 000 tokens", () => {
    const paragraph = DOCUMENTS["an answer with everything"] ?? "";
    const { container, rerender } = render(<Markdown text={paragraph.repeat(2)} streaming />);
    const first = container.querySelector("h1");
    const changed = vi.fn();
    const observer = new MutationObserver(changed);
    if (first?.parentElement) observer.observe(first.parentElement, { childList: true, subtree: true, characterData: true });
    let text = paragraph.repeat(2);
    for (let round = 0; round < 20; round++) {
      text += paragraph;
      rerender(<Markdown text={text} streaming />);
    }
    expect(container.querySelector("h1")).toBe(first);
    expect(changed).not.toHaveBeenCalled();
    observer.disconnect();
  });

  it("begins anew with another text", () => {
    const { container, rerender } = render(<Markdown text="# One" streaming />);
    rerender(<Markdown text="Two **x**" />);
    expect(container.textContent).toBe("Two x");
  });
});
