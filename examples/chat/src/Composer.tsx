import { useLayoutEffect, useState, type FormEvent, type KeyboardEvent, type Ref, type RefObject } from "react";

import { Icon } from "./icons";

interface ComposerProps {
  ref: Ref<HTMLTextAreaElement>;
  running: boolean;
  onSend: (text: string) => void;
  onStop: () => void;
}

/** Enter sends, Shift+Enter is a new line, Escape stops. */
export function Composer({ ref, running, onSend, onStop }: ComposerProps) {
  const [text, setText] = useState("");
  const box = ref as RefObject<HTMLTextAreaElement | null>;
  useLayoutEffect(() => {
    if (!box.current) return;
    box.current.style.height = "auto";
    box.current.style.height = `${box.current.scrollHeight}px`;
  }, [text, box]);
  const send = (event: FormEvent): void => {
    event.preventDefault();
    if (running || text.trim() === "") return;
    onSend(text.trim());
    setText("");
  };
  const key = (event: KeyboardEvent): void => {
    // While an input method composes a character, Enter belongs to that.
    if (event.key === "Enter" && !event.shiftKey && !event.nativeEvent.isComposing) send(event);
  };
  return (
    <form className="composer" onSubmit={send}>
      <textarea
        id="composer"
        ref={ref}
        rows={1}
        value={text}
        placeholder="Message"
        aria-label="Message"
        data-testid="composer"
        enterKeyHint="send"
        onChange={(event) => setText(event.target.value)}
        onKeyDown={key}
      />
      {running ? (
        <button key="stop" type="button" className="round stop" aria-label="Stop" title="Stop (Esc)" data-testid="stop" onClick={onStop}>
          <span className="square" aria-hidden="true" />
        </button>
      ) : (
        <button key="send" type="submit" className="round" aria-label="Send" title="Send (Enter)" data-testid="send" disabled={text.trim() === ""}>
          <Icon name="send" />
        </button>
      )}
    </form>
  );
}
