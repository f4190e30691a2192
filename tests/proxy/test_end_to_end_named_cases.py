"""What users of other gateways complain about, each complaint a test of its name.

Each is here once in short; what is said about it in breadth is named beside it.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import httpx
import msgspec
import pytest

from behest_ledger.charging import Evidence, Outcome, charge
from behest_ledger.holds import Admission, Settlement
from behest_ledger.prices.rates import ClassRates, ContextTier, Rates
from behest_ledger.settlement import settlement_for
from behest_ledger.store import holds
from behest_ledger.store.errors import LedgerUnavailableError
from behest_ledger.store.holds import Settled
from behest_ledger.store.writer import SettlementWriter
from behest_ledger.token_counts import TokenCounts
from behest_proxy.holding import plan
from behest_proxy.models import ModelFacts
from behest_proxy.request import InputCount, parse
from ledger.books import Books, admission, granted, keep_books, refused, settlement
from ledger.sidecars import Sidecar, reap
from ledger.sidecars import charge as charge_by_policy
from stack import Project, Stack, wait_until

BODY: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Tell me a story."}]}


def ask(project: Project, *, token: str = "", stream: bool = True, **sim: Any) -> httpx.Response:
    """One request, read to its end."""
    return httpx.post(
        project.stack.base_url + "/v1/chat/completions",
        headers={"Authorization": f"Bearer {token or project.mint()}"},
        json={**BODY, "stream": stream, "sim": sim},
        timeout=30,
    )


def budget(project: Project, name: str, rest: str) -> None:
    """Another budget of the project."""
    project.stack.apply(f"""
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: {name}, namespace: {project.namespace}}}
spec:
{rest}
""")


def held(project: Project) -> int:
    """What is held in all windows of the project's tenant."""
    (row,) = project.stack.query(
        "SELECT coalesce(sum(held + suspense), 0)::bigint AS held FROM ledger.budget_window WHERE tenant_id = $1",
        project.namespace,
    )
    return int(row["held"])


def test_first_concurrent_requests_of_a_new_user(stack: Stack) -> None:
    """They bypassed the budget, because its row was not there yet. In breadth: test_store_holds_windows."""
    project = stack.project()
    budget(project, "calls", "  {scope: {project: app}, per: [user], limit: {requests: 7}, window: {period: Day}}")
    token = project.mint(user="nobody-ever-saw")

    async def scenario() -> Counter[int]:
        async with httpx.AsyncClient(base_url=stack.base_url, timeout=30) as client:
            answers = await asyncio.gather(
                *(
                    client.post(
                        "/v1/chat/completions",
                        headers={"Authorization": f"Bearer {token}"},
                        json={**BODY, "sim": {"output_tokens": 2, "first_chunk_delay_ms": 50}},
                    )
                    for _ in range(40)
                )
            )
        return Counter(answer.status_code for answer in answers)

    assert asyncio.run(scenario()) == {200: 7, 402: 33}
    assert len(project.settled(number=7)) == 7


@pytest.mark.parametrize(
    ("bound", "real", "spent", "overrun"),
    [
        # Bounded as a long prompt, and counted as a short one: the dear rates were held, the cheap ones are paid.
        (1500, 900, 900 * 2 + 100 * 8, 0),
        # Bounded as a short one, and counted as a long one by the provider: all of it is paid, as far as there is room.
        (1000, 1001, 1001 * 5 + 100 * 20, 0),
        (1000, 1700, 10_000, 1700 * 5 + 100 * 20 - 10_000),
    ],
)
def test_hold_priced_at_another_tier_than_settle(
    database: str, bound: int, real: int, spent: int, overrun: int
) -> None:
    """One function priced the hold and another one the charge. Here it is one; the tier is that of the real count."""
    rates = Rates(
        price_key="k",
        base=ClassRates.of({"input": 2, "output": 8}),
        tiers=(ContextTier(start_input_tokens=1000, rates=ClassRates.of({"input": 5, "output": 20})),),
    )
    request = parse(msgspec.json.encode({**BODY, "stream": True, "max_tokens": 100}))
    hold = plan(request, ModelFacts(visible_only=True), rates, InputCount(bound, bound, exact=True))

    async def work(books: Books) -> None:
        await books.budget("money", 10_000)
        asked = msgspec.structs.replace(
            admission(need=hold.need_tokens, want=hold.want_tokens, shares=1, rate=hold.output_rate_pico),
            input_tokens=hold.input_tokens,
            input_amount_pico=hold.input_amount_pico,
        )
        output = granted(await holds.admit(books.connection, asked)).output_tokens
        assert output == 100
        usage = TokenCounts(input=real, output=output)
        evidence = Evidence(request_sent=True, first_byte=True, counted=usage, provider=usage)
        ended = settlement_for(
            tenant_id=asked.tenant_id,
            request_id=asked.request_id,
            outcome=Outcome.COMPLETED,
            charge=charge(Outcome.COMPLETED, evidence),
            rates=rates,
            facts={},
        )
        await holds.settle(books.connection, [ended])
        assert await books.balances("money") == (spent, 0, overrun, 0)
        assert ended.amount_pico == spent + overrun == rates.amount_pico(usage)

    keep_books(database, work)


def test_settle_after_expiry(database: str) -> None:
    """The hold had expired, and its charge was lost or freed money twice. In breadth: test_store_keeper."""

    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        sidecar, another = await Sidecar.start(books), await Sidecar.start(books)
        early, late = [await sidecar.admitted(need=40) for _ in range(2)]
        await sidecar.die()
        assert await reap(books) == 2
        # Expired is not free: nobody else gets what they hold.
        assert refused((await another.admit(need=21))[1]).held == 800
        assert await books.settle(settlement(early, output=30)) == ["settled"]
        assert await charge_by_policy(books, "checkpoint") == {late: 0}
        assert await books.settle(settlement(late, output=25)) == ["corrected"]
        assert await books.settle(settlement(early, output=30), settlement(late, output=25)) == ["already", "already"]
        assert await books.balances("money") == (550, 0, 0, 0)

    keep_books(database, work)


@pytest.mark.parametrize(
    "sim",
    [
        {"reset_before_head": True},
        {"status": 500},
        {"body": "html"},
        {"reset_after_chunks": 0},
        {"end_after_chunks": 0},
        {"error_event_after_chunks": 0},
    ],
    ids=str,
)
def test_failure_before_the_first_chunk(stack: Stack, sim: dict[str, Any]) -> None:
    """Its hold leaked, until the budget refused everybody with nothing spent. In breadth: test_end_to_end_failures."""
    project = stack.project(limit_usd="0.0001")  # little enough for a leak of a few holds to be seen
    for number in range(6):
        answer = ask(project, **sim)
        assert answer.status_code in (200, 502), answer.text
        assert "quota_exceeded" not in answer.text
        assert '"error"' in answer.text
        project.settled(number=number + 1)
    assert held(project) == 0
    assert ask(project, output_tokens=5).text.endswith("data: [DONE]\n\n")
    *failed, completed = project.settled(number=7)
    assert {row["outcome"] for row in failed} == {"upstream_error"}
    assert {row["output_tokens"] for row in failed} == {0}
    assert (completed["outcome"], completed["output_tokens"]) == ("completed", 5)


@pytest.mark.parametrize("strict", ["a-first", "z-last"])
def test_strict_and_loose_budget_together(stack: Stack, strict: str) -> None:
    """The loose one shadowed the strict one, by the order of their names. In breadth: test_store_holds_breadth."""
    project = stack.project(limit_usd="1000")
    budget(project, strict, "  {scope: {project: app}, per: [user], limit: {tokens: 120}, window: {period: Day}}")
    text = ask(project, output_tokens=500).text
    *_, terminal, done, _ = text.split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(terminal[6:])["error"]["details"]["budget"] == f"{project.namespace}/{strict}"
    (row,) = project.settled()
    assert row["input_tokens"] + row["output_tokens"] <= 120
    rows = project.budgets(project.mint())
    assert rows[strict]["spent"] == str(row["input_tokens"] + row["output_tokens"])
    assert float(rows["sessions"]["spent"]) * 10**12 == pytest.approx(row["amount_pico"])


def test_provider_id_reused(stack: Stack) -> None:
    """The provider gave one id twice, and the second charge was dropped as a duplicate. Ids in the books are ours."""
    project = stack.project()
    texts = [ask(project, recording="text-usage-in-own-chunk").text for _ in range(3)]
    ids = {json.loads(line[6:])["id"] for text in texts for line in text.splitlines() if line.startswith("data: {")}
    assert len(ids) == 1
    rows = project.settled(number=3)
    assert len({row["request_id"] for row in rows}) == 3
    assert {(row["input_tokens"], row["output_tokens"]) for row in rows} == {(9, 4)}
    spent = project.budgets(project.mint())["sessions"]["spent"]
    assert round(float(spent) * 10**12) == sum(row["amount_pico"] for row in rows)


def test_client_retry_after_success(stack: Stack) -> None:
    """A client that asks again is answered again: each answer has an id of its own and is charged once, under it."""
    project = stack.project()
    answers = [ask(project, stream=False, output_tokens=5, seed=1) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    rows = project.settled(number=2)
    assert {row["request_id"] for row in rows} == {answer.headers["x-request-id"] for answer in answers}
    assert rows[0]["amount_pico"] == rows[1]["amount_pico"] > 0
    assert len({answer.headers["x-request-id"] for answer in answers}) == 2
    assert held(project) == 0


def test_unknown_result_of_a_timed_out_write(database: str) -> None:
    """It was taken for failed, and counted again or never. With a locked database: test_end_to_end_stopping."""
    calls: list[str] = []

    async def work(books: Books) -> None:
        await books.budget("money", 1000)

        # A settlement that was written, and whose answer was lost: it comes again and moves nothing.
        async def settle(items: Sequence[Settlement]) -> list[Settled]:
            results = await holds.settle(books.connection, items)
            calls.append(results[0].result)
            if len(calls) < 3:
                raise LedgerUnavailableError("no answer in time")
            return results

        told: list[UUID] = []
        writer = SettlementWriter(settle, on_settled=lambda settled: told.append(settled.request_id))
        writer.start()
        one, _ = await books.admit(need=50)
        writer.submit(settlement(one, output=30))
        assert await writer.flush(30)
        assert (calls, told) == (["settled", "already", "already"], [one])
        assert await books.balances("money") == (300, 0, 0, 0)

        # An admission that was written, and whose answer was lost: it is voided, and nothing stays held.
        lost: Admission = admission(need=50)
        granted(await holds.admit(books.connection, lost))
        writer.submit(settlement(lost.request_id, sent=False))
        assert await writer.flush(30)
        assert await books.balances("money") == (300, 0, 0, 0)

        # And one that comes only after its void holds nothing either.
        overtaken = admission(need=50)
        writer.submit(settlement(overtaken.request_id, sent=False))
        assert await writer.flush(30)
        await holds.admit(books.connection, overtaken)
        assert await books.balances("money") == (300, 0, 0, 0)
        await writer.aclose()

    keep_books(database, work)


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
def test_close_right_after_done(stack: Stack, http2: bool) -> None:
    """Every OpenAI SDK stops reading there; it was taken for a cancel, and the usage was lost."""
    project = stack.project()

    async def scenario() -> None:
        for _ in range(10):
            async with (
                httpx.AsyncClient(base_url=stack.base_url, http1=not http2, http2=http2, timeout=30) as client,
                client.stream(
                    "POST",
                    "/v1/chat/completions",
                    headers={"Authorization": f"Bearer {project.mint()}"},
                    json={**BODY, "stream": True, "sim": {"output_tokens": 6, "chunk_interval_ms": 1}},
                ) as answer,
            ):
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        break

    asyncio.run(scenario())
    rows = project.settled(number=10)
    assert {(row["outcome"], row["source"], row["output_tokens"]) for row in rows} == {("completed", "provider", 6)}
    wait_until(lambda: held(project) == 0, what="the release")
