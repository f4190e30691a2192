import type { BehestError } from "@behest/client-ts";
import { useEffect, useRef } from "react";

import { amountText } from "./BudgetMeter";

/** The budget is used up: what was read stays, and this says what can be done. */
export function UpgradeDialog({ error, onClose }: { error: BehestError; onClose: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    // A modal dialog of the browser keeps the focus inside, and closes by Escape.
    if (!dialog.current?.open) dialog.current?.showModal();
  }, []);
  const details = error.details ?? {};
  const text = (name: string): string | undefined => (typeof details[name] === "string" ? details[name] : undefined);
  const unit = text("unit") ?? "";
  const limit = text("limit");
  const resetsAt = text("resets_at");
  return (
    <dialog ref={dialog} className="dialog" aria-labelledby="upgrade-title" aria-describedby="upgrade-text" data-testid="upgrade" onClose={onClose}>
      <div className="dialog-mark" aria-hidden="true">
        <svg viewBox="0 0 48 48">
          <circle cx="24" cy="24" r="19" />
          <path d="M24 13v11l7 5" />
        </svg>
      </div>
      <h2 id="upgrade-title">You have reached your limit</h2>
      <p id="upgrade-text">
        {limit ? `Your budget of ${amountText(limit, unit)} is used up` : "Your budget is used up"}
        {resetsAt ? `. It is renewed ${when(resetsAt)}.` : "."} Everything you have read stays here.
      </p>
      <div className="dialog-buttons">
        <button className="button" data-testid="upgrade-close" onClick={() => dialog.current?.close()}>
          Keep reading
        </button>
        <a className="button primary" href="https://example.com/plans" target="_blank" rel="noopener">
          See plans
        </a>
      </div>
    </dialog>
  );
}

function when(time: string): string {
  const date = new Date(time);
  const isSoon = date.getTime() - Date.now() < 20 * 3600 * 1000;
  return isSoon
    ? `at ${date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })}`
    : `on ${date.toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}`;
}
