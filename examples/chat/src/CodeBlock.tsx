import type { CodeProps } from "@behest/client-ts/react";
import { memo, useEffect, useState } from "react";

import { coloured } from "./highlight";
import { Icon } from "./icons";

/** A block of code with its language, a button that copies it, and colours. It grows piece by piece. */
export function CodeBlock({ language, pieces, closed }: CodeProps) {
  return (
    <figure className="code" data-testid="code">
      <figcaption>
        <span>{language || "text"}</span>
        {closed && <CopyButton pieces={pieces} />}
      </figcaption>
      <pre tabIndex={0} aria-label={`Code${language ? `, ${language}` : ""}`}>
        <code>
          {pieces.map((text, index) => (
            <ColouredPiece key={index} text={text} language={language} />
          ))}
        </code>
      </pre>
    </figure>
  );
}

const ColouredPiece = memo(function ColouredPiece({ text, language }: { text: string; language: string }) {
  return (
    <span className="behest-piece">
      {coloured(text, language).map(({ kind, text: part }, index) => (kind ? <span key={index} className={kind}>{part}</span> : part))}
    </span>
  );
});

function CopyButton({ pieces }: { pieces: readonly string[] }) {
  const [copied, setCopied] = useState(false);
  useEffect(() => {
    if (!copied) return undefined;
    const timer = setTimeout(() => setCopied(false), 2_000);
    return () => clearTimeout(timer);
  }, [copied]);
  const copy = (): void => {
    void navigator.clipboard.writeText(pieces.join("")).then(() => setCopied(true));
  };
  return (
    <button className="link-button" onClick={copy}>
      <Icon name={copied ? "check" : "copy"} /> <span aria-live="polite">{copied ? "Copied" : "Copy"}</span>
    </button>
  );
}
