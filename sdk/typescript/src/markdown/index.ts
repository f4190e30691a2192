/** Markdown for streams: safe by construction, incremental, and without a flash of marks that are not complete. */

import { healed } from "./heal.js";
import { htmlOf } from "./html.js";
import { Segmenter, type CodeSegment, type Segment } from "./segments.js";
import { languageOf, treeOf, type MarkdownCode, type MarkdownNode } from "./tree.js";

export { htmlOf, textOf } from "./html.js";
export type { MarkdownCode, MarkdownElement, MarkdownNode, MarkdownTag } from "./tree.js";

/** A part of the document. One that is `final` is the same object for ever. */
export interface MarkdownBlock {
  /** Its number in the document. */
  key: number;
  nodes: readonly MarkdownNode[];
  final: boolean;
}

/** So many lines of code are one piece: a piece that is full never changes. */
const PIECE_LINES = 64;

/**
 * A document that grows. `append` what comes and show `blocks()`, as often as a frame is drawn: the work of that is
 * bounded by the open block (4 KiB at most), however long the document is.
 */
export class MarkdownStream {
  readonly #segments = new Segmenter();
  #final: MarkdownBlock[] = [];
  #pieces: string[] = []; // of the open code: those that are full
  #open: CodeSegment | undefined;
  #ended = false;

  append(text: string): void {
    if (this.#ended) throw new Error("The document has ended.");
    this.#segments.push(text);
    this.#take();
  }

  /** No more comes: what was kept back is shown as it stands. */
  end(): void {
    if (this.#ended) return;
    this.#ended = true;
    this.#segments.end();
    this.#take();
  }

  /** All blocks. The finished ones are the same objects as before; the array is a new one. */
  blocks(): MarkdownBlock[] {
    const open = this.openBlock();
    return open ? [...this.#final, open] : [...this.#final];
  }

  /** The finished blocks: append-only, not a copy. */
  get finished(): readonly MarkdownBlock[] {
    return this.#final;
  }

  /** The block that still grows, where something of it can be shown. */
  openBlock(): MarkdownBlock | undefined {
    if (this.#ended) return undefined;
    const open = this.#segments.open();
    const nodes = "code" in open ? [this.#codeNode(open.code, open.partial)] : treeOf(healed(open.source));
    return nodes.length > 0 ? { key: this.#final.length, nodes, final: false } : undefined;
  }

  #take(): void {
    for (const segment of this.#segments.finished) {
      this.#final.push({ key: this.#final.length, nodes: this.#nodesOf(segment), final: true });
    }
    this.#segments.finished = [];
  }

  #nodesOf(segment: Segment): MarkdownNode[] {
    if (segment.kind === "text") return treeOf(segment.source);
    return [this.#codeNode(segment, "")];
  }

  #codeNode(code: CodeSegment, partial: string): MarkdownCode {
    if (this.#open !== code) {
      this.#open = code;
      this.#pieces = [];
    }
    while ((this.#pieces.length + 1) * PIECE_LINES <= code.lines.length) {
      const begin = this.#pieces.length * PIECE_LINES;
      this.#pieces.push(code.lines.slice(begin, begin + PIECE_LINES).join("\n") + "\n");
    }
    const rest = code.lines.slice(this.#pieces.length * PIECE_LINES);
    const last = rest.map((line) => line + "\n").join("") + partial;
    const pieces = last === "" ? [...this.#pieces] : [...this.#pieces, last];
    return { tag: "pre", language: languageOf(code.info), pieces, closed: code.closed };
  }
}

/** The nodes of a whole document. */
export function markdownToTree(source: string): MarkdownNode[] {
  const stream = new MarkdownStream();
  stream.append(source);
  stream.end();
  return stream.blocks().flatMap((block) => block.nodes);
}

/** The HTML of a whole document, or of one that still comes; safe to be set as `innerHTML`. */
export function markdownToHtml(source: string, { streaming = false }: { streaming?: boolean } = {}): string {
  const stream = new MarkdownStream();
  stream.append(source);
  if (!streaming) stream.end();
  return stream.blocks().map((block) => htmlOf(block.nodes)).join("");
}
