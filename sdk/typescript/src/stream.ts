/**
 * A stream of chunks. It ends in one of three ways: whole; by an error of this package, also where the connection
 * simply went away; or by the caller's abort, as an `AbortError`.
 */

import { BehestAbortError, BehestConnectionError, errorOfEnvelope, factsOfHeaders, isRecord } from "./errors.js";
import { reasonOf } from "./http.js";
import { SseParser, type SseEvent } from "./sse.js";
import type { ChatCompletionChunk } from "./types.js";

export interface StreamSettings {
  /** Cancels the request. */
  abandon: AbortController;
  /** The signal of the request: the caller's own, and that of `abandon`. */
  signal: AbortSignal;
  /** Give also chunks without choices, such as the one with usage. */
  withUsage: boolean;
  /** How many choices were asked for: so many must finish where there is no `[DONE]`. */
  choices: number;
  /** So long without a byte and the connection is taken for dead; the gateway sends something every 15 s. */
  idleTimeoutMs: number;
}

/** The chunks of one answer. Iterate it once; leaving the loop early cancels the request, and its billing. */
export class ChatStream implements AsyncIterable<ChatCompletionChunk> {
  /** The answer's headers. */
  readonly headers: Headers;
  readonly traceId: string | undefined;
  readonly requestId: string | undefined;
  /** The id of the last event that was given to the loop: what a resuming call names as `Last-Event-ID`. */
  lastEventId = "";

  /** The answer, not its body alone: Node cancels a body that is not read yet when its answer is held by nobody. */
  readonly #response: Response;
  readonly #settings: StreamSettings;
  #used = false;
  #ended = false;

  constructor(response: Response, settings: StreamSettings) {
    this.headers = response.headers;
    const facts = factsOfHeaders(response.headers);
    this.traceId = facts.traceId;
    this.requestId = facts.requestId;
    this.#settings = settings;
    if (!response.body) throw new BehestConnectionError("The answer has no body.", { code: "stream_cut", ...facts });
    this.#response = response;
  }

  /** Cancel the request. A loop over this stream ends with an `AbortError`. */
  abort(): void {
    this.#settings.abandon.abort();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<ChatCompletionChunk, void, undefined> {
    if (this.#used) throw new BehestConnectionError("A stream can be read once.", { code: "stream_used" });
    this.#used = true;
    const reader = (this.#response.body as ReadableStream<Uint8Array>).getReader();
    const parser = new SseParser();
    const open = new OpenChoices(this.#settings.choices);
    try {
      for (;;) {
        const bytes = await this.#read(reader);
        if (bytes === undefined) break;
        for (const event of parser.push(bytes)) {
          const { signal } = this.#settings;
          if (signal.aborted) throw new BehestAbortError(signal);
          if (event.data === "[DONE]") {
            this.#ended = true;
            return;
          }
          const chunk = this.#chunkOf(event);
          open.saw(chunk);
          if (event.id) this.lastEventId = event.id;
          if (this.#settings.withUsage || chunk.choices.length > 0) yield chunk;
        }
      }
      if (!open.allFinished) throw this.#cut("The stream ended before its end: neither [DONE] nor a finish came.");
      this.#ended = true;
    } finally {
      // The loop was left, or something failed: the gateway resets its provider as soon as it sees this.
      if (!this.#ended) await reader.cancel().catch(() => undefined);
      reader.releaseLock();
    }
  }

  async #read(reader: ReadableStreamDefaultReader<Uint8Array>): Promise<Uint8Array | undefined> {
    const { signal, idleTimeoutMs } = this.#settings;
    if (signal.aborted) throw new BehestAbortError(signal);
    let interrupt: () => void = () => undefined;
    let timer: ReturnType<typeof setTimeout> | undefined;
    const interrupted = new Promise<"aborted" | "idle">((resolve) => {
      interrupt = (): void => resolve("aborted");
      signal.addEventListener("abort", interrupt, { once: true });
      timer = setTimeout(() => resolve("idle"), idleTimeoutMs);
    });
    try {
      const result = await Promise.race([reader.read(), interrupted]);
      if (result === "aborted") throw new BehestAbortError(signal);
      if (result === "idle") throw this.#cut(`Nothing came for ${idleTimeoutMs} ms.`);
      return result.done ? undefined : result.value;
    } catch (cause) {
      if (cause instanceof BehestAbortError || cause instanceof BehestConnectionError) throw cause;
      if (signal.aborted) throw new BehestAbortError(signal);
      throw this.#cut(`The connection broke: ${reasonOf(cause)}`, cause);
    } finally {
      clearTimeout(timer);
      signal.removeEventListener("abort", interrupt);
    }
  }

  #chunkOf(event: SseEvent): ChatCompletionChunk {
    let chunk: unknown;
    try {
      chunk = JSON.parse(event.data);
    } catch (cause) {
      throw this.#cut("An event of the stream is no JSON.", cause);
    }
    if (isRecord(chunk) && isRecord(chunk["error"])) {
      throw errorOfEnvelope(chunk, { traceId: this.traceId, requestId: this.requestId });
    }
    if (!isRecord(chunk) || !Array.isArray(chunk["choices"])) throw this.#cut("An event of the stream is no chunk.");
    return chunk as unknown as ChatCompletionChunk;
  }

  #cut(message: string, cause?: unknown): BehestConnectionError {
    const { traceId, requestId } = this;
    return new BehestConnectionError(message, { code: "stream_cut", traceId, requestId, cause });
  }
}

/** Which choices still speak. */
class OpenChoices {
  readonly #finished = new Set<number>();
  readonly #seen = new Set<number>();
  readonly #wanted: number;

  constructor(wanted: number) {
    this.#wanted = wanted;
  }

  saw(chunk: ChatCompletionChunk): void {
    for (const choice of chunk.choices) {
      this.#seen.add(choice.index);
      if (choice.finish_reason) this.#finished.add(choice.index);
    }
  }

  get allFinished(): boolean {
    return this.#finished.size >= Math.max(this.#wanted, this.#seen.size);
  }
}
