/** A few colours for code of most languages: comments, strings, numbers, key words, names that are called. */

export interface Part {
  kind: "" | "comment" | "string" | "number" | "keyword" | "call" | "type";
  text: string;
}

const KEYWORDS = new Set(
  (
    "abstract and as async await break case catch class const constructor continue def default defer delete do elif else enum except export extends " +
    "false finally fn for from func function go if impl implements import in instanceof interface is lambda let match mod mut " +
    "new nil none not null or package pass private protected pub public raise readonly return self static struct super switch then " +
    "this throw trait true try type typeof undefined use var void while with yield True False None done fi esac select insert update where"
  ).split(" "),
);
const HASH_COMMENTS = /^(?:python|py|sh|bash|zsh|shell|yaml|yml|toml|ruby|rb|r|make|makefile|dockerfile|ini|perl|elixir)$/i;
const SHELLS = /^(?:sh|bash|zsh|shell|console)$/i;
const SLASHES = String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`;
const HASHES = String.raw`#[^\n]*`;
const REST =
  String.raw`"""[\s\S]*?(?:"""|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|${"`"}(?:\\.|[^${"`"}\\])*${"`"}?` +
  String.raw`|\b\d[\d_.a-fxA-F]*\b|[A-Za-z_$][\w$]*`;
const slashed = new RegExp(`${SLASHES}|${REST}`, "g");
const hashed = new RegExp(`${HASHES}|${REST}`, "g");

/** The text in parts. Text without a language keeps its one colour. */
export function coloured(text: string, language: string): Part[] {
  if (language === "" || language === "text") return [{ kind: "", text }];
  const parts: Part[] = [];
  let from = 0;
  for (const match of text.matchAll(HASH_COMMENTS.test(language) ? hashed : slashed)) {
    const kind = kindOf(match[0], text.charAt(match.index + match[0].length));
    if (kind === "" || (kind !== "comment" && kind !== "string" && SHELLS.test(language))) continue;
    if (match.index > from) parts.push({ kind: "", text: text.slice(from, match.index) });
    parts.push({ kind, text: match[0] });
    from = match.index + match[0].length;
  }
  if (from < text.length) parts.push({ kind: "", text: text.slice(from) });
  return parts;
}

function kindOf(word: string, next: string): Part["kind"] {
  if (/^(?:\/[/*]|#)/.test(word)) return "comment";
  if (/^["'`]/.test(word)) return "string";
  if (/^\d/.test(word)) return "number";
  if (KEYWORDS.has(word)) return "keyword";
  if (next === "(") return "call";
  return /^[A-Z]\w*[a-z]/.test(word) ? "type" : "";
}
