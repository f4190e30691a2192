/** Reads `text/event-stream` (WHATWG HTML, "Server-sent events") out of bytes that may be cut anywhere. */

import { BehestConnectionError } from "./errors.js";

export interface SseEvent {
  /** The `data:` lines, joined by line feeds. */
  data: string;
  /** The last id that was seen, this event's or an earlier one's; `""` before the first. */
  id: string;
}

/** One event may be this long, in UTF-16 units; a longer one is an error, not a growing buffer. */
export const EVENT_LENGTH_MAX = 16 * 1024 * 1024;

/**
 * A parser that is fed. Lines end with LF, CRLF or CR; comments and unknown fields are skipped; what has no blank line
 * behind it is no event, as the standard says.
 */
export class SseParser {
  readonly #decoder = new TextDecoder("utf-8");
  #line: string[] = []; // pieces of a line whose end is not here yet: joined once, so that long lines stay linear
  #lineLength = 0;
  #data: string[] = [];
  #dataLength = 0;
  #id = "";
  #afterCarriageReturn = false;

  /** The events that are whole with these bytes. Throws `BehestConnectionError` where one is too long. */
  push(bytes: Uint8Array): SseEvent[] {
    const text = this.#decoder.decode(bytes, { stream: true });
    const events: SseEvent[] = [];
    let begin = 0;
    for (let at = 0; at < text.length; at++) {
      const unit = text.charCodeAt(at);
      if (unit !== 10 && unit !== 13) {
        this.#afterCarriageReturn = false;
        continue;
      }
      if (unit === 10 && this.#afterCarriageReturn) {
        this.#afterCarriageReturn = false;
        begin = at + 1;
        continue;
      }
      this.#afterCarriageReturn = unit === 13;
      const event = this.#endLine(text.slice(begin, at));
      if (event) events.push(event);
      begin = at + 1;
    }
    if (begin < text.length) {
      this.#line.push(text.slice(begin));
      this.#lineLength += text.length - begin;
      this.#bound();
    }
    return events;
  }

  #bound(): void {
    if (this.#lineLength + this.#dataLength > EVENT_LENGTH_MAX) {
      throw new BehestConnectionError("An event of the stream is longer than 16 MiB.", { code: "stream_cut" });
    }
  }

  #endLine(end: string): SseEvent | undefined {
    let line = end;
    if (this.#line.length > 0) {
      this.#line.push(end);
      line = this.#line.join("");
      this.#line = [];
      this.#lineLength = 0;
    }
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    if (colon === 0) return undefined;
    const field = colon < 0 ? line : line.slice(0, colon);
    const rest = colon < 0 ? "" : line.slice(line.charCodeAt(colon + 1) === 32 ? colon + 2 : colon + 1);
    if (field === "data") {
      this.#data.push(rest);
      this.#dataLength += rest.length;
      this.#bound();
    } else if (field === "id" && !rest.includes("\0")) this.#id = rest;
    return undefined;
  }

  #dispatch(): SseEvent | undefined {
    if (this.#data.length === 0) return undefined;
    const event = { data: this.#data.join("\n"), id: this.#id };
    this.#data = [];
    this.#dataLength = 0;
    return event;
  }
}
