"""Streams of providers that keep to the protocol: forwarded to the letter, charged once."""

import json

import pytest

from behest_ledger.holds import Granted
from behest_proxy.actions import (
    Begin,
    CallUpstream,
    Finish,
    Write,
)
from behest_proxy.sse import DONE, data_event
from proxy.scripts import (
    BROKEN,
    CANCEL,
    COMPLETED,
    DONE_EVENT,
    FINISHED,
    ROLE,
    USAGE,
    Cut,
    Event,
    Settled,
    admitted,
    choice,
    chunk,
    drained,
    ended,
    event_of,
    exchange,
    failed,
    fed,
    finish,
    gone,
    head,
    play,
    raw,
    read,
    sent,
    streaming,
    text,
    usage,
    wrote,
)


def test_a_plain_stream_is_forwarded_to_the_letter_and_charged_by_the_providers_usage() -> None:
    play(
        exchange(include_usage=False),
        (admitted(Granted(output_tokens=500)), [CallUpstream()]),
        (sent(), []),
        (head(200), [Begin()]),
        (read(ROLE, text("Hello")), [wrote(ROLE, text("Hello"))]),
        (read(text(" you")), [wrote(text(" you"))]),
        (read(finish()), [wrote(finish())]),
        (read(USAGE, DONE_EVENT), [FINISHED, Finish(), Settled(COMPLETED, "provider", 12, 5)]),
    )


def test_without_any_usage_the_own_count_is_charged() -> None:
    play(
        streaming(),
        (
            read(text("Hello"), finish(), DONE_EVENT),
            [wrote(text("Hello"), finish()), FINISHED, Finish(), Settled(COMPLETED, "local", 10, 5)],
        ),
    )


def test_a_read_that_was_cut_inside_an_event_is_no_event_yet() -> None:
    event = data_event(text("Hello"))
    play(streaming(), (raw(event[:30]), []), (raw(event[30:]), [Write(event, 1)]))


def test_comments_ids_and_blank_events_are_dropped_and_the_framing_is_ours() -> None:
    data = b": ping\n\nid: 7\r\nretry: 5\r\nevent: message\r\ndata:" + text("Hi") + b"\r\n\r\ndata: \n\ndata:\n\n"
    play(streaming(), (raw(data), [wrote(text("Hi"))]))


def test_usage_that_was_asked_for_is_forwarded_with_its_cost() -> None:
    under = streaming(include_usage=True)
    play(under, (read(text("Hello"), finish()), [wrote(text("Hello"), finish())]))
    (write,) = fed(under, data_event(USAGE), 0.0)
    event = event_of(write)
    assert event.pop("usage") == {**usage(12, 5), "cost_usd": 6.2e-9}
    assert event == {key: value for key, value in json.loads(USAGE).items() if key != "usage"}
    play(under, (read(DONE_EVENT), [FINISHED, Finish(), Settled(COMPLETED, "provider", 12, 5)]))


def test_a_finish_chunk_with_usage_goes_on_also_where_usage_was_not_asked_for() -> None:
    last = finish(usage=usage(12, 5))
    play(
        streaming(),
        (read(last, DONE_EVENT), [wrote(last), FINISHED, Finish(), Settled(COMPLETED, "provider", 12, 5)]),
    )


def test_a_usage_chunk_with_a_choice_of_nothing_is_dropped_once_all_have_finished() -> None:
    empty = chunk(choice({"content": ""}), usage=usage(12, 5))
    play(streaming(), (read(empty, finish()), [wrote(empty, finish())]), (read(empty), []))


def test_a_provider_without_usage_gets_a_usage_chunk_of_ours_for_who_asked() -> None:
    under = streaming(include_usage=True)
    play(under, (read(text("Hello"), finish()), [wrote(text("Hello"), finish())]))
    write, *rest = fed(under, b"data: [DONE]\n\n", 0.0)
    event = event_of(write)
    assert (event["id"], event["model"], event["created"], event["choices"]) == ("c1", "heron-1", 5, [])
    assert event["usage"]["prompt_tokens"] == 10
    assert event["usage"]["completion_tokens"] == 5
    assert event["usage"]["cost_usd"] == 6e-9
    assert isinstance(write, Write)
    assert write.data.endswith(DONE)
    assert rest == [Finish(), Settled(COMPLETED, "local", 10, 5)]


def test_usage_that_only_an_unknown_member_holds_is_said_in_a_chunk_of_ours() -> None:
    under = streaming(include_usage=True)
    last = finish(x_groq={"usage": usage(12, 5)})
    write, end, *rest = fed(under, data_event(last) + DONE, 0.0)
    assert write == wrote(last)
    assert event_of(end)["usage"]["completion_tokens"] == 5
    assert rest == [Finish(), Settled(COMPLETED, "provider", 12, 5)]


def test_every_choice_is_counted() -> None:
    other = chunk(choice({"role": "assistant", "content": "Hi"}, index=1))
    both = chunk(choice({"content": "ab"}), choice({"content": "cde"}, index=1))
    play(
        streaming(choices=2),
        (read(other, both), [wrote(other, both)]),
        (read(finish()), [wrote(finish())]),
        (read(finish("length", index=1)), [wrote(finish("length", index=1))]),
        (read(DONE_EVENT), [FINISHED, Finish(), Settled(COMPLETED, "local", 10, 7)]),
    )


def test_tool_calls_are_counted_by_names_and_arguments() -> None:
    begin = chunk(choice({"tool_calls": [{"index": 0, "id": "t1", "function": {"name": "find", "arguments": ""}}]}))
    more = chunk(choice({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]}))
    play(
        streaming(),
        (read(begin, more, finish("tool_calls")), [wrote(begin, more, finish("tool_calls"))]),
        (read(DONE_EVENT), [FINISHED, Finish(), Settled(COMPLETED, "local", 10, 11)]),
    )


def test_reasoning_that_is_shown_is_counted_as_reasoning() -> None:
    thought = chunk(choice({"reasoning_content": "hmm", "reasoning": "hmm"}))
    play(
        streaming(),
        (read(thought, text("Yes"), finish()), [wrote(thought, text("Yes"), finish())]),
        (read(DONE_EVENT), [FINISHED, Finish(), Settled(COMPLETED, "local", 10, 3, 3)]),
    )


def test_usage_that_comes_thrice_is_charged_once() -> None:
    last = finish(usage=usage(12, 5))
    play(
        streaming(),
        (read(text("Hello"), last), [wrote(text("Hello"), last)]),
        (read(USAGE, USAGE), []),
        (read(DONE_EVENT), [FINISHED, Finish(), Settled(COMPLETED, "provider", 12, 5)]),
    )


def test_usage_that_grows_in_every_chunk_is_a_state() -> None:
    chunks = [text("ab", usage=usage(12, 1)), text("cd", usage=usage(12, 2)), finish(usage=usage(12, 3))]
    play(
        streaming(),
        (read(*chunks), [wrote(*chunks)]),
        (ended(), [FINISHED, Finish(), Settled(COMPLETED, "provider", 12, 3)]),
    )


def test_what_came_after_growing_usage_is_charged_on_top_where_the_stream_broke() -> None:
    counted = text("ab", usage=usage(12, 1))
    play(
        streaming(),
        (read(counted, text("cde")), [wrote(counted, text("cde"))]),
        (failed("reset"), [CANCEL, Cut(502, "upstream_error"), Finish(), Settled(BROKEN, "local", 12, 4)]),
    )


@pytest.mark.parametrize("end", [read(DONE_EVENT), ended()])
def test_a_place_holder_is_not_all_that_is_charged(end: Event) -> None:
    first = chunk(choice({"role": "assistant"}), usage=usage(12, 1))
    play(
        streaming(),
        (read(first, text("Hello"), finish()), [wrote(first, text("Hello"), finish())]),
        (end, [FINISHED, Finish(), Settled(COMPLETED, "local", 12, 6)]),
    )


def test_zeros_for_usage_are_none() -> None:
    zeros = finish(usage=usage(0, 0))
    play(
        streaming(),
        (read(text("Hello"), zeros), [wrote(text("Hello"), zeros)]),
        (ended(), [FINISHED, Finish(), Settled(COMPLETED, "local", 10, 5)]),
    )


def test_a_clean_end_after_every_finish_reason_is_complete_without_done() -> None:
    play(
        streaming(),
        (read(finish()), [wrote(finish())]),
        (ended(), [FINISHED, Finish(), Settled(COMPLETED, "local", 10)]),
    )


def test_done_is_complete_without_any_finish_reason() -> None:
    play(streaming(), (read(DONE_EVENT), [FINISHED, Finish(), Settled(COMPLETED, "local", 10)]))


def test_what_comes_after_done_is_not_forwarded() -> None:
    play(
        streaming(),
        (read(DONE_EVENT, text("more")), [FINISHED, Finish(), Settled(COMPLETED, "local", 10)]),
        (read(text("more")), []),
        (ended(), []),
        (failed("closed"), []),
        (gone(), []),
        (drained(), []),
    )
