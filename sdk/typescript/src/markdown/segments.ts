/**
 * Cuts Markdown that still comes into blocks that can no longer change, line by line: a line is looked at once, however
 * the text arrives. A block that grows beyond 4 KiB is cut too, so that the open one stays small.
 */

export interface TextSegment {
  kind: "text";
  source: string;
}

/** A fenced block of code; `lines` have no line feeds. */
export interface CodeSegment {
  kind: "code";
  info: string;
  lines: string[];
  closed: boolean;
}

export type Segment = TextSegment | CodeSegment;

/** UTF-16 units after which an open block is cut where it does least harm. */
export const SEGMENT_LENGTH_MAX = 4 * 1024;

const FENCE = /^( {0,3})(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}#{1,6}(?:[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const LIST_ITEM = /^ {0,3}(?:[-+*]|\d{1,9}[.)])(?:[ \t]|$)/;
const TABLE_ROW = /^ {0,3}\|/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

interface Fence {
  indent: number;
  mark: string;
  length: number;
}

/** Feed it; take `finished` when there are some; `open` is what comes after them. */
export class Segmenter {
  /** Segments that are final, since they were last taken. */
  finished: Segment[] = [];
  /** The part of the open line that has come. */
  #partial = "";
  #lines: string[] = [];
  #length = 0;
  #kind: "paragraph" | "list" | "indented" | "table" = "paragraph";
  #blank = false;
  #tableHead = "";
  #code: CodeSegment | undefined;
  #fence: Fence = { indent: 0, mark: "`", length: 3 };

  push(text: string): void {
    let begin = 0;
    for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n", begin)) {
      this.#partial += text.slice(begin, end);
      if (this.#partial.endsWith("\r")) this.#partial = this.#partial.slice(0, -1);
      this.#cutLongLine();
      const line = this.#partial;
      this.#partial = "";
      this.#line(line);
      begin = end + 1;
    }
    this.#partial += text.slice(begin);
    this.#cutLongLine();
  }

  /** No more comes: everything is final. */
  end(): void {
    if (this.#partial !== "") this.#line(this.#partial);
    this.#partial = "";
    if (this.#code) {
      this.finished.push(this.#code);
      this.#code = undefined;
    }
    this.#close();
  }

  /** What is not final: code with the open line's beginning, or text. */
  open(): { code: CodeSegment; partial: string } | { source: string } {
    const partial = this.#partial.endsWith("\r") ? this.#partial.slice(0, -1) : this.#partial;
    if (this.#code) {
      const mayClose = new RegExp(`^ {0,3}${this.#fence.mark}*[ \\t]*$`).test(partial);
      return { code: this.#code, partial: mayClose ? "" : this.#unindented(partial) };
    }
    const source = this.#lines.join("\n") + (this.#lines.length > 0 ? "\n" : "");
    return { source: this.#tableHead + source + partial };
  }

  #line(line: string): void {
    if (this.#code) {
      this.#codeLine(this.#code, line);
      return;
    }
    const inList = this.#kind === "list" && this.#lines.length > 0;
    const indent = line.length - line.trimStart().length;
    if (line.trim() === "") {
      if (this.#lines.length === 0) return;
      this.#blank = true;
      if (inList || this.#kind === "indented") this.#add(line);
      else this.#close();
      return;
    }
    const mayInterrupt = !inList || indent < 2;
    const fence = mayInterrupt ? FENCE.exec(line) : null;
    if (fence) {
      this.#close();
      const mark = fence[2] ?? "```";
      this.#fence = { indent: fence[1]?.length ?? 0, mark: mark[0] ?? "`", length: mark.length };
      this.#code = { kind: "code", info: fence[3] ?? "", lines: [], closed: false };
      return;
    }
    const isList = LIST_ITEM.test(line) && !RULE.test(line);
    if (this.#blank && !this.#continues(indent, isList)) this.#close();
    if (mayInterrupt && (HEADING.test(line) || RULE.test(line))) {
      this.#close();
      this.#add(line);
      this.#close();
      return;
    }
    this.#cutLongBlock(isList && indent === 0);
    this.#classify(line, indent, isList);
    this.#add(line);
    this.#blank = false;
  }

  /** Whether a line behind a blank one still belongs to the block. */
  #continues(indent: number, isList: boolean): boolean {
    if (this.#kind === "list") return isList || indent >= 2;
    return this.#kind === "indented" && indent >= 4;
  }

  #classify(line: string, indent: number, isList: boolean): void {
    const first = this.#lines.length === 0 && this.#tableHead === "";
    if (isList && this.#kind !== "indented") this.#kind = "list";
    else if (first && indent >= 4) this.#kind = "indented";
    else if (this.#kind === "paragraph" && TABLE_RULE.test(line) && TABLE_ROW.test(this.#lines.at(-1) ?? "")) {
      this.#kind = "table";
    }
  }

  #cutLongBlock(atItem: boolean): void {
    if (this.#length < SEGMENT_LENGTH_MAX) return;
    if (this.#kind === "list" && !atItem && this.#length < 4 * SEGMENT_LENGTH_MAX) return;
    const head = this.#kind === "table" ? this.#tableHead || this.#headOfTable() : "";
    this.#close();
    if (head) {
      this.#tableHead = head;
      this.#kind = "table";
    }
  }

  #headOfTable(): string {
    const rule = this.#lines.findIndex((line, index) => index > 0 && TABLE_RULE.test(line));
    return rule > 0 ? `${this.#lines[rule - 1] ?? ""}\n${this.#lines[rule] ?? ""}\n` : "";
  }

  /** A line without an end is cut at a space: the place depends on the text alone, not on how it came. */
  #cutLongLine(): void {
    while (this.#code === undefined && this.#partial.length >= SEGMENT_LENGTH_MAX) {
      const space = this.#partial.lastIndexOf(" ", SEGMENT_LENGTH_MAX - 1);
      const cut = space > SEGMENT_LENGTH_MAX / 2 ? space : SEGMENT_LENGTH_MAX - 1;
      const head = this.#partial.slice(0, cut);
      this.#partial = this.#partial.slice(this.#partial[cut] === " " ? cut + 1 : cut);
      this.#line(head);
      if (!this.#code) this.#close();
    }
  }

  #codeLine(code: CodeSegment, line: string): void {
    const { mark, length } = this.#fence;
    const closing = new RegExp(`^ {0,3}${mark}{${length},}[ \\t]*$`);
    if (closing.test(line)) {
      code.closed = true;
      this.finished.push(code);
      this.#code = undefined;
    } else code.lines.push(this.#unindented(line));
  }

  #unindented(line: string): string {
    let cut = 0;
    while (cut < this.#fence.indent && line[cut] === " ") cut += 1;
    return line.slice(cut);
  }

  #add(line: string): void {
    this.#lines.push(line);
    this.#length += line.length + 1;
  }

  #close(): void {
    const source = this.#lines.join("\n");
    if (source.trim() !== "") this.finished.push({ kind: "text", source: this.#tableHead + source });
    this.#lines = [];
    this.#length = 0;
    this.#blank = false;
    this.#tableHead = "";
    this.#kind = "paragraph";
  }
}
