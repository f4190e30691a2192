import { Lexer } from "marked";
import { describe, expect, it } from "vitest";

import { htmlOf, markdownToHtml, MarkdownStream, textOf } from "../src/markdown/index.js";
import { SEGMENT_LENGTH_MAX } from "../src/markdown/segments.js";
import { DOCUMENTS } from "./documents.js";

const squeezed = (text: string): string => text.replace(/\s+/g, "");
const shown = (stream: MarkdownStream): string => stream.blocks().map((block) => textOf(block.nodes)).join("\n");
const html = (stream: MarkdownStream): string => stream.blocks().map((block) => htmlOf(block.nodes)).join("");

function played(source: string, sizes: () => number): MarkdownStream {
  const stream = new MarkdownStream();
  for (let at = 0; at < source.length; ) {
    const size = sizes();
    stream.append(source.slice(at, at + size));
    stream.blocks();
    at += size;
  }
  stream.end();
  return stream;
}

/** A generator of numbers that is the same in every run. */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
}

describe.each(Object.entries(DOCUMENTS))("%s", (_name, source) => {
  it("ends as the same HTML, wherever it was cut", () => {
    const whole = markdownToHtml(source);
    for (let cut = 1; cut < source.length; cut++) {
      const stream = new MarkdownStream();
      stream.append(source.slice(0, cut));
      stream.blocks();
      stream.append(source.slice(cut));
      stream.end();
      expect(html(stream)).toBe(whole);
    }
    for (let seed = 0; seed < 20; seed++) {
      const next = random(seed);
      expect(html(played(source, () => 1 + Math.floor(next() * 12)))).toBe(whole);
    }
  });

  it("never takes back a character that it has shown, and shows no mark that will vanish", () => {
    const stream = new MarkdownStream();
    let before = "";
    for (const unit of source) {
      stream.append(unit);
      const now = squeezed(shown(stream));
      expect(now.startsWith(before), `${JSON.stringify(before.slice(-40))} became ${JSON.stringify(now.slice(-40))}`).toBe(true);
      before = now;
    }
    stream.end();
    expect(squeezed(shown(stream)).startsWith(before)).toBe(true);
  });

  it("shows nearly all that has come: what is kept back is short", () => {
    const stream = new MarkdownStream();
    for (let cut = 1; cut <= source.length; cut++) {
      stream.append(source.slice(cut - 1, cut));
      const missing = squeezed(source.slice(0, cut)).length - squeezed(shown(stream)).length;
      const marks = squeezed(source.slice(0, cut)).length - squeezed(markdownText(source.slice(0, cut))).length;
      expect(missing - marks).toBeLessThan(90);
    }
  });

  it("keeps finished blocks as the same objects", () => {
    const stream = new MarkdownStream();
    const kept = new Map<number, unknown>();
    for (const unit of source) {
      stream.append(unit);
      for (const block of stream.blocks()) {
        if (!block.final) continue;
        if (kept.has(block.key)) expect(kept.get(block.key)).toBe(block);
        kept.set(block.key, block);
      }
    }
  });
});

function markdownText(source: string): string {
  const stream = new MarkdownStream();
  stream.append(source);
  stream.end();
  return shown(stream);
}

describe("what it makes", () => {
  it.each([
    ["**bold**", "<p><strong>bold</strong></p>"],
    ["# A `b`", "<h1>A <code>b</code></h1>"],
    ["3. x\n4. y", '<ol start="3"><li>x</li><li>y</li></ol>'],
    ["- [x] a\n- [ ] b", '<ul><li><input type="checkbox" disabled checked> a</li><li><input type="checkbox" disabled> b</li></ul>'],
    ["a  \nb", "<p>a<br>b</p>"],
    ["| a | b |\n|--|:-:|\n| 1 | 2 |", '<table><thead><tr><th>a</th><th style="text-align:center">b</th></tr></thead><tbody><tr><td>1</td><td style="text-align:center">2</td></tr></tbody></table>'],
    ["```rust ignore\nfn a() {}\n```", '<pre><code class="language-rust">fn a() {}\n</code></pre>'],
    ["> a\n> b", "<blockquote><p>a\nb</p></blockquote>"],
    ["text\n---\nmore", "<p>text</p><hr><p>more</p>"],
    ["~5 or ~6", "<p>~5 or ~6</p>"],
    ["&amp; &#65; &#x42; &unknown;", "<p>&amp; A B &amp;unknown;</p>"],
    ["[a](https://b.c 'd')", '<p><a href="https://b.c" target="_blank" rel="noopener noreferrer nofollow ugc" title="d">a</a></p>'],
  ])("%j", (source, expected) => {
    expect(markdownToHtml(source)).toBe(expected);
  });

  it.each([
    ["**bo", "<p><strong>bo</strong></p>"],
    ["**bold*", "<p><strong>bold</strong></p>"],
    ["a **b *c", "<p>a <strong>b <em>c</em></strong></p>"],
    ["use `co", "<p>use <code>co</code></p>"],
    ["see [text](https://exa", "<p>see</p>"],
    ["a\n\n- ", "<p>a</p>"],
    ["a\n\n``", "<p>a</p>"],
    ["```py", ""],
    ["```py\nx = 1\n``", '<pre><code class="language-py">x = 1\n</code></pre>'],
    ["| a | b |\n|--", ""],
    ["| a | b |\n|--|--|\n| **x", "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td><strong>x</strong></td><td></td></tr></tbody></table>"],
    ["5 * 3", "<p>5 * 3</p>"],
    ["## ", ""],
  ])("of %j, while more may come", (source, expected) => {
    expect(markdownToHtml(source, { streaming: true })).toBe(expected);
  });
});

describe("what it never makes", () => {
  it.each([
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a <b onmouseover=x>b</b> <!-- c -->",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java&#10;script:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](\u0001javascript:alert(1))",
    "[x](data:text/html,<script>)",
    "[x](vbscript:x) ![y](javascript:x)",
    "<javascript:alert(1)>",
    '[x](https://a.b "\\" onclick=alert(1)")',
    '```"><script>\nx\n```',
    "[x]: javascript:alert(1)\n\n[x]",
    '| <b> | [a](javascript:x) |\n|--|--|\n| <i onclick="x"> | y |',
  ])("of %j at any cut", (source) => {
    for (let cut = 1; cut <= source.length; cut++) {
      for (const streaming of [true, false]) {
        const made = markdownToHtml(source.slice(0, cut), { streaming });
        const tags = made.match(/<[^>]*>/g) ?? [];
        for (const tag of tags) {
          expect(tag).toMatch(/^<\/?(?:p|h\d|ul|ol|li|blockquote|hr|br|strong|em|del|code|pre|a|table|thead|tbody|tr|th|td|input)\b/);
          expect(tag.replace(/"[^"]*"/g, "")).not.toMatch(/\son\w+|javascript|style=[^"]/i);
          const href = /href="([^"]*)"/.exec(tag)?.[1];
          if (href !== undefined) expect(href).toMatch(/^(?:https?:|mailto:|tel:)/);
        }
        expect(made.replace(/<[^>]*>/g, "")).not.toMatch(/[<>]/);
      }
    }
  });
});

describe("nonsense", () => {
  const alphabet = ["*", "**", "_", "`", "```", "~~", "[", "]", "(", ")", "!", "#", "# ", "- ", "1. ", "> ", "|", "|--|", "\n", "\n\n", " ", "    ", "\\", "<", ">", "&", "a", "b c", "é", "😀", "https://x.y/z", "\t", "\r\n"];

  it("ends as the same HTML however it is cut, well formed and escaped", () => {
    for (let seed = 0; seed < 400; seed++) {
      const next = random(seed + 1);
      const source = Array.from({ length: 40 }, () => alphabet[Math.floor(next() * alphabet.length)]).join("");
      const whole = markdownToHtml(source);
      expect(html(played(source, () => 1 + Math.floor(next() * 4))), JSON.stringify(source)).toBe(whole);
      const open: string[] = [];
      for (const [, closing, name] of whole.matchAll(/<(\/?)(\w+)[^>]*>/g)) {
        if (name === "br" || name === "hr" || name === "input") continue;
        if (closing) expect(open.pop()).toBe(name);
        else open.push(name ?? "");
      }
      expect(open).toEqual([]);
    }
  });
});

describe("long documents", () => {
  const paragraph = DOCUMENTS["an answer with everything"] ?? "";

  it.each([
    ["many blocks", paragraph.repeat(120)],
    ["one paragraph without an end", "word **bold** `code` and more ".repeat(7_000)],
    ["one list", "- item **bold** with `code`\n".repeat(7_000)],
    ["one table", "| a | b |\n|--|--|\n" + "| some `cell` | **other** |\n".repeat(7_000)],
    ["one block of code", "```js\n" + "const answer = compute(42);\n".repeat(7_000)],
    ["one quote", "> quoted *text* goes on\n".repeat(8_000)],
  ])("%s of 200 000 characters: the open block stays small", (_name, source) => {
    const stream = new MarkdownStream();
    let widest = 0;
    for (let at = 0; at < source.length; at += 400) {
      stream.append(source.slice(at, at + 400));
      const open = stream.openBlock();
      const node = open?.nodes[0];
      const size = typeof node === "object" && node.tag === "pre" ? node.pieces.at(-1)?.length ?? 0 : textOf(open?.nodes ?? []).length;
      widest = Math.max(widest, size);
    }
    stream.end();
    expect(widest).toBeLessThan(SEGMENT_LENGTH_MAX + 1_000);
    expect(html(stream)).toBe(markdownToHtml(source));
  });

  it("keeps the pieces of code that are full", () => {
    const stream = new MarkdownStream();
    stream.append("```\n" + "line\n".repeat(200));
    const first = stream.openBlock()?.nodes[0];
    stream.append("line\n".repeat(10));
    const second = stream.openBlock()?.nodes[0];
    if (typeof first !== "object" || first.tag !== "pre" || typeof second !== "object" || second.tag !== "pre") throw new Error("no code");
    expect(first.pieces.length).toBe(4);
    expect(second.pieces.slice(0, 3).every((piece, index) => piece === first.pieces[index])).toBe(true);
    expect(second.pieces.join("")).toBe("line\n".repeat(210));
  });
});

it("cuts where marked itself sees blocks", () => {
  for (const source of Object.values(DOCUMENTS)) {
    const stream = new MarkdownStream();
    stream.append(source.replaceAll("\r", ""));
    stream.end();
    const kinds = stream.blocks().flatMap((block) => block.nodes.map((node) => (typeof node === "string" ? "text" : node.tag)));
    const expected = new Lexer({ gfm: true })
      .lex(source.replaceAll("\r", "").replace("Text\n---\n", "Text\n\n---\n"))
      .filter((token) => token.type !== "space")
      .map((token) => ({ heading: `h${(token as { depth?: number }).depth}`, paragraph: "p", code: "pre", list: (token as { ordered?: boolean }).ordered ? "ol" : "ul" })[token.type as string] ?? token.type);
    expect(kinds).toEqual(expected);
  }
});
