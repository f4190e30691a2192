"""The chat of `examples/chat` as a reader uses it, for tests and pictures."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from playwright.sync_api import Browser, Page, expect

from browser.site import Site
from typescript.packages import install

# Not those without an end, such as a spinner.
_AT_REST = """Promise.all(document.getAnimations().filter((one) => isFinite(one.effect.getComputedTiming().endTime))
  .map((one) => one.finished.catch(() => 0))).then(() => 0)"""

_WATCH = """(readsText) => {
  const watched = { frames: [], growth: [], tasks: [], last: performance.now(), length: 0 };
  window.watched = watched;
  new PerformanceObserver((list) => {
    for (const task of list.getEntries()) watched.tasks.push(task.duration);
  }).observe({ type: 'longtask' });
  const look = (now) => {
    const text = readsText ? document.querySelector('[data-testid=text]') : null;
    const length = text ? text.textContent.length : 0;
    watched.frames.push(now - watched.last);
    if (length !== watched.length) watched.growth.push([now, length - watched.length, watched.frames.length]);
    watched.last = now;
    watched.length = length;
    watched.handle = requestAnimationFrame(look);
  };
  watched.handle = requestAnimationFrame((now) => { watched.last = now; look(now); });
}"""


def watch_for(page: Page, test_id: str) -> None:
    """From now on all that this element says is kept, also what is gone before anybody looks."""
    page.evaluate(
        """(id) => {
          const said = (window.said = []);
          const look = () => said.push(document.querySelector(`[data-testid=${id}]`)?.textContent ?? '');
          new MutationObserver(look).observe(document.body, { childList: true, subtree: true, characterData: true });
        }""",
        test_id,
    )


def said(page: Page) -> list[str]:
    """What was kept of it, in order, each thing once in a row."""
    found: list[str] = page.evaluate("() => window.said.filter((text, index, all) => text !== all[index - 1])")
    return found


@contextmanager
def opened(browser: Browser, site: Site, *, sim: dict[str, Any] | None = None, **options: Any) -> Generator[Page]:
    """The chat in a context of its own, ready for a question; nothing may go wrong in its scripts."""
    settings: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}, "locale": "en-GB", **options}
    context = browser.new_context(**settings)
    page = context.new_page()
    thrown: list[str] = []
    page.on("pageerror", lambda error: thrown.append(str(error)))
    page.goto(site.origin + "/" + (f"?sim={quote(json.dumps(sim))}" if sim is not None else ""))
    expect(page.get_by_test_id("composer")).to_be_focused(timeout=20_000)
    try:
        yield page
    finally:
        context.close()
    assert thrown == []


def ask(page: Page, question: str = "Tell me a story.") -> None:
    """By keyboard, as most do."""
    page.get_by_test_id("composer").fill(question)
    page.keyboard.press("Enter")


def ended(page: Page, *, timeout_ms: float = 60_000) -> None:
    """Wait until nothing runs any more."""
    expect(page.get_by_test_id("send")).to_be_visible(timeout=timeout_ms)


class Watched(msgspec.Struct, frozen=True):
    """What was seen of a page; times are milliseconds."""

    frames: list[float]
    """From each frame to the next."""
    tasks: list[float]
    """The scripts and layouts that took longer than 50 ms: what the page itself does to a frame."""
    growth: list[tuple[float, int, int]]
    """When the text grew, by how much, and which of the frames ended there, counted from 1."""


def watch(page: Page, *, reads_text: bool = True) -> None:
    """Look at each frame from now on. Reading a long text takes a while of each frame itself."""
    page.evaluate(_WATCH, reads_text)


def watched(page: Page) -> Watched:
    """What was seen since."""
    return msgspec.convert(page.evaluate("() => { cancelAnimationFrame(watched.handle); return watched; }"), Watched)


def violations(page: Page, repository: Path) -> list[str]:
    """What axe says of the page as it is, in its words: the rules of WCAG 2.2 A and AA, and its best practices.

    What rises or fades is waited for: what is half transparent has no contrast of its own.
    """
    script = install(repository / "tests" / "browser" / "axe") / "node_modules" / "axe-core" / "axe.min.js"
    if not page.evaluate("'axe' in window"):
        page.add_script_tag(path=script)
    page.evaluate(_AT_REST)
    found = page.evaluate("axe.run().then((told) => told.violations)")
    return [f"{one['id']}: {one['nodes'][0]['html'][:160]} {one['nodes'][0]['failureSummary']}" for one in found]
