"""`make screenshots`: the pictures of the documents, taken anew of what really runs.

To add one: a function that takes a `Scene` and writes into `docs/pictures`, and its name in `PICTURES`.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page

from behest_ledger.store.migrate import migrate
from browser import chat_pictures
from browser.chromium import running
from browser.showcase import fill
from conftest import execute, own_server
from stack import Stack, running_stack

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "pictures"


@dataclass
class Scene:
    """What pictures are taken of."""

    stack: Stack
    browser: Browser


def page(scene: Scene) -> None:
    """The built-in page, light and dark."""
    schemes: tuple[Any, ...] = ("light", "dark")
    for scheme in schemes:
        with scene.browser.new_context(
            viewport={"width": 1240, "height": 1308}, color_scheme=scheme, device_scale_factor=1.25, locale="en-GB"
        ) as context:
            opened: Page = context.new_page()
            opened.goto(scene.stack.admin_url + "/")
            opened.get_by_text("Live", exact=True).wait_for()
            opened.wait_for_timeout(600)  # the bars have moved to where they belong
            opened.screenshot(path=FOLDER / f"page-{scheme}.png")


def chat(scene: Scene) -> None:
    """The chat of examples/chat in its five states."""
    chat_pictures.chat(scene.stack, scene.browser)


PICTURES: dict[str, Callable[[Scene], None]] = {"page": page, "chat": chat}


def main() -> None:
    """Take those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], help="which (default: all)")
    names = parser.parse_args().names or list(PICTURES)
    with own_server(None) as server, tempfile.TemporaryDirectory() as folder:
        asyncio.run(execute(server.dsn, "CREATE DATABASE behest_pictures"))
        dsn = server.of("behest_pictures")
        asyncio.run(migrate(dsn))
        asyncio.run(fill(dsn))
        with running_stack(dsn, Path(folder)) as stack, running() as browser:
            for name in names:
                PICTURES[name](Scene(stack, browser))


if __name__ == "__main__":
    main()
