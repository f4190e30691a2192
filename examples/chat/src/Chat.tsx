import { BehestError } from "@behest/client-ts";
import { uiMessages, useAnnouncement, useBehestChat, type UiMessage } from "@behest/client-ts/react";
import { useCallback, useEffect, useRef, useState } from "react";

import { Composer } from "./Composer";
import { SUGGESTIONS } from "./demo";
import type { Gateway } from "./gateway";
import { Icon } from "./icons";
import { Message } from "./Message";
import { RateToast } from "./RateToast";
import { UpgradeDialog } from "./UpgradeDialog";
import { useFollow } from "./useFollow";

interface ChatProps {
  gateway: Gateway;
  threadId: string;
  /** Nothing of it is on the gateway yet. */
  isNew: boolean;
  /** What this page knows of it already. */
  known: readonly UiMessage[] | undefined;
  onAsk: (threadId: string, question: string) => void;
  onEnd: (threadId: string, messages: readonly UiMessage[]) => void;
}

/** A conversation; what was said before is fetched first. */
export function Chat(props: ChatProps) {
  const { gateway, threadId, isNew, known } = props;
  const [before, setBefore] = useState<readonly UiMessage[] | undefined>(known ?? (isNew ? [] : undefined));
  const [lacking, setLacking] = useState(false);
  useEffect(() => {
    if (before || lacking) return undefined;
    const abort = new AbortController();
    gateway.client.threads.messages(threadId, { limit: 200 }, { signal: abort.signal }).then(
      (messages) => setBefore(uiMessages(messages)),
      (error: unknown) => {
        if (abort.signal.aborted) return;
        if (error instanceof BehestError && error.status === 404) setBefore([]);
        else setLacking(true);
      },
    );
    return () => abort.abort();
  }, [before, lacking, gateway, threadId]);
  if (lacking) {
    return (
      <div className="loading" role="alert">
        The chat could not be loaded.
        <button className="button" onClick={() => setLacking(false)}>
          <Icon name="retry" /> Try again
        </button>
      </div>
    );
  }
  if (!before) return <div className="loading" role="status">Loading the chat …</div>;
  return <Conversation {...props} before={before} />;
}

function Conversation({ gateway, threadId, before, onAsk, onEnd }: ChatProps & { before: readonly UiMessage[] }) {
  const chat = useBehestChat({ client: gateway.client, threadId, initialMessages: before });
  const { messages, status, error, attempt, send, stop, retry, dismissError } = chat;
  const composer = useRef<HTMLTextAreaElement>(null);
  const running = status !== "idle";
  const last = messages.at(-1);
  const announcement = useAnnouncement(last?.role === "assistant" ? last.content : "", running);
  const follow = useFollow();
  const wasRunning = useRef(false);

  const ask = useCallback(
    (question: string) => {
      onAsk(threadId, question);
      follow.toEnd();
      composer.current?.focus();
      send(question, gateway.paramsFor(question));
    },
    [gateway, onAsk, threadId, follow, send],
  );
  const askAgain = useCallback(() => {
    const question = messages.findLast((message) => message.role === "user");
    if (question) retry(gateway.paramsFor(question.content));
  }, [gateway, messages, retry]);
  useEffect(() => {
    if (wasRunning.current && !running) {
      onEnd(threadId, messages);
      // The Stop button is gone, and the focus with it.
      if (document.activeElement === document.body) composer.current?.focus();
    }
    wasRunning.current = running;
  }, [running, messages, onEnd, threadId]);
  useEffect(() => composer.current?.focus(), []);
  useEffect(() => {
    if (!running) return undefined;
    const escape = (event: KeyboardEvent): void => {
      if (event.key === "Escape" && !event.defaultPrevented) stop();
    };
    addEventListener("keydown", escape);
    return () => removeEventListener("keydown", escape);
  }, [running, stop]);

  const statusOf = error instanceof BehestError ? error.status : undefined;
  // The dialog closes; that the budget ended stays written under the answer.
  const [read, setRead] = useState<Error>();
  const closeDialog = useCallback(() => {
    setRead(error);
    composer.current?.focus();
  }, [error]);
  const closeError = useCallback(() => {
    dismissError();
    composer.current?.focus();
  }, [dismissError]);

  return (
    <>
      <div className="scroller" ref={follow.scroller} data-testid="scroller" tabIndex={-1}>
        {messages.length === 0 ? (
          <Welcome onAsk={ask} />
        ) : (
          <section className="messages" ref={follow.content} aria-label="Conversation" data-testid="messages">
            {messages.map((message, index) => (
              <Message
                key={message.id}
                message={message}
                waiting={message.state === "streaming" && message.content === ""}
                error={index === messages.length - 1 && statusOf !== 429 ? error : undefined}
                onRetry={index === messages.length - 1 && !running ? askAgain : undefined}
              />
            ))}
          </section>
        )}
      </div>
      <div className="bottom">
        {!follow.atEnd && messages.length > 0 && (
          <button className="to-end" onClick={follow.toEnd}>
            <Icon name="down" /> Latest
          </button>
        )}
        <Connection status={status} attempt={attempt} />
        <Composer ref={composer} running={running} onSend={ask} onStop={stop} />
        <p className="small-print">Answers can be wrong. Stop ends the bill as well as the text.</p>
      </div>
      <div className="hidden" aria-live="polite" data-testid="announcement">
        {announcement}
      </div>
      {statusOf === 402 && error !== read && <UpgradeDialog error={error as BehestError} onClose={closeDialog} />}
      {statusOf === 429 && <RateToast error={error as BehestError} onRetry={askAgain} onClose={closeError} />}
    </>
  );
}

function Welcome({ onAsk }: { onAsk: (question: string) => void }) {
  return (
    <div className="welcome" data-testid="welcome">
      <img src="/mark.svg" alt="" width="56" height="56" />
      <h2>What can I help with?</h2>
      <p>Ask anything, or begin with one of these.</p>
      <ul className="suggestions">
        {SUGGESTIONS.map(({ title, question }) => (
          <li key={title}>
            <button onClick={() => onAsk(question)}>
              <strong>{title}</strong>
              <span>{question}</span>
            </button>
          </li>
        ))}
      </ul>
    </div>
  );
}

/** Says that the network is away: at once where the browser knows, else while the client tries again. */
function Connection({ status, attempt }: { status: string; attempt: number }) {
  const [online, setOnline] = useState(navigator.onLine);
  useEffect(() => {
    const look = (): void => setOnline(navigator.onLine);
    addEventListener("online", look);
    addEventListener("offline", look);
    return () => {
      removeEventListener("online", look);
      removeEventListener("offline", look);
    };
  }, []);
  const text = status === "reconnecting" ? `Connection lost. Reconnecting (${attempt}) …` : online ? "" : "You are offline.";
  return (
    <div className="connection" role="status" data-testid="connection">
      {text && (
        <span className="pill">
          <span className="spinner" aria-hidden="true" /> {text}
        </span>
      )}
    </div>
  );
}
