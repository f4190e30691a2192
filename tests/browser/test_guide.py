"""The snippets of the streaming guide in a real browser, on the unmodified `openai` package."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from browser.beside import StackBeside
from browser.site import Site
from stack import Project, wait_until

PROMPT_TOKENS = 12
INPUT_PICO, OUTPUT_PICO = 150_000, 600_000
"""What gpt-4o-mini costs: its price is that of the ledger's own book."""
SLOW = {"output_tokens": 20_000, "chunk_interval_ms": 5}
_names = itertools.count(1)


@pytest.fixture
def page(browser: Browser, guide_site: Site) -> Iterator[Page]:
    with browser.new_context(ignore_https_errors=True) as context:
        opened = context.new_page()
        opened.goto(guide_site.origin + "/")
        yield opened


def given(project: Project, base_url: str, **more: Any) -> dict[str, Any]:
    """What a page is told, with a user and session of nobody else's."""
    name = f"guide-{next(_names)}"
    token = project.mint(user=name, session=name)
    return {"baseURL": base_url, "token": token, "sessionId": name, **more}


def asked(project: Project) -> str:
    """What an answer without a break says to the guide's question."""
    body = {"messages": [{"role": "user", "content": "Tell me a story."}]}
    headers = {"Authorization": f"Bearer {project.mint(session='whole')}"}
    answer = httpx.post(project.stack.base_url + "/v1/chat/completions", json=body, headers=headers, timeout=30)
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture(params=["http/1.1", "h2"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base_url(protocol: str, gateway: StackBeside, secure_url: str) -> str:
    return secure_url if protocol == "h2" else gateway.base_url


def test_a_basic_stream(page: Page, project: Project, base_url: str, protocol: str) -> None:
    protocols: list[str] = []
    network = page.context.new_cdp_session(page)

    def received(event: dict[str, Any]) -> None:
        protocols.append(event["response"]["protocol"])

    network.on("Network.responseReceived", received)
    network.send("Network.enable")
    told = given(project, base_url)
    assert page.evaluate("told => page.basic(told)", told) == asked(project)
    assert protocols[-1] == protocol
    row = _row_of(project, told)
    assert (row["outcome"], row["output_tokens"]) == ("completed", 64)


def _row_of(project: Project, told: dict[str, Any]) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        rows = [row for row in project.settled() if row["session_id"] == told["sessionId"]]
        return rows[0] if rows else None

    row: dict[str, Any] = wait_until(found, what="the settled request")
    return row


def _stop(page: Page, _site: Site) -> None:
    page.get_by_text("Stop", exact=True).click()
    page.wait_for_function("page.state.ended")
    assert page.evaluate("page.state.error") == "", "the snippet takes an abort for the user's wish"
    length = page.evaluate("page.state.text.length")
    page.wait_for_timeout(150)
    assert page.evaluate("page.state.text.length") == length


def _unmount(page: Page, _site: Site) -> None:
    page.evaluate("page.leave()")


def _close(page: Page, _site: Site) -> None:
    page.close()


def _navigate(page: Page, site: Site) -> None:
    page.goto(site.origin + "/?elsewhere")


@pytest.mark.parametrize(
    ("begin", "leave"),
    [("cancel", _stop), ("unmount", _unmount), ("cancel", _close), ("cancel", _navigate)],
    ids=["stop button", "unmount", "closing the tab", "navigating away"],
)
def test_leaving_resets_the_provider_and_ends_the_bill(
    page: Page, project: Project, guide_site: Site, base_url: str, begin: str, leave: Callable[[Page, Site], None]
) -> None:
    told = given(project, base_url, sim=SLOW)
    with page.expect_response(lambda answer: answer.request.method == "POST") as answered:
        page.evaluate(f"told => page.{begin}(told)", told)
    request_id = answered.value.headers["x-request-id"]
    page.wait_for_function("page.state.text.length > 60")
    leave(page, guide_site)

    def cancelled() -> dict[str, Any] | None:
        seen = project.stack.sim_request(request_id)
        return seen if seen and seen["outcome"] == "cancelled" else None

    seen = wait_until(cancelled, what="the provider's seeing the cancel", timeout_s=20)
    row = _row_of(project, told)
    assert (row["outcome"], row["source"], row["input_tokens"]) == ("client_cancelled", "local", PROMPT_TOKENS)
    assert 10 <= row["output_tokens"] <= seen["output_tokens_sent"] < SLOW["output_tokens"]
    assert row["amount_pico"] == PROMPT_TOKENS * INPUT_PICO + row["output_tokens"] * OUTPUT_PICO


def test_an_error_in_the_middle_keeps_what_was_rendered(page: Page, gateway: StackBeside, guide_site: Site) -> None:
    """The unmodified package has no `status` there: the guide's branch for 402 needs `code`."""
    poor = gateway.project(limit_usd="0.0001", project=f'  allowedOrigins: ["{guide_site.origin}"]')
    told = page.evaluate(
        "told => page.failing(told)", given(poor, gateway.base_url, sim={"output_tokens": 4000, "chunk_interval_ms": 1})
    )
    assert told["told"] == ["error"]
    assert (told["code"], told["status"]) == ("quota_exceeded", 402)
    assert told["text"].startswith("This is simulated text")


def test_the_typewriter_appends_everything_in_order(page: Page, project: Project, gateway: StackBeside) -> None:
    appended = page.evaluate("told => page.typewriter(told)", given(project, gateway.base_url))
    assert "".join(appended) == asked(project)
    assert len(appended) >= 60


def test_progressive_markdown_ends_as_the_markup_of_the_whole(
    page: Page, project: Project, gateway: StackBeside
) -> None:
    source = "# Title\n\nSome `code` and **bold** <b>text</b>.\n\n```ts\nconst a = 1;\n```\n"
    told, whole = page.evaluate(
        "([told, source]) => page.progressive(told, source)", [given(project, gateway.base_url), source]
    )
    assert told == whole
    assert "<strong>bold</strong>" in whole
    assert "&lt;b&gt;" in whole


def test_markdown_that_is_cut_behind_any_byte_never_shows_broken_markup(page: Page) -> None:
    names = page.evaluate("page.documents")
    assert len(names) >= 7
    for name in names:
        found = page.evaluate("name => page.cuts(name)", name)
        assert found["cuts"] > 30
        assert found["wrong"] == [], name


def test_a_site_that_the_project_does_not_name_is_kept_out(page: Page, gateway: StackBeside) -> None:
    stranger = gateway.project()
    told = page.evaluate(
        "told => page.basic(told).then(() => 'let in', error => error.constructor.name + ': ' + error.message)",
        given(stranger, gateway.base_url),
    )
    assert told.endswith("Connection error.")
