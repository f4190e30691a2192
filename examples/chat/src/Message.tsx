import { BehestError } from "@behest/client-ts";
import { Markdown, type UiMessage } from "@behest/client-ts/react";
import { memo } from "react";

import { CodeBlock } from "./CodeBlock";
import { Icon } from "./icons";

interface MessageProps {
  message: UiMessage;
  /** Nothing of the answer is here yet. */
  waiting: boolean;
  error: Error | undefined;
  onRetry: (() => void) | undefined;
}

/** One message. Those that are done are never rendered again. */
export const Message = memo(function Message({ message, waiting, error, onRetry }: MessageProps) {
  const { role, content, state } = message;
  if (role === "user") {
    return (
      <article className="message user" aria-label="You" data-testid="question">
        <div className="bubble">{content}</div>
      </article>
    );
  }
  const streaming = state === "streaming";
  return (
    <article className="message assistant" aria-label="Answer" aria-busy={streaming} data-testid="answer" data-state={state}>
      <img className="face" src="/mark.svg" alt="" width="28" height="28" />
      <div className="answer">
        {waiting && <div className="dots" role="status" aria-label="The answer is on its way"><i /><i /><i /></div>}
        <div className={streaming ? "prose streaming" : "prose"} data-testid="text">
          {/* What was cut off has marks that were never closed: they stay hidden as while it streamed. */}
          <Markdown text={content} streaming={state !== "done"} code={CodeBlock} />
        </div>
        {state === "stopped" && <Ending text="Stopped" onRetry={onRetry} label="Continue" />}
        {state === "failed" && <Failure error={error} canGoOn={message.lastEventId !== undefined} onRetry={onRetry} />}
      </div>
    </article>
  );
});

function Ending({ text, onRetry, label }: { text: string; onRetry: (() => void) | undefined; label: string }) {
  return (
    <p className="ending" data-testid="ending">
      <span>{text}</span>
      {onRetry && (
        <button className="link-button" data-testid="retry" onClick={onRetry}>
          <Icon name="retry" /> {label}
        </button>
      )}
    </p>
  );
}

function Failure({ error, canGoOn, onRetry }: { error: Error | undefined; canGoOn: boolean; onRetry: (() => void) | undefined }) {
  const status = error instanceof BehestError ? error.status : undefined;
  if (status === 402) return <Ending text="The budget ended here." onRetry={onRetry} label="Try again" />;
  // It broke off earlier, such as with the page that asked for it.
  if (!error) return <Ending text="Interrupted" onRetry={onRetry} label={canGoOn ? "Continue" : "Try again"} />;
  const traceId = error instanceof BehestError ? error.traceId : undefined;
  return (
    <div className="failure" role="alert" data-testid="failure">
      <Icon name="alert" />
      <div>
        <strong>Something went wrong.</strong>
        <p>{status === 403 ? "This conversation was suspended." : "What you read so far is kept."}</p>
        {traceId && <code className="trace">trace {traceId.slice(0, 12)}</code>}
      </div>
      {onRetry && (
        <button className="button" data-testid="retry" onClick={onRetry}>
          <Icon name="retry" /> Retry
        </button>
      )}
    </div>
  );
}
