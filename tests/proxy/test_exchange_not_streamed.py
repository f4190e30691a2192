"""Answers as a whole: put together from the provider's stream, given or charged at its end."""

import json
from typing import Any

import pytest

from behest_ledger.charging import Outcome
from behest_ledger.holds import Granted
from behest_proxy.actions import Action, Begin, CallUpstream, Fail, Finish, Respond, Settle, Write
from behest_proxy.exchange import Exchange
from behest_proxy.sse import data_event
from proxy.scripts import (
    BROKEN,
    CANCEL,
    CANCELLED,
    COMPLETED,
    DETAILS,
    EVENT_STREAM,
    JSON,
    QUOTA,
    QUOTA_EXCEEDED,
    USAGE,
    Cut,
    Event,
    Failed,
    Settled,
    admitted,
    chunk,
    clamped,
    drained,
    ended,
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
    respond, *rest = fed(under, b"data: [DONE]\n\n", 0.0)
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
    cancel, fail, settle = fed(under, b"data: [DONE]\n\n", 0.0)
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
    respond, *rest = fed(under, b"data: [DONE]\n\n", 0.0)
    assert body_of(respond)["choices"][0]["finish_reason"] == "length"
    assert rest == [Settled(COMPLETED, "provider", 12, 3)]


def test_what_there_is_may_hold_half_of_a_pair() -> None:
    under = clamped(streamed=False)
    play(under, (read(text("half \ud83d", finish="length")), []))
    _, fail, _ = fed(under, b"data: [DONE]\n\n", 0.0)
    assert isinstance(fail, Fail)
    assert b'"half \\ud83d"' in fail.error.envelope()


def test_an_answer_as_a_whole_that_grows_too_large_is_an_error() -> None:
    under = streaming(10**9, **{**WHOLE, "cap_tokens": 10**9})
    big = text("x" * 4_000_000)
    for _ in range(8):
        play(under, (read(big), []))
    actions = fed(under, data_event(big), 0.0)
    assert actions[:2] == [CANCEL, Failed(502, "upstream_error")]
    assert isinstance(actions[-1], Settle)


# --- providers that do not stream ------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"upstream_streams": False, "metered": False, "cap_tokens": 1000}


def answered(content: str = "Hello", *, reason: str = "stop", used: int | None = 5) -> bytes:
    members: dict[str, Any] = {
        "id": "c1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason}],
    }
    if used is not None:
        members["usage"] = usage(12, used)
    return json.dumps(members).encode()


def plainly(granted_tokens: int = 1000, *, streamed: bool = True, **changes: Any) -> Exchange:
    under = exchange(streamed=streamed, **{**PLAIN, **changes})
    play(
        under,
        (admitted(Granted(output_tokens=granted_tokens, bound_by=QUOTA)), [CallUpstream()]),
        (sent(), []),
        (head(200, JSON), [Begin()] if streamed else []),
    )
    return under


def streamed_to_client(actions: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    writes = b"".join(action.data for action in actions if isinstance(action, Write))
    *events, done, nothing = writes.split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    return [json.loads(event.removeprefix(b"data: ")) for event in events], [
        action for action in actions if not isinstance(action, Write)
    ]


def test_a_whole_answer_reaches_a_client_that_asked_for_a_stream_as_chunks() -> None:
    under = plainly(include_usage=True)
    body = answered()
    play(under, (raw(body[:20]), []), (raw(body[20:]), []))
    events, rest = streamed_to_client(under.upstream_end(0.0))
    assert [event["choices"][0]["delta"] if event["choices"] else None for event in events] == [
        {"role": "assistant", "content": "Hello"},
        {},
        None,
    ]
    assert events[1]["choices"][0]["finish_reason"] == "stop"
    assert events[2]["usage"] == {**usage(12, 5), "cost_usd": 6.2e-9}
    assert rest == [Finish(), Settled(COMPLETED, "provider", 12, 5)]


def test_a_client_that_did_not_ask_for_usage_gets_none() -> None:
    under = plainly()
    play(under, (raw(answered()), []))
    events, _ = streamed_to_client(under.upstream_end(0.0))
    assert len(events) == 2


def test_a_whole_answer_stays_whole_for_a_client_that_wants_it_so() -> None:
    under = plainly(streamed=False)
    play(under, (raw(answered()), []))
    respond, *rest = under.upstream_end(0.0)
    body = body_of(respond)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}
    assert body["usage"] == {**usage(12, 5), "cost_usd": 6.2e-9}
    assert rest == [Settled(COMPLETED, "provider", 12, 5)]


def test_a_whole_answer_without_usage_is_counted() -> None:
    under = plainly()
    play(under, (raw(answered(used=None)), []))
    assert under.upstream_end(0.0)[-1] == Settled(COMPLETED, "local", 10, 5)


def test_a_whole_answer_is_not_cut_where_we_count_more_than_its_provider() -> None:
    under = plainly(granted_tokens=5)
    play(under, (raw(answered("Hello, this is long")), []))
    assert under.upstream_end(0.0)[-1] == Settled(COMPLETED, "provider", 12, 5)


def test_a_whole_answer_that_our_limit_ended_is_a_budgets_end_and_one_that_ended_sooner_is_not() -> None:
    for used, outcome in ((5, QUOTA_EXCEEDED), (3, COMPLETED)):
        under = plainly(granted_tokens=5, clamp_tokens=5, cap_tokens=5)
        play(under, (raw(answered("Hel", reason="length", used=used)), []))
        assert under.upstream_end(0.0)[-1] == Settled(outcome, "provider", 12, used)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("body", [b"", b"{", b'{"choices": []}', b'{"error": {"message": "no"}}'])
def test_a_whole_answer_that_is_none_is_an_error(body: bytes, streamed: bool) -> None:
    under = plainly(streamed=streamed)
    fed(under, body, 0.0)
    cancel, *shown, settle = under.upstream_end(0.0)
    assert cancel == CANCEL
    assert shown == ([Cut(502, "upstream_error"), Finish()] if streamed else [Failed(502, "upstream_error")])
    assert settle == Settled(BROKEN, "local", 10)


def test_a_whole_answer_that_is_a_stream_after_all_is_an_error() -> None:
    under = exchange(**PLAIN)
    play(under, (admitted(Granted(output_tokens=1000)), [CallUpstream()]), (sent(), []))
    cancel, fail, _ = under.upstream_head(200, EVENT_STREAM, 0.0)
    assert cancel == CANCEL
    assert fail == Failed(502, "server_error")


def test_a_whole_answer_without_an_end_of_its_size_is_an_error() -> None:
    under = plainly()
    piece = b"x" * (1 << 20)
    for _ in range(32):
        assert fed(under, piece, 0.0) == []
    cancel, cut, finish_, settle = fed(under, piece, 0.0)
    assert (cancel, finish_) == (CANCEL, Finish())
    assert cut == Cut(502, "upstream_error")
    assert settle == Settled(BROKEN, "local", 10)


def test_who_leaves_before_a_whole_answer_came_pays_its_input() -> None:
    play(plainly(), (gone(), [CANCEL, Settled(CANCELLED, "local", 10)]))
