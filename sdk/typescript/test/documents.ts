/** Documents as models write them: what each test of the renderer is played with. */

export const DOCUMENTS: Readonly<Record<string, string>> = {
  "an answer with everything": `# Rate limits, *briefly*

A **token bucket** holds \`capacity\` tokens and gains \`rate\` of them a second. See [RFC 6585](https://www.rfc-editor.org/rfc/rfc6585 "429") and
the ~~old~~ new \`\`code with a \` tick\`\` in it, snake_case_names, 5 * 3 * 2, and ***both at once***.

## In Python

\`\`\`python
def take(bucket: Bucket, n: int = 1) -> bool:
    """Not \`\`\` the end, **nor** [this](x)."""
    bucket.refill()
    return bucket.level >= n  # <script>alert(1)</script>
\`\`\`

1. **First**, measure:
   - p50, p99
   - _errors_ by \`status\`
2. Then \`limit\`:

   \`\`\`sh
   behest apply -f *.yaml && echo "[done](now)"
   \`\`\`

3. Last, *watch*.

- [x] done
- [ ] open: [link](https://example.com/a_b_c?d=e&f=g)

> Quoted **text
> over lines**, with \`code\`.

| budget | limit | **left** |
|:-------|------:|:--------:|
| day | 5.00 | \`1.20\` |
| month | 50.00 | [more](https://example.com) |

---

An image ![of a cat](https://example.com/cat.png), an escape \\*not emphasis\\*, AT&amp;T, a &lt; b, 1 < 2, <https://example.com/auto>, https://example.com/bare_url_here.
Hello! Wow!! Costs: $5 (~5 minutes), [1] and [2].
`,
  "headings and rules": "# One\nText under it\n## Two #\n***\nText\n---\nMore *text*\n\n* star\n* list\n\n+ plus\n",
  "nested lists": "- a\n  - b **bold**\n    - c `code`\n\n      more of c\n- d\n\n10. ten\n11. eleven\n    1. inner\n\nEnd.",
  "emoji and scripts": "Grüße 👩‍👩‍👧‍👦 **日本語テキスト** and *العربية* — naïve “quotes”… `Ω≈ç√`\n\n- 🇩🇪 eins\n- 👍🏽 zwei\n",
  "code without an end": "Look:\n\n```ts\nconst a = `x ${1}`;\n\nconst b = [1, 2][0];\n// ``` inside\n",
  "tildes and info": "~~~json title=x\n{\"a\": \"`\"}\n~~~\n\ntext ~~~ text\n",
  "crlf": "# Title\r\n\r\nA **bold** line\r\nand another\r\n\r\n```js\r\nlet a = 1;\r\n```\r\n",
};
