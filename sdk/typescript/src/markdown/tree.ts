/**
 * Markdown as a small tree with a closed set of tags. There is no node for HTML: what looks like HTML is text. So
 * whatever renders the tree cannot be made to run a script, and has nothing to sanitise.
 */

import { Lexer, Marked, type Token, type Tokens } from "marked";

export type MarkdownTag =
  | "p" | "h1" | "h2" | "h3" | "h4" | "h5" | "h6" | "ul" | "ol" | "li" | "blockquote" | "hr" | "br"
  | "strong" | "em" | "del" | "code" | "a" | "table" | "thead" | "tbody" | "tr" | "th" | "td" | "checkbox";

export interface MarkdownElement {
  tag: MarkdownTag;
  children: readonly MarkdownNode[];
  /** Of `a`: http, https, mailto or tel. */
  href?: string;
  title?: string;
  /** Of `ol`: its first number, where that is not 1. */
  start?: number;
  /** Of `th` and `td`. */
  align?: "left" | "center" | "right";
  /** Of `checkbox`. */
  checked?: boolean;
}

/** A block of code. Its text comes in pieces, of which all but the last stay the same while it grows. */
export interface MarkdownCode {
  tag: "pre";
  /** The first word behind the fence; `""` where there is none. */
  language: string;
  pieces: readonly string[];
  /** Whether its closing fence has come. */
  closed: boolean;
}

export type MarkdownNode = string | MarkdownElement | MarkdownCode;

const marked = new Marked({ gfm: true, breaks: false });
marked.use({
  tokenizer: {
    // `false` asks marked for its own; `undefined` says that there is none here.
    html: () => undefined,
    tag: () => undefined,
    def: () => undefined,
    // "text" with "---" under it would be text first, and a heading a moment later: it stays text, with a rule.
    lheading: () => undefined,
    // One tilde is "about" more often than anything else.
    del(source) {
      return source.startsWith("~~") ? false : undefined;
    },
  },
});

/** The tree of a piece of Markdown that stands for itself. */
export function treeOf(source: string): MarkdownNode[] {
  const lexer = new Lexer(marked.defaults);
  return blocks(lexer.lex(source));
}

function blocks(tokens: readonly Token[]): MarkdownNode[] {
  return tokens.flatMap((token) => block(token));
}

function block(token: Token): MarkdownNode[] {
  switch (token.type) {
    case "space":
    case "checkbox":
      return [];
    case "paragraph":
    case "text":
      return [element("p", inlineOf(token))];
    case "heading":
      return [element(`h${(token as Tokens.Heading).depth}` as MarkdownTag, inlineOf(token))];
    case "hr":
      return [element("hr")];
    case "blockquote":
      return [element("blockquote", blocks((token as Tokens.Blockquote).tokens))];
    case "code": {
      const code = token as Tokens.Code;
      return [{ tag: "pre", language: languageOf(code.lang ?? ""), pieces: [code.text + "\n"], closed: true }];
    }
    case "list":
      return [list(token as Tokens.List)];
    case "table":
      return [table(token as Tokens.Table)];
    default:
      return [element("p", inlineOf(token))];
  }
}

export function languageOf(info: string): string {
  return /^[\w+#.-]{1,32}/.exec(info.trim())?.[0] ?? "";
}

function list(token: Tokens.List): MarkdownNode {
  const items = token.items.map((item) => {
    // The first text of an item is never a paragraph of its own: a list does not spread when a blank line comes later.
    const children = item.tokens.flatMap((inner, index) =>
      (inner.type === "text" || inner.type === "paragraph") && index === firstText(item) ? inlineOf(inner) : block(inner),
    );
    if (!item.task) return element("li", children);
    const box: MarkdownElement = { ...element("checkbox"), checked: item.checked === true };
    return element("li", [box, ...children]);
  });
  const start = typeof token.start === "number" && token.start !== 1 ? { start: token.start } : {};
  return { ...element(token.ordered ? "ol" : "ul", items), ...start };
}

function firstText(item: Tokens.ListItem): number {
  return item.tokens.findIndex((token) => token.type !== "space" && token.type !== "checkbox");
}

function table(token: Tokens.Table): MarkdownNode {
  const row = (cells: readonly Tokens.TableCell[], tag: "th" | "td"): MarkdownNode =>
    element("tr", cells.map((cell) => ({ ...element(tag, inline(cell.tokens)), ...(cell.align ? { align: cell.align } : {}) })));
  return element("table", [
    element("thead", [row(token.header, "th")]),
    element("tbody", token.rows.map((cells) => row(cells, "td"))),
  ]);
}

function inlineOf(token: Token): MarkdownNode[] {
  const { tokens } = token as { tokens?: Token[] };
  return tokens ? inline(tokens) : [decoded((token as { text?: string }).text ?? token.raw)];
}

function inline(tokens: readonly Token[]): MarkdownNode[] {
  const nodes: MarkdownNode[] = [];
  for (const token of tokens) {
    for (const node of inlineToken(token)) {
      const last = nodes.length - 1;
      if (typeof node === "string" && typeof nodes[last] === "string") nodes[last] += node;
      else if (node !== "") nodes.push(node);
    }
  }
  return nodes;
}

function inlineToken(token: Token): MarkdownNode[] {
  switch (token.type) {
    case "strong":
    case "em":
    case "del":
      return [element(token.type, inlineOf(token))];
    case "codespan":
      return [element("code", [(token as Tokens.Codespan).text])];
    case "br":
      return [element("br")];
    case "checkbox":
      return [];
    case "escape":
      return [(token as Tokens.Escape).text];
    case "link": {
      const link = token as Tokens.Link;
      return anchor(link.href, link.title, inlineOf(link));
    }
    case "image": {
      // Not fetched: a model could say an address that carries the conversation away. It becomes a link.
      const image = token as Tokens.Image;
      return anchor(image.href, image.title, [decoded(image.text || "image")]);
    }
    default:
      return inlineOf(token);
  }
}

function anchor(href: string, title: string | null | undefined, children: readonly MarkdownNode[]): MarkdownNode[] {
  const safe = safeAddress(decoded(href));
  if (safe === undefined) return [...children];
  return [{ ...element("a", children), href: safe, ...(title ? { title: decoded(title) } : {}) }];
}

/** Addresses that a link may have; anything else, also a relative one, is text. */
function safeAddress(href: string): string | undefined {
  // What a browser skips when it reads an address must not hide a scheme from us.
  const address = href.replace(/[\u0000-\u0020\u007f-\u009f\u200b-\u200f\u2028\u2029\ufeff]/g, "");
  return /^(?:https?:\/\/|mailto:|tel:)[^\s]+$/i.test(address) ? address : undefined;
}

const ENTITIES: Readonly<Record<string, string>> = {
  amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", reg: "®", trade: "™", hellip: "…",
  mdash: "—", ndash: "–", lsquo: "‘", rsquo: "’", ldquo: "“", rdquo: "”", laquo: "«", raquo: "»", bull: "•",
  middot: "·", times: "×", divide: "÷", deg: "°", plusmn: "±", micro: "µ", para: "¶", sect: "§", euro: "€",
  pound: "£", yen: "¥", cent: "¢", larr: "←", rarr: "→", uarr: "↑", darr: "↓", harr: "↔", le: "≤", ge: "≥", ne: "≠",
  infin: "∞", minus: "−", frac12: "½", szlig: "ß", auml: "ä", ouml: "ö", uuml: "ü", eacute: "é",
};

function decoded(text: string): string {
  if (!text.includes("&")) return text;
  return text.replace(/&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|(\w{2,8}));/g, (whole, decimal, hexadecimal, name) => {
    if (name !== undefined) return ENTITIES[name as string] ?? whole;
    const point = decimal !== undefined ? Number(decimal) : Number.parseInt(hexadecimal as string, 16);
    const isText = point > 0 && point <= 0x10ffff && !(point >= 0xd800 && point <= 0xdfff);
    return isText ? String.fromCodePoint(point) : "\ufffd";
  });
}

function element(tag: MarkdownTag, children: readonly MarkdownNode[] = []): MarkdownElement {
  return { tag, children };
}
