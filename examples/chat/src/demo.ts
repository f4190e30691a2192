/** What the provider simulator of `behest up` is asked to say, so that there is something to see. */

export const SUGGESTIONS = [
  { title: "Explain hard budgets", question: "What is a hard budget, and how does it stop a stream?" },
  { title: "Write some code", question: "Write a token bucket in TypeScript." },
  { title: "Compare two plans", question: "Compare the Free and Pro plans in a table." },
  { title: "Plan a launch", question: "Give me a checklist to launch a chat product." },
] as const;

const BUDGETS = `## Hard budgets

A **hard budget** is a ceiling that holds: the money for an answer is set aside *before* the provider is called, and spent from that while the text streams.

1. **Hold.** The gateway asks the ledger for the prompt and the first tokens.
2. **Spend.** Every chunk is counted on its way to you.
3. **Settle.** What was not used goes back the moment the stream ends.

> When the money is gone, the stream ends with a proper last event, and what you have read stays.

So a hundred parallel streams can never spend more than what is left. Stop one, and its hold is free again at once.
`;

const CODE = `A token bucket needs three numbers: how much it holds, how fast it fills, and when you last looked.

\`\`\`typescript
/** Allows \`rate\` calls a second on average, and \`capacity\` at once. */
export class TokenBucket {
  private level: number;
  private lastMs: number;

  constructor(
    private readonly capacity: number,
    private readonly rate: number,
    private readonly now: () => number = Date.now,
  ) {
    this.level = capacity;
    this.lastMs = now();
  }

  take(count = 1): boolean {
    const nowMs = this.now();
    const gained = ((nowMs - this.lastMs) / 1000) * this.rate;
    this.level = Math.min(this.capacity, this.level + gained);
    this.lastMs = nowMs;
    if (this.level < count) return false; // come again later
    this.level -= count;
    return true;
  }
}
\`\`\`

Three things to note:

- **No timer.** The bucket is filled when somebody looks.
- **The clock is a parameter**, so tests need not wait: \`new TokenBucket(5, 1, () => 0)\`.
- It is *not* shared between processes; for that, keep \`level\` and \`lastMs\` in a database row.
`;

const TABLE = `Here is how the plans differ:

| | Free | Pro |
|:--|--:|--:|
| Requests a minute | 10 | 60 |
| Requests a day | 100 | 10 000 |
| Tokens a day | 50 000 | 2 000 000 |
| Models | small | **all** |

**Pro** pays for itself when you pass about *40 long answers a day*. Below that, Free is fine.

---

Both plans stream, both can be stopped at any time, and neither is ever billed for what you did not read.
`;

const CHECKLIST = `### Before the launch

- [x] Tokens are minted by the backend, never in the browser
- [x] A **Stop** button that really stops the provider
- [ ] A budget for each user and day
- [ ] Text for the moment when the budget ends
- [ ] Streams that survive a train tunnel

### On the day

1. Watch \`behest ledger top\`.
2. Keep the kill switch at hand:
   \`\`\`sh
   kubectl patch project chat --type merge -p '{"spec": {"suspended": true}}'
   \`\`\`
3. Have [the error table](https://example.com/errors) open.
`;

/** The member \`sim\` of a request. */
export function demoAnswer(question: string): Record<string, unknown> {
  const text = /code|bucket|typescript/i.test(question)
    ? CODE
    : /table|plan(s|\b.*compare)|compare/i.test(question)
      ? TABLE
      : /check|launch/i.test(question)
        ? CHECKLIST
        : BUDGETS;
  return { text, continue_assistant: true, tokens_per_chunk: 3, chunk_interval_ms: 45, first_chunk_delay_ms: 350 };
}
