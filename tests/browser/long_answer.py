"""`make bench-page`: 50,000 tokens into the chat, five times; how long its frames take, and what the page keeps.

A frame that takes long says that the page had much to do, or that others had the processors. So one more run is traced:
of each task of the page's main thread Chromium then knows how long it had a processor.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    heap_left_bytes: int
    """The same when the reader has gone on to a new chat."""
    elements: int
    characters: int


class Work(msgspec.Struct, frozen=True):
    """What the page's main thread did itself, whatever else ran on the machine."""

    longest_ms: float
    """The time of a processor that one task took, at most. A frame is one task, or a few."""
    whole_s: float


def work_of(trace: bytes) -> Work:
    """From Chromium's trace: the thread of the page is the main thread that did most."""
    events: list[dict[str, Any]] = json.loads(trace)["traceEvents"]
    mains = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    tasks: dict[Any, list[int]] = {main: [] for main in mains}
    for event in events:
        if event.get("name") == "ThreadControllerImpl::RunTask" and (event["pid"], event["tid"]) in mains:
            tasks[event["pid"], event["tid"]].append(event.get("tdur", 0))
    found = max(tasks.values(), key=sum)
    return Work(longest_ms=max(found) / 1e3, whole_s=sum(found) / 1e6)


def play(
    browser: Browser, site: Site, *, interval_ms: int, during: AbstractContextManager[Any] | None = None
) -> Played:
    """An answer of prose, lists, tables and code, ten tokens in a chunk, so many milliseconds apart.

    `during` is what lasts from the question to the end of the answer.
    """
    text = "".join(_SECTION.replace("{n}", str(number)) for number in range(TOKENS // _SECTION_TOKENS + 1))

    def tell(route: Route) -> None:
        # It is too long for the page's address, where `?sim=` would say it.
        body = msgspec.json.decode(route.request.post_data_buffer or b"{}", type=dict[str, Any])
        sim = {"text": text, "tokens_per_chunk": 10, "chunk_interval_ms": interval_ms}
        route.continue_(post_data=msgspec.json.encode({**body, "sim": sim}))

    with opened(browser, site) as page:
        page.route("**/v1/chat/completions", tell)
        inner = page.context.new_cdp_session(page)

        def heap_bytes() -> int:
            inner.send("HeapProfiler.collectGarbage")
            return int(inner.send("Runtime.getHeapUsage")["usedSize"])

        before = heap_bytes()
        with during or nullcontext():
            watch(page, reads_text=False)
            ask(page)
            page.evaluate(_ENDED)
            seen = watched(page)
        after = heap_bytes()
        elements = page.evaluate("document.getElementsByTagName('*').length")
        characters = page.get_by_test_id("text").evaluate("text => text.textContent.length")
        page.get_by_test_id("new-chat").click()
        page.get_by_test_id("welcome").wait_for()
        return Played(
            frames=len(seen.frames),
            median_ms=statistics.median(seen.frames),
            p99_ms=statistics.quantiles(seen.frames, n=100)[98],
            longest_ms=max(seen.frames),
            longest_task_ms=max(seen.tasks, default=0.0),
            heap_bytes=after - before,
            heap_left_bytes=heap_bytes() - before,
            elements=elements,
            characters=characters,
        )


def main() -> None:
    """The runs, the one in the middle, and one that is traced."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--interval-ms", type=int, default=4, help="between chunks of ten tokens (default: 4)")
    parser.add_argument("--trace", type=Path, help="write a trace of all that the page does here, for chrome://tracing")
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
            for _ in range(arguments.runs):
                played.append(play(browser, site, interval_ms=arguments.interval_ms))
                print(_told(played[-1]), flush=True)
            loads = os.getloadavg()
            work = _traced(browser, site, interval_ms=arguments.interval_ms, path=arguments.trace)
    middle = sorted(one.longest_ms for one in played)[len(played) // 2]
    print(
        f"about {10_000 // arguments.interval_ms} tokens a second: the longest frame of the run in the middle took"
        f" {middle:.1f} ms (wanted: at most {FRAME_MOST_MS} ms); the machine's load was {loads[0]:.1f}\n"
        f"the page's own work: at most {work.longest_ms:.1f} ms of a processor in one task, {work.whole_s:.1f} s in all"
    )


def _traced(browser: Browser, site: Site, *, interval_ms: int, path: Path | None) -> Work:
    traces: list[bytes] = []

    @contextmanager
    def traced() -> Generator[None]:
        browser.start_tracing(path=path, categories=None if path else ["toplevel"])
        yield
        traces.append(browser.stop_tracing())

    play(browser, site, interval_ms=interval_ms, during=traced())
    return work_of(traces[0])


def _told(one: Played) -> str:
    return (
        f"{one.frames} frames: median {one.median_ms:.1f} ms, p99 {one.p99_ms:.1f} ms, longest {one.longest_ms:.1f} ms,"
        f" longest task {one.longest_task_ms:.0f} ms; kept {one.heap_bytes / 2**20:.1f} MiB, {one.elements} elements,"
        f" {one.characters} characters, and {one.heap_left_bytes / 2**20:.1f} MiB after the next chat was opened"
    )


if __name__ == "__main__":
    main()
