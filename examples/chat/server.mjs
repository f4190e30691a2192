/**
 * The backend of the chat: it knows who the user is, and hands out tokens. The API key stays here; text goes from the
 * gateway to the browser directly.
 *
 *     npm start                  beside a running `behest up`
 *     BEHEST_BASE_URL=... BEHEST_KEY=... npm start
 *     NODE_ENV=development npm start      while changing it
 */

import { Behest, BehestError } from "@behest/client-ts";
import { randomUUID } from "node:crypto";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createServer as createVite } from "vite";

process.env.NODE_ENV ??= "production"; // React's development build is several times slower
const PORT = Number(process.env.PORT ?? 5173);
const READY_FILE = process.env.BEHEST_READY_FILE ?? new URL("../../.behest/ready.json", import.meta.url);

const gateway = await findGateway();
const behest = new Behest({ baseURL: gateway.baseURL, apiKey: gateway.key });
const vite = await createVite({ root: import.meta.dirname, server: { middlewareMode: true } });

const server = createServer((request, response) => {
  if (request.url === "/api/behest/token") {
    giveToken(request, response).catch((error) => {
      const status = error instanceof BehestError ? 502 : 500;
      console.error(`No token: ${error.message}`);
      response.writeHead(status, { "content-type": "application/json" }).end('{"error":"no token"}');
    });
  } else vite.middlewares(request, response);
});
server.listen(PORT, "127.0.0.1", () => {
  console.log(`Chat on http://localhost:${server.address().port}, through the gateway on ${gateway.baseURL}`);
});

/** A token for the user of the cookie. A real application takes the user whom it has logged in. */
async function giveToken(request, response) {
  // Another site's page cannot set this method and type without being asked (CORS), and is never allowed.
  if (request.method !== "POST" || request.headers["content-type"] !== "application/json") {
    response.writeHead(405, { allow: "POST" }).end();
    return;
  }
  const known = /(?:^|;\s*)user=([0-9a-f-]{36})(?:;|$)/.exec(request.headers.cookie ?? "")?.[1];
  const userId = known ?? randomUUID();
  const { token, sessionId, expiresAt } = await behest.tokens.get({ userId });
  const cookie = `user=${userId}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000`;
  response.writeHead(200, { "content-type": "application/json", "cache-control": "no-store", "set-cookie": cookie });
  response.end(JSON.stringify({ token, sessionId, expiresAt, baseURL: gateway.baseURL, simulated: gateway.simulated }));
}

/** From the environment, or what `behest up` wrote down. */
async function findGateway() {
  const { BEHEST_BASE_URL, BEHEST_KEY } = process.env;
  if (BEHEST_BASE_URL && BEHEST_KEY) {
    return { baseURL: BEHEST_BASE_URL, key: BEHEST_KEY, simulated: process.env.BEHEST_SIMULATED === "1" };
  }
  try {
    const ready = JSON.parse(await readFile(READY_FILE, "utf8"));
    return { baseURL: ready.base_url, key: ready.api_key, simulated: await isSimulator(ready.upstream_url) };
  } catch {
    console.error("No gateway: run `make up` in another terminal, or set BEHEST_BASE_URL and BEHEST_KEY.");
    process.exit(1);
  }
}

/** The simulator answers with words of no meaning: the page asks it for something nicer. */
async function isSimulator(upstream) {
  try {
    return (await fetch(new URL("/sim/requests?limit=1", upstream))).ok;
  } catch {
    return false;
  }
}
