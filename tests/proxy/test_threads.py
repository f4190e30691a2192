import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.errors import InvalidRequest
from behest_proxy.request import ChatRequest, parse
from behest_proxy.threads import (
    CannotContinue,
    Continuation,
    EventId,
    Memory,
    Said,
    Turn,
    continued,
    event_id,
    reply_of,
    take_turn,
    text_of,
)

Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def reply(text: str) -> Message:
    return {"role": "assistant", "content": text}


def history(*messages: Message, broken: bool = False) -> list[Said]:
    said = [Said(role=one["role"], content=msgspec.json.encode(one)) for one in messages]
    if broken:
        said[-1] = msgspec.structs.replace(said[-1], is_whole=False)
    return said


def call(*messages: Message, **members: Any) -> ChatRequest:
    return parse(msgspec.json.encode({"messages": list(messages), **members}))


def turn(known: Sequence[Said], *messages: Message, memory: Memory | None = None) -> Turn:
    return take_turn(known, call(*messages), memory or Memory())


def plain(raws: Sequence[msgspec.Raw]) -> list[Message]:
    return [json.loads(bytes(raw)) for raw in raws]


A, B = user("a"), user("b")
X, Y = reply("x"), reply("y")


@pytest.mark.parametrize(
    ("known", "asked", "new", "sent"),
    [
        ([], [A], [A], [A]),
        ([A, X], [B], [B], [A, X, B]),
        ([A, X], [A, X, B], [B], [A, X, B]),
        ([A, X, B, Y], [B, Y, user("c")], [user("c")], [A, X, B, Y, user("c")]),
        ([A, X], [A, X, A], [A], [A, X, A]),  # the same once more, knowingly
        ([A, X], [A, X, user("m"), reply("n"), B], [user("m"), reply("n"), B], [A, X, user("m"), reply("n"), B]),
        ([A, X], [A, X, {"role": "tool", "tool_call_id": "1", "content": "r"}], None, None),
    ],
)
def test_only_what_history_does_not_hold_is_new(
    known: list[Message], asked: list[Message], new: list[Message] | None, sent: list[Message] | None
) -> None:
    found = turn(history(*known), *asked)
    assert plain(found.new) == (asked[-1:] if new is None else new)
    assert plain(found.messages) == (asked if sent is None else sent)
    assert not found.repeats


@pytest.mark.parametrize("asked", [[A], [user("0"), reply("1"), A]])
def test_the_repeated_message_of_a_broken_reply_is_nothing_new(asked: list[Message]) -> None:
    found = turn(history(user("0"), reply("1"), A, X, broken=True), *asked)
    assert (found.repeats, found.new) == (True, [])
    assert plain(found.messages) == [user("0"), reply("1"), A]


def test_the_repeated_message_of_a_whole_reply_is_a_new_turn_and_told() -> None:
    found = turn(history(A, X), A)
    assert (found.repeats, plain(found.new), plain(found.messages)) == (True, [A], [A, X, A])


@pytest.mark.parametrize("seen", ["x", "x y", ""])
def test_who_has_seen_a_part_of_a_broken_reply_and_goes_on_means_that_reply(seen: str) -> None:
    found = turn(history(A, reply("x"), broken=True), A, reply(seen), B)
    assert (found.repeats, plain(found.new)) == (False, [B])
    assert plain(found.messages) == [A, reply("x"), B]


def test_instructions_come_first_and_are_not_kept() -> None:
    lead = {"role": "developer", "content": "Be brief."}
    found = turn(history(A, X), lead, B, memory=Memory(system_prompt="Be kind."))
    assert plain(found.messages) == [{"role": "system", "content": "Be kind."}, lead, A, X, B]
    assert plain(found.new) == [B]
    with pytest.raises(InvalidRequest, match="no instruction"):
        turn([], lead)


@given(st.lists(st.sampled_from([A, B]), max_size=12), st.integers(0, 12), st.integers(0, 400))
def test_the_window_is_the_end_of_what_was_said_within_its_bounds(
    questions: list[Message], messages: int, size_bytes: int
) -> None:
    said = [one for question in questions for one in (question, X)]
    found = turn(history(*said), user("new"), memory=Memory(messages=messages, size_bytes=size_bytes))
    kept = plain(found.messages)[:-1]
    assert kept == said[len(said) - len(kept) :]
    assert len(kept) <= messages
    assert sum(len(msgspec.json.encode(one)) for one in kept) <= size_bytes
    assert not kept or kept[0]["role"] == "user"


def test_a_message_in_parts_is_the_same_as_its_text() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    assert turn(history(parts, X, broken=True), A).repeats
    image = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}],
    }
    assert not turn(history(image, X, broken=True), A).repeats


def test_of_a_reply_only_what_a_request_may_hold_is_sent() -> None:
    stored = {**X, "reasoning_content": "hm", "annotations": [], "refusal": None, "tool_calls": [{"id": "1"}]}
    assert plain(turn(history(A, stored), B).messages)[1] == {**X, "tool_calls": [{"id": "1"}]}
    assert plain(turn(history(A, stored, broken=True), B).messages)[1] == X


def test_what_is_too_large_for_a_thread_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[1\]") as refused:
        turn([], A, user("x" * 2_000_000))
    assert refused.value.details == {"limit": "message_bytes", "max": 1024 * 1024}
    with pytest.raises(InvalidRequest, match="one reply"):
        take_turn([], call(A, n=2), Memory())


# Going on


def go_on(said: Message, continuation: Continuation, **members: Any) -> ChatRequest:
    found = turn(history(A, said, broken=True), A)
    return continued(found, said, said_tokens=7, request=call(A, **members), continuation=continuation)


def test_a_reply_that_said_nothing_is_asked_for_again_whatever_the_provider_can() -> None:
    assert plain(msgspec.json.decode(go_on(reply(""), "None").members["messages"], type=list[msgspec.Raw])) == [A]


def test_the_limits_of_the_caller_are_for_the_whole_reply() -> None:
    sent = go_on(X, "Prompt", max_tokens=10, max_completion_tokens=5).members
    assert (bytes(sent["max_tokens"]), bytes(sent["max_completion_tokens"])) == (b"3", b"1")


@pytest.mark.parametrize("part", ["tool_calls", "function_call"])
def test_a_tool_call_is_not_continued(part: str) -> None:
    with pytest.raises(CannotContinue):
        go_on({**X, part: [{"id": "1"}]}, "Prefix")


def test_a_provider_that_cannot_continue_is_not_asked_to() -> None:
    with pytest.raises(CannotContinue):
        go_on(X, "None")


def event(text: str | None = None, **delta: Any) -> bytes:
    members = {"content": text, **delta} if text is not None else delta
    chunk = {"choices": [{"index": 0, "delta": members, "finish_reason": None}]}
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def test_a_reply_is_what_its_events_come_to() -> None:
    found = reply_of([event(role="assistant"), event("Hel"), event("lo"), b"data: nonsense\n\n", event("!")])
    assert (found["role"], text_of(found)) == ("assistant", "Hello")
    assert text_of(reply_of([])) == ""


@given(st.uuids(), st.integers(0, 10**9 - 1))
def test_an_event_id_is_read_as_it_is_written(generation: UUID, number: int) -> None:
    written = EventId(generation, number)
    assert event_id(str(written)) == written


@given(st.text(max_size=50))
def test_what_is_no_event_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        event_id(text)
