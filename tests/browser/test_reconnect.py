"""A browser on a network that is cut again and again: what is rendered, and what is charged."""

import random
from typing import Any

import pytest
from playwright.sync_api import Browser

from browser.beside import StackBeside
from browser.site import Site
from cutter import cutting
from stack import Project, wait_until

TOKENS = 200
SIM = {"output_tokens": TOKENS, "chunk_interval_ms": 10, "continue_assistant": True}
CUTS = 50
CUT_BYTES = (600, 4500)
"""After so many bytes of an answer. Five times that is half of the whole, so that its end is never lost, also where a
busy machine tells the gateway of a cut a second later: were the last event in flight, the reply would be whole for the
gateway and the same call a new turn (docs/threads.md)."""
CHUNKS_IN_FLIGHT = 60
"""What one broken connection may swallow here; a chunk is a token."""


def render(browser: Browser, site: Site, project: Project, base_url: str, call: str, *, name: str) -> Any:
    """What a fresh page renders of one stream; the function of the page that asks is named."""
    told = {
        "baseURL": base_url,
        "token": project.mint(user=name, session=name),
        "sessionId": name,
        "sim": SIM,
        "waitsDividedBy": 20,
    }
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(site.origin + "/")
        return page.evaluate(f"told => page.{call}(told, told.sessionId, 40)", told)


@pytest.fixture(scope="module")
def uncut(browser: Browser, guide_site: Site, project: Project, gateway: StackBeside) -> str:
    found = render(browser, guide_site, project, gateway.base_url, "resume", name="uncut")
    assert found["reconnects"] == 0
    return str(found["text"])


def assert_charged_once(project: Project, names: str, number: int) -> None:
    """So many sessions have such names, and each of them paid for the text once, over all its attempts."""
    sql = """SELECT session_id, sum(output_tokens)::int8 AS tokens, count(*) AS attempts FROM ledger.request_now
             WHERE project_id = $1 AND session_id LIKE $2 GROUP BY session_id"""

    def paid() -> list[dict[str, Any]] | None:
        rows = project.stack.query(sql, project.project_id, names + "-%")
        return rows if len(rows) == number and all(row["tokens"] >= TOKENS for row in rows) else None

    for row in wait_until(paid, what="the settling of every attempt"):
        # Where a token was cut in two, both halves count.
        assert row["tokens"] <= TOKENS + row["attempts"], row


def test_our_client_renders_the_uncut_text_over_50_cuts(
    browser: Browser, guide_site: Site, project: Project, gateway: StackBeside, uncut: str
) -> None:
    dice = random.Random(11)
    cut = 0
    for number in range(CUTS):
        with cutting(gateway.base_url, [dice.randrange(*CUT_BYTES) for _ in range(5)]) as network:
            name = f"ours-{number}"
            found = render(browser, guide_site, project, network.base_url, "resume", name=name)
            assert found["text"] == uncut
        cut += network.done
        if cut >= CUTS:
            assert_charged_once(project, "ours", number + 1)
            return
    pytest.fail(f"the network was cut {cut} times only")


def test_the_unmodified_client_repeats_nothing_and_misses_only_what_was_in_flight(
    browser: Browser, guide_site: Site, project: Project, gateway: StackBeside, uncut: str
) -> None:
    dice = random.Random(12)
    cut = 0
    for number in range(CUTS):
        with cutting(gateway.base_url, [dice.randrange(*CUT_BYTES) for _ in range(5)]) as network:
            name = f"theirs-{number}"
            texts = render(browser, guide_site, project, network.base_url, "reconnect", name=name)
        at = gaps = 0
        for text in texts:
            begin = uncut.find(text, at)
            assert begin >= 0, f"{text[:60]!r} is repeated, or was never said behind {uncut[max(0, at - 60) : at]!r}"
            gaps += begin - at
            at = begin + len(text)
        assert at == len(uncut)
        assert gaps <= network.done * CHUNKS_IN_FLIGHT * 6
        cut += network.done
        if cut >= CUTS:
            assert_charged_once(project, "theirs", number + 1)
            return
    pytest.fail(f"the network was cut {cut} times only")
