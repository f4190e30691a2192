import { Behest } from "@behest/client-ts";
const behest = new Behest();

const stream = await behest.chat.completions.create({
  messages,
  stream: true,
  user_id, // auto-mints a per-user JWT for this call
});
let out = "";
for await (const chunk of stream) out += chunk.choices[0]?.delta?.content ?? "";
