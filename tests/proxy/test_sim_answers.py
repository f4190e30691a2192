"""The simulator's planning, without sockets: what a request makes it say, in which form and at which times."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_proxy.sim.answers import AnswerContext, Body, Finish, Head, Step, chat_answer, recorded_events
from behest_proxy.sim.behaviour import Behaviour, parse_behaviour
from behest_proxy.sim.chat_request import Message, count_prompt_tokens, parse_chat_request
from behest_proxy.sim.refusal import Refusal
from behest_proxy.sim.text import made_up, pieces_of, token_count, without_beginning

MESSAGES = [{"role": "user", "content": "Hello there"}]
NO_BODY = parse_chat_request(json.dumps({"model": "m", "messages": MESSAGES}).encode())[0].sim


def no_recording(name: str) -> tuple[bytes, bytes]:
    raise AssertionError(name)


def plan(sim: dict[str, Any] | None = None, **members: Any) -> list[Step]:
    return list(islice(lazily(sim, **members), 100_000))


def lazily(sim: dict[str, Any] | None = None, **members: Any) -> Iterator[Step]:
    body = {"model": "m", "messages": MESSAGES, "stream": True, "sim": sim or {}, **members}
    request, behaviour = parse_chat_request(json.dumps(body).encode())
    prompt_tokens = count_prompt_tokens(request.messages)
    return chat_answer(request, behaviour, AnswerContext("chatcmpl-x", 1, prompt_tokens, no_recording))


def body_of(steps: list[Step]) -> bytes:
    return b"".join(step.data for step in steps if isinstance(step, Body))


def chunks_of(steps: list[Step]) -> list[dict[str, Any]]:
    # Not str.splitlines: an event stream knows no other line ends than CR and LF.
    lines = [line.decode() for line in body_of(steps).splitlines()]
    payloads = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(payload) for payload in payloads if payload != "[DONE]"]


def text_of(steps: list[Step], member: str = "content") -> str:
    deltas = [choice["delta"] for chunk in chunks_of(steps) for choice in chunk["choices"]]
    return "".join(delta.get(member) or "" for delta in deltas)


def finish_of(steps: list[Step]) -> list[str]:
    reasons = [choice["finish_reason"] for chunk in chunks_of(steps) for choice in chunk["choices"]]
    return [reason for reason in reasons if reason]


def test_the_prompt_is_counted_as_openai_documents_it() -> None:
    # The example of OpenAI's cookbook, for which its API reported 124 prompt tokens (gpt-4o).
    told = "You are a helpful, pattern-following assistant that translates corporate jargon into plain English."
    messages = [
        Message("system", told),
        Message("system", "New synergies will help drive top-line growth.", "example_user"),
        Message("system", "Things working well together will increase revenue.", "example_assistant"),
        Message(
            "system",
            "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage.",
            "example_user",
        ),
        Message("system", "Let's talk later when we're less busy about how to do better.", "example_assistant"),
        Message(
            "user",
            "This late pivot means we don't have time to boil the ocean for the client deliverable.",
        ),
    ]
    assert count_prompt_tokens(messages) == 124


def test_parts_that_are_not_text_count_nothing() -> None:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "Hello there"}, {"type": "image_url"}]
    assert count_prompt_tokens([Message("user", parts)]) == count_prompt_tokens([Message("user", "Hello there")])


@given(seed=st.integers(0, 2**63 - 1), stream=st.integers(0, 200), tokens=st.integers(0, 300))
def test_made_up_text_counts_as_many_tokens_as_it_has_pieces(seed: int, stream: int, tokens: int) -> None:
    pieces = list(islice(made_up(seed, stream), tokens))
    assert token_count("".join(piece.text for piece in pieces)) == tokens
    assert all(token_count(piece.text) == piece.tokens == 1 for piece in pieces)


@given(st.text(max_size=200))
def test_the_pieces_of_any_text_are_the_text(text: str) -> None:
    pieces = list(pieces_of(text))
    assert "".join(piece.text for piece in pieces) == text
    assert sum(piece.tokens for piece in pieces) == token_count(text)


@given(st.text(max_size=60), st.integers(0, 60))
def test_what_was_said_is_taken_off_at_any_place(text: str, place: int) -> None:
    rest = without_beginning(pieces_of(text), text[:place])
    assert rest is not None
    assert "".join(piece.text for piece in rest) == text[place:]


def test_what_was_never_said_is_not_taken_off() -> None:
    assert without_beginning(pieces_of("one two"), "one three") is None
    assert without_beginning(pieces_of("one two"), "one two three") is None


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    split=st.one_of(st.none(), st.integers(1, 400)),
    random_cuts=st.booleans(),
    crlf=st.booleans(),
    choices=st.integers(1, 3),
)
def test_any_form_gives_the_same_text(
    size: int, split: int | None, random_cuts: bool, crlf: bool, choices: int
) -> None:
    form = {
        "tokens_per_chunk": size,
        "chunk_split": split,
        "chunk_split_random": random_cuts,
        "crlf": crlf,
        "output_tokens": 50,
        "usage": "always",
    }
    plain = plan({"output_tokens": 50}, n=choices)
    formed = plan(form, n=choices)
    for index in range(choices):
        assert choice_text(formed, index) == choice_text(plain, index)
        assert token_count(choice_text(formed, index)) == 50
    assert chunks_of(formed)[-1]["usage"]["completion_tokens"] == 50 * choices
    assert sum(step.tokens for step in formed if isinstance(step, Body)) == 50 * choices


def choice_text(steps: list[Step], index: int) -> str:
    found = [choice for chunk in chunks_of(steps) for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in found)


@given(text=st.text(min_size=1, max_size=80), size=st.integers(1, 9))
def test_an_exact_text_is_sent_exactly(text: str, size: int) -> None:
    steps = plan({"text": text, "tokens_per_chunk": size, "usage": "always"})
    assert text_of(steps) == text
    assert chunks_of(steps)[-1]["usage"]["completion_tokens"] == token_count(text)


@given(
    calls=st.integers(1, 5),
    tokens=st.integers(1, 120),
    size=st.integers(1, 12),
    limit=st.one_of(st.none(), st.integers(1, 100)),
)
@settings(max_examples=60, deadline=None)
def test_tool_calls_count_their_names_and_arguments(calls: int, tokens: int, size: int, limit: int | None) -> None:
    sim = {"tool_calls": calls, "output_tokens": tokens, "tokens_per_chunk": size, "usage": "always"}
    steps = plan(sim, max_completion_tokens=limit)
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for chunk in chunks_of(steps):
        for choice in chunk["choices"]:
            for call in choice["delta"].get("tool_calls", ()):
                if "id" in call:
                    names[call["index"]] = call["function"]["name"]
                arguments[call["index"]] = arguments.get(call["index"], "") + call["function"]["arguments"]
    reported = chunks_of(steps)[-1]["usage"]["completion_tokens"]
    counted = sum(map(token_count, [*names.values(), *arguments.values()]))
    if finish_of(steps) == ["tool_calls"]:
        assert all(json.loads(text)["simulated"] for text in arguments.values())
        assert len(names) == calls
        assert reported == counted
    else:
        assert finish_of(steps) == ["length"]
        assert limit is not None
        assert reported <= limit


def test_made_up_text_depends_on_seed_and_choice() -> None:
    first, second = plan({"seed": 1}, n=2), plan({"seed": 2}, n=2)
    texts = {choice_text(steps, index) for steps in (first, second) for index in (0, 1)}
    assert len(texts) == 4
    assert all(text.startswith("This is simulated text") for text in texts)
    assert plan({"seed": 1}, n=2) == first
    assert text_of(plan({}, seed=1)) == text_of(plan({"seed": 1}))


def test_chunks_come_at_their_interval_and_nothing_else_waits() -> None:
    sim = {
        "output_tokens": 3,
        "head_delay_ms": 5,
        "first_chunk_delay_ms": 7,
        "chunk_interval_ms": 11,
        "usage": "always",
    }
    waits = [step.wait_ms for step in plan(sim)]
    # head · role, three chunks · finish, usage, [DONE], end
    assert waits == [5, 7, 0, 11, 11, 0, 0, 0, 0]


def test_an_answer_in_one_piece_comes_when_its_stream_would_have_ended() -> None:
    sim = {"output_tokens": 3, "head_delay_ms": 5, "first_chunk_delay_ms": 7, "chunk_interval_ms": 11}
    head = plan(sim, stream=False)[0]
    assert isinstance(head, Head)
    assert head.wait_ms == 5 + 7 + 2 * 11


def test_a_long_answer_is_not_made_in_advance() -> None:
    steps = lazily({"output_tokens": 1_000_000}, n=128)
    assert len(list(islice(steps, 1_000))) == 1_000


@pytest.mark.parametrize(
    ("sim", "members", "tokens", "finish"),
    [
        ({"output_tokens": 9}, {"max_tokens": 4}, 4, "length"),
        ({"output_tokens": 9}, {"max_completion_tokens": 9}, 9, "stop"),
        ({"output_tokens": 9}, {"max_completion_tokens": 5, "max_tokens": 7}, 5, "length"),
        ({"output_tokens": 9, "ignore_max_tokens": True}, {"max_tokens": 4}, 9, "stop"),
        ({"output_tokens": 9, "reasoning_tokens": 3}, {"max_completion_tokens": 5}, 5, "length"),
        ({"output_tokens": 9, "reasoning_tokens": 30}, {"max_completion_tokens": 5}, 5, "length"),
        ({"output_tokens": 0}, {}, 0, "stop"),
    ],
)
def test_limits_hold_for_everything_that_is_billed(
    sim: dict[str, Any], members: dict[str, Any], tokens: int, finish: str
) -> None:
    steps = plan({**sim, "usage": "always"}, **members)
    assert chunks_of(steps)[-1]["usage"]["completion_tokens"] == tokens
    assert finish_of(steps) == [finish]


def test_a_broken_answer_is_continued_after_the_last_assistant_message() -> None:
    whole = text_of(plan({"output_tokens": 20}))
    sim = {"output_tokens": 20, "continue_assistant": True, "reset_after_chunks": 6}
    broken = plan(sim)
    assert broken[-1] == Finish(0, "reset", 2)
    said = text_of(broken)
    again = [*MESSAGES, {"role": "assistant", "content": said}, {"role": "user", "content": "go on"}]
    rest = plan(sim, messages=again)
    assert rest[-1] == Finish(0, "completed")
    assert said + text_of(rest) == whole
    # What was said to its end is history: the next turn starts anew.
    again[1] = {"role": "assistant", "content": whole}
    assert text_of(plan({"output_tokens": 20, "continue_assistant": True}, messages=again)) == whole


def test_the_earliest_of_several_breaks_happens() -> None:
    sim = {"end_after_chunks": 4, "reset_after_chunks": 2, "stall_after_chunks": 3, "reset_code": 8}
    assert plan(sim)[-1] == Finish(0, "reset", 8)
    assert sum(step.chunks for step in plan(sim) if isinstance(step, Body)) == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": MESSAGES}, "model"),
        ({"model": "m"}, "messages"),
        ({"model": "m", "messages": []}, "messages"),
        ({"model": "m", "messages": [{"content": "x"}]}, "messages"),
        ({"model": "m", "messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
        ({"model": "m", "messages": MESSAGES, "n": "two"}, "n"),
        ({"model": "m", "messages": MESSAGES, "stream_options": {}}, "stream_options"),
        ({"model": "m", "messages": MESSAGES, "sim": 3}, "sim"),
        ({"model": "m", "messages": MESSAGES, "sim": {"output_token": 3}}, "sim.output_token"),
        ({"model": "m", "messages": MESSAGES, "sim": {"output_tokens": "3"}}, "sim.output_tokens"),
        ({"model": "m", "messages": MESSAGES, "sim": {"body": "pdf"}}, "sim.body"),
        ({"model": "m", "messages": MESSAGES, "sim": {"chunk_split": 0}}, "sim.chunk_split"),
    ],
)
def test_a_refusal_names_the_member(body: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse_chat_request(json.dumps(body).encode())
    assert (refused.value.status, refused.value.param) == (400, param)


@given(st.binary(max_size=60))
def test_any_body_is_understood_or_refused(body: bytes) -> None:
    with pytest.raises(Refusal):
        parse_chat_request(body)


def test_the_header_asks_as_the_body_does_and_the_body_wins() -> None:
    body = parse_chat_request(b'{"model":"m","messages":[{"role":"user"}],"sim":{"output_tokens":2}}')[0].sim
    merged = parse_behaviour(header=b'{"output_tokens":1,"crlf":true}', body=body)
    assert merged == Behaviour(output_tokens=2, crlf=True)
    assert parse_behaviour(header=b'{"crlf":true}', body=NO_BODY) == Behaviour(crlf=True)
    assert parse_behaviour(header=None, body=NO_BODY) == Behaviour()
    with pytest.raises(Refusal):
        parse_behaviour(header=b"{", body=NO_BODY)


@given(st.lists(st.sampled_from([b"data: x\n\n", b": c\n", b"data: y\r\n\r\n", b"\n", b"rest"])).map(b"".join))
def test_a_recording_is_cut_into_events_without_losing_a_byte(recorded: bytes) -> None:
    assert b"".join(recorded_events(recorded)) == recorded
