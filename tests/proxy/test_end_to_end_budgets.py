"""A budget is a true ceiling: many streams of one session, cut in the middle, with the books as witness."""

import asyncio
import json
from collections import Counter
from typing import Any

import httpx
import openai
import pytest

from stack import Project, Stack

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
OUTPUT_PICO = 600_000
"""gpt-4o-mini: 0.60 USD per million output tokens."""


def _window(project: Project) -> tuple[int, int, int, int]:
    (row,) = project.stack.query(
        "SELECT limit_amount::text, spent::text, held::text, overrun::text"
        " FROM ledger.budget_window WHERE tenant_id = $1",
        project.namespace,
    )
    return int(row["limit_amount"]), int(row["spent"]), int(row["held"]), int(row["overrun"])


async def _until_cut(
    client: openai.AsyncOpenAI, sim: dict[str, Any], *, begun: asyncio.Event | None = None
) -> tuple[str, int, dict[str, Any]]:
    """Read one stream to its end: the error's code, the chunks with text before it, and the error's members.

    `begun` is set at its first text.
    """
    chunks = 0
    try:
        stream = await client.chat.completions.create(
            model="gpt-4o-mini", messages=QUESTION, stream=True, extra_body={"sim": sim}
        )
        async for chunk in stream:
            chunks += bool(chunk.choices and chunk.choices[0].delta.content)
            if chunks and begun is not None:
                begun.set()
    except openai.APIStatusError as error:
        return f"{error.status_code} {error.code}", chunks, error.body if isinstance(error.body, dict) else {}
    except openai.APIError as error:
        return f"in the stream {error.code}", chunks, error.body if isinstance(error.body, dict) else {}
    return "completed", chunks, {}


def _stream_until_cut(project: Project, streams: int, sim: dict[str, Any]) -> list[tuple[str, int, dict[str, Any]]]:
    async def scenario() -> list[tuple[str, int, dict[str, Any]]]:
        async with openai.AsyncOpenAI(
            base_url=project.stack.base_url + "/v1", api_key=project.mint(), max_retries=0
        ) as client:
            return await asyncio.gather(*(_until_cut(client, sim) for _ in range(streams)))

    return asyncio.run(scenario())


@pytest.mark.parametrize("tokens_per_chunk", [1, 7])
def test_a_hundred_streams_of_one_session_are_cut_in_the_middle_and_leave_next_to_nothing(
    stack: Stack, tokens_per_chunk: int
) -> None:
    project = stack.project(limit_usd="0.006")  # the worth of 10,000 output tokens
    ends = _stream_until_cut(
        project, 100, {"output_tokens": 100_000, "tokens_per_chunk": tokens_per_chunk, "chunk_interval_ms": 2}
    )

    assert Counter(end[0] for end in ends) == {"in the stream quota_exceeded": 100}
    error = ends[0][2]
    assert error["status"] == 402
    assert error["type"] == "insufficient_quota"
    assert set(error["details"]) >= {"budget", "scope", "limit", "spent", "held", "remaining", "resets_at"}

    rows = project.settled(number=100)
    assert {row["outcome"] for row in rows} == {"quota_exceeded"}
    limit, spent, held, overrun = _window(project)
    assert held == 0
    assert overrun == 0
    assert spent <= limit
    assert spent >= limit * 95 // 100, f"only {100 * spent / limit:.1f} % were spent"
    # Nobody paid for a token that was not forwarded, and nothing was forwarded unpaid.
    assert sum(row["output_tokens"] for row in rows) == sum(end[1] for end in ends) * tokens_per_chunk
    assert stack.verify().findings == []

    # Where nothing at all is left the next request is refused outright; a rest too small to begin with is refused too.
    ((code, chunks, refusal),) = _stream_until_cut(project, 1, {"output_tokens": 100})
    assert (code, chunks) == ("402 quota_exceeded", 0)
    assert refusal["details"]["budget"].endswith("/sessions")


def test_replayed_recordings_exhaust_a_budget_without_passing_it(stack: Stack) -> None:
    project = stack.project(limit_usd="0.01")
    names = [
        "text-without-usage",
        "text-usage-in-own-chunk",
        "parallel-tool-calls",
        "usage-three-times",
        "two-choices",
        "usage-cumulative-crlf-no-done",
        "comments-between",
    ]

    async def scenario() -> Counter[str]:
        ends: Counter[str] = Counter()
        async with openai.AsyncOpenAI(base_url=stack.base_url + "/v1", api_key=project.mint(), max_retries=0) as client:

            async def goes_on(worker: int, turn: int) -> bool:
                sim = {
                    "recording": names[(worker + turn) % len(names)],
                    "chunk_split": 23 + worker % 40,
                    "chunk_split_random": True,
                    "seed": worker * 1000 + turn,
                }
                code, _, _ = await _until_cut(client, sim)
                ends[code] += 1
                return not code.startswith("402")

            async def one(worker: int) -> None:
                for turn in range(400):
                    if not await goes_on(worker, turn):
                        return

            await asyncio.gather(*(one(worker) for worker in range(100)))
            # What others held at that moment and did not need is left: one more takes it.
            for turn in range(400):
                await asyncio.to_thread(project.all_settled)
                if not await goes_on(100, turn):
                    return ends
        raise AssertionError("it goes on for ever")

    ends = asyncio.run(scenario())
    assert ends["completed"] > 0
    assert ends["402 quota_exceeded"] == 101
    assert set(ends) <= {"completed", "402 quota_exceeded", "in the stream quota_exceeded"}
    assert len(project.all_settled()) == ends.total() - 101
    limit, spent, held, overrun = _window(project)
    assert (held, overrun) == (0, 0)
    assert limit * 95 // 100 <= spent <= limit
    assert stack.verify().findings == []


def test_the_terminal_event_is_followed_by_done_and_nothing_else(stack: Stack) -> None:
    project = stack.project(limit_usd="0.00003")
    answer = httpx.post(
        stack.base_url + "/v1/chat/completions",
        headers={"Authorization": f"Bearer {project.mint()}"},
        json={"model": "gpt-4o-mini", "stream": True, "messages": QUESTION, "sim": {"output_tokens": 1000}},
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream"
    *_, terminal, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    event = json.loads(terminal.removeprefix("data: "))
    assert event["choices"] == []
    assert event["error"]["code"] == "quota_exceeded"
    assert event["error"]["details"]["limit"] == "0.00003"


def test_a_call_that_does_not_stream_is_told_that_its_budget_ended_it(stack: Stack) -> None:
    project = stack.project(limit_usd="0.0001")
    answer = httpx.post(
        stack.base_url + "/v1/chat/completions",
        headers={"Authorization": f"Bearer {project.mint()}"},
        json={"model": "gpt-4o-mini", "messages": QUESTION, "max_tokens": 5000, "sim": {"output_tokens": 5000}},
    )
    assert answer.status_code == 402
    error = answer.json()["error"]
    assert error["code"] == "quota_exceeded"
    assert error["details"]["partial"]["choices"][0]["message"]["content"]
    (row,) = project.settled()
    assert (row["outcome"], row["source"]) == ("quota_exceeded", "provider")
    assert row["output_tokens"] > 10


def test_several_budgets_bind_together_and_the_strict_one_wins(stack: Stack) -> None:
    project = stack.project(limit_usd="1000")
    stack.apply(f"""
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: tokens, namespace: {project.namespace}}}
spec:
  scope: {{project: app}}
  limit: {{tokens: 200}}
  window: {{period: Day}}
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: requests, namespace: {project.namespace}}}
spec:
  scope: {{project: app}}
  per: [user]
  limit: {{requests: 3}}
  window: {{period: Day}}
""")
    ((code, chunks, error),) = _stream_until_cut(project, 1, {"output_tokens": 1000})
    assert (code, error["details"]["budget"]) == ("in the stream quota_exceeded", f"{project.namespace}/tokens")
    (row,) = project.settled()
    assert row["output_tokens"] == chunks
    assert row["input_tokens"] + row["output_tokens"] <= 200
    budgets = project.budgets(project.mint())
    assert budgets["requests"]["spent"] == "1"
    assert budgets["requests"]["remaining"] == "2"


def test_a_rate_of_requests_is_refused_with_402_for_a_budget_resource(stack: Stack) -> None:
    project = stack.project()
    stack.apply(f"""
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: requests, namespace: {project.namespace}}}
spec:
  scope: {{project: app}}
  limit: {{requests: 2}}
  window: {{period: Day}}
""")
    codes = [_stream_until_cut(project, 1, {"output_tokens": 3})[0][0] for _ in range(3)]
    assert codes == ["completed", "completed", "402 quota_exceeded"]


def test_a_raised_limit_lets_the_session_go_on(stack: Stack) -> None:
    project = stack.project(limit_usd="0.00003")
    assert _stream_until_cut(project, 1, {"output_tokens": 1000})[0][0] == "in the stream quota_exceeded"
    stack.apply(f"""
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: sessions, namespace: {project.namespace}}}
spec:
  scope: {{project: app}}
  per: [session]
  limit: {{amount: "1", currency: USD}}
  window: {{period: Day}}
""")
    assert _stream_until_cut(project, 1, {"output_tokens": 1000})[0][0] == "completed"
    assert stack.verify().findings == []


@pytest.mark.parametrize("what", ["project", "budget"])
def test_what_is_suspended_ends_its_live_streams_and_refuses_new_ones(stack: Stack, what: str) -> None:
    project = stack.project()
    suspended = {
        "project": f"""
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: app, namespace: {project.namespace}}}
spec: {{tenant: {project.namespace}, defaultModel: gpt-4o-mini, suspended: true}}
""",
        "budget": f"""
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: sessions, namespace: {project.namespace}}}
spec:
  scope: {{project: app}}
  per: [session]
  limit: {{amount: "1000", currency: USD}}
  window: {{period: Day}}
  suspended: true
""",
    }[what]

    async def scenario() -> tuple[str, int, dict[str, Any]]:
        async with openai.AsyncOpenAI(base_url=stack.base_url + "/v1", api_key=project.mint(), max_retries=0) as client:
            begun = asyncio.Event()
            sim = {"output_tokens": 10_000, "chunk_interval_ms": 10}
            live = asyncio.create_task(_until_cut(client, sim, begun=begun))
            await asyncio.wait_for(begun.wait(), 30)
            await asyncio.to_thread(stack.apply, suspended)
            return await asyncio.wait_for(live, 30)

    code, chunks, error = asyncio.run(scenario())
    assert code == "in the stream forbidden"
    assert chunks > 0
    assert (error["details"]["reason"], error["details"]["what"]) == ("suspended", what)
    assert project.settled()[0]["outcome"] == "killed"
    assert _stream_until_cut(project, 1, {})[0][0] == "403 forbidden"
