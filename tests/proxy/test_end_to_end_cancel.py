"""A client that leaves stops the provider, whenever it leaves, and pays what the charging table says."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from behest_ledger.store.pool import connect
from stack import Project, Stack, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
PROMPT_TOKENS = 12
WAITS = """
SELECT FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%ledger.admit_%'
"""
"""The admissions that wait for a lock."""


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project()


@pytest.fixture(params=["HTTP/1.1", "HTTP/2"])
def http(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"http1": request.param == "HTTP/1.1", "http2": request.param == "HTTP/2"}


async def _leave_after(
    project: Project,
    http: dict[str, Any],
    *,
    chunks: int | None = None,
    when: Callable[[], Any] = lambda: False,
    **body: Any,
) -> str:
    """Begin a call, leave after so many chunks or when something is so, and return the request id.

    It is empty where the client left before the head of the answer came.
    """
    request_id, token = "", project.mint()
    async with httpx.AsyncClient(base_url=project.stack.base_url, **http) as client:

        async def read() -> None:
            nonlocal request_id
            async with client.stream(
                "POST",
                "/v1/chat/completions",
                headers={"Authorization": f"Bearer {token}"},
                json={"model": "gpt-4o-mini", "messages": QUESTION, **body},
                timeout=30,
            ) as answer:
                request_id = answer.headers["x-request-id"]
                seen = 0
                async for line in answer.aiter_lines():
                    if line.startswith("data: ") and (seen := seen + 1) == chunks:
                        return

        reading = asyncio.create_task(read())
        if chunks is None:
            await asyncio.to_thread(wait_until, when, what="the moment to leave")
            assert not reading.done()
            reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
    return request_id


def _at_the_provider(project: Project, *, tokens: int = 0) -> Callable[[], bool]:
    """Whether the next call is with the provider, which has said so many tokens of its answer."""
    before = [seen["id"] for seen in project.stack.sim_requests(last=1)]

    def is_so() -> bool:
        for seen in project.stack.sim_requests(last=1):
            is_new = seen["id"] not in before
            return is_new and seen["outcome"] == "open" and seen["output_tokens_sent"] >= tokens
        return False

    return is_so


def _provider_sees_the_cancel(project: Project, request_id: str) -> dict[str, Any]:
    found: dict[str, Any] = wait_until(
        lambda: (seen := project.stack.sim_request(request_id)) and seen["outcome"] == "cancelled" and seen,
        what="the provider's seeing the cancel",
    )
    return found


def _last(project: Project, before: int) -> dict[str, Any]:
    return project.settled(number=before + 1)[-1]


def _count(project: Project) -> int:
    return len(project.stack.query("SELECT 1 FROM ledger.request WHERE project_id = $1", project.project_id))


def test_leaving_between_chunks_pays_the_input_and_what_was_forwarded(project: Project, http: dict[str, Any]) -> None:
    before = _count(project)
    request_id = asyncio.run(
        _leave_after(project, http, chunks=20, stream=True, sim={"output_tokens": 10_000, "chunk_interval_ms": 5})
    )
    seen = _provider_sees_the_cancel(project, request_id)
    row = _last(project, before)
    assert (row["outcome"], row["source"], row["input_tokens"]) == ("client_cancelled", "local", PROMPT_TOKENS)
    # The first chunk names the role: 19 with text were read. What is in flight when the client leaves is paid too.
    assert 19 <= row["output_tokens"] <= seen["output_tokens_sent"] < 1000
    assert row["amount_pico"] == PROMPT_TOKENS * 150_000 + row["output_tokens"] * 600_000


def test_leaving_before_the_first_byte_pays_the_input(project: Project, http: dict[str, Any]) -> None:
    before = _count(project)
    when = _at_the_provider(project)
    asyncio.run(_leave_after(project, http, when=when, stream=True, sim={"head_delay_ms": 60_000}))
    row = _last(project, before)
    assert (row["outcome"], row["source"]) == ("client_cancelled", "local")
    assert (row["input_tokens"], row["output_tokens"]) == (PROMPT_TOKENS, 0)
    _provider_sees_the_cancel(project, row["request_id"])


def test_leaving_a_call_that_does_not_stream_stops_the_provider_too(project: Project, http: dict[str, Any]) -> None:
    before = _count(project)
    when = _at_the_provider(project, tokens=20)
    asyncio.run(_leave_after(project, http, when=when, sim={"output_tokens": 4000, "chunk_interval_ms": 10}))
    row = _last(project, before)
    assert (row["outcome"], row["source"]) == ("client_cancelled", "local")
    assert 0 < row["output_tokens"] < 1000
    _provider_sees_the_cancel(project, row["request_id"])


def test_leaving_while_the_ledger_is_asked_costs_nothing_and_never_reaches_the_provider(
    stack: Stack, http: dict[str, Any]
) -> None:
    project = stack.project()
    asyncio.run(_leave_after(project, http, chunks=1, stream=True, sim={"output_tokens": 1}))
    project.settled()
    seen_before = len(stack.sim_requests())

    async def scenario() -> None:
        connection = await connect(stack.dsn)
        try:
            async with connection.transaction():
                # The admission waits for this lock; the client leaves meanwhile.
                await connection.execute(
                    "SELECT 1 FROM ledger.budget_window WHERE tenant_id = $1 FOR UPDATE", project.namespace
                )
                await _leave_after(project, http, when=lambda: stack.query(WAITS), stream=True)
        finally:
            await connection.close()

    asyncio.run(scenario())
    row = project.settled(number=2)[-1]
    assert (row["outcome"], row["source"], row["amount_pico"]) == ("client_cancelled", "none", 0)
    assert row["facts"]["requests"] == 0
    assert len(stack.sim_requests()) == seen_before
    assert project.budgets(project.mint())["sessions"]["held"] == "0"


def test_leaving_after_the_last_finish_reason_is_a_success(project: Project, http: dict[str, Any]) -> None:
    before = _count(project)

    async def scenario() -> None:
        async with (
            httpx.AsyncClient(base_url=project.stack.base_url, **http) as client,
            client.stream(
                "POST",
                "/v1/chat/completions",
                headers={"Authorization": f"Bearer {project.mint()}"},
                # Usage comes 300 ms after the finish: one chunk's interval.
                json={
                    "model": "gpt-4o-mini",
                    "messages": QUESTION,
                    "stream": True,
                    "sim": {"output_tokens": 3, "chunk_interval_ms": 150},
                },
            ) as answer,
        ):
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["finish_reason"]:
                    return

    asyncio.run(scenario())
    row = _last(project, before)
    assert (row["outcome"], row["source"], row["output_tokens"]) == ("completed", "provider", 3)


def test_two_hundred_clients_that_leave_are_each_settled_once(stack: Stack, http: dict[str, Any]) -> None:
    project = stack.project()
    token = project.mint()

    async def scenario() -> None:
        async with httpx.AsyncClient(
            base_url=stack.base_url, limits=httpx.Limits(max_connections=200), timeout=30, **http
        ) as client:

            async def one(number: int) -> None:
                async with client.stream(
                    "POST",
                    "/v1/chat/completions",
                    headers={"Authorization": f"Bearer {token}"},
                    json={
                        "messages": QUESTION,
                        "stream": True,
                        "sim": {"output_tokens": 10_000, "chunk_interval_ms": 20},
                    },
                ) as answer:
                    seen = 0
                    async for _ in answer.aiter_lines():
                        seen += 1
                        if seen > number % 17:
                            return

            await asyncio.gather(*(one(number) for number in range(200)))

    asyncio.run(scenario())
    rows = project.settled(number=200)
    assert len(rows) == 200
    assert {row["outcome"] for row in rows} == {"client_cancelled"}
    ids = {row["request_id"] for row in rows}

    def all_cancelled() -> bool:
        mine = [seen for seen in stack.sim_requests() if seen["id"] in ids]
        return len(mine) == 200 and {seen["outcome"] for seen in mine} == {"cancelled"}

    wait_until(all_cancelled, what="the provider's seeing all cancels")
    assert stack.verify().findings == []
