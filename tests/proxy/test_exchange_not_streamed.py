"""Answers as a whole: put together from the provider's stream, given or charged at its end."""

import json
from typing import Any

import pytest

from behest_ledger.charging import Outcome
from behest_proxy.actions import (
    Action,
    Fail,
    Respond,
    Settle,
)
from behest_proxy.sse import data_event
from proxy.scripts import (
    BROKEN,
    CANCEL,
    CANCELLED,
    COMPLETED,
    DETAILS,
    QUOTA_EXCEEDED,
    USAGE,
    Event,
    Failed,
    Settled,
    chunk,
    clamped,
    drained,
    ended,
    failed,
    finish,
    gone,
    play,
    read,
    streaming,
    text,
    usage,
)

WHOLE: dict[str, Any] = {"streamed": False, "metered": False, "cap_tokens": 1000}


def body_of(action: Action) -> dict[str, Any]:
    assert isinstance(action, Respond)
    assert action.status == 200
    members: dict[str, Any] = json.loads(action.body)
    return members


def test_an_answer_as_a_whole_is_put_together_and_given_at_its_end() -> None:
    under = streaming(**WHOLE)
    play(under, (read(text("Hel")), []), (read(text("lo"), finish(), USAGE), []))
    respond, *rest = under.upstream_data(b"data: [DONE]\n\n", 0.0)
    body = body_of(respond)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {**usage(12, 5), "cost_usd": 6.2e-9}
    assert rest == [Settled(COMPLETED, "provider", 12, 5)]


def test_an_answer_as_a_whole_without_usage_says_what_is_charged() -> None:
    under = streaming(**WHOLE)
    play(under, (read(text("Hello"), finish()), []))
    respond, *rest = under.upstream_end(0.0)
    assert body_of(respond)["usage"]["completion_tokens"] == 5
    assert body_of(respond)["usage"]["cost_usd"] == 6e-9
    assert rest == [Settled(COMPLETED, "local", 10, 5)]


@pytest.mark.parametrize(
    ("event", "error", "outcome"),
    [
        (ended(), Failed(502, "upstream_error"), BROKEN),
        (failed("idle_timeout"), Failed(504, "upstream_timeout"), Outcome.UPSTREAM_TIMEOUT),
        (read(b"garbage"), Failed(502, "upstream_error"), BROKEN),
        (read(b'{"error": "x"}'), Failed(502, "upstream_error"), BROKEN),
        (drained(), Failed(503, "draining", 1), Outcome.DRAINING),
    ],
    ids=["half", "timeout", "garbage", "error", "draining"],
)
def test_an_answer_as_a_whole_that_breaks_is_a_status_and_charged_as_far_as_it_came(
    event: Event, error: Failed, outcome: Outcome
) -> None:
    play(
        streaming(**WHOLE),
        (read(text("Hel")), []),
        (event, [CANCEL, error, Settled(outcome, "local", 10, 3)]),
    )


def test_who_leaves_before_the_answer_as_a_whole_has_cancelled_also_after_its_finish_reason() -> None:
    play(streaming(**WHOLE), (read(text("Hel")), []), (gone(), [CANCEL, Settled(CANCELLED, "local", 10, 3)]))
    play(streaming(**WHOLE), (read(finish()), []), (gone(), [CANCEL, Settled(CANCELLED, "local", 10)]))


def test_an_answer_as_a_whole_that_our_limit_ended_is_402_with_what_there_is() -> None:
    under = clamped(streamed=False)
    play(under, (read(text("Hello", finish="length"), USAGE), []))
    cancel, fail, settle = under.upstream_data(b"data: [DONE]\n\n", 0.0)
    assert cancel == CANCEL
    assert fail == Failed(402, "quota_exceeded")
    assert isinstance(fail, Fail)
    details = json.loads(fail.error.envelope())["error"]["details"]
    partial = details.pop("partial")
    assert details == DETAILS
    assert partial["choices"][0]["message"]["content"] == "Hello"
    assert partial["choices"][0]["finish_reason"] is None
    assert partial["usage"] == {**usage(12, 5), "cost_usd": 6.2e-9}
    assert settle == Settled(QUOTA_EXCEEDED, "provider", 12, 5)


def test_an_answer_as_a_whole_that_ended_before_our_limit_was_reached_is_an_answer() -> None:
    under = clamped(streamed=False)
    play(under, (read(text("Hel", finish="length"), chunk(usage=usage(12, 3))), []))
    respond, *rest = under.upstream_data(b"data: [DONE]\n\n", 0.0)
    assert body_of(respond)["choices"][0]["finish_reason"] == "length"
    assert rest == [Settled(COMPLETED, "provider", 12, 3)]


def test_what_there_is_may_hold_half_of_a_pair() -> None:
    under = clamped(streamed=False)
    play(under, (read(text("half \ud83d", finish="length")), []))
    _, fail, _ = under.upstream_data(b"data: [DONE]\n\n", 0.0)
    assert isinstance(fail, Fail)
    assert b'"half \\ud83d"' in fail.error.envelope()


def test_an_answer_as_a_whole_that_grows_too_large_is_an_error() -> None:
    under = streaming(10**9, **{**WHOLE, "cap_tokens": 10**9})
    big = text("x" * 4_000_000)
    for _ in range(8):
        play(under, (read(big), []))
    actions = under.upstream_data(data_event(big), 0.0)
    assert actions[:2] == [CANCEL, Failed(502, "upstream_error")]
    assert isinstance(actions[-1], Settle)
