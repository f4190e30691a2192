/** Markdown that still comes, as React elements: no HTML is set, and finished blocks are never rendered again. */

import { createElement, Fragment, memo, useEffect, useMemo, useRef, useState, type ComponentType, type ReactNode } from "react";

import { MarkdownStream, textOf, type MarkdownBlock, type MarkdownCode, type MarkdownNode } from "../markdown/index.js";

export interface CodeProps {
  /** `""` where the fence names none. */
  language: string;
  /** The text in pieces; all but the last stay the same while it grows. */
  pieces: readonly string[];
  /** Whether all of it is here. */
  closed: boolean;
}

export interface MarkdownProps {
  /** All text so far. While it only grows, only what is new is read. */
  text: string;
  /** Whether more comes: marks that are not complete are kept back then. */
  streaming?: boolean;
  /** Renders blocks of code; give the same component every time. */
  code?: ComponentType<CodeProps>;
}

/** So many blocks are one group, which React skips as a whole when nothing of it changes. */
const GROUP_BLOCKS = 32;

/**
 * A document of Markdown. Style it by its tags; a block has the class `behest-block`. 32 blocks are a `behest-group`: with
 * `content-visibility: auto` on the groups a page that is far longer than the screen costs no more than what is in view.
 * (On each block it would cost the browser a look at every block in every frame.)
 */
export function Markdown({ text, streaming = false, code = PlainCode }: MarkdownProps): ReactNode {
  const document = useRef<{ stream: MarkdownStream; text: string; ended: boolean } | undefined>(undefined);
  const blocks = useMemo(() => {
    let current = document.current;
    if (!current || current.ended || !text.startsWith(current.text)) current = { stream: new MarkdownStream(), text: "", ended: false };
    if (text.length > current.text.length) current.stream.append(ownText(text.slice(current.text.length)));
    if (!streaming) current.stream.end();
    document.current = { stream: current.stream, text, ended: !streaming };
    return current.stream.blocks();
  }, [text, streaming]);
  const groups: ReactNode[] = [];
  for (let begin = 0; begin < blocks.length; begin += GROUP_BLOCKS) {
    groups.push(createElement(Group, { key: begin, blocks: blocks.slice(begin, begin + GROUP_BLOCKS), code }));
  }
  return createElement(Fragment, null, ...groups);
}

/**
 * The text without what it was cut from. Engines keep the whole for as long as a piece of it lives: blocks would hold every
 * state of the document that they were cut from, which is megabytes after a thousand frames.
 */
function ownText(piece: string): string {
  return ` ${piece}`.slice(1);
}

interface GroupProps {
  blocks: readonly MarkdownBlock[];
  code: ComponentType<CodeProps>;
}

const Group = memo(
  function Group({ blocks, code }: GroupProps): ReactNode {
    return createElement("div", { className: "behest-group" }, ...blocks.map((block) => createElement(Block, { key: block.key, block, code })));
  },
  (before, after) =>
    before.code === after.code &&
    before.blocks.length === after.blocks.length &&
    before.blocks.every((block, index) => block === after.blocks[index]),
);

const Block = memo(function Block({ block, code }: { block: MarkdownBlock; code: ComponentType<CodeProps> }): ReactNode {
  return createElement("div", { className: "behest-block" }, ...block.nodes.map((node, index) => elementOf(node, index, code)));
});

function elementOf(node: MarkdownNode, key: number, code: ComponentType<CodeProps>): ReactNode {
  if (typeof node === "string") return node;
  if (node.tag === "pre") return createElement(code, { key, ...codeProps(node) });
  if (node.tag === "hr" || node.tag === "br") return createElement(node.tag, { key });
  if (node.tag === "checkbox") {
    return createElement("input", { key, type: "checkbox", disabled: true, checked: node.checked === true, readOnly: true, "aria-label": node.checked ? "done" : "open" });
  }
  const children = node.children.map((child, index) => elementOf(child, index, code));
  const properties = {
    key,
    ...(node.href === undefined ? {} : { href: node.href, target: "_blank", rel: "noopener noreferrer nofollow ugc" }),
    ...(node.title === undefined ? {} : { title: node.title }),
    ...(node.start === undefined ? {} : { start: node.start }),
    ...(node.align === undefined ? {} : { style: { textAlign: node.align } }),
    ...(node.tag === "th" ? { scope: "col" } : {}),
  };
  const element = createElement(node.tag, properties, ...children);
  // A table that is wider than the text scrolls by itself, and the keyboard reaches it.
  if (node.tag !== "table") return element;
  return createElement("div", { key, className: "behest-table", role: "region", "aria-label": "Table", tabIndex: 0 }, element);
}

function codeProps(node: MarkdownCode): CodeProps {
  return { language: node.language, pieces: node.pieces, closed: node.closed };
}

/** A block of code without colours. */
export function PlainCode({ language, pieces }: CodeProps): ReactNode {
  const className = language ? `language-${language}` : undefined;
  return createElement("pre", { tabIndex: 0 }, createElement("code", { className }, ...pieces.map((text, index) => createElement(Piece, { key: index, text }))));
}

/** One piece of a block of code: full pieces are never rendered again. */
export const Piece = memo(function Piece({ text }: { text: string }): ReactNode {
  return createElement("span", { className: "behest-piece" }, text);
});

/**
 * What a screen reader is told of a text that still comes: whole sentences, at most every few seconds, so that it reads
 * along instead of beginning anew with every word.
 */
export function useAnnouncement(text: string, streaming: boolean, everyMs = 4_000): string {
  const [said, setSaid] = useState({ announcement: "", until: 0 });
  const latest = useRef({ text, streaming });
  latest.current = { text, streaming };
  useEffect(() => {
    const say = (): void => {
      const { text: whole, streaming: goesOn } = latest.current;
      setSaid((before) => {
        const from = whole.length < before.until ? 0 : before.until;
        const rest = whole.slice(from);
        const until = goesOn ? from + endOfSentence(rest) : whole.length;
        return until === before.until ? before : { announcement: plainText(whole.slice(from, until)), until };
      });
    };
    say();
    if (!streaming) return undefined;
    const timer = setInterval(say, everyMs);
    return () => clearInterval(timer);
  }, [streaming, everyMs]);
  return said.announcement;
}

function endOfSentence(text: string): number {
  let end = 0;
  for (const match of text.matchAll(/[.!?:。！？]["')\]]*\s|\n/g)) end = match.index + match[0].length;
  return end;
}

function plainText(source: string): string {
  const stream = new MarkdownStream();
  stream.append(source);
  stream.end();
  return stream.blocks().map((block) => textOf(block.nodes)).join(" ").trim();
}
