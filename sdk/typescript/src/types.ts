/**
 * The shapes of requests and answers: those of OpenAI's Chat Completions, of which only what is used often is spelled
 * out. What is not named here passes through both ways.
 */

export interface ContentPart {
  type: string;
  text?: string;
  refusal?: string;
  image_url?: unknown;
  input_audio?: unknown;
  file?: unknown;
}

/** A message of a conversation. The messages of the `openai` package are such. */
export interface ChatMessage {
  role: "system" | "developer" | "user" | "assistant" | "tool" | "function";
  content?: string | readonly ContentPart[] | null;
  name?: string;
  tool_calls?: readonly unknown[];
  tool_call_id?: string;
  refusal?: string | null;
}

/** What a request may say, whether it streams or not. */
export interface CreateParamsBase {
  messages: readonly ChatMessage[];
  /** Absent: the project's default model. */
  model?: string;
  max_tokens?: number | null;
  max_completion_tokens?: number | null;
  temperature?: number | null;
  top_p?: number | null;
  n?: number | null;
  stop?: string | readonly string[] | null;
  tools?: readonly unknown[];
  tool_choice?: unknown;
  response_format?: unknown;
  stream_options?: { include_usage?: boolean } | null;
  /** On a server: for whom. A token of this user is minted (or signed) and kept. */
  user_id?: string;
  /** On a server: in which session of that user. Absent: the one that came with the token. */
  session_id?: string;
  /** On a server: the user's tier, by number or name. */
  tier?: number | string;
  /** Keeps the conversation on the gateway and makes the stream resumable; the same as the option `threadId`. */
  thread_id?: string;
  [member: string]: unknown;
}

export interface CreateParamsStreaming extends CreateParamsBase {
  stream: true;
}

export interface CreateParamsWhole extends CreateParamsBase {
  stream?: false | null;
}

export type CreateParams = CreateParamsStreaming | CreateParamsWhole;

export type FinishReason = "stop" | "length" | "tool_calls" | "content_filter" | "function_call";

/** What an answer used; `cost_usd` is what it cost. */
export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  cost_usd?: number;
  prompt_tokens_details?: { cached_tokens?: number; audio_tokens?: number } | null;
  completion_tokens_details?: { reasoning_tokens?: number; audio_tokens?: number } | null;
}

export interface ToolCallDelta {
  index: number;
  id?: string;
  type?: "function";
  function?: { name?: string; arguments?: string };
}

export interface ChunkChoice {
  index: number;
  delta: {
    role?: ChatMessage["role"];
    content?: string | null;
    refusal?: string | null;
    reasoning_content?: string | null;
    tool_calls?: ToolCallDelta[];
  };
  finish_reason: FinishReason | null;
  logprobs?: unknown;
}

export interface ChatCompletionChunk {
  id: string;
  object: "chat.completion.chunk";
  created: number;
  model: string;
  choices: ChunkChoice[];
  /** Only where `stream_options.include_usage` asked: in the last chunk, which has no choices. */
  usage?: Usage | null;
  system_fingerprint?: string | null;
  service_tier?: string | null;
}

export interface ChatCompletion {
  id: string;
  object: "chat.completion";
  created: number;
  model: string;
  choices: {
    index: number;
    message: {
      role: "assistant";
      content: string | null;
      refusal?: string | null;
      reasoning_content?: string | null;
      tool_calls?: { id: string; type: "function"; function: { name: string; arguments: string } }[];
    };
    finish_reason: FinishReason;
    logprobs?: unknown;
  }[];
  usage?: Usage;
  system_fingerprint?: string | null;
}

/** A conversation that the gateway keeps. Times are RFC 3339 or seconds since 1970, as the gateway says them. */
export interface Thread {
  id: string;
  title?: string | null;
  /** How many. */
  messages?: number;
  created_at?: string | number;
  updated_at?: string | number;
  [member: string]: unknown;
}

export interface ThreadMessage {
  role: ChatMessage["role"];
  content: string | readonly ContentPart[] | null;
  /** Its number in the thread, from 1. */
  id?: number;
  /** False: a reply that broke off, or is still under way. */
  complete?: boolean;
  /** Of a reply that broke off: with it as `lastEventId` the same call goes on where `content` ends. */
  last_event_id?: string;
  created_at?: string | number;
  [member: string]: unknown;
}

/** A budget that binds the caller. Amounts are decimal texts in `unit`. */
export interface Budget {
  budget: string;
  scope?: unknown;
  unit: string;
  limit: string;
  spent: string;
  held: string;
  remaining: string;
  resets_at?: string | null;
  [member: string]: unknown;
}

export interface UsageTotals {
  requests: number;
  input_tokens: number;
  output_tokens: number;
  tokens: number;
  cost_usd: number;
}

export interface UsageReport {
  totals: UsageTotals;
  breakdown: ({ timestamp: string } & Partial<UsageTotals>)[];
}

export interface Model {
  id: string;
  object: "model";
  created?: number;
  owned_by?: string;
}
