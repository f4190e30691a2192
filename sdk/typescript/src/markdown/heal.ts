/**
 * What to show of a paragraph whose end has not come. Marks that may still become something else are kept back, and
 * what is open is closed: `**bo` is bold already, `[text](htt` waits. So nothing that was shown is ever taken back.
 */

/** A last line that is nothing but the begin of a block's mark: "-", "3.", "##", "> ", "- [ ". */
const MARK_ONLY =
  /^(?:[ \t]|>)*(?:[-+]?[ \t]*|[-+*][ \t]+\[[ xX]?\]?[ \t]*|\d{1,9}[.)]?[ \t]*|#{1,6}[ \t]*|[-*_=](?:[ \t]*[-*_=])*[ \t]*|[`~]{1,2}|\|[ \t]*)$/;
/** The begin of a fence, on a line that is not ended. */
const FENCE = /^(?:[ \t]|>)*(?:[-+*][ \t]+|\d{1,9}[.)][ \t]+)?(?:`{3,}[^`]*|~{3,}.*)$/;
const BLOCK_MARK = /^(?:[ \t]|>)*(?:(?:[-+*]|\d{1,9}[.)])[ \t]+(?:\[[ xX]\][ \t]+)?|#{1,6}[ \t]+)+/;
const QUOTE_MARK = /^(?:[ \t]*>)+[ \t]?/;
const TABLE_ROW = /^[ \t]*\|/;
/** An opened bracket that has not closed after so many characters is a bracket. */
const LINK_TEXT_MAX = 400;
const ADDRESS_MAX = 2_000;

/** The source to show for an unfinished block. */
export function healed(source: string): string {
  if (/^(?: {4}|\t)/.test(source)) return source;
  const fence = openFence(source);
  if (fence) return withoutClosing(source, fence);
  let shown = source;
  const lineBegin = shown.lastIndexOf("\n") + 1;
  const line = shown.slice(lineBegin);
  if (line !== "" && (MARK_ONLY.test(line) || FENCE.test(line))) shown = shown.slice(0, lineBegin);
  shown = withoutUnsureTable(shown);
  const begin = regionBegin(shown);
  const region = healedInline(shown.slice(begin));
  if (region === "") {
    // A mark with nothing behind it would be an empty item or heading; a cell may be empty.
    const mark = shown.lastIndexOf("\n", begin - 1) + 1;
    return TABLE_ROW.test(shown.slice(mark)) ? shown.slice(0, begin) : shown.slice(0, mark).trimEnd();
  }
  return shown.slice(0, begin) + region;
}

/** The fence of a block of code inside a list or quote that is still open on the last line; undefined: none is. */
function openFence(source: string): string | undefined {
  let fence: string | undefined;
  const lines = source.split("\n");
  lines.forEach((line, index) => {
    const isPartial = index === lines.length - 1;
    const mark = /^(?:[ \t]|>|[-+*][ \t]|\d{1,9}[.)][ \t])*(`{3,}(?=[^`]*$)|~{3,})(.*)$/.exec(line);
    if (!mark?.[1] || isPartial) return;
    if (fence === undefined) fence = mark[1];
    else if (mark[1].startsWith(fence) && mark[2]?.trim() === "") fence = undefined;
  });
  return fence;
}

/** Open code is shown as it is, but for the beginning of what may close it. */
function withoutClosing(source: string, fence: string): string {
  const begin = source.lastIndexOf("\n") + 1;
  const line = source.slice(begin).replace(/^(?:[ \t]|>)*/, "");
  const mayClose = line === "" || (line[0] === fence[0] && /^(.)\1*[ \t]*$/.test(line));
  return mayClose ? source.slice(0, begin) : source;
}

/** A row that may be a table's head is a table only when the rule under it has come: until then it waits. */
function withoutUnsureTable(source: string): string {
  const lines = source.split("\n");
  let first = lines.length - (lines.at(-1) === "" ? 1 : 0);
  const end = first;
  while (first > 0 && TABLE_ROW.test(lines[first - 1] ?? "")) first -= 1;
  const rows = end - first;
  if (rows === 0 || rows > 2) return source;
  const [rule = "", isWhole] = [lines[first + 1], end < lines.length];
  if (rows === 2 && (isWhole || !/^[\s|:-]*$/.test(rule))) return source; // decided: it is one, or it is text
  return lines.slice(0, first).join("\n");
}

/** Where the last run of inline text begins: behind the last blank line, block mark or cell. */
function regionBegin(source: string): number {
  let end = source.length;
  for (;;) {
    const begin = source.lastIndexOf("\n", end - 1) + 1;
    const line = source.slice(begin, end);
    const mark = BLOCK_MARK.exec(line);
    if (mark) return begin + mark[0].length;
    if (TABLE_ROW.test(line)) return begin + lastCell(line);
    const quote = QUOTE_MARK.exec(line)?.[0] ?? "";
    if (line.slice(quote.length).trim() === "" && begin + quote.length < source.trimEnd().length) return end;
    if (begin === 0) return quote.length;
    end = begin - 1;
  }
}

function lastCell(line: string): number {
  for (let at = line.length - 1; at >= 0; at--) {
    if (line[at] === "|" && line[at - 1] !== "\\") return at + 1;
  }
  return 0;
}

interface OpenMark {
  mark: string;
  count: number;
  begin: number;
  end: number;
}

/** Inline Markdown with what is unsure taken off its end and what is open closed. */
function healedInline(text: string): string {
  const open: OpenMark[] = [];
  let at = 0;
  let end = text.length;
  let closer = "";
  while (at < end) {
    const unit = text[at] ?? "";
    if (unit === "\\") {
      if (at + 1 === end) end = at;
      at += 2;
    } else if (unit === "`") {
      const run = runLength(text, at);
      const close = closingTicks(text, at + run, run);
      if (close >= 0) at = close + run;
      else {
        // A tick at the end may be part of the closing mark, also with a space behind it.
        const content = text.slice(at + run).replace(/[`\s]+$/, "");
        if (content === "") end = at;
        else {
          end = at + run + content.length;
          closer = "`".repeat(run);
        }
        break;
      }
    } else if (unit === "[" || (unit === "!" && (text[at + 1] === "[" || at + 1 === end))) {
      const after = behindLink(text, unit === "!" ? at + 1 : at);
      if (after === "unsure") end = at;
      else at = after;
    } else if (unit === "<" || unit === "&") {
      const unsure = unit === "<" ? /^<(?:[a-zA-Z][^\s<>]{0,400})?$/ : /^&#?\w{0,8}$/;
      if (unsure.test(text.slice(at, at + 420))) end = at;
      at += 1;
    } else if (unit === "*" || unit === "_" || unit === "~") {
      const run = runLength(text, at);
      if (at + run === end) end = at;
      else emphasis(text, at, run, open);
      at += run;
    } else if (unit === "h" && /^https?:\/\//.test(text.slice(at, at + 8))) {
      at += /^[^\s<*~`)\]]*/.exec(text.slice(at))?.[0].length ?? 1;
    } else at += 1;
  }
  let shown = text.slice(0, end);
  if (closer === "") shown = shown.trimEnd();
  // What was opened and has nothing in it yet is not shown either.
  for (let last = open.at(-1); last !== undefined && last.end >= shown.length; last = open.at(-1)) {
    shown = shown.slice(0, last.begin).trimEnd();
    open.pop();
  }
  return shown + closer + open.reverse().map((mark) => mark.mark.repeat(mark.count)).join("");
}

function runLength(text: string, at: number): number {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function closingTicks(text: string, from: number, run: number): number {
  for (let at = text.indexOf("`", from); at >= 0; ) {
    const length = runLength(text, at);
    if (length === run) return at;
    at = text.indexOf("`", at + length);
  }
  return -1;
}

/** Where to go on behind a bracket: behind the link, just behind a bracket that is none; or it may become one. */
function behindLink(text: string, at: number): number | "unsure" {
  let depth = 0;
  let close = -1;
  for (let index = at; index < text.length && close < 0; index++) {
    if (text[index] === "\\") index += 1;
    else if (text[index] === "[") depth += 1;
    else if (text[index] === "]" && --depth === 0) close = index;
  }
  if (close < 0) return text.length - at > LINK_TEXT_MAX ? at + 1 : "unsure";
  if (close + 1 === text.length) return "unsure";
  if (text[close + 1] !== "(") return at + 1;
  depth = 0;
  for (let index = close + 1; index < text.length; index++) {
    if (text[index] === "\\") index += 1;
    else if (text[index] === "(") depth += 1;
    else if (text[index] === ")" && --depth === 0) return index + 1;
    else if (text[index] === "\n" && text[index + 1] === "\n") return at + 1;
  }
  return text.length - close > ADDRESS_MAX ? at + 1 : "unsure";
}

const SPACE = /^\s?$/;
const PUNCTUATION = /^[\p{P}\p{S}]$/u;

/** Opens or closes emphasis, by the rules of CommonMark's "left-flanking" and "right-flanking". */
function emphasis(text: string, at: number, run: number, open: OpenMark[]): void {
  const mark = text[at] ?? "";
  if (mark === "~" && run !== 2) return;
  const [before, after] = [text[at - 1] ?? "", text[at + run] ?? ""];
  const left = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
  const right = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
  const mayOpen = mark === "_" ? left && (!right || PUNCTUATION.test(before)) : left;
  const mayClose = mark === "_" ? right && (!left || PUNCTUATION.test(after)) : right;
  let rest = run;
  while (mayClose && rest > 0) {
    const match = open.findLastIndex((candidate) => candidate.mark === mark);
    const opened = open[match];
    if (!opened) break;
    open.length = match + 1;
    const used = Math.min(opened.count, rest);
    rest -= used;
    opened.count -= used;
    if (opened.count === 0) open.pop();
  }
  if (rest > 0 && mayOpen) open.push({ mark, count: rest, begin: at + run - rest, end: at + run });
}
