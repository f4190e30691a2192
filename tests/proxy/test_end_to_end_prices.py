"""Prices while requests run: versions that begin later, a change in the middle of a stream, services priced apart."""

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from behest_ledger.prices.book import BookDocument, PriceBook, PriceSheet, TieredRate
from behest_ledger.prices.snapshot import compile_package_book
from behest_ledger.store.pool import connect
from behest_ledger.store.prices import store_book
from conftest import Server, own_database
from stack import Project, Stack, running_stack, wait_until

QUESTION = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def own_stack(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this file's own: prices are the same for all tenants of a ledger."""
    with (
        own_database(template, "prices") as dsn,
        running_stack(dsn, tmp_path_factory.mktemp("prices")) as running,
    ):
        yield running
        assert running.verify().findings == []


def cheap_book(pico: int, version: str) -> PriceBook:
    """The package's book, with gpt-4o-mini at one price for everything."""
    book = compile_package_book()
    rate = TieredRate(base=pico)
    cheap = PriceSheet(rates={"input": rate, "output": rate})
    providers = [
        replace(
            provider,
            models=[
                replace(model, sheets=[cheap], variants=[]) if model.id == "gpt-4o-mini" else model
                for model in provider.models
            ],
        )
        for provider in book.document.providers
    ]
    return PriceBook(BookDocument(source="test", providers=providers), version=version)


def ask(project: Project, token: str, **members: Any) -> httpx.Response:
    body = {"model": "gpt-4o-mini", "messages": QUESTION, "sim": {"output_tokens": 20}, **members}
    return httpx.post(
        project.stack.base_url + "/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {token}"}
    )


def prices_charged(project: Project) -> list[tuple[str, dict[str, int]]]:
    """By request, in the order of their beginnings: the price key, and the rate of each class."""
    rows = project.stack.query(
        "SELECT r.price_key, l.class, l.rate_pico::text AS rate FROM ledger.request r"
        " JOIN ledger.usage_line l USING (tenant_id, month, request_id) WHERE r.project_id = $1 ORDER BY r.request_id",
        project.project_id,
    )
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        found.setdefault(row["price_key"], {})[row["class"]] = int(row["rate"])
    return list(found.items())


def test_a_stream_that_runs_across_a_change_of_prices_pays_those_of_its_beginning(own_stack: Stack) -> None:
    project = own_stack.project()
    token = project.mint()

    async def scenario() -> None:
        async with (
            httpx.AsyncClient(base_url=own_stack.base_url, headers={"Authorization": f"Bearer {token}"}) as client,
            client.stream(
                "POST",
                "/v1/chat/completions",
                json={
                    "model": "gpt-4o-mini",
                    "messages": QUESTION,
                    "stream": True,
                    "sim": {"output_tokens": 120, "chunk_interval_ms": 20},
                },
                timeout=30,
            ) as answer,
        ):
            lines = answer.aiter_lines()
            await anext(lines)
            # One version at once, and one that nobody announces when it begins.
            now = datetime.now(UTC)
            await asyncio.to_thread(_store_two, own_stack, now)
            async for _ in lines:
                pass

    asyncio.run(scenario())
    project.settled()

    def is_priced_anew() -> bool:
        assert ask(project, token).status_code == 200
        return any(key.startswith("later/") for key, _ in prices_charged(project))

    wait_until(is_priced_anew, what="the later version")
    (first, first_rates), *later = prices_charged(project)
    assert first.startswith("genai-prices-")
    assert first_rates["output"] == 600_000
    assert dict(later)["later/openai/gpt-4o-mini#0"] == {"input": 500, "output": 500}


def _store_two(stack: Stack, now: datetime) -> None:
    async def work() -> None:
        connection = await connect(stack.dsn)
        try:
            await store_book(connection, cheap_book(300, "sooner"), effective_from=now)
            await store_book(connection, cheap_book(500, "later"), effective_from=now + timedelta(seconds=2))
        finally:
            await connection.close()

    asyncio.run(work())


UPSTREAM = """
  models:
    - {name: gpt-4o-mini, provider: openai}
    - {name: gpt-5, provider: openai, priceContext: {service_tier: priority}, visibleOnly: true}
    - {name: gpt-4.1, provider: openai, priceContext: {service_tier: unheard-of}}
    - {name: o3, provider: openai}
    - {name: gpt-4o-search-preview, provider: openai}
    - {name: voxtral-small-24b-2507, provider: mistral, contextLimit: 1000}
    - {name: ours, prices: {input: "1", output: "2"}}
"""


def test_a_service_that_is_priced_apart_is_charged_so_or_refused(own_stack: Stack) -> None:
    project = own_stack.project(upstream=UPSTREAM)
    token = project.mint()
    asked = [
        ask(project, token, model=model, **members).status_code
        for model, members in (
            ("o3", {}),
            ("o3", {"service_tier": "flex"}),
            ("gpt-5", {}),
            ("gpt-5", {"service_tier": "default"}),
            ("ours", {"service_tier": "default"}),
        )
    ]
    assert asked == [200] * 5
    project.settled(number=5)
    charged = [(key.partition("/")[2], rates["output"]) for key, rates in prices_charged(project)]
    assert [rate for _, rate in charged] == [8_000_000, 4_000_000, 20_000_000, 10_000_000, 2_000_000]

    for model, members, param in (
        ("o3", {"service_tier": "turbo"}, "service_tier"),
        ("o3", {"speed": "fast"}, "speed"),
        ("ours", {"service_tier": "priority"}, "service_tier"),
        ("gpt-4.1", {}, "model"),
        ("gpt-4o-search-preview", {}, "model"),
        ("voxtral-small-24b-2507", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages"),
    ):
        answer = ask(project, token, model=model, **members)
        error = json.loads(answer.content)["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "unpriced_model", param), error
