import { useEffect } from "react";

import { Icon } from "./icons";
import { dayOf, type Conversation } from "./threads";

interface SidebarProps {
  conversations: readonly Conversation[];
  current: string;
  /** On narrow screens it lies over the page. */
  open: boolean;
  onClose: () => void;
  onNew: () => void;
  onOpen: (id: string) => void;
  onDelete: (id: string) => void;
}

export function Sidebar({ conversations, current, open, onClose, onNew, onOpen, onDelete }: SidebarProps) {
  useEffect(() => {
    if (!open) return undefined;
    const close = (event: KeyboardEvent): void => {
      if (event.key === "Escape") onClose();
    };
    addEventListener("keydown", close);
    return () => removeEventListener("keydown", close);
  }, [open, onClose]);
  const days = [...Map.groupBy(conversations, (conversation) => dayOf(conversation.usedAt))];
  return (
    <>
      {open && <div className="shade" onClick={onClose} aria-hidden="true" />}
      <aside className={open ? "sidebar open" : "sidebar"} aria-label="Chats">
        <div className="brand">
          <img src="/mark.svg" alt="" width="28" height="28" />
          <span>Behest</span>
          <button className="icon-button only-narrow" aria-label="Close the list of chats" onClick={onClose}>
            <Icon name="close" />
          </button>
        </div>
        <button className="button new-chat" data-testid="new-chat" onClick={onNew}>
          <Icon name="plus" /> New chat
        </button>
        <nav className="conversations" aria-label="Earlier chats" data-testid="threads">
          {days.length === 0 && <p className="nothing">Your chats will be listed here.</p>}
          {days.map(([day, those]) => (
            <section key={day} aria-label={day}>
              <h2>{day}</h2>
              <ul>
                {those.map(({ id, title }) => (
                  <li key={id} className={id === current ? "current" : undefined}>
                    <button className="conversation" aria-current={id === current ? "page" : undefined} onClick={() => onOpen(id)}>
                      {title}
                    </button>
                    <button className="icon-button small" aria-label={`Delete ${title}`} onClick={() => onDelete(id)}>
                      <Icon name="trash" />
                    </button>
                  </li>
                ))}
              </ul>
            </section>
          ))}
        </nav>
        <p className="foot">Streams run through a gateway with hard budgets: nobody pays for what was not read.</p>
      </aside>
    </>
  );
}
