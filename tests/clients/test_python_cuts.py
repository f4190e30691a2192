"""Fifty cuts of the network at random places, with both faces of the client for Python."""

import asyncio
import random
from typing import Any

import pytest

from behest import Behest, BehestSync, retries
from behest.testing import async_http, sync_http
from cutter import cutting
from stack import Stack

UNUSED_KEY = "behest_sk_live_" + "0" * 32
"""Tokens are given: as a browser's, they are made before, by somebody whose network is not cut."""
QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
TOKENS = 250
SIM = {"sim": {"output_tokens": TOKENS, "chunk_interval_ms": 8, "continue_assistant": True}}
CUTS = 50
CUT_BYTES = (300, 9_000)
"""After so many bytes of an answer: before its first chunk, inside of a chunk, between two of them, at its end."""


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_S", (0.02, 0.1, 0.5))


def _read_sync(base_url: str, token: str) -> str:
    with BehestSync(key=UNUSED_KEY, base_url=base_url, http_client=sync_http()) as behest:
        stream = behest.chat.completions.create(
            messages=QUESTION, stream=True, extra_body=SIM, token=token, thread_id="t"
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == stream.text
        return text


async def _read(base_url: str, token: str) -> str:
    async with Behest(key=UNUSED_KEY, base_url=base_url, http_client=async_http()) as behest:
        stream = await behest.chat.completions.create(
            messages=QUESTION, stream=True, extra_body=SIM, token=token, thread_id="t"
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


@pytest.mark.usefixtures("hasty")
def test_fifty_random_cuts_leave_the_text_of_an_uncut_stream_charged_once(stack: Stack) -> None:
    project = stack.project()
    uncut = _read_sync(stack.base_url, project.mint(user="uncut", session="uncut"))
    dice = random.Random(17)
    cut = number = 0
    while cut < CUTS:
        name = f"cut-{number}"
        token = project.mint(user=name, session=name)
        with cutting(stack.base_url, [dice.randrange(*CUT_BYTES) for _ in range(10)]) as network:
            said = asyncio.run(_read(network.base_url, token)) if number % 2 else _read_sync(network.base_url, token)
        assert said == uncut, f"after {network.done} cuts"
        assert network.done >= 2
        cut += network.done
        number += 1
    charged: dict[str, list[int]] = {f"cut-{one}": [] for one in range(number)}
    for row in project.all_settled():
        if row["session_id"] in charged:
            charged[row["session_id"]].append(row["output_tokens"])
    for tokens in charged.values():
        # Where a token was cut in two, both halves count.
        assert TOKENS <= sum(tokens) <= TOKENS + len(tokens), tokens
        assert len(tokens) > 1, "what had not been sent yet was asked for again"
