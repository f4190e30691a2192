import type { BehestError } from "@behest/client-ts";
import { useEffect, useState } from "react";

import { Icon } from "./icons";

interface RateToastProps {
  error: BehestError;
  onRetry: () => void;
  onClose: () => void;
}

/** Too many requests: counts down, and then lets the reader try again. */
export function RateToast({ error, onRetry, onClose }: RateToastProps) {
  const [left, setLeft] = useState(error.retryAfter ?? 0);
  useEffect(() => {
    const until = Date.now() + (error.retryAfter ?? 0) * 1000;
    const timer = setInterval(() => setLeft(Math.max(0, Math.ceil((until - Date.now()) / 1000))), 250);
    return () => clearInterval(timer);
  }, [error]);
  return (
    <div className="toast" role="alert" data-testid="toast">
      <Icon name="alert" />
      <div>
        <strong>That was a little fast.</strong>
        {/* Read once: a count that is read every second helps nobody. */}
        <span aria-hidden="true">{left > 0 ? `Try again in ${left} s.` : "You can try again now."}</span>
        <span className="hidden">{`Try again in ${error.retryAfter ?? 0} seconds.`}</span>
      </div>
      <button className="button" disabled={left > 0} onClick={onRetry}>
        Retry
      </button>
      <button className="icon-button" aria-label="Close" onClick={onClose}>
        <Icon name="close" />
      </button>
    </div>
  );
}
