"""Limits that change while streams run: raised, lowered, suspended; and how many streams may run at once."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from behest_ledger.store.configuration import apply_text
from behest_ledger.store.pool import connect
from stack import Project, Stack, within_one

TIMEOUT = httpx.Timeout(30)


class Stream:
    """One live answer, read as it comes."""

    def __init__(self) -> None:
        self.chunks = 0
        self.last_chunk_s = 0.0
        self.error: dict[str, Any] = {}
        self.over = False

    async def read(self, response: httpx.Response) -> None:
        async for line in response.aiter_lines():
            payload = line.removeprefix("data: ")
            if not line or payload == "[DONE]":
                self.over |= payload == "[DONE]"
                continue
            event = json.loads(payload)
            if "error" in event:
                self.error = event["error"]
            else:
                self.chunks += 1
                self.last_chunk_s = time.monotonic()

    @property
    def code(self) -> str:
        return str(self.error.get("code", "completed" if self.over else "broken"))


async def until(is_so: Callable[[], Any], what: str) -> None:
    """Wait for something to be true. It is looked at once each time, for a look may be a request."""
    deadline_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.01)


@asynccontextmanager
async def streaming(
    project: Project, sim: dict[str, Any], *, base_url: str = "", token: str = ""
) -> AsyncGenerator[tuple[Stream, "asyncio.Task[None]"]]:
    """A stream that has begun, and the task that reads it; the client leaves at the end of the block."""
    stream = Stream()
    async with (
        httpx.AsyncClient(timeout=TIMEOUT) as client,
        client.stream(
            "POST",
            (base_url or project.stack.base_url) + "/v1/chat/completions",
            headers={"Authorization": f"Bearer {token or project.mint()}"},
            json={"stream": True, "messages": [{"role": "user", "content": "Tell me a story."}], "sim": sim},
        ) as response,
    ):
        assert response.status_code == 200, await response.aread()
        task = asyncio.create_task(stream.read(response))
        try:
            await until(lambda: stream.chunks or task.done(), "the stream's begin")
            yield stream, task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def asked(project: Project, *, token: str = "", tokens: int = 3) -> httpx.Response:
    """One answer as a whole."""
    return httpx.post(
        project.stack.base_url + "/v1/chat/completions",
        headers={"Authorization": f"Bearer {token or project.mint()}"},
        json={"messages": [{"role": "user", "content": "Hi"}], "sim": {"output_tokens": tokens}, "max_tokens": tokens},
        timeout=TIMEOUT,
    )


def sessions(project: Project, limit_usd: str, more: str = "") -> str:
    """The project's own budget with another limit."""
    return f"""
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: sessions, namespace: {project.namespace}}}
spec:
  scope: {{project: app}}
  per: [session]
  limit: {{amount: "{limit_usd}", currency: USD}}
  window: {{period: Day}}
{more}
"""


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(90):
            await scenario()

    asyncio.run(main())


def test_a_limit_that_is_raised_lets_a_stream_go_on_that_would_have_been_cut(stack: Stack) -> None:
    project = stack.project(limit_usd="0.0006")  # the worth of 1,000 output tokens

    async def scenario() -> None:
        sim = {"output_tokens": 1400, "tokens_per_chunk": 4, "chunk_interval_ms": 12}  # the first 1,000 take 3 s
        async with streaming(project, sim) as (stream, task):
            assert stream.chunks < 200
            await apply_text(stack.dsn, sessions(project, "1"))
            await task
            assert stream.code == "completed"

    play(scenario)
    (row,) = project.settled()
    assert (row["outcome"], row["output_tokens"]) == ("completed", 1400)
    assert stack.verify().findings == []


def test_a_limit_that_is_raised_reaches_a_stream_that_stands_in_line(stack: Stack) -> None:
    """In line behind one that left: what that one gives back cannot come, because somebody has its hold locked."""
    project = stack.project(limit_usd="0.0006")

    async def scenario() -> None:
        connection = await connect(stack.dsn)
        try:
            async with AsyncExitStack() as first_client, connection.transaction():
                sim = {"output_tokens": 5000, "chunk_interval_ms": 1000}
                await first_client.enter_async_context(streaming(project, sim))
                locked = await connection.fetch(
                    "SELECT request_id FROM ledger.hold WHERE tenant_id = $1 AND state = 'open' FOR UPDATE",
                    project.namespace,
                )
                assert len(locked) == 1
                sim = {"output_tokens": 2000, "tokens_per_chunk": 10, "chunk_interval_ms": 1}
                async with streaming(project, sim) as (second, task):
                    await first_client.aclose()
                    seen = -1
                    while seen != second.chunks and not task.done():  # until it stands still
                        seen = second.chunks
                        await asyncio.sleep(0.4)
                    assert not task.done(), second.error
                    assert second.chunks < 150
                    await apply_text(stack.dsn, sessions(project, "1"))
                    await task
                    assert second.code == "completed"
        finally:
            await connection.close()

    play(scenario)
    rows = project.settled(number=2)
    assert [row["outcome"] for row in rows] in (["completed", "client_cancelled"], ["client_cancelled", "completed"])


def test_a_limit_that_is_lowered_ends_live_streams_admits_nobody_and_lets_the_balance_only_fall(stack: Stack) -> None:
    project = stack.project(limit_usd="1")
    balances: list[int] = []

    async def scenario() -> None:
        sim = {"output_tokens": 50_000, "tokens_per_chunk": 5, "chunk_interval_ms": 10}
        connection = await connect(stack.dsn)
        try:
            async with AsyncExitStack() as clients:
                live = [await clients.enter_async_context(streaming(project, sim)) for _ in range(5)]
                await apply_text(stack.dsn, sessions(project, "0.0000001"))
                refused = await asyncio.to_thread(asked, project)
                assert (refused.status_code, refused.json()["error"]["code"]) == (402, "quota_exceeded")
                assert refused.json()["error"]["details"]["remaining"] == "0"
                reading = asyncio.gather(*(task for _, task in live))
                while not reading.done():
                    balances.append(
                        await connection.fetchval(
                            "SELECT (spent + held + suspense)::bigint FROM ledger.budget_window WHERE tenant_id = $1",
                            project.namespace,
                        )
                    )
                    await asyncio.sleep(0.02)
                assert {stream.code for stream, _ in live} == {"quota_exceeded"}
                assert {stream.error["details"]["limit"] for stream, _ in live} == {"0.0000001"}
        finally:
            await connection.close()

    play(scenario)
    assert balances == sorted(balances, reverse=True)
    assert {row["outcome"] for row in project.settled(number=5)} == {"quota_exceeded"}
    (window,) = stack.query(
        "SELECT spent, held, overrun, ceiling FROM ledger.budget_window WHERE tenant_id = $1", project.namespace
    )
    assert (window["held"], window["overrun"]) == (0, 0)
    assert window["ceiling"] == window["spent"] < 10**12
    assert asked(project).status_code == 402
    assert stack.verify().findings == []


@pytest.mark.parametrize("what", ["project", "budget"])
def test_the_kill_switch_ends_live_streams_in_every_sidecar_within_a_second(stack: Stack, what: str) -> None:
    project = stack.project()
    suspended = {
        "project": f"""
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: app, namespace: {project.namespace}}}
spec: {{tenant: {project.namespace}, defaultModel: gpt-4o-mini, suspended: true}}
""",
        "budget": sessions(project, "1000", more="  suspended: true"),
    }[what]
    token = project.mint()
    later_s: list[float] = []

    async def scenario() -> None:
        sim = {"output_tokens": 50_000, "chunk_interval_ms": 10}
        with stack.another_sidecar() as other:
            async with AsyncExitStack() as clients:
                live = [
                    await clients.enter_async_context(streaming(project, sim, base_url=base_url, token=token))
                    for base_url in (stack.base_url, other) * 3
                ]
                await apply_text(stack.dsn, suspended)
                switched_s = time.monotonic()
                await asyncio.gather(*(task for _, task in live))
                later_s.extend(stream.last_chunk_s - switched_s for stream, _ in live)
                assert {stream.code for stream, _ in live} == {"forbidden"}
                assert {stream.error["details"]["what"] for stream, _ in live} == {what}

    play(scenario)
    # Half a second until it is polled. Here with room for a busy machine.
    assert max(later_s) < 3.0, f"the last chunk came {max(later_s):.2f} s after the switch"
    assert {row["outcome"] for row in project.settled(number=6)} == {"killed"}
    assert asked(project, token=token).status_code == 403


TIER = """
apiVersion: behest.ai/v1alpha1
kind: Tier
metadata: {{name: free, namespace: {namespace}}}
spec: {{number: 1, {rates}}}
"""


def test_a_tier_limits_how_many_requests_of_a_user_run_at_once(stack: Stack) -> None:
    project = stack.project(project="  defaultTier: free")
    stack.apply(TIER.format(namespace=project.namespace, rates="concurrency: 2"))
    name = f"{project.namespace}/tier:free:concurrency"

    async def scenario() -> None:
        sim = {"output_tokens": 50_000, "chunk_interval_ms": 20}
        async with streaming(project, sim), AsyncExitStack() as second:
            await second.enter_async_context(streaming(project, sim, token=project.mint(session="s2")))
            refused = await asyncio.to_thread(asked, project)
            assert refused.status_code == 429
            assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("1", "false")
            error = refused.json()["error"]
            assert error["code"] == "rate_limited"
            assert (error["details"].pop("scope"), error["details"]) == (
                {"namespace": project.namespace, "tier": "free"},
                {
                    "budget": name, "unit": "concurrency", "limit": "2", "spent": "0", "held": "2", "remaining": "0",
                    "resets_at": None,
                },
            )  # fmt: skip
            row = project.budgets(project.mint())["tier:free:concurrency"]
            assert (row["held"], row["phase"], row["resets_at"]) == ("2", "Exhausted", None)
            other_user = await asyncio.to_thread(asked, project, token=project.mint(user="u2"))
            assert other_user.status_code == 200
            await second.aclose()
            await until(lambda: asked(project).status_code == 200, "the place of the one that left")

    play(scenario)
    assert stack.verify().findings == []


def test_who_asks_again_right_after_an_answer_is_not_refused_for_what_that_one_held(stack: Stack) -> None:
    project = stack.project(project="  defaultTier: free")
    stack.apply(TIER.format(namespace=project.namespace, rates="concurrency: 1"))
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "sim": {"output_tokens": 1}}
    headers = {"Authorization": f"Bearer {project.mint()}"}
    with httpx.Client(base_url=stack.base_url, headers=headers, timeout=30) as client:
        statuses = [client.post("/v1/chat/completions", json=body).status_code for _ in range(50)]
    assert statuses == [200] * 50


BUDGET = """
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: it, namespace: {namespace}}}
spec: {{scope: {{project: app}}, per: [user], limit: {limit}, window: {window}}}
"""
DAY = "{period: Day, timeZone: Asia/Kathmandu}"

# What is applied, the refusal's status and code, and its details after three requests of 8 tokens in and 3 out.
REFUSALS = [
    (
        BUDGET.replace("{limit}", '{{amount: "0.000010", currency: USD}}').replace("{window}", "{{period: Lifetime}}"),
        402, "quota_exceeded", ("it", "usd", "0.00001", "0.000009", "0.000001", False),
    ),
    (
        BUDGET.replace("{limit}", "{{tokens: 34}}").replace("{window}", f"{{{DAY}}}"),
        402, "quota_exceeded", ("it", "tokens", "34", "33", "1", True),
    ),
    (
        BUDGET.replace("{limit}", "{{tokens: 26, tokenKind: Input}}").replace("{window}", f"{{{DAY}}}"),
        402, "quota_exceeded", ("it", "tokens", "26", "24", "2", True),
    ),
    (
        BUDGET.replace("{limit}", "{{tokens: 9, tokenKind: Output}}").replace("{window}", f"{{{DAY}}}"),
        402, "quota_exceeded", ("it", "tokens", "9", "9", "0", True),
    ),
    (
        BUDGET.replace("{limit}", "{{requests: 3}}").replace("{window}", f"{{{DAY}}}"),
        402, "quota_exceeded", ("it", "requests", "3", "3", "0", True),
    ),
    (
        TIER.replace("{rates}", "requestsPerMinute: 3"),
        429, "rate_limited", ("tier:free:requests-per-minute", "requests", "3", "3", "0", True),
    ),
    (
        TIER.replace("{rates}", "requestsPerDay: 3"),
        429, "rate_limited", ("tier:free:requests-per-day", "requests", "3", "3", "0", True),
    ),
    (
        TIER.replace("{rates}", "tokensPerDay: 34"),
        402, "quota_exceeded", ("tier:free:tokens-per-day", "tokens", "34", "33", "1", True),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "status", "code", "told"), REFUSALS, ids=[f"{told[0]}-{told[2]}" for *_, told in REFUSALS]
)
def test_a_refusal_says_in_any_unit_how_its_budget_stands(
    stack: Stack, text: str, status: int, code: str, told: tuple[str, str, str, str, str, bool]
) -> None:
    project = stack.project(project="  defaultTier: free")
    stack.apply(text.format(namespace=project.namespace))
    token = project.mint()
    # Minutes, and days of any zone: everywhere they begin with a quarter of an hour.
    within_one(60 if "Minute" in text else 900, takes_s=15)
    for number in range(3):
        assert asked(project, token=token).status_code == 200
        project.settled(number=number + 1)
    answer = asked(project, token=token)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    details = error["details"]
    budget, unit, limit, spent, remaining, resets = told
    assert details["budget"] == f"{project.namespace}/{budget}"
    assert (details["unit"], details["limit"], details["spent"], details["held"], details["remaining"]) == (
        unit, limit, spent, "0", remaining,
    )  # fmt: skip
    assert details["scope"]["namespace"] == project.namespace
    assert (details["resets_at"] is not None) == resets
    if status == 429:
        # Within a minute a client may come back by itself; tomorrow is for people to know.
        seconds = int(answer.headers["retry-after"])
        assert 1 <= seconds <= 86_400
        assert answer.headers.get("x-should-retry", "true") == ("true" if seconds <= 60 else "false")
    else:
        assert answer.headers["x-should-retry"] == "false"


def test_a_soft_budget_stops_nobody_and_shows_by_how_much_it_was_passed(stack: Stack) -> None:
    project = stack.project()
    stack.apply(
        BUDGET.replace("window: {window}", "window: {{period: Day}}, enforcement: Soft, alertThresholds: [50]")
        .replace("{limit}", "{{tokens: 100}}")
        .format(namespace=project.namespace)
    )
    token = project.mint()
    phases = list[tuple[str, str, str]]()
    for number in range(3):
        assert asked(project, token=token, tokens=30).status_code == 200
        project.settled(number=number + 1)
        row = project.budgets(token)["it"]
        assert row["enforcement"] == "soft"
        phases.append((row["spent"], row["remaining"], row["phase"]))
    assert phases == [("38", "62", "Active"), ("76", "24", "Warning"), ("114", "-14", "Warning")]
    assert stack.verify().findings == []
