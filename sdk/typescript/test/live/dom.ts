/** A document for React, and nothing else of a browser: `fetch` stays Node's own. Import it before React. */

import { Window } from "happy-dom";

const window = new Window({ url: "http://page.test/" });
Object.assign(globalThis, { window, document: window.document, IS_REACT_ACT_ENVIRONMENT: true });
// Newer ones have a navigator of their own, which is good enough.
if (!("navigator" in globalThis)) Object.assign(globalThis, { navigator: window.navigator });
