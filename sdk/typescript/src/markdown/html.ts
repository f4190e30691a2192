/** The tree as HTML in which every text is escaped. */

import type { MarkdownNode } from "./tree.js";

const ESCAPES: Readonly<Record<string, string>> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

export function escaped(text: string): string {
  return text.replace(/[&<>"']/g, (unit) => ESCAPES[unit] ?? unit);
}

/** HTML of nodes; safe to be set as `innerHTML`. */
export function htmlOf(nodes: readonly MarkdownNode[]): string {
  return nodes.map(nodeToHtml).join("");
}

function nodeToHtml(node: MarkdownNode): string {
  if (typeof node === "string") return escaped(node);
  if (node.tag === "pre") {
    const language = node.language ? ` class="language-${escaped(node.language)}"` : "";
    return `<pre><code${language}>${node.pieces.map(escaped).join("")}</code></pre>`;
  }
  if (node.tag === "hr" || node.tag === "br") return `<${node.tag}>`;
  if (node.tag === "checkbox") return `<input type="checkbox" disabled${node.checked ? " checked" : ""}> `;
  let attributes = "";
  if (node.href !== undefined) {
    attributes += ` href="${escaped(node.href)}" target="_blank" rel="noopener noreferrer nofollow ugc"`;
  }
  if (node.title !== undefined) attributes += ` title="${escaped(node.title)}"`;
  if (node.start !== undefined) attributes += ` start="${node.start}"`;
  if (node.align !== undefined) attributes += ` style="text-align:${node.align}"`;
  return `<${node.tag}${attributes}>${htmlOf(node.children)}</${node.tag}>`;
}

/** The text of nodes, without any mark. */
export function textOf(nodes: readonly MarkdownNode[]): string {
  return nodes
    .map((node) => {
      if (typeof node === "string") return node;
      if (node.tag === "pre") return node.pieces.join("");
      return node.tag === "br" ? "\n" : textOf(node.children);
    })
    .join("");
}
