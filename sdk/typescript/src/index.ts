export { Behest, type BehestOptions, type For, type RequestOptions, type When } from "./client.js";
export { Behest as default } from "./client.js";
export {
  BehestAbortError,
  BehestAuthError,
  BehestBadRequestError,
  BehestConfigError,
  BehestConnectionError,
  BehestError,
  BehestQuotaError,
  BehestRateLimitError,
  BehestServerError,
} from "./errors.js";
export { isFatal, streamWithRetry, type StreamWithRetryOptions } from "./resume.js";
export { ChatStream } from "./stream.js";
export type { Token, TokenAnswer, TokenSource, Who } from "./tokens.js";
export type * from "./types.js";
export { Typewriter, type TypewriterOptions } from "./typewriter.js";
