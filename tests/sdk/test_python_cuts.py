"""A network that is cut again and again: the text has no gap and no repetition, and is charged once."""

import random
from typing import Any

import pytest

from behest import BehestSync, retries
from behest.testing import sync_http
from cutter import cutting
from stack import Project, Stack, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
TOKENS = 250
SIM = {"sim": {"output_tokens": TOKENS, "chunk_interval_ms": 2, "continue_assistant": True}}


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project()


def _charged(project: Project, session: str) -> list[int]:
    """What each attempt of a session was charged."""
    return [row["output_tokens"] for row in project.all_settled() if row["session_id"] == session]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_S", (0.02, 0.1, 0.5))


@pytest.mark.usefixtures("hasty")
def test_the_text_of_a_stream_that_is_cut_many_times_is_the_text_of_one_that_is_not(project: Project) -> None:
    with BehestSync(key=project.api_key, base_url=project.stack.base_url, http_client=sync_http()) as behest:
        uncut = behest.chat.completions.create(messages=QUESTION, extra_body=SIM, session_id="uncut")
        token = behest.auth.mint(session_id="cut").value
    dice = random.Random(7)
    cuts = [dice.randrange(300, 9000) for _ in range(12)]
    with (
        cutting(project.stack.base_url, cuts) as network,
        BehestSync(key=project.api_key, base_url=network.base_url, http_client=sync_http()) as behest,
    ):
        stream = behest.chat.completions.create(
            messages=QUESTION, stream=True, extra_body=SIM, token=token, thread_id="t-cut"
        )
        said = [chunk.choices[0].delta.content or "" for chunk in stream]
        wait_until(lambda: behest.threads.messages("t-cut", token=token)[-1].content == stream.text)
        messages = behest.threads.messages("t-cut", token=token)
    assert network.done >= 5
    assert "".join(said) == stream.text == uncut.choices[0].message.content
    assert [message.role for message in messages] == ["user", "assistant"]
    charged = _charged(project, "cut")
    assert TOKENS <= sum(charged) <= TOKENS + len(charged), charged


@pytest.mark.usefixtures("hasty")
def test_an_answer_that_was_lost_before_its_first_chunk_is_charged_once(project: Project) -> None:
    with BehestSync(key=project.api_key, base_url=project.stack.base_url, http_client=sync_http()) as behest:
        token = behest.auth.mint(session_id="lost").value
    with (
        cutting(project.stack.base_url, [1], is_noticed=False) as network,
        BehestSync(key=project.api_key, base_url=network.base_url, http_client=sync_http()) as behest,
    ):
        stream = behest.chat.completions.create(
            messages=QUESTION, stream=True, extra_body={"sim": {"output_tokens": 9}}, token=token, thread_id="t-lost"
        )
        for _ in stream:
            pass
        wait_until(lambda: behest.threads.messages("t-lost", token=token)[-1].content == stream.text)
        messages = behest.threads.messages("t-lost", token=token)
    assert network.done == 1
    assert [message.role for message in messages] == ["user", "assistant"]
    assert _charged(project, "lost") == [9]
