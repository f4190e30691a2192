import OpenAI from "openai";

const { token, sessionId } = await fetchBehestToken();
const openai = new OpenAI({
  apiKey: token,
  baseURL: `${BEHEST_BASE_URL}/v1`,
  dangerouslyAllowBrowser: true,
  defaultHeaders: { "X-Session-Id": sessionId },
});

const stream = await openai.chat.completions.create({
  messages,
  stream: true,
});

for await (const chunk of stream) {
  const delta = chunk.choices[0]?.delta?.content ?? "";
  appendToUI(delta);
}
