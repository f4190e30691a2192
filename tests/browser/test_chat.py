"""The chat of `examples/chat` in a real browser, built for production, against a real gateway."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from browser.beside import StackBeside
from browser.chat_page import ask, ended, opened, said, violations, watch, watch_for, watched
from browser.long_answer import TOKENS, play
from browser.site import Site
from cutter import cutting
from stack import Project, wait_until

BURST_TOKENS, BURST_INTERVAL_MS = 50, 400
SMOOTH_FRAME_MS = 100


@pytest.fixture
def chat(chat_site: Site, project: Project) -> Site:
    chat_site.speak_for(project)
    return chat_site


@pytest.fixture
def poor(chat_site: Site, gateway: StackBeside) -> Site:
    """For users whose sessions have next to nothing."""
    chat_site.speak_for(gateway.project(limit_usd="0.0002", project=f'  allowedOrigins: ["{chat_site.origin}"]'))
    return chat_site


@pytest.fixture
def slow(browser: Browser, chat: Site) -> Iterator[Page]:
    """An answer that is on its way for as long as the test looks."""
    with opened(browser, chat, sim={"output_tokens": 5000, "chunk_interval_ms": 20}) as page:
        ask(page)
        expect(page.get_by_test_id("text")).to_contain_text("This is simulated text", timeout=20_000)
        yield page


def text_of(page: Page) -> str:
    return page.get_by_test_id("text").last.inner_text()


def test_bursts_of_fifty_tokens_are_shown_evenly(browser: Browser, chat: Site) -> None:
    sim = {"output_tokens": 500, "tokens_per_chunk": BURST_TOKENS, "chunk_interval_ms": BURST_INTERVAL_MS}
    with opened(browser, chat, sim=sim) as page:
        watch(page)
        ask(page)
        ended(page)
        seen = watched(page)
    growth = seen.growth
    burst = sum(length for _, length, _ in growth) / (500 / BURST_TOKENS)
    for time_ms, length, frame in growth:
        if time_ms > growth[0][0] + 2 * BURST_INTERVAL_MS:
            # A frame that the machine was late with may show what is due by then.
            late = max(1.0, seen.frames[frame - 1] / SMOOTH_FRAME_MS)
            assert length < late * burst / 2, "no burst is seen as one"
    assert len(growth) > (growth[-1][2] - growth[0][2]) / 2, "text moves in nearly every frame"


def test_the_budget_ends_in_the_middle_and_what_was_read_stays(browser: Browser, poor: Site, repository: Path) -> None:
    with opened(browser, poor, sim={"output_tokens": 4000, "chunk_interval_ms": 2}) as page:
        ask(page)
        dialog = page.get_by_test_id("upgrade")
        expect(dialog).to_be_visible(timeout=30_000)
        expect(dialog).to_contain_text("Your budget of $0.0002 is used up")
        read = text_of(page)
        assert read.startswith("This is simulated text")
        assert len(read) > 200
        assert page.evaluate("document.querySelector('dialog').contains(document.activeElement)")
        assert violations(page, repository) == []
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        expect(page.get_by_test_id("composer")).to_be_focused()
        assert text_of(page) == read
        expect(page.get_by_test_id("ending")).to_contain_text("The budget ended here.")


def test_too_many_requests_are_a_toast_that_counts_down_and_then_lets_one_retry(browser: Browser, chat: Site) -> None:
    with opened(browser, chat, sim={"status": 429, "retry_after_s": 61}) as page:
        page.clock.install()
        ask(page)
        toast = page.get_by_test_id("toast")
        expect(toast).to_contain_text("That was a little fast.", timeout=20_000)
        retry = toast.get_by_role("button", name="Retry")
        expect(retry).to_be_disabled()
        page.clock.fast_forward(62_000)
        expect(retry).to_be_enabled(timeout=20_000)
        with page.expect_request(lambda request: request.url.endswith("/v1/chat/completions")):
            retry.click()


def test_the_stop_button_ends_the_bill_and_keeps_the_text(slow: Page, project: Project) -> None:
    slow.keyboard.press("Escape")
    expect(slow.get_by_test_id("ending")).to_contain_text("Stopped", timeout=20_000)
    expect(slow.get_by_test_id("composer")).to_be_focused()
    read = text_of(slow)
    wait_until(lambda: project.stack.sim_requests()[-1]["outcome"] == "cancelled", what="the provider's reset")
    slow.wait_for_timeout(200)
    assert text_of(slow) == read


def test_a_network_that_is_cut_is_told_of_and_the_answer_is_whole(
    browser: Browser, chat: Site, project: Project, gateway: StackBeside
) -> None:
    sim = {"output_tokens": 300, "chunk_interval_ms": 4, "continue_assistant": True}
    with opened(browser, chat, sim=sim) as page:
        ask(page)
        ended(page)
        whole = text_of(page)
    # The page asks for its budget and its threads, too.
    with cutting(gateway.base_url, [4_000, 14_000, 9_000, 12_000]) as network:
        chat.speak_for(project, base_url=network.base_url)
        with opened(browser, chat, sim=sim) as page:
            watch_for(page, "connection")
            ask(page)
            ended(page)
            assert any("Reconnecting" in told for told in said(page)), "it lasts for half a second"
            assert text_of(page) == whole
            expect(page.get_by_test_id("connection")).to_be_empty()
        assert network.done >= 1


def test_an_answer_that_a_reload_broke_off_is_shown_so_and_goes_on_where_it_ended(
    browser: Browser, chat: Site, project: Project
) -> None:
    sim = {"output_tokens": 300, "chunk_interval_ms": 15, "continue_assistant": True}
    with opened(browser, chat, sim={**sim, "chunk_interval_ms": 0}) as page:
        ask(page)
        ended(page)
        whole = text_of(page)
    chat.speak_for(project, user="reloads")
    with opened(browser, chat, sim=sim) as page:
        ask(page)
        expect(page.get_by_test_id("text")).to_contain_text("This is simulated text", timeout=20_000)
        page.wait_for_function("document.querySelector('[data-testid=text]').innerText.length > 200")
        page.reload()
        expect(page.get_by_test_id("ending")).to_contain_text("Interrupted", timeout=20_000)
        expect(page.get_by_test_id("answer")).to_have_attribute("data-state", "failed")
        read = text_of(page)
        assert len(read) > 200
        assert whole.startswith(read)
        assert read != whole
        page.get_by_role("button", name="Continue").click()
        ended(page)
        expect(page.get_by_test_id("ending")).to_have_count(0)
        assert text_of(page) == whole
        page.reload()
        expect(page.get_by_test_id("answer")).to_have_attribute("data-state", "done", timeout=20_000)
        assert text_of(page) == whole

    def charged() -> list[int] | None:
        rows = [row["output_tokens"] for row in project.settled() if row["user_id"] == "reloads"]
        return rows if sum(rows) >= 300 else None

    tokens = wait_until(charged, what="the settling of both attempts")
    assert sum(tokens) <= 300 + len(tokens), "a word that was cut in two may be one token more"


def test_the_list_of_chats_outlives_a_reload_and_deletion_deletes(
    browser: Browser, chat: Site, project: Project
) -> None:
    chat.speak_for(project, user="lists")
    headers = {"Authorization": f"Bearer {project.mint(user='lists')}"}

    def kept() -> list[str]:
        return [row["id"] for row in httpx.get(project.stack.base_url + "/v1/threads", headers=headers).json()]

    with opened(browser, chat, sim={"text": "Said and kept."}) as page:
        listed = page.get_by_test_id("threads")
        for question in ("First question", "Second question"):
            page.get_by_test_id("new-chat").click()
            ask(page, question)
            ended(page)
        page.reload()
        expect(page.get_by_test_id("question")).to_have_text("Second question", timeout=20_000)
        expect(listed.get_by_role("listitem")).to_have_count(2)
        assert listed.get_by_role("listitem").all_inner_texts() == ["Second question", "First question"]
        listed.get_by_role("button", name="First question", exact=True).click()
        expect(page.get_by_test_id("question")).to_have_text("First question", timeout=20_000)
        expect(page.get_by_test_id("text")).to_have_text("Said and kept.")
        assert len(kept()) == 2
        listed.get_by_text("First question").hover()
        listed.get_by_role("button", name="Delete First question").click()
        expect(listed.get_by_role("listitem")).to_have_count(1)
        expect(page.get_by_test_id("welcome")).to_be_visible()
        wait_until(lambda: len(kept()) == 1, what="the deletion at the gateway")
        page.reload()
        expect(listed.get_by_role("listitem")).to_have_text("Second question", timeout=20_000)
        # A browser that remembers no titles sees what the gateway keeps.
        page.evaluate("localStorage.clear()")
        page.reload()
        expect(listed.get_by_role("listitem")).to_have_count(1, timeout=20_000)


def test_axe_finds_nothing_in_any_state(browser: Browser, chat: Site, slow: Page, repository: Path) -> None:
    assert violations(slow, repository) == []
    slow.keyboard.press("Escape")
    expect(slow.get_by_test_id("ending")).to_be_visible(timeout=20_000)
    assert violations(slow, repository) == []
    schemes: tuple[Any, ...] = ("light", "dark")
    for scheme in schemes:
        with opened(browser, chat, color_scheme=scheme) as page:
            assert violations(page, repository) == [], scheme
            ask(page, "Write a token bucket in TypeScript.")
            ended(page)
            assert violations(page, repository) == [], scheme


def test_everything_can_be_reached_and_done_by_keyboard(browser: Browser, chat: Site) -> None:
    with opened(browser, chat, sim={"output_tokens": 20}) as page:
        reached: set[str] = set()
        for _ in range(24):
            page.keyboard.press("Tab")
            told = page.evaluate(
                """() => { const on = document.activeElement; const style = getComputedStyle(on);
                return [on.getAttribute('aria-label') ?? on.innerText, style.outlineStyle, style.boxShadow]; }"""
            )
            reached.add(str(told[0]).splitlines()[0] if told[0] else "")
        assert {"New chat", "Message", "Skip to the message box"} <= reached, reached
        assert any(name.startswith("Use ") for name in reached), reached
        page.get_by_test_id("composer").focus()
        page.keyboard.type("first line")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("second line")
        page.keyboard.press("Enter")
        ended(page)
        assert page.get_by_test_id("question").inner_text() == "first line\nsecond line"


def test_a_screen_reader_is_told_whole_sentences_of_the_answer(browser: Browser, chat: Site) -> None:
    with opened(
        browser, chat, sim={"text": "One is here. Two is here. Three is here.", "chunk_interval_ms": 5}
    ) as page:
        region = page.get_by_test_id("announcement")
        assert region.get_attribute("aria-live") == "polite"
        ask(page)
        ended(page)
        expect(region).to_contain_text("Three is here.", timeout=20_000)
        expect(page.get_by_test_id("answer")).to_have_attribute("aria-busy", "false")


def test_fifty_thousand_tokens_keep_the_page_alive_and_small(browser: Browser, chat: Site, project: Project) -> None:
    """Its frames are measured by `make bench-page`: here nobody knows what else the machine does, and only a page that
    hangs is a fault."""
    played = play(browser, chat, interval_ms=1)
    wait_until(
        lambda: any(row["output_tokens"] >= TOKENS for row in project.settled()), what="the settling of the long answer"
    )
    assert played.p99_ms < 1_000
    assert played.heap_bytes < 40 * 2**20
    assert played.heap_left_bytes < 20 * 2**20, "a chat that was left stays as its text only"
    assert played.elements < 40_000
