/** A gateway inside of the test: answers of one's own, requests kept. The real one is met in `tests/typescript`. */

export interface Seen {
  method: string;
  path: string;
  headers: Headers;
  body: Record<string, unknown>;
}

export type Answer = (seen: Seen, signal: AbortSignal | null) => Response | Promise<Response>;

export class Gateway {
  readonly seen: Seen[] = [];
  readonly #answers: Answer[];

  /** The answers in their order; the last one is given again and again. */
  constructor(...answers: Answer[]) {
    this.#answers = answers;
  }

  readonly fetch: typeof globalThis.fetch = async (input, init) => {
    const url = new URL(String(input));
    const body = typeof init?.body === "string" ? (JSON.parse(init.body) as Record<string, unknown>) : {};
    const seen = { method: init?.method ?? "GET", path: url.pathname + url.search, headers: new Headers(init?.headers), body };
    const answer = this.#answers[Math.min(this.seen.length, this.#answers.length - 1)];
    this.seen.push(seen);
    init?.signal?.throwIfAborted();
    if (!answer) throw new Error("no answer");
    return answer(seen, init?.signal ?? null);
  };
}

export function json(status: number, body: unknown, headers: HeadersInit = {}): Answer {
  return () => new Response(JSON.stringify(body), { status, headers: { "content-type": "application/json", ...headers } });
}

export function failed(status: number, code: string, headers: HeadersInit = {}, more: object = {}): Answer {
  return json(status, { error: { code, message: `${code}!`, type: "t", param: null, ...more } }, headers);
}

export function minted(token = "a.b.c", ttl = 3600): Answer {
  return json(200, { jwt: token, access_token: token, ttl, session_id: `session of ${token}` });
}

export function chunk(content: string, finish: string | null = null, index = 0): string {
  return JSON.stringify({ id: "c", object: "chat.completion.chunk", created: 1, model: "m", choices: [{ index, delta: { content }, finish_reason: finish }] });
}

/** How a stream ends behind its pieces: as it should, or as networks do. */
export type End = "clean" | "error" | "never";

export function stream(pieces: readonly (string | Uint8Array)[], end: End = "clean", headers: HeadersInit = {}): Answer {
  return (_seen, signal) => {
    let at = 0;
    const body = new ReadableStream<Uint8Array>({
      start(controller) {
        signal?.addEventListener("abort", () => controller.error(signal.reason));
      },
      pull(controller) {
        const piece = pieces[at++];
        if (piece !== undefined) controller.enqueue(typeof piece === "string" ? new TextEncoder().encode(piece) : piece);
        else if (end === "clean") controller.close();
        else if (end === "error") controller.error(new TypeError("network error"));
        else return new Promise(() => undefined);
        return undefined;
      },
    });
    return new Response(body, { status: 200, headers: { "content-type": "text/event-stream", "x-trace-id": "trace-1", "x-request-id": "request-1", ...headers } });
  };
}

export const DONE = "data: [DONE]\n\n";

export function event(data: string, id?: string): string {
  return (id === undefined ? "" : `id: ${id}\n`) + `data: ${data}\n\n`;
}
