const abortRef = useRef<AbortController | null>(null);

async function send() {
  abortRef.current = new AbortController();
  const stream = await openai.chat.completions.create(
    { messages, stream: true },
    { signal: abortRef.current.signal }
  );
  try {
    for await (const chunk of stream) render(chunk);
  } catch (err) {
    if ((err as Error).name === "AbortError") return; // user cancelled
    throw err;
  }
}

<button onClick={() => abortRef.current?.abort()}>Stop</button>;
