import { expect, it } from "vitest";

import { EVENT_LENGTH_MAX, SseParser, type SseEvent } from "../src/sse.js";

const STREAM =
  ": ka\n\ndata: {\"a\":\"ä😀\"}\n\nid: g-1\ndata: one\ndata: two\n\n: ka\n" +
  "event: x\r\ndata:tight\r\n\r\nid\ndata\n\nretry: 10\n\ndata: \rdata: cr\r\rdata: [DONE]\n\ndata: never ended";
const EVENTS: SseEvent[] = [
  { data: '{"a":"ä😀"}', id: "" },
  { data: "one\ntwo", id: "g-1" },
  { data: "tight", id: "g-1" },
  { data: "", id: "" },
  { data: "\ncr", id: "" },
  { data: "[DONE]", id: "" },
];
const BYTES = new TextEncoder().encode(STREAM);

function read(pieces: Uint8Array[]): SseEvent[] {
  const parser = new SseParser();
  return pieces.flatMap((piece) => parser.push(piece));
}

it("reads the same events wherever the bytes are cut", () => {
  expect(read([BYTES])).toEqual(EVENTS);
  for (let cut = 0; cut <= BYTES.length; cut++) expect(read([BYTES.slice(0, cut), BYTES.slice(cut)])).toEqual(EVENTS);
  for (let first = 0; first < BYTES.length; first++) {
    const second = first + 1 + (first % 7);
    expect(read([BYTES.slice(0, first), BYTES.slice(first, second), BYTES.slice(second)])).toEqual(EVENTS);
  }
});

it("reads them byte by byte", () => {
  expect(read(Array.from(BYTES, (byte) => Uint8Array.of(byte)))).toEqual(EVENTS);
});

it("refuses an event without an end", () => {
  const parser = new SseParser();
  const piece = new TextEncoder().encode("data: " + "x".repeat(1024 * 1024));
  expect(() => {
    for (let size = 0; size <= EVENT_LENGTH_MAX; size += piece.length) parser.push(piece);
  }).toThrow("16 MiB");
});

it("reads a long event that comes in many pieces without starting anew", () => {
  const parser = new SseParser();
  const bytes = new TextEncoder().encode(`data: ${"y".repeat(2 * 1024 * 1024)}\n\n`);
  const events: SseEvent[] = [];
  for (let at = 0; at < bytes.length; at += 512) events.push(...parser.push(bytes.subarray(at, at + 512)));
  expect(events.map((found) => found.data.length)).toEqual([2 * 1024 * 1024]);
});
