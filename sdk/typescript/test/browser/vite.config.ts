/** Bundles the page as an application would be for production: minified, so that no class keeps its name. */
import { defineConfig } from "vite";

/** The SDK's package says of its files that they have no effects; the snippets are nothing but effects. */
const effects = {
  name: "effects",
  transform: (code: string, id: string) => (id.includes("/.made/") ? { code, moduleSideEffects: true } : null),
};

export default defineConfig({
  root: import.meta.dirname,
  plugins: [effects],
  build: { target: "es2022", outDir: "dist", emptyOutDir: true },
});
