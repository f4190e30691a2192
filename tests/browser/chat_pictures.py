"""The five states of the chat of `examples/chat`, as pictures of its documents."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect

from browser.beside import StackBeside
from browser.chat_page import ask, ended, opened
from browser.site import Site, serving
from cutter import cutting
from stack import Project, Stack
from typescript.packages import install, run

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "chat"
_SETTLE_MS = 700
"""The bars and the dialog have moved to where they belong."""


@contextmanager
def chat_site(stack: Stack, limit_usd: str) -> Generator[tuple[Site, Project]]:
    """The chat, built, for a project whose sessions have so much."""
    run(["npm", "run", "build"], install(_EXAMPLE.parents[1] / "sdk" / "typescript"))
    run(["npm", "run", "build"], install(_EXAMPLE))
    with serving(_EXAMPLE / "dist") as site:
        project = stack.project(limit_usd=limit_usd, project=f'  allowedOrigins: ["{site.origin}"]')
        site.speak_for(project)
        yield site, project


def _take(page: Page, name: str) -> None:
    page.wait_for_timeout(_SETTLE_MS)
    page.screenshot(path=_EXAMPLE / "screenshots" / f"{name}.png")


def chat(stack: Stack, browser: Browser) -> None:
    """Empty, streaming, reconnecting, at the end of a budget, and long Markdown in the dark."""
    beside = StackBeside.of(stack)
    with chat_site(beside, "1") as (site, project):
        with opened(browser, site) as page:
            _take(page, "empty")
            ask(page, "Write a token bucket in TypeScript.")
            expect(page.get_by_test_id("code")).to_contain_text("capacity", timeout=20_000)
            _take(page, "streaming")
        _dark(browser, site)
        _reconnecting(browser, site, project)
    with chat_site(beside, "0.0001") as (site, _), opened(browser, site) as page:
        ask(page, "Write a token bucket in TypeScript.")
        expect(page.get_by_test_id("upgrade")).to_be_visible(timeout=30_000)
        _take(page, "budget")


def _dark(browser: Browser, site: Site) -> None:
    options: dict[str, Any] = {"color_scheme": "dark"}
    with opened(browser, site, **options) as page:
        for question in ("Write a token bucket in TypeScript.", "Compare the Free and Pro plans in a table."):
            ask(page, question)
            expect(page.get_by_test_id("stop")).to_be_visible()
            ended(page)
        _take(page, "dark")


def _reconnecting(browser: Browser, site: Site, project: Project) -> None:
    with cutting(project.stack.base_url, [9_000] * 6 + [1] * 40) as network:
        site.speak_for(project, base_url=network.base_url)
        with opened(browser, site) as page:
            ask(page, "Write a token bucket in TypeScript.")
            expect(page.get_by_test_id("connection")).to_contain_text("Reconnecting", timeout=30_000)
            page.screenshot(path=_EXAMPLE / "screenshots" / "reconnecting.png")
