"""Chunks: what metering reads from them, and the few edits that are allowed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy import chunk as chunks
from behest_proxy.chunk import ChoiceTexts, ChunkError

PLAIN = b'{"id":"c1","model":"heron-1","choices":[{"index":0,"delta":{"content":" fish"},"finish_reason":null}]}'

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "delta", "content", "text", "thinking", "tool_calls", "function", "index", "usage"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
json_objects = st.dictionaries(
    st.sampled_from(["id", "model", "choices", "usage", "x_groq", "error", "other"]), json_values, max_size=5
)


def choice(members: str) -> bytes:
    return f'{{"choices":[{{"index":0,{members}}}]}}'.encode()


def texts(members: str) -> ChoiceTexts:
    (found,) = chunks.chunk_texts(chunks.decode(choice(members)))
    return found


@given(json_objects)
def test_no_json_object_fails_to_decode(members: dict[str, object]) -> None:
    chunk = chunks.decode(json.dumps(members).encode())
    chunks.chunk_texts(chunk)
    chunks.plain_text(chunk)
    chunks.is_usage_only(chunk, finished=True)


@pytest.mark.parametrize("payload", [b"", b"[DONE]", b"[]", b'"x"', b"1", b"{", b"{} x", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_a_chunk_error(payload: bytes) -> None:
    with pytest.raises(ChunkError):
        chunks.decode(payload)


def test_an_ordinary_chunk_is_plain_text() -> None:
    chunk = chunks.decode(PLAIN)
    assert chunks.plain_text(chunk) == " fish"
    assert chunks.chunk_texts(chunk) == [ChoiceTexts(0, " fish", "", "", 0)]


@pytest.mark.parametrize(
    "members",
    [
        '"delta":{}',
        '"delta":{"content":"a","refusal":"b"}',
        '"text":"a"',
        '"delta":{"content":"a","reasoning":"b"}',
        '"delta":{"content":"a","tool_calls":[{"index":0}]}',
        '"delta":{"content":[]}',
    ],
)
def test_a_chunk_that_adds_anything_else_is_not_plain_text(members: str) -> None:
    assert chunks.plain_text(chunks.decode(choice(members))) is None


def test_delta_counts_and_message_and_text_do_not_where_all_are_there() -> None:
    assert texts('"delta":{"content":"a"},"message":{"content":"a"},"text":"a"').visible == "a"
    assert texts('"message":{"content":"a"}').visible == "a"
    assert texts('"text":"a"').visible == "a"


def test_reasoning_counts_once_under_its_three_names() -> None:
    names = '"reasoning":"a","reasoning_content":"a","reasoning_details":[{"text":"a"}]'
    assert texts('"delta":{' + names + "}").reasoning == "a"
    assert texts('"delta":{"reasoning_details":[{"text":"a"},{"data":"x"},{"summary":"b"}]}').reasoning == "ab"


def test_thinking_inside_a_content_array_is_reasoning() -> None:
    found = texts('"delta":{"content":[{"type":"thinking","thinking":[{"text":"a"}]},{"type":"text","text":"b"}]}')
    assert (found.visible, found.reasoning) == ("b", "a")


def test_tool_calls_give_their_text_and_how_many_begin() -> None:
    found = texts('"delta":{"tool_calls":[{"index":0,"id":"x","function":{"name":"f","arguments":"{"}}]}')
    assert (found.tools, found.tool_calls) == ("f{", 1)
    assert texts('"delta":{"tool_calls":[{"index":0,"id":"","function":{"arguments":"}"}}]}').tool_calls == 0


def test_arguments_given_as_an_object_are_counted_as_their_text() -> None:
    found = texts('"delta":{"tool_calls":[{"index":0,"function":{"name":"f","arguments":{"a":1}}}]}')
    assert json.loads(found.tools.removeprefix("f")) == {"a": 1}


def test_an_odd_member_costs_only_itself() -> None:
    chunk = chunks.decode(b'{"id":7,"usage":"x","choices":[3,{"index":0,"delta":{"content":"a","refusal":1}}]}')
    assert chunk.id is None
    assert chunk.any_usage is None
    assert chunks.plain_text(chunk) == "a"


def test_usage_is_found_at_the_top_and_in_groqs_member() -> None:
    assert chunks.decode(b'{"usage":{"a":1}}').any_usage == {"a": 1}
    assert chunks.decode(b'{"x_groq":{"usage":{"a":1}}}').any_usage == {"a": 1}
    assert chunks.decode(b'{"usage":null,"x_groq":{"id":"r"}}').any_usage is None


def test_an_error_may_be_an_object_or_a_text() -> None:
    assert chunks.decode(b'{"error":{"code":"x"}}').error == {"code": "x"}
    assert chunks.decode(b'{"error":"x"}').error == "x"


USAGE = '"usage":{"prompt_tokens":1}'


def test_a_usage_chunk_has_usage_and_empty_choices() -> None:
    assert chunks.is_usage_only(chunks.decode(b'{"choices":[],%b}' % USAGE.encode()))
    assert not chunks.is_usage_only(chunks.decode(b'{"choices":[],"prompt_filter_results":[]}'))
    assert not chunks.is_usage_only(chunks.decode(b'{"choices":[],"usage":null}'))


def test_a_usage_chunk_with_an_empty_choice_counts_only_after_the_finish() -> None:
    chunk = chunks.decode(f'{{"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}}}}],{USAGE}}}'.encode())
    assert not chunks.is_usage_only(chunk)
    assert chunks.is_usage_only(chunk, finished=True)


@pytest.mark.parametrize("members", ['"delta":{},"finish_reason":"stop"', '"delta":{"content":"a"}', '"text":"a"'])
def test_a_chunk_that_finishes_or_adds_is_never_dropped_for_its_usage(members: str) -> None:
    chunk = chunks.decode(f'{{"choices":[{{"index":0,{members}}}],{USAGE}}}'.encode())
    assert not chunks.is_usage_only(chunk, finished=True)


def test_cost_is_added_and_every_other_value_keeps_its_text() -> None:
    payload = b'{"seed":18446744073709551615,"r":0.10,"usage":{"prompt_tokens":5,"rate":1.50},"z":"\\u00e9"}'
    assert chunks.with_usage_cost(payload, "0.000000000001") == payload.replace(
        b'"rate":1.50', b'"rate":1.50,"cost_usd":0.000000000001'
    )


@pytest.mark.parametrize("payload", [b'{"choices":[]}', b'{"usage":null}', b'{"usage":3}'])
def test_without_usage_there_is_nowhere_to_put_a_cost(payload: bytes) -> None:
    assert chunks.with_usage_cost(payload, "1") == payload


def test_cost_can_be_added_to_what_strict_parsers_refuse() -> None:
    edited = chunks.with_usage_cost(b'{"usage":{"a":1},"x":NaN,"y":"\\ud83d"}', "0.5")
    assert json.loads(edited) == {"usage": {"a": 1, "cost_usd": 0.5}, "x": None, "y": "\ud83d"}


def test_only_a_finish_for_length_becomes_null() -> None:
    payload = b'{"a":1.0,"choices":[{"index":0,"finish_reason":"length"},{"finish_reason":"stop","index":1}]}'
    assert chunks.with_finish_reason_null(payload) == payload.replace(b'"length"', b"null")
    with pytest.raises(ChunkError):
        chunks.with_finish_reason_null(b'{"choices":1}')
