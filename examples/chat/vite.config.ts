import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

export default defineConfig({
  plugins: [react()],
  // The SDK of this checkout is a linked folder with a React of its own for its tests: there must be one.
  resolve: { dedupe: ["react", "react-dom"] },
  build: { target: "es2022" },
});
