/**
 * Even text out of uneven chunks. Chunks come in bursts; a typewriter shows them at the pace at which they come on
 * average, a little in every frame, and is soon done when the stream is.
 */

export interface TypewriterOptions {
  /** Gets the text of a frame. */
  onText: (text: string) => void;
  /** Calls back before the next frame (default `requestAnimationFrame`, and a timer where there is none). */
  schedule?: (callback: (nowMs: number) => void) => void;
  /** Show everything at once: the default where the reader asked the system for less motion. */
  instant?: boolean;
}

const FRAME_MS = 1000 / 60;
/** Bursts are closer together than this: what comes sooner belongs to the same burst. */
const BURST_GAP_MS = 24;
/** Text is shown over so many gaps between bursts: the next burst comes before the last one is used up. */
const GAPS_COVERED = 1.6;
const DELAY_MIN_MS = 120;
const DELAY_MAX_MS = 1_500;
/** Never slower than this while there is text, in UTF-16 units a second. */
const RATE_MIN = 40;
/** When the stream has ended the rest is shown within this time. */
const FINISH_MS = 350;

/** Shows text evenly. `push` what comes, `finish` when it ends. */
export class Typewriter {
  readonly #onText: (text: string) => void;
  readonly #schedule: (callback: (nowMs: number) => void) => void;
  readonly #instant: boolean;
  #queue: string[] = [];
  #length = 0;
  #running = false;
  #lastFrameMs: number | undefined;
  #burst = false; // something came since the last frame
  #lastBurstMs: number | undefined;
  #gapMs = 250;
  #owed = 0; // units that are due, with their fraction
  #finishRate: number | undefined;
  #waiting: (() => void)[] = [];

  constructor(options: TypewriterOptions) {
    this.#onText = options.onText;
    this.#schedule = options.schedule ?? nextFrame;
    this.#instant = options.instant ?? prefersLessMotion();
  }

  /** How much is not shown yet, in UTF-16 units. */
  get pending(): number {
    return this.#length;
  }

  push(text: string): void {
    if (text === "") return;
    if (this.#instant || isHidden()) {
      this.flush();
      this.#onText(text);
      return;
    }
    this.#queue.push(text);
    this.#length += text.length;
    this.#burst = true;
    this.#finishRate = undefined;
    this.#run();
  }

  /** No more comes: kept when all is shown. */
  finish(): Promise<void> {
    if (isHidden()) this.flush(); // the page was hidden after the last push: no frame may ever come
    if (this.#length === 0) return Promise.resolve();
    this.#finishRate = Math.max(RATE_MIN, (this.#length / FINISH_MS) * 1000);
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  /** Show all that is here, now: after a stop or an error nothing of what was received may be missing. */
  flush(): void {
    const text = this.#take(this.#length);
    if (text) this.#onText(text);
    this.#settle();
  }

  #run(): void {
    if (this.#running) return;
    this.#running = true;
    this.#lastFrameMs = undefined;
    this.#schedule(this.#frame);
  }

  readonly #frame = (nowMs: number): void => {
    const elapsed = this.#lastFrameMs === undefined ? FRAME_MS : Math.max(0, nowMs - this.#lastFrameMs);
    this.#lastFrameMs = nowMs;
    this.#measure(nowMs);
    if (isHidden()) this.flush(); // frames come once a second or never there
    const text = this.#take(this.#due(elapsed));
    if (text) this.#onText(text);
    if (this.#length === 0) {
      this.#running = false;
      this.#owed = 0;
      this.#settle();
      return;
    }
    this.#schedule(this.#frame);
  };

  /** Learn how far apart bursts are. */
  #measure(nowMs: number): void {
    if (!this.#burst) return;
    this.#burst = false;
    const gap = this.#lastBurstMs === undefined ? undefined : nowMs - this.#lastBurstMs;
    if (gap !== undefined && gap < BURST_GAP_MS) return;
    this.#lastBurstMs = nowMs;
    if (gap !== undefined && gap < 4 * DELAY_MAX_MS) this.#gapMs += (gap - this.#gapMs) / 4;
  }

  #due(elapsedMs: number): number {
    const delayMs = Math.min(DELAY_MAX_MS, Math.max(DELAY_MIN_MS, this.#gapMs * GAPS_COVERED));
    const rate = this.#finishRate ?? Math.max(RATE_MIN, (this.#length / delayMs) * 1000);
    // After a frame that took long the text does not jump by all that was missed.
    this.#owed += (rate * Math.min(elapsedMs, 4 * FRAME_MS)) / 1000;
    const due = Math.floor(this.#owed);
    this.#owed -= due;
    return due;
  }

  #take(length: number): string {
    let missing = Math.min(length, this.#length);
    if (missing <= 0) return "";
    const pieces: string[] = [];
    let used = 0;
    while (missing > 0 && used < this.#queue.length) {
      const piece = this.#queue[used] ?? "";
      if (piece.length > missing) {
        const cut = wholeCharacters(piece, missing);
        pieces.push(piece.slice(0, cut));
        this.#queue[used] = piece.slice(cut);
        if (cut === piece.length) used += 1;
        missing = 0;
      } else {
        pieces.push(piece);
        missing -= piece.length;
        used += 1;
      }
    }
    this.#queue.splice(0, used);
    const text = pieces.join("");
    this.#length -= text.length;
    return text;
  }

  #settle(): void {
    if (this.#length > 0) return;
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const resolve of waiting) resolve();
  }
}

const graphemes = typeof Intl.Segmenter === "function" ? new Intl.Segmenter(undefined, { granularity: "grapheme" }) : undefined;

/** Where to cut so that no character is torn: neither a surrogate pair, nor what is joined to the character before. */
function wholeCharacters(text: string, length: number): number {
  // Below the first combining mark nothing joins.
  if (text.charCodeAt(length - 1) < 0x300 && text.charCodeAt(length) < 0x300) return length;
  const begin = Math.max(0, length - 256);
  const found = graphemes?.segment(text.slice(begin, length + 64)).containing(length - begin);
  if (found) return found.index === length - begin ? length : begin + found.index + found.segment.length;
  const next = text.charCodeAt(length);
  return next >= 0xdc00 && next <= 0xdfff ? length + 1 : length;
}

function nextFrame(callback: (nowMs: number) => void): void {
  if (typeof requestAnimationFrame === "function") requestAnimationFrame(callback);
  else setTimeout(() => callback(performance.now()), FRAME_MS);
}

function isHidden(): boolean {
  return typeof document !== "undefined" && document.visibilityState === "hidden";
}

function prefersLessMotion(): boolean {
  return typeof matchMedia === "function" && matchMedia("(prefers-reduced-motion: reduce)").matches;
}
