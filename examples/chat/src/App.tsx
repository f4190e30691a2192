import { useBehestThreads, type UiMessage } from "@behest/client-ts/react";
import { useCallback, useMemo, useRef, useState } from "react";

import { BudgetMeter, useBudget } from "./BudgetMeter";
import { Chat } from "./Chat";
import type { Gateway } from "./gateway";
import { Icon } from "./icons";
import { Sidebar } from "./Sidebar";
import { forget, listed, remember, remembered, setAddress, threadOfAddress } from "./threads";

/** The page: conversations at the side, one of them in the middle, the budget above it. */
export function App({ gateway }: { gateway: Gateway }) {
  const { client } = gateway;
  const [addressed] = useState(threadOfAddress);
  const [threadId, setThreadId] = useState<string>(() => addressed ?? crypto.randomUUID());
  const [sidebarOpen, setSidebarOpen] = useState(false);
  const [titles, setTitles] = useState(remembered);
  const { threads, refresh, remove } = useBehestThreads({ client });
  const budget = useBudget(client);
  const known = useRef(new Map<string, readonly UiMessage[]>());
  const conversations = useMemo(() => listed(threads, titles), [threads, titles]);
  const title = conversations.find((thread) => thread.id === threadId)?.title ?? "New chat";

  const open = useCallback((id: string, isNew = false) => {
    setAddress(isNew ? undefined : id);
    setThreadId(id);
    setSidebarOpen(false);
  }, []);
  const begin = useCallback(() => open(crypto.randomUUID(), true), [open]);
  const asked = useCallback((id: string, question: string) => {
    setAddress(id);
    setTitles(remember(id, question));
  }, []);
  const ended = useCallback(
    (id: string, messages: readonly UiMessage[]) => {
      known.current.set(id, messages);
      void refresh();
      void budget.refresh();
    },
    [refresh, budget.refresh],
  );
  const discard = useCallback(
    (id: string) => {
      setTitles(forget(id));
      known.current.delete(id);
      void remove(id).catch(() => undefined);
      if (id === threadId) begin();
    },
    [remove, threadId, begin],
  );

  return (
    <div className="app">
      <a className="skip" href="#composer">
        Skip to the message box
      </a>
      <Sidebar
        conversations={conversations}
        current={threadId}
        open={sidebarOpen}
        onClose={() => setSidebarOpen(false)}
        onNew={begin}
        onOpen={open}
        onDelete={discard}
      />
      <main className="main">
        <header className="top">
          <button className="icon-button only-narrow" aria-label="Open the list of chats" onClick={() => setSidebarOpen(true)}>
            <Icon name="menu" />
          </button>
          <h1 className="top-title">{title}</h1>
          <BudgetMeter budget={budget.budget} />
          <ThemeButton />
        </header>
        <Chat
          key={threadId}
          gateway={gateway}
          threadId={threadId}
          isNew={threadId !== addressed && !conversations.some((thread) => thread.id === threadId)}
          known={known.current.get(threadId)}
          onAsk={asked}
          onEnd={ended}
        />
      </main>
    </div>
  );
}

function ThemeButton() {
  const [theme, setTheme] = useState(document.documentElement.dataset["theme"]);
  const other = theme === "dark" ? "light" : "dark";
  const change = (): void => {
    document.documentElement.dataset["theme"] = other;
    localStorage.setItem("theme", other);
    setTheme(other);
  };
  return (
    <button className="icon-button" aria-label={`Use ${other} colours`} data-testid="theme" onClick={change}>
      <Icon name={theme === "dark" ? "sun" : "moon"} />
    </button>
  );
}
