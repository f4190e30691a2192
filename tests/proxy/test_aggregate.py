"""A stream made into one body."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.aggregate import AggregateTooLarge, Aggregator
from behest_proxy.chunk import ChunkError


def body_of(*chunks: Any, usage: dict[str, Any] | None = None, cost_usd: str | None = None) -> dict[str, Any]:
    aggregator = Aggregator()
    for chunk in chunks:
        aggregator.feed(chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode())
    found: dict[str, Any] = json.loads(aggregator.body(usage=usage, cost_usd=cost_usd))
    return found


def delta(members: dict[str, Any], **choice: Any) -> dict[str, Any]:
    return {"id": "c1", "model": "heron-1", "created": 5, "choices": [{"index": 0, "delta": members, **choice}]}


def message_of(*deltas: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = body_of(*map(delta, deltas))["choices"][0]["message"]
    return found


def test_a_text_becomes_a_chat_completion() -> None:
    body = body_of(
        delta({"role": "assistant", "content": "", "refusal": None}),
        delta({"content": "The heron"}),
        delta({"content": " waits."}),
        delta({}, finish_reason="stop"),
        usage={"prompt_tokens": 9},
        cost_usd="0.000001",
    )
    assert body == {
        "id": "c1",
        "object": "chat.completion",
        "created": 5,
        "model": "heron-1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The heron waits.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 9, "cost_usd": 0.000001},
    }


@given(st.lists(st.tuples(st.integers(0, 3), st.text(max_size=5)), max_size=20))
def test_choices_are_kept_apart(pieces: list[tuple[int, str]]) -> None:
    chunks = [{"choices": [{"index": index, "delta": {"content": text}}]} for index, text in pieces]
    for choice in body_of(*chunks)["choices"]:
        assert choice["message"]["content"] == "".join(text for index, text in pieces if index == choice["index"])


def test_the_first_that_is_not_empty_names_the_answer_and_the_last_of_the_rest_counts() -> None:
    body = body_of(
        {"id": "", "model": "", "created": 0, "choices": [], "prompt_filter_results": [1]},
        {"id": "a", "model": "m1", "created": 3, "service_tier": "default", "citations": [1]},
        {"id": "b", "model": "m2", "created": 4, "citations": [1, 2], "obfuscation": "xx", "note": None},
    )
    assert body == {
        "id": "a",
        "object": "chat.completion",
        "created": 3,
        "model": "m1",
        "choices": [],
        "prompt_filter_results": [1],
        "service_tier": "default",
        "citations": [1, 2],
    }


def test_numbers_beyond_a_float_survive() -> None:
    assert b'"seed":18446744073709551615' in _fed(b'{"seed":18446744073709551615,"choices":[]}')
    assert b'"seed":18446744073709551615' in _fed(b'{"choices":[{"index":0,"delta":{},"seed":18446744073709551615}]}')


def _fed(payload: bytes) -> bytes:
    aggregator = Aggregator()
    aggregator.feed(payload)
    return aggregator.body()


def test_tool_calls_are_put_together_by_index() -> None:
    message = message_of(
        {
            "content": None,
            "tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}],
        },
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "id": "", "function": {"arguments": "{}"}}]},
        {"tool_calls": [{"index": 1, "function": {"name": None, "arguments": "}"}}]},
    )
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "a", "function": {"name": "f", "arguments": "{}"}, "type": "function"},
        {"id": "b", "function": {"name": "g", "arguments": "{}"}, "type": "function"},
    ]


def test_tool_calls_without_index_are_put_together_by_order() -> None:
    calls = message_of(
        {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]},
        {"tool_calls": [{"function": {"arguments": "}"}}]},
        {"tool_calls": [{"id": "b", "function": {"name": "g", "arguments": {"x": 1}}}]},
    )["tool_calls"]
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [("a", "{}"), ("b", '{"x": 1}')]


def test_another_id_with_a_name_begins_another_call_though_the_index_repeats() -> None:
    calls = message_of(
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]},
        {"tool_calls": [{"index": 0, "id": "b", "function": {"name": "f", "arguments": "[]"}}]},
    )["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ["{}", "[]"]


def test_a_legacy_function_call_is_put_together() -> None:
    message = message_of({"function_call": {"name": "f", "arguments": ""}}, {"function_call": {"arguments": "{}"}})
    assert message["function_call"] == {"name": "f", "arguments": "{}"}


def test_unknown_members_of_a_delta_are_kept() -> None:
    message = message_of(
        {"reasoning": "Look", "channel": "analysis", "details": [1], "state": {"a": 1}, "n": 1},
        {"reasoning": " down", "channel": "analysis", "details": [2], "state": {"b": 2}, "n": 2},
    )
    assert message["reasoning"] == "Look down"
    assert message["channel"] == "analysis"
    assert message["details"] == [1, 2]
    assert message["state"] == {"b": 2}
    assert message["n"] == 2


def test_content_of_parts_stays_parts_and_adjacent_ones_of_a_kind_are_one() -> None:
    content = message_of(
        {"content": ""},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Fish"}]}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "?"}], "closed": True}]},
        {"content": [{"type": "text", "text": "Fi"}]},
        {"content": "sh."},
    )["content"]
    assert content == [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Fish?"}], "closed": True},
        {"type": "text", "text": "Fish."},
    ]


def test_logprobs_are_concatenated() -> None:
    body = body_of(
        delta({"content": "a"}, logprobs={"content": [], "refusal": None}),
        delta({"content": "a"}, logprobs={"content": [{"token": "a"}], "refusal": None}),
        delta({"content": "b"}, logprobs={"content": [{"token": "b"}]}),
    )
    assert body["choices"][0]["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}], "refusal": None}


def test_a_message_beside_the_delta_is_not_added_twice() -> None:
    body = body_of(delta({"content": "a"}, message={"content": "a"}), delta({"content": "b"}, message={"content": "b"}))
    assert body["choices"][0]["message"]["content"] == "ab"


def test_legacy_text_without_delta_is_the_message() -> None:
    body = body_of({"choices": [{"index": 0, "text": "a"}]}, {"choices": [{"index": 0, "text": "b"}]})
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "ab"}


def test_audio_is_put_together() -> None:
    audio = message_of(
        {"audio": {"id": "a1", "transcript": "Kra"}},
        {"audio": {"transcript": "ah", "data": "AA"}},
        {"audio": {"data": "BB", "expires_at": 7}},
    )["audio"]
    assert audio == {"id": "a1", "transcript": "Kraah", "data": "AABB", "expires_at": 7}


def test_halves_of_a_surrogate_pair_meet_again() -> None:
    body = body_of(
        b'{"x":1.5,"choices":[{"delta":{"content":"\\ud83d"}}]}', b'{"choices":[{"delta":{"content":"\\ude00"}}]}'
    )
    assert body["choices"][0]["message"]["content"] == "😀"
    assert body["x"] == 1.5


def test_what_is_no_object_is_refused_and_odd_members_are_not() -> None:
    with pytest.raises(ChunkError):
        Aggregator().feed(b"[]")
    assert body_of({"choices": [1, {"index": "x", "delta": 3, "logprobs": 4}]})["choices"][0]["index"] == 0
    assert body_of({"choices": "x"})["choices"] == []


def test_size_choices_and_calls_are_bounded() -> None:
    with pytest.raises(AggregateTooLarge):
        Aggregator(bytes_max=10).feed(b'{"a":"0123456789"}')
    with pytest.raises(AggregateTooLarge):
        body_of({"choices": [{"index": index} for index in range(129)]})
    with pytest.raises(AggregateTooLarge):
        message_of({"tool_calls": [{"index": index, "id": "x"} for index in range(1025)]})
