"""Whether reads that are not parsed would have been parsed to just the same."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.chunk import decode, plain_text
from behest_proxy.likeness import Likeness
from behest_proxy.sse import SseFramer


def chunk(text: str, **others: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    members = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m", "choices": [choice], **others}
    return json.dumps(members, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def event(payload: bytes) -> bytes:
    return b"data: %b\n\n" % payload


def learned_from(text: str, payload: bytes | None = None) -> Likeness:
    likeness = Likeness()
    likeness.learn(chunk(text) if payload is None else payload, text)
    return likeness


def parsed(read: bytes) -> list[str | None]:
    framer = SseFramer()
    return [plain_text(decode(payload)) for payload in framer.feed(read)]


def test_a_chunk_like_the_one_before_is_known_without_parsing() -> None:
    assert learned_from(" wide").texts_of(event(chunk(" world"))) == [" world"]


def test_a_read_with_several_of_them_gives_the_text_of_each() -> None:
    read = event(chunk("a")) + event(chunk("")) + event(chunk("ö 好"))
    assert learned_from("x").texts_of(read) == ["a", "", "ö 好"]


def test_before_anything_was_learned_everything_is_parsed() -> None:
    assert Likeness().texts_of(event(chunk("a"))) is None


@pytest.mark.parametrize(
    "read",
    [
        event(chunk('say "hi"')),
        event(chunk("a\\b")),
        event(chunk("tab\there")),
        event(chunk("line\u2028separator")),
        event(chunk("a", usage={"prompt_tokens": 1})),
        event(chunk("a").replace(b"null}]", b'"stop"}]')),
        event(chunk("a").replace(b'"index":0', b'"index":1')),
        event(chunk("a")) + b": comment\n\n",
        event(chunk("a")) + event(chunk("b", usage={"prompt_tokens": 1})) + event(chunk("c")),
        event(chunk("a")) + event(chunk("b").replace(b'"b"', b'"b\nb"')),
        event(chunk("a")) + event(chunk("b").replace(b'"b"', b'"b\rb"')),
        event(chunk("a")).replace(b'"a"', b'"\xc3"') + event(chunk("a").replace(b'"a"', b'"\xa4"')),
        event(chunk("a")) + b"\n\n",
        event(chunk("a")) + b"\n" + event(chunk("a")),
        event(chunk("a"))[:-1],
        event(chunk("a"))[:-2] + b"\r\n\r\n",
        b"id: 1\n" + event(chunk("a")),
        event(chunk("a").replace(b'"a"', b'"\xff"')),
        event(chunk("a").replace(b'"a"', b'""a"')),
        event(chunk("a").replace(b'{"content":"a"}', b'{"content":"a","tool_calls":[{}]}')),
        b"",
    ],
)
def test_whatever_differs_elsewhere_or_is_written_with_escapes_is_parsed(read: bytes) -> None:
    assert learned_from("x").texts_of(read) is None


def test_a_read_shorter_than_the_pattern_is_no_likeness() -> None:
    payload = b'{"choices":[{"index":0,"delta":{"content":"x"}}],"a":"b"}'
    likeness = learned_from("x", payload)
    assert likeness.texts_of(event(payload)) == ["x"]
    overlapping = b'data: {"choices":[{"index":0,"delta":{"content":"}}],"a":"b"}\n\n'
    assert likeness.texts_of(overlapping) is None


def test_another_member_of_the_same_text_is_not_taken_for_the_content() -> None:
    payload = b'{"id":"x","choices":[{"index":0,"delta":{"content":"x"}}]}'
    assert learned_from("x", payload).texts_of(event(payload.replace(b'"id":"x"', b'"id":"y"'))) is None


def test_a_stream_whose_chunks_are_all_different_is_not_studied_for_ever() -> None:
    likeness = Likeness()
    for number in range(20):
        likeness.learn(chunk("x", obfuscation="y" * number), "x")
    assert likeness.texts_of(event(chunk("z", obfuscation="y" * 7))) == ["z"]
    assert likeness.texts_of(event(chunk("z", obfuscation="y" * 19))) is None


texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(['"', "\\", '","', '"}}', "\n", "\u200b"])
odd_ends = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\n", b"\n\n\n", b'"}\n\n'])


@given(first=texts, others=st.lists(texts, min_size=1, max_size=4), end=odd_ends, cut=st.integers(0, 40))
def test_what_is_known_without_parsing_is_what_parsing_gives(
    first: str, others: list[str], end: bytes, cut: int
) -> None:
    likeness = learned_from(first)
    read = b"".join(event(chunk(text)) for text in others)
    for bytes_read in (read, read[:-2] + end, read[cut:], read[: len(read) - cut]):
        known = likeness.texts_of(bytes_read)
        assert known is None or known == parsed(bytes_read)


@given(before=st.binary(max_size=30), text=texts, after=st.binary(max_size=30))
def test_any_bytes_may_be_learned_from_and_looked_at(before: bytes, text: str, after: bytes) -> None:
    payload = before + chunk(text) + after
    likeness = learned_from(text, payload)
    known = likeness.texts_of(event(payload))
    assert known is None or known == parsed(event(payload))
