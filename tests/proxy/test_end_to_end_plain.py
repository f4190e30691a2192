"""Upstreams that cannot stream: a plain call, held in the worst case, for clients of both kinds."""

import asyncio
import contextlib
from typing import Any

import httpx
import openai
import pytest

from stack import Project, Stack, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
UPSTREAM = "  capabilities: {streams: false}"
PROMPT_TOKENS = 12


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project(upstream=UPSTREAM)


def client_of(project: Project) -> openai.OpenAI:
    return openai.OpenAI(base_url=project.stack.base_url + "/v1", api_key=project.mint(), max_retries=0)


def test_a_client_that_asks_for_a_stream_gets_one(project: Project) -> None:
    with client_of(project) as client:
        chunks = list(
            client.chat.completions.create(
                model="gpt-4o-mini",
                messages=QUESTION,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"sim": {"output_tokens": 20}},
            )
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None, "stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    row = project.settled()[-1]
    assert (row["outcome"], row["source"], row["output_tokens"]) == ("completed", "provider", 20)
    seen = wait_until(lambda: project.stack.sim_request(row["request_id"]), what="the call")
    assert seen["body"]["stream"] is False
    assert "stream_options" not in seen["body"]
    # What the client can decode is not what we can.
    headers = {name.lower(): value for name, value in seen["headers"].items()}
    assert headers["accept-encoding"] == "identity"


def test_a_client_that_asks_for_the_whole_gets_it(project: Project) -> None:
    with client_of(project) as client:
        answer = client.chat.completions.create(
            model="gpt-4o-mini", messages=QUESTION, extra_body={"sim": {"output_tokens": 20}}
        )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20


@pytest.mark.parametrize("stream", [True, False])
def test_a_budget_ends_it_by_a_limit_in_the_request(stack: Stack, stream: bool) -> None:
    project = stack.project(limit_usd="0.0001", upstream=UPSTREAM)  # the worth of 166 output tokens

    def ask(client: openai.OpenAI) -> None:
        answer: Any = client.chat.completions.create(
            model="gpt-4o-mini", messages=QUESTION, stream=stream, extra_body={"sim": {"output_tokens": 5000}}
        )
        list(answer)

    with client_of(project) as client, pytest.raises(openai.APIError) as caught:
        ask(client)
    assert caught.value.code == "quota_exceeded"
    (row,) = project.settled()
    assert (row["outcome"], row["source"]) == ("quota_exceeded", "provider")
    assert 0 < row["amount_pico"] <= 100_000_000
    # The worst case is held and told to the provider, also where a model shows all that it bills.
    seen = wait_until(lambda: stack.sim_request(row["request_id"]), what="the call")
    assert seen["body"]["max_tokens"] == row["output_tokens"]


def test_a_client_that_leaves_stops_the_plain_call_too(stack: Stack) -> None:
    project = stack.project(upstream=UPSTREAM)

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=stack.base_url) as client:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    client.post(
                        "/v1/chat/completions",
                        headers={"Authorization": f"Bearer {project.mint()}"},
                        json={"messages": QUESTION, "stream": True, "sim": {"head_delay_ms": 20_000}},
                        timeout=30,
                    ),
                    1.0,
                )

    asyncio.run(leave())
    (row,) = project.settled()
    assert (row["outcome"], row["input_tokens"], row["output_tokens"]) == ("client_cancelled", PROMPT_TOKENS, 0)
    wait_until(
        lambda: (found := stack.sim_request(row["request_id"])) and found["outcome"] == "cancelled",
        what="the provider's seeing the cancel",
    )


@pytest.mark.parametrize("stream", [True, False])
def test_a_provider_that_refuses_or_breaks_is_told_as_ever(project: Project, stream: bool) -> None:
    with client_of(project) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model="gpt-4o-mini", messages=QUESTION, stream=stream, extra_body={"sim": {"status": 500}}
        )
    assert caught.value.status_code == 502
