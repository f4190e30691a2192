/**
 * Tests against a running gateway; `make test-sdk` starts one and says where it is. With `CLIENT=openai` the snippets of
 * the guide run on the unmodified `openai` package, else on this one under that name.
 */

import { fileURLToPath } from "node:url";
import { defineConfig } from "vitest/config";

const dist = fileURLToPath(new URL("dist/index.js", import.meta.url));
const ours = [{ find: "@behest/client-ts", replacement: dist }];

export default defineConfig({
  resolve: { alias: process.env["CLIENT"] === "openai" ? ours : [...ours, { find: /^openai$/, replacement: dist }] },
  test: { include: ["test/live/*.test.{ts,tsx}"], testTimeout: 60_000, fileParallelism: false },
});
