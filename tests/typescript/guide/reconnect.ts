async function streamWithRetry(
  openai: OpenAI,
  messages: Msg[],
  threadId: string,
  attempts = 2
) {
  for (let i = 0; i <= attempts; i++) {
    try {
      const stream = await openai.chat.completions.create(
        {
          messages,
          stream: true,
        },
        {
          headers: { "X-Thread-Id": threadId },
        }
      );
      for await (const chunk of stream) {
        if (chunk.choices[0]?.delta?.content) render(chunk);
        if (chunk.choices[0]?.finish_reason) return; // done
      }
    } catch (err) {
      if (i === attempts || isFatal(err)) throw err;
      await sleep(500 * 2 ** i); // exponential backoff: 500ms, 1s, 2s
    }
  }
}
