import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, it } from "vitest";

const source = join(dirname(fileURLToPath(import.meta.url)), "../src");

/** The packages that an entry loads, through all of our modules. */
function packagesOf(entry: string, seen = new Set<string>()): Set<string> {
  const packages = new Set<string>();
  if (seen.has(entry)) return packages;
  seen.add(entry);
  const text = readFileSync(join(source, entry), "utf8");
  for (const [, from = ""] of text.matchAll(/^(?:import|export)\s(?!type\s)[^;]*?from\s+"([^"]+)";/gms)) {
    const found = from.startsWith(".") ? packagesOf(join(dirname(entry), from.replace(/\.js$/, ".ts")), seen) : [from];
    for (const name of found) packages.add(name);
  }
  return packages;
}

it.each([
  ["index.ts", []],
  ["resume.ts", []],
  ["typewriter.ts", []],
  ["markdown/index.ts", ["marked"]],
  ["react/index.ts", ["marked", "react"]],
])("%s loads no other package than %j", (entry, expected) => {
  expect([...packagesOf(entry)].sort()).toEqual(expected);
});

it("nothing happens when a module is only loaded: bundlers may leave out what is not used", () => {
  expect(JSON.parse(readFileSync(join(source, "../package.json"), "utf8"))).toMatchObject({ sideEffects: false });
});
