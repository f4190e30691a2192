"""The guide's snippets in the browser against what users begin with: a real `behest up`."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from browser.beside import beside
from browser.site import Site
from up import Up, behest_up

WORDS = "This is simulated text"


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    starting = behest_up()
    started = beside(starting.__enter__)
    yield started
    beside(starting.__exit__, None, None, None)


@pytest.fixture(scope="module")
def key(up: Up, guide_site: Site) -> str:
    return up.project("pages", origins=[guide_site.origin])


@pytest.fixture
def page(browser: Browser, guide_site: Site) -> Iterator[Page]:
    with browser.new_context() as context:
        opened = context.new_page()
        opened.goto(guide_site.origin + "/")
        yield opened


@pytest.fixture
def given(up: Up, key: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    name = request.node.name
    token = up.minted(key, user=name).json()["jwt"]
    return {"baseURL": up.base_url, "token": token, "sessionId": name}


def test_a_basic_stream_a_typewriter_and_markdown(page: Page, given: dict[str, Any], guide_site: Site) -> None:
    text = page.evaluate("told => page.basic(told)", given)
    assert text.startswith(WORDS)
    page.goto(guide_site.origin + "/?typewriter")
    assert "".join(page.evaluate("told => page.typewriter(told)", given)) == text
    page.goto(guide_site.origin + "/?markdown")
    told, whole = page.evaluate("told => page.progressive(told, '# A\\n\\nSome **bold** text.\\n')", given)
    assert told == whole
    assert "<strong>bold</strong>" in whole


def test_the_stop_button_ends_the_text_and_keeps_it(page: Page, given: dict[str, Any]) -> None:
    page.evaluate("told => page.cancel(told)", {**given, "sim": {"output_tokens": 20_000, "chunk_interval_ms": 5}})
    page.wait_for_function("page.state.text.length > 60")
    page.get_by_text("Stop", exact=True).click()
    page.wait_for_function("page.state.ended")
    assert page.evaluate("page.state.error") == ""
    assert page.evaluate("page.state.text").startswith(WORDS)


def test_a_cut_stream_goes_on_with_our_client_and_with_the_unmodified_one(page: Page, given: dict[str, Any]) -> None:
    sim = {"output_tokens": 60, "reset_after_chunks": 20, "continue_assistant": True}
    told = {**given, "sim": sim, "waitsDividedBy": 20}
    ours = page.evaluate("told => page.resume(told, 'ours', 10)", told)
    assert ours["reconnects"] >= 1
    theirs = page.evaluate("told => page.reconnect(told, 'theirs', 10)", told)
    assert "".join(theirs) == ours["text"], "the provider broke off: nothing was in flight"


def test_the_end_of_a_budget_keeps_what_was_rendered(page: Page, up: Up, guide_site: Site) -> None:
    poor = up.project("poor-pages", limit_usd="0.0001", origins=[guide_site.origin])
    token = up.minted(poor).json()["jwt"]
    sim = {"output_tokens": 4000, "chunk_interval_ms": 1}
    told = page.evaluate(
        "told => page.failing(told)", {"baseURL": up.base_url, "token": token, "sessionId": "u1", "sim": sim}
    )
    assert (told["code"], told["status"]) == ("quota_exceeded", 402)
    assert told["text"].startswith(WORDS)
