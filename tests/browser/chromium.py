"""Chromium, headless, for tests and pictures: the one that is installed, driven by Playwright."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")

# It asks nobody for anything; what it would send over a network has no meaning here.
_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class BrowserMissing(RuntimeError):
    """There is no browser here; the message says what to install."""


def executable() -> str:
    """Its path: `BEHEST_CHROMIUM`, or one on PATH. Raises `BrowserMissing`."""
    found = os.environ.get("BEHEST_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise BrowserMissing(
            f"no Chromium was found ({', '.join(NAMES)} on PATH): install one (Debian: apt install chromium), or name"
            " it in BEHEST_CHROMIUM"
        )
    return found


@contextmanager
def running() -> Generator[Browser]:
    """A browser for as long as the block runs. Raises `BrowserMissing`."""
    path = executable()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()
