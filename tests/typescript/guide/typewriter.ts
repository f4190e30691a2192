const queue: string[] = [];
let flushTimer: ReturnType<typeof setInterval> | null = null;

function startFlush() {
  if (flushTimer) return;
  flushTimer = setInterval(() => {
    if (queue.length === 0) return;
    const next = queue.shift()!;
    appendCharByChar(next, 8); // 8ms per char
  }, 16); // 60fps
}

for await (const chunk of stream) {
  queue.push(chunk.choices[0]?.delta?.content ?? "");
  startFlush();
}
