import { afterEach, describe, expect, it, vi } from "vitest";

import { Typewriter } from "../src/typewriter.js";

/** Frames and chunks on a clock of the test's own. */
class Screen {
  ms = 0;
  text = "";
  /** What each frame showed. */
  frames: number[] = [];
  #callback: ((nowMs: number) => void) | undefined;
  readonly typewriter: Typewriter;

  constructor(options: { instant?: boolean } = {}) {
    this.typewriter = new Typewriter({ instant: false, ...options, onText: (text) => (this.text += text), schedule: (callback) => (this.#callback = callback) });
  }

  frame(elapsedMs = 1000 / 60): void {
    this.ms += elapsedMs;
    const before = this.text.length;
    const callback = this.#callback;
    this.#callback = undefined;
    callback?.(this.ms);
    this.frames.push(this.text.length - before);
  }

  get idle(): boolean {
    return this.#callback === undefined;
  }
}

afterEach(() => vi.unstubAllGlobals());

describe("bursts of 50 chunks", () => {
  it.each([
    [200, 4],
    [500, 4],
    [800, 3],
  ])("every %i ms are shown in steady frames", (everyMs, chunkLength) => {
    const screen = new Screen();
    let sent = "";
    let due = 0;
    const seconds = 12;
    for (let frame = 0; frame < seconds * 60; frame++) {
      while (screen.ms >= due) {
        for (let index = 0; index < 50; index++) {
          const piece = "abcdefgh".slice(0, chunkLength);
          sent += piece;
          screen.typewriter.push(piece);
        }
        due += everyMs;
      }
      screen.frame();
    }
    const steady = screen.frames.slice(4 * 60);
    const mean = steady.reduce((sum, count) => sum + count, 0) / steady.length;
    const coming = (50 * chunkLength * 1000) / everyMs / 60;
    expect(mean / coming).toBeGreaterThan(0.85);
    expect(mean / coming).toBeLessThan(1.15);
    expect(Math.min(...steady)).toBeGreaterThan(0); // no frame stands still
    expect(Math.max(...steady)).toBeLessThan(2 * mean + 1); // none leaps
    expect(sent.startsWith(screen.text)).toBe(true);
    expect(screen.typewriter.pending).toBeLessThan((50 * chunkLength * 2.5 * Math.max(everyMs, 120)) / everyMs + 1);
  });
});

describe("a typewriter", () => {
  it("shows everything, in order, and is soon done when the stream is", async () => {
    const screen = new Screen();
    const text = "The quick brown fox. ".repeat(200);
    for (let at = 0; at < text.length; at += 37) screen.typewriter.push(text.slice(at, at + 37));
    let done = false;
    void screen.typewriter.finish().then(() => (done = true));
    for (let frame = 0; frame < 30; frame++) screen.frame();
    await Promise.resolve();
    expect([screen.text === text, done, screen.idle]).toEqual([true, true, true]);
  });

  it("shows the first characters at once", () => {
    const screen = new Screen();
    screen.typewriter.push("Hello");
    screen.frame();
    screen.frame();
    expect(screen.text.length).toBeGreaterThan(0);
  });

  it("flushes what is left", async () => {
    const screen = new Screen();
    screen.typewriter.push("some text that is not shown yet");
    const finished = screen.typewriter.finish();
    screen.typewriter.flush();
    await finished;
    expect([screen.text, screen.typewriter.pending]).toEqual(["some text that is not shown yet", 0]);
  });

  it("does not leap after a frame that took long", () => {
    const screen = new Screen();
    screen.typewriter.push("x".repeat(500));
    for (let frame = 0; frame < 5; frame++) screen.frame();
    const before = screen.frames.at(-1) ?? 0;
    screen.frame(3000);
    expect(screen.frames.at(-1)).toBeLessThanOrEqual(5 * before + 5);
  });

  it("tears no character", () => {
    const parts = ["👩‍👩‍👧‍👦", "é", "🇩🇪", "👍🏽", "日", "n\u0303", "❤️"];
    const screen = new Screen();
    let shown = "";
    const text = parts.join("").repeat(10);
    screen.typewriter.push(text);
    const ends = new Set<number>();
    for (let frame = 0; frame < 400 && !screen.idle; frame++) {
      screen.frame(4);
      if (screen.text !== shown) ends.add(screen.text.length);
      shown = screen.text;
    }
    expect(shown).toBe(text);
    const segments = [...new Intl.Segmenter("en", { granularity: "grapheme" }).segment(text)];
    const borders = new Set([...segments.map((segment) => segment.index), text.length]);
    expect([...ends].filter((end) => !borders.has(end))).toEqual([]);
  });

  it("shows everything at once where less motion is wished, or nobody looks", () => {
    const still = new Screen({ instant: true });
    still.typewriter.push("at once");
    expect(still.text).toBe("at once");
    vi.stubGlobal("document", { visibilityState: "hidden" });
    const hidden = new Screen();
    hidden.typewriter.push("at once");
    expect(hidden.text).toBe("at once");
  });

  it("is done at once where nobody looks any more: no frame comes then", async () => {
    const screen = new Screen();
    screen.typewriter.push("seen by nobody");
    vi.stubGlobal("document", { visibilityState: "hidden" });
    await screen.typewriter.finish();
    expect([screen.text, screen.typewriter.pending]).toEqual(["seen by nobody", 0]);
  });

  it("takes a timer where there are no frames", async () => {
    let text = "";
    const typewriter = new Typewriter({ onText: (piece) => (text += piece) });
    typewriter.push("Hello");
    await typewriter.finish();
    expect(text).toBe("Hello");
  });
});
