"""The built-in page in a real browser: it shows the books, goes on by itself, and runs nothing that a client sent."""

import asyncio
import os
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from behest_ledger.store.configuration import apply_text
from browser.beside import StackBeside, beside
from browser.showcase import fill
from conftest import Server, execute
from stack import Stack, running_stack

# What would be seen if it were taken for markup, wherever it is put: in text, in an attribute, in a script, in a URL.
HOSTILE = (
    '<img/src=x/onerror="window.hit=1">',
    "\"'><script>window.hit=1</script>",
    "</script><svg/onload=window.hit=1>",
    "javascript:window.hit=1",
    "${window.hit=1}{{7*7}}",
)


@pytest.fixture(scope="module")
def stack(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A sidecar on a ledger with an hour of traffic, and a project whose users and sessions are hostile."""
    name = f"behest_browser_{os.getpid()}"
    beside(asyncio.run, execute(template.dsn, f"CREATE DATABASE {name} TEMPLATE behest_template"))
    dsn = template.of(name)
    beside(asyncio.run, fill(dsn, requests=60))
    starting = running_stack(dsn, tmp_path_factory.mktemp("browser"))
    stack = StackBeside.of(beside(starting.__enter__))
    try:
        yield stack
    finally:
        stack.close()
        beside(starting.__exit__, None, None, None)
    beside(asyncio.run, execute(template.dsn, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def page(browser: Browser, stack: Stack) -> Iterator[Page]:
    """The page, opened; it may ask nobody but the sidecar, and its console stays empty."""
    context = browser.new_context(viewport={"width": 1240, "height": 1000})
    opened = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(stack.admin_url + "/")
    expect(opened.locator("#state")).to_have_class("well", timeout=20_000)
    yield opened
    context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(stack.admin_url)] == []


def spend(stack: Stack, session: str, user: str = "ann") -> None:
    made = stack.project(namespace="hostile")
    body = {"messages": [{"role": "user", "content": "hi"}], "sim": {"output_tokens": 2000}}
    headers = {"Authorization": f"Bearer {made.mint(user=user, session=session)}"}
    httpx.post(stack.base_url + "/v1/chat/completions", json=body, headers=headers, timeout=30).raise_for_status()


def number(text: str) -> Decimal:
    return Decimal(text.replace("$", "").replace(",", ""))


def books(stack: Stack) -> list[Decimal]:
    """The hour that the page shows ends with this minute; or with the last, where that went by since it was drawn."""
    rows = stack.query(
        "SELECT (SELECT sum(amount_pico) FROM ledger.request_now"
        " WHERE ended_at >= date_trunc('minute', now()) - minutes * interval '1 minute')::text AS amount"
        " FROM unnest(ARRAY[59, 60]) AS minutes"
    )
    return [Decimal(row["amount"]).scaleb(-12) for row in rows]


def test_it_shows_the_books(page: Page, stack: Stack) -> None:
    shown = number(page.locator("#spent").inner_text())
    assert min(abs(shown - amount) for amount in books(stack)) < Decimal("0.01"), "cents are shown"
    assert page.locator("#requests tbody tr").count() == 30
    outcomes = set(page.locator("#requests .badge").all_inner_texts())
    assert "completed" in outcomes
    assert page.locator("#live").inner_text() == "4"
    assert page.locator("#plot rect").count() > 10
    assert page.locator("#legend li").count() == 4
    totals = sum(number(text) for text in page.locator("#models tbody td:nth-child(2)").all_text_contents())
    assert abs(totals - shown) < Decimal("0.05")


def test_what_is_held_is_drawn_apart_from_what_is_spent(page: Page, stack: Stack) -> None:
    budget = page.locator("#budgets li", has_text="shop/project-month")
    spent, held = (float(budget.locator(f"rect.{name}").get_attribute("width") or "nan") for name in ("spent", "held"))
    (window,) = stack.query(
        "SELECT spent::float8 / limit_amount::float8 AS spent, held::float8 / limit_amount::float8 AS held"
        " FROM ledger.budget_window WHERE budget_id = 'shop/project-month'"
    )
    assert window["held"] > 0
    assert spent == pytest.approx(1000 * window["spent"], abs=1)
    assert held == pytest.approx(1000 * window["held"], abs=1)
    assert budget.locator("svg").get_attribute("aria-label") is not None
    assert budget.locator(".share").inner_text() == f"{100 * window['spent']:.0f} %"


def test_it_goes_on_by_itself(page: Page, stack: Stack) -> None:
    before = page.locator("#ended").inner_text()
    spend(stack, "while-you-watch")
    expect(page.locator("#requests tbody tr").first).to_contain_text("while-you-watch", timeout=20_000)
    expect(page.locator("#ended")).not_to_have_text(before, timeout=20_000)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_client_calls_itself_is_shown_and_never_run(page: Page, stack: Stack, hostile: str) -> None:
    session = hostile.replace(" ", "")
    spend(stack, session, user=hostile)
    row = page.locator("#requests tbody tr").first
    expect(row).to_contain_text(session, timeout=20_000)
    expect(row).to_contain_text(hostile)
    page.locator("#q").fill(session)
    found = page.locator("#sessions tbody tr").first
    expect(found).to_contain_text(session, timeout=20_000)
    found.hover()
    assert page.evaluate("window.hit") is None
    assert page.locator("main img, main script, main a").count() == 0


def test_no_script_but_its_own_would_run(browser: Browser, stack: Stack) -> None:
    """Were there a way in after all, the policy would still stop it."""
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(stack.admin_url + "/")
        told: Any = page.evaluate(
            """() => new Promise((resolve) => {
                const refused = [];
                document.addEventListener('securitypolicyviolation', (event) => refused.push(event.effectiveDirective));
                const made = document.createElement('div');
                made.innerHTML = '<b onclick="window.hit = 1" style="color: red">x</b><img src="https://example.com/x">';
                document.body.append(made);
                made.firstChild.click();
                const script = document.createElement('script');
                script.textContent = 'window.hit = 1';
                document.body.append(script);
                fetch('https://example.com/').catch(() => 0);
                const told = () => resolve([window.hit === undefined, refused]);
                const look = () => refused.length >= 5 && setTimeout(told, 100);
                document.addEventListener('securitypolicyviolation', look);
                setTimeout(told, 20000);
            })"""
        )
    assert told[0]
    assert set(told[1]) == {"script-src-attr", "style-src-attr", "img-src", "script-src-elem", "connect-src"}


def test_what_was_searched_for_is_looked_for_again_by_itself(page: Page, stack: Stack) -> None:
    page.locator("#q").fill("comes-later")
    expect(page.locator("#sessions-empty")).to_have_text("No session of this time begins so.", timeout=20_000)
    spend(stack, "comes-later-than-it-was-asked")
    expect(page.locator("#sessions tbody tr").first).to_contain_text("comes-later-than", timeout=30_000)


def test_a_search_finds_sessions_by_their_beginning(page: Page) -> None:
    page.locator("#q").fill("ann-")
    expect(page.locator("#sessions tbody tr").first).to_contain_text("ann-", timeout=20_000)
    for text in page.locator("#sessions tbody tr td:first-child").all_inner_texts():
        assert text.startswith("ann-")
    page.locator("#q").fill("nobody-begins-so")
    expect(page.locator("#sessions-empty")).to_have_text("No session of this time begins so.", timeout=20_000)
    page.locator("#q").fill("")
    expect(page.locator("#sessions tbody tr")).not_to_have_count(0, timeout=20_000)


def test_it_looks_back_as_far_as_it_is_asked_by_keyboard_too(page: Page) -> None:
    page.locator("input[value='1h']").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("input[value='24h']").is_checked()
    expect(page.locator("#plot svg[aria-label*='24 hours']")).to_have_count(1, timeout=20_000)


def test_it_says_when_the_sidecar_is_gone_and_that_it_is_back(browser: Browser, stack: Stack) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(stack.admin_url + "/")
        expect(page.locator("#state")).to_have_class("well", timeout=20_000)
        page.route("**/page/now.json*", lambda route: route.abort())
        expect(page.locator("#state")).to_have_class("away", timeout=20_000)
        assert page.locator("#state-text").inner_text() == "The sidecar does not answer"
        page.unroute("**/page/now.json*")
        expect(page.locator("#state")).to_have_class("well", timeout=20_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_both_schemes_and_on_a_phone(browser: Browser, stack: Stack, scheme: Any) -> None:
    with browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(stack.admin_url + "/")
        expect(page.locator("#state")).to_have_class("well", timeout=20_000)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0
        assert _contrast(page, "body", "body") >= 7
        for selector in ("h2", ".note", ".badge", "th"):
            assert _contrast(page, f"main {selector}", ".card") >= 4.5, selector  # WCAG 2.2, 1.4.3


def _contrast(page: Page, text: str, ground: str) -> float:
    """WCAG's contrast ratio of the colour of a text on that of its ground."""
    colours: list[str] = page.evaluate(
        "([text, ground]) => [getComputedStyle(document.querySelector(text)).color,"
        " getComputedStyle(document.querySelector(ground)).backgroundColor]",
        [text, ground],
    )

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def test_everything_has_a_name_for_those_who_cannot_see(page: Page) -> None:
    """Each section is named by its heading, each column by its head, each bar by a sentence."""
    assert page.locator("html").get_attribute("lang") == "en"
    for section in page.locator("main section").all():
        labelled = section.get_attribute("aria-labelledby")
        assert section.get_attribute("aria-label") or page.locator(f"#{labelled}").inner_text()
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("main svg:not([aria-label])").count() == 0
    assert page.get_by_role("searchbox", name="Sessions that begin with").count() == 1
    assert page.get_by_role("radio").count() == 3
    assert page.get_by_role("status").count() == 1


def test_a_budget_that_nobody_has_used_is_drawn_too(page: Page, stack: Stack) -> None:
    manifest = """
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: quiet, namespace: shop}
spec: {scope: {project: nobody}, limit: {amount: "5", currency: USD}, window: {period: Month}}
"""
    stack.run(apply_text(stack.dsn, manifest))
    expect(page.locator("#budgets li", has_text="shop/quiet")).to_contain_text("$0.00 of $5.00", timeout=20_000)
