import { StrictMode } from "react";
import { createRoot } from "react-dom/client";

import { App } from "./App";
import { connect } from "./gateway";
import "./styles/base.css";
import "./styles/layout.css";
import "./styles/messages.css";

const root = createRoot(document.getElementById("root")!);
connect().then(
  (gateway) =>
    root.render(
      <StrictMode>
        <App gateway={gateway} />
      </StrictMode>,
    ),
  () =>
    root.render(
      <main className="unreachable" role="alert">
        <h1>The chat is not available</h1>
        <p>Its backend gave no token. Is the gateway running?</p>
        <button className="button primary" onClick={() => location.reload()}>
          Try again
        </button>
      </main>,
    ),
);
