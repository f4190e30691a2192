"""Answers that were given as a whole become the chunks that would have been streamed."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.aggregate import Aggregator
from behest_proxy.chunk import ChunkError, decode
from behest_proxy.sse import DONE_PAYLOAD
from behest_proxy.whole import whole_answer

CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
BODY: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "citations": ["https://example.org"],
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        },
        {
            "index": 1,
            "message": {"role": "assistant", "content": None, "tool_calls": CALLS},
            "finish_reason": "tool_calls",
        },
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
}


def chunks_of(body: Any) -> list[dict[str, Any]]:
    *payloads, done = whole_answer(json.dumps(body).encode()).payloads
    assert done == DONE_PAYLOAD
    return [json.loads(payload) for payload in payloads]


def test_role_and_content_come_first_then_the_ends_and_the_usage() -> None:
    first, second, end, other_end, usage = chunks_of(BODY)
    assert {chunk["object"] for chunk in (first, second, end, other_end, usage)} == {"chat.completion.chunk"}
    assert {chunk["id"] for chunk in (first, second, end, other_end, usage)} == {"chatcmpl-1"}
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert first["citations"] == ["https://example.org"]
    assert second["choices"][0]["delta"]["tool_calls"] == [{"index": 0, **CALLS[0]}]
    assert [each["choices"][0]["finish_reason"] for each in (first, second)] == [None, None]
    assert end["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert other_end["choices"] == [{"index": 1, "delta": {}, "finish_reason": "tool_calls"}]
    assert (usage["choices"], usage["usage"]) == ([], BODY["usage"])


def test_put_together_again_it_is_the_answer_that_came() -> None:
    aggregator = Aggregator()
    for payload in whole_answer(json.dumps(BODY).encode()).payloads[:-1]:
        decode(payload)
        aggregator.feed(payload)
    body = json.loads(aggregator.body(usage=BODY["usage"]))
    assert body["choices"][0]["message"]["content"] == "Hello"
    assert body["choices"][1]["message"]["tool_calls"] == CALLS
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "tool_calls"]
    assert body["citations"] == BODY["citations"]
    assert body["usage"] == BODY["usage"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [1]}', b'{"choices": [{"delta": {}}]}', b"[" * 100_000],
)
def test_what_is_no_answer_is_an_error(body: bytes) -> None:
    with pytest.raises(ChunkError):
        whole_answer(body)


def test_an_error_inside_stays_one() -> None:
    answer = whole_answer(b'{"error": {"message": "no"}, "choices": []}')
    assert answer.payloads == [b'{"error":{"message":"no"}}']
    assert answer.usage is None


def test_half_a_pair_survives() -> None:
    body = b'{"choices": [{"message": {"content": "half \\ud83d"}}]}'
    assert b"half \\ud83d" in whole_answer(body).payloads[0]


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_is_an_answer_or_an_error(value: Any) -> None:
    for body in (
        value,
        {"choices": value},
        {"choices": [{"message": value}]},
        {"choices": [{"message": {"tool_calls": value}}]},
    ):
        try:
            answer = whole_answer(json.dumps(body).encode())
        except ChunkError:
            continue
        for payload in answer.payloads:
            assert payload == DONE_PAYLOAD or msgspec.json.decode(payload) is not None
