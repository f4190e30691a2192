"""`make bench-page`: 50,000 tokens into the chat, three times; how long its frames take, and what the page keeps."""

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from playwright.sync_api import Browser, Route

from behest_ledger.store.migrate import migrate
from browser.beside import StackBeside
from browser.chat_page import ask, opened, watch, watched
from browser.chat_pictures import chat_site
from browser.chromium import running
from browser.site import Site
from conftest import execute, own_server
from stack import running_stack

FRAME_MOST_MS = 50
TOKENS = 50_000
_SECTION = """## Part {n}

The **bucket** holds `capacity` tokens and gains `rate` of them a second, so that *on average* no more than that get
through. See [the text](https://example.com/{n}).

- first, measure what there is
- then limit it
- last, watch

| budget | limit |
|:--|--:|
| day | 5.00 |
| month | 50.00 |

```python
def take(bucket, n={n}):
    bucket.refill()
    return bucket.level >= n
```

"""
_SECTION_TOKENS = 115

# Waiting with Playwright's own means would take seconds of the page: it describes all that is shown at each look.
_ENDED = """() => new Promise((resolve) => {
  let began = false;
  const timer = setInterval(() => {
    began ||= document.querySelector('[data-testid=stop]') !== null;
    if (!began || !document.querySelector('[data-testid=send]')) return;
    clearInterval(timer);
    resolve();
  }, 50);
})"""


class Played(msgspec.Struct, frozen=True):
    """One run."""

    frames: int
    median_ms: float
    p99_ms: float
    longest_ms: float
    longest_task_ms: float
    """0 where no task took 50 ms."""
    heap_bytes: int
    """What the page keeps more than before, after a collection of garbage."""
    elements: int
    characters: int


def play(browser: Browser, site: Site, *, interval_ms: int, trace: Path | None = None) -> Played:
    """An answer of prose, lists, tables and code, ten tokens in a chunk, so many milliseconds apart. Where a file for
    it is named, Chromium's trace of it is written there."""
    text = "".join(_SECTION.replace("{n}", str(number)) for number in range(TOKENS // _SECTION_TOKENS + 1))

    def tell(route: Route) -> None:
        # It is too long for the page's address, where `?sim=` would say it.
        body = msgspec.json.decode(route.request.post_data_buffer or b"{}", type=dict[str, Any])
        sim = {"text": text, "tokens_per_chunk": 10, "chunk_interval_ms": interval_ms}
        route.continue_(post_data=msgspec.json.encode({**body, "sim": sim}))

    with opened(browser, site) as page:
        page.route("**/v1/chat/completions", tell)
        inner = page.context.new_cdp_session(page)
        inner.send("HeapProfiler.collectGarbage")
        before = inner.send("Runtime.getHeapUsage")["usedSize"]
        if trace:
            browser.start_tracing(page=page, path=trace)
        watch(page, reads_text=False)
        ask(page)
        page.evaluate(_ENDED)
        seen = watched(page)
        if trace:
            browser.stop_tracing()
        inner.send("HeapProfiler.collectGarbage")
        after = inner.send("Runtime.getHeapUsage")["usedSize"]
        return Played(
            frames=len(seen.frames),
            median_ms=statistics.median(seen.frames),
            p99_ms=statistics.quantiles(seen.frames, n=100)[98],
            longest_ms=max(seen.frames),
            longest_task_ms=max(seen.tasks, default=0.0),
            heap_bytes=int(after - before),
            elements=page.evaluate("document.getElementsByTagName('*').length"),
            characters=page.get_by_test_id("text").evaluate("text => text.textContent.length"),
        )


def main() -> None:
    """Three runs, and the one in the middle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--interval-ms", type=int, default=4, help="between chunks of ten tokens (default: 4)")
    parser.add_argument("--trace", type=Path, help="write Chromium's trace of the last run here, for chrome://tracing")
    arguments = parser.parse_args()
    with own_server(None) as server, tempfile.TemporaryDirectory() as folder:
        asyncio.run(execute(server.dsn, "CREATE DATABASE behest_page"))
        dsn = server.of("behest_page")
        asyncio.run(migrate(dsn))
        with (
            running_stack(dsn, Path(folder)) as stack,
            running() as browser,
            chat_site(StackBeside.of(stack), "1000") as (site, _),
        ):
            played: list[Played] = []
            for number in range(arguments.runs):
                trace = arguments.trace if number == arguments.runs - 1 else None
                played.append(play(browser, site, interval_ms=arguments.interval_ms, trace=trace))
                one = played[-1]
                print(
                    f"{one.frames} frames: median {one.median_ms:.1f} ms, p99 {one.p99_ms:.1f} ms, longest"
                    f" {one.longest_ms:.1f} ms, longest task {one.longest_task_ms:.0f} ms;"
                    f" kept {one.heap_bytes / 2**20:.1f} MiB, {one.elements} elements, {one.characters} characters",
                    flush=True,
                )
    middle = sorted(one.longest_ms for one in played)[len(played) // 2]
    print(
        f"about {10_000 // arguments.interval_ms} tokens a second: the longest frame of the run in the middle took"
        f" {middle:.1f} ms (wanted: at most {FRAME_MOST_MS} ms)"
    )


if __name__ == "__main__":
    main()
