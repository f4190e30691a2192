/** The connection to the gateway: one client for the page, with tokens from our backend. */

import { Behest } from "@behest/client-ts";

import { demoAnswer } from "./demo";

export interface Gateway {
  client: Behest;
  /** Further members of a request for this question. */
  paramsFor: (question: string) => Record<string, unknown>;
}

interface TokenAnswer {
  token: string;
  sessionId: string;
  expiresAt: number;
  baseURL: string;
  simulated: boolean;
}

async function fetchToken(): Promise<TokenAnswer> {
  const answer = await fetch("/api/behest/token", { method: "POST", headers: { "content-type": "application/json" } });
  if (!answer.ok) throw new Error(`no token: ${answer.status}`);
  return (await answer.json()) as TokenAnswer;
}

export async function connect(): Promise<Gateway> {
  let first: TokenAnswer | undefined = await fetchToken();
  const { baseURL, simulated } = first;
  const getToken = (): Promise<TokenAnswer> | TokenAnswer => {
    const token = first ?? fetchToken();
    first = undefined;
    return token;
  };
  // What the simulator behind a `behest up` shall do, for tests: ?sim={"output_tokens":50000}
  const asked = new URLSearchParams(location.search).get("sim");
  const paramsFor = (question: string): Record<string, unknown> => {
    if (asked) return { sim: JSON.parse(asked) as unknown };
    return simulated ? { sim: demoAnswer(question) } : {};
  };
  return { client: new Behest({ baseURL, getToken }), paramsFor };
}
