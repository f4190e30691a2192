"""A browser for each file of this folder: while it runs, asyncio is for other threads."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from browser.chromium import BrowserMissing, running
from conftest import Server


@pytest.fixture(scope="module")
def browser(template: Server) -> Iterator[Browser]:
    """Chromium. Without one nothing here can be tested, and that is said at once. The server is started before it: see
    `browser.beside`."""
    try:
        with running() as started:
            yield started
    except BrowserMissing as error:
        pytest.exit(str(error), returncode=4)
