"""The decisions of one request, as scripts: what happens, and what is done about it."""

import json
from typing import Any

import pytest

from behest_ledger.charging import Outcome
from behest_ledger.holds import Gone, Granted
from behest_ledger.token_counts import TokenCounts
from behest_proxy.actions import (
    Action,
    AskCredit,
    Begin,
    CallUpstream,
    CancelUpstream,
    Fail,
    Finish,
    Linger,
    Pause,
    Respond,
    Resume,
    Settle,
    Write,
)
from behest_proxy.errors import Forbidden
from behest_proxy.exchange import Exchange, Phase
from behest_proxy.provider_errors import ERROR_BODY_BYTES_MAX
from behest_proxy.sse import DONE, data_event
from proxy.scripts import (
    DETAILS,
    DONE_EVENT,
    EVENT_STREAM,
    FINISHED,
    JSON,
    QUOTA,
    ROLE,
    SUSPENDED,
    USAGE,
    Cut,
    Event,
    Failed,
    Settled,
    admitted,
    choice,
    chunk,
    credited,
    drained,
    ended,
    exchange,
    failed,
    finish,
    gone,
    granted,
    head,
    lingered,
    play,
    raw,
    read,
    sent,
    streaming,
    text,
    usage,
    voided,
    wrote,
)

COMPLETED = Outcome.COMPLETED
CANCELLED = Outcome.CLIENT_CANCELLED
BROKEN = Outcome.UPSTREAM_ERROR
NO_LEDGER = Outcome.LEDGER_UNAVAILABLE
QUOTA_EXCEEDED = Outcome.QUOTA_EXCEEDED

CANCEL = CancelUpstream()


def event_of(action: Action) -> dict[str, Any]:
    """The JSON of the first event of a write."""
    assert isinstance(action, Write)
    members: dict[str, Any] = json.loads(action.data.removeprefix(b"data: ").partition(b"\n\n")[0])
    return members


# --- plain streams ---------------------------------------------------------------------------------------------


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
    play(streaming(), (raw(event[:30]), []), (raw(event[30:]), [Write(event)]))


def test_comments_ids_and_blank_events_are_dropped_and_the_framing_is_ours() -> None:
    data = b": ping\n\nid: 7\r\nretry: 5\r\nevent: message\r\ndata:" + text("Hi") + b"\r\n\r\ndata: \n\ndata:\n\n"
    play(streaming(), (raw(data), [wrote(text("Hi"))]))


def test_usage_that_was_asked_for_is_forwarded_with_its_cost() -> None:
    under = streaming(include_usage=True)
    play(under, (read(text("Hello"), finish()), [wrote(text("Hello"), finish())]))
    (write,) = under.upstream_data(data_event(USAGE), 0.0)
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
    write, *rest = under.upstream_data(b"data: [DONE]\n\n", 0.0)
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
    write, end, *rest = under.upstream_data(data_event(last) + DONE, 0.0)
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


# --- providers that break --------------------------------------------------------------------------------------


def test_half_a_stream_ends_with_an_error_and_never_as_if_it_were_whole() -> None:
    play(
        streaming(),
        (read(text("Hel")), [wrote(text("Hel"))]),
        (ended(), [CANCEL, Cut(502, "upstream_error"), Finish(), Settled(BROKEN, "local", 10, 3)]),
    )


def test_one_of_two_choices_that_did_not_finish_makes_half_a_stream() -> None:
    other = text("x", index=1)
    play(
        streaming(choices=2),
        (read(other, finish()), [wrote(other, finish())]),
        (ended(), [CANCEL, Cut(502, "upstream_error"), Finish(), Settled(BROKEN, "local", 10, 1)]),
    )


def test_a_last_event_without_its_blank_line_counts() -> None:
    play(
        streaming(),
        (raw(data_event(finish()) + b"data: [DONE]"), [wrote(finish())]),
        (ended(), [FINISHED, Finish(), Settled(COMPLETED, "local", 10)]),
    )


@pytest.mark.parametrize("garbage", [b"<html>", b"{", b"7", b"[]", b"null", b'"text"', b"\xff\xfe", b"[DONE"])
def test_garbage_breaks_the_stream_after_what_came_before_it(garbage: bytes) -> None:
    play(
        streaming(),
        (
            read(text("Hel"), garbage, text("lo")),
            [wrote(text("Hel")), CANCEL, Cut(502, "upstream_error"), Finish(), Settled(BROKEN, "local", 10, 3)],
        ),
    )


@pytest.mark.parametrize("error", [{"message": "overloaded", "code": 529}, "overloaded", {"message": "half \ud83d"}])
def test_an_error_in_the_stream_becomes_the_terminal_event(error: Any) -> None:
    payload = json.dumps({"error": error}).encode()
    message = "overloaded" if "overloaded" in str(error) else "half ?"
    under = streaming()
    cancel, write, *rest = under.upstream_data(data_event(payload), 0.0)
    assert cancel == CANCEL
    assert write == Cut(502, "upstream_error")
    assert event_of(write)["error"]["details"]["upstream"]["message"] == message
    assert rest == [Finish(), Settled(BROKEN, "local", 10)]


@pytest.mark.parametrize("payload", [b'{"message": "no"}', text("no"), b"no"])
def test_an_event_named_error_becomes_the_terminal_event_whatever_it_holds(payload: bytes) -> None:
    play(
        streaming(),
        (
            raw(b"event: error\ndata: " + payload + b"\n\n"),
            [CANCEL, Cut(502, "upstream_error"), Finish(), Settled(BROKEN, "local", 10)],
        ),
    )


def test_usage_inside_an_error_counts() -> None:
    payload = chunk(choice(finish="error"), error={"message": "no"}, usage=usage(12, 5))
    play(
        streaming(),
        (read(payload), [CANCEL, Cut(502, "upstream_error"), Finish(), Settled(BROKEN, "provider", 12, 5)]),
    )


def test_an_event_that_is_too_large_breaks_the_stream() -> None:
    play(
        streaming(),
        (
            raw(b"data: " + b"x" * (5 * 1024 * 1024)),
            [CANCEL, Cut(502, "upstream_error"), Finish(), Settled(BROKEN, "local", 10)],
        ),
    )


def test_more_choices_than_anybody_asks_for_break_the_stream() -> None:
    many = chunk(*(choice({"content": "x"}, index=index) for index in range(200)))
    play(
        streaming(),
        (read(many), [CANCEL, Cut(502, "upstream_error"), Finish(), Settled(BROKEN, "local", 10)]),
    )


def calling(**changes: Any) -> Exchange:
    under = exchange(**changes)
    play(under, (admitted(Granted(output_tokens=500)), [CallUpstream()]), (sent(), []))
    return under


def test_a_page_instead_of_a_stream_is_an_error_before_the_first_byte() -> None:
    play(
        calling(),
        (
            head(200, [(b"content-type", b"text/html")]),
            [CANCEL, Failed(502, "server_error"), Settled(BROKEN, "none")],
        ),
        (raw(b"<html>"), []),
        (ended(), []),
    )


def test_a_stream_without_a_content_type_is_believed() -> None:
    play(calling(), (head(200, []), [Begin()]))


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
def test_a_providers_refusal_of_the_request_goes_on_as_it_came(status: int) -> None:
    body = b'{"error": {"message": "context too long", "code": "context_length_exceeded"}}'
    play(
        calling(),
        (head(status, JSON), []),
        (raw(body[:20]), []),
        (raw(body[20:]), []),
        (ended(), [Respond(status, body), CANCEL, Settled(Outcome.REFUSED, "none")]),
    )


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_of_our_key_is_not_the_callers_fault(status: int) -> None:
    play(
        calling(),
        (head(status, JSON), []),
        (raw(b'{"error": {"message": "bad key sk-123"}}'), []),
        (ended(), [CANCEL, Failed(502, "server_error"), Settled(Outcome.REFUSED, "none")]),
    )


def test_the_providers_rate_limit_is_said_with_its_time() -> None:
    play(
        calling(),
        (head(429, [*JSON, (b"retry-after", b"17")]), []),
        (ended(), [CANCEL, Failed(429, "upstream_rate_limited", 17), Settled(Outcome.REFUSED, "none")]),
    )


@pytest.mark.parametrize("status", [500, 502, 503, 529])
def test_a_provider_that_fails_is_an_error_that_costs_nothing(status: int) -> None:
    play(
        calling(),
        (head(status, JSON), []),
        (failed("reset"), [CANCEL, Failed(502, "server_error"), Settled(BROKEN, "none")]),
    )


def test_an_endless_refusal_is_read_up_to_its_bound() -> None:
    under = calling()
    play(under, (head(400), []), (raw(b"x" * ERROR_BODY_BYTES_MAX), []))
    respond, *rest = under.upstream_data(b"x", 0.0)
    assert isinstance(respond, Respond)
    assert respond.status == 400
    assert rest == [CANCEL, Settled(Outcome.REFUSED, "none")]


TIMEOUTS = ["connect_timeout", "first_byte_timeout", "idle_timeout"]
BREAKS = ["connect", "tls", "refused_stream", "reset", "closed", "protocol"]


@pytest.mark.parametrize("kind", TIMEOUTS + BREAKS)
def test_a_failure_before_the_providers_answer_is_a_status(kind: str) -> None:
    late = kind in TIMEOUTS
    error = Failed(504, "upstream_timeout") if late else Failed(502, "server_error")
    outcome = Outcome.UPSTREAM_TIMEOUT if late else BROKEN
    play(calling(), (failed(kind), [CANCEL, error, Settled(outcome, "none")]))


@pytest.mark.parametrize("kind", TIMEOUTS + BREAKS)
def test_a_failure_after_the_head_is_a_terminal_event_also_before_the_first_byte(kind: str) -> None:
    late = kind in TIMEOUTS
    error = Cut(504, "upstream_timeout") if late else Cut(502, "upstream_error")
    outcome = Outcome.UPSTREAM_TIMEOUT if late else BROKEN
    play(calling(), (head(200), [Begin()]), (failed(kind), [CANCEL, error, Finish(), Settled(outcome, "none")]))


@pytest.mark.parametrize("kind", TIMEOUTS + BREAKS)
def test_a_failure_in_the_stream_is_a_terminal_event_and_what_was_forwarded_is_charged(kind: str) -> None:
    late = kind in TIMEOUTS
    error = Cut(504, "upstream_timeout") if late else Cut(502, "upstream_error")
    outcome = Outcome.UPSTREAM_TIMEOUT if late else BROKEN
    play(
        streaming(),
        (read(text("Hel")), [wrote(text("Hel"))]),
        (failed(kind), [CANCEL, error, Finish(), Settled(outcome, "local", 10, 3)]),
    )


def test_a_failure_before_the_request_was_sent_costs_nothing() -> None:
    under = exchange()
    play(
        under,
        (admitted(Granted(output_tokens=500)), [CallUpstream()]),
        (failed("connect"), [CANCEL, Failed(502, "server_error"), voided(BROKEN)]),
    )


# --- admission -------------------------------------------------------------------------------------------------


def test_a_refused_admission_holds_nothing_and_settles_nothing() -> None:
    under = exchange()
    (fail,) = under.admitted(QUOTA, 0.0)
    assert fail == Failed(402, "quota_exceeded")
    assert isinstance(fail, Fail)
    assert fail.error.details == DETAILS
    assert under.phase is Phase.ENDED


def test_a_suspended_budget_forbids() -> None:
    play(exchange(), (admitted(SUSPENDED), [Failed(403, "forbidden")]))


@pytest.mark.parametrize("answer", [None, Gone()])
def test_an_admission_without_an_answer_is_voided_because_a_hold_may_exist(answer: Gone | None) -> None:
    play(exchange(), (admitted(answer), [Failed(503, "ledger_unavailable", 1), voided(NO_LEDGER)]))


@pytest.mark.parametrize("answer", [Granted(output_tokens=500), None])
def test_a_client_that_leaves_while_admitting_gives_its_hold_back(answer: Granted | None) -> None:
    outcome = CANCELLED if answer else NO_LEDGER
    play(exchange(), (gone(), []), (admitted(answer), [voided(outcome)]), (sent(), []))


def test_a_client_that_leaves_while_it_is_refused_has_nothing_to_give_back() -> None:
    play(exchange(), (gone(), []), (admitted(QUOTA), []))


def test_a_stop_while_admitting_ends_the_request_as_soon_as_the_hold_is_known() -> None:
    play(
        exchange(),
        (drained(), []),
        (admitted(Granted(output_tokens=500)), [Failed(503, "draining", 1), voided(Outcome.DRAINING)]),
    )


# --- budgets ---------------------------------------------------------------------------------------------------


def short(**changes: Any) -> Exchange:
    """A stream with credit for 92 characters besides its reserve of 8, of which 90 are used; it has asked ahead."""
    under = streaming(100, **changes)
    wrote_it = [wrote(text("x" * 90))] if changes.get("streamed", True) else []
    play(under, (read(text("x" * 90)), [*wrote_it, AskCredit(1, 200, is_short=False)]))
    return under


def test_the_next_tranche_is_asked_for_at_half_of_the_last_one() -> None:
    play(
        streaming(100),
        (read(text("x" * 42)), [wrote(text("x" * 42))]),
        (read(text("x")), [wrote(text("x")), AskCredit(1, 200, is_short=False)]),
        (read(text("x")), [wrote(text("x"))]),
        (granted(200), []),
        (read(text("x" * 105)), [wrote(text("x" * 105))]),
        (read(text("x" * 80)), [wrote(text("x" * 80)), AskCredit(1, 400, is_short=False)]),
    )


def test_a_chunk_that_the_credit_does_not_reach_is_kept_and_goes_on_once_it_does() -> None:
    play(
        streaming(100),
        (
            read(text("a" * 40), text("b" * 60), text("c")),
            [wrote(text("a" * 40)), Pause(), AskCredit(8, 200, is_short=True)],
        ),
        (read(text("d")), []),
        (granted(200), [wrote(text("b" * 60), text("c"), text("d")), Resume()]),
    )


def test_a_grant_that_is_still_too_small_is_asked_for_again() -> None:
    play(
        streaming(100),
        (read(text("b" * 150)), [Pause(), AskCredit(58, 200, is_short=True)]),
        (granted(8), [Pause(), AskCredit(50, 50, is_short=True)]),
        (granted(50), [wrote(text("b" * 150)), AskCredit(1, 100, is_short=False), Resume()]),
    )


def test_a_refusal_of_what_is_needed_cuts_the_stream() -> None:
    play(
        short(),
        (credited(QUOTA), []),
        (read(text("abc"), text("d")), [Pause(), AskCredit(1, 200, is_short=True)]),
        (
            credited(QUOTA),
            [
                CANCEL,
                Cut(402, "quota_exceeded", details=DETAILS, type="insufficient_quota", param=None),
                Finish(),
                Settled(QUOTA_EXCEEDED, "local", 10, 90),
            ],
        ),
    )


def test_a_refusal_of_what_was_asked_ahead_of_need_is_not_final() -> None:
    play(
        short(),
        (read(text("abc")), [Pause()]),
        (credited(QUOTA), [AskCredit(1, 200, is_short=True)]),
        (granted(200), [wrote(text("abc")), Resume()]),
    )


def test_a_refused_early_question_is_not_asked_again_until_it_is_short() -> None:
    play(
        short(),
        (credited(QUOTA), []),
        (read(text("ab")), [wrote(text("ab"))]),
        (read(text("c")), [Pause(), AskCredit(1, 200, is_short=True)]),
        (granted(16), [wrote(text("c")), Resume()]),
        (read(text("x" * 10)), [wrote(text("x" * 10)), AskCredit(1, 32, is_short=False)]),
    )


def test_no_answer_to_an_early_question_is_not_final_either() -> None:
    play(short(), (credited(None), []), (read(text("ab")), [wrote(text("ab"))]))


def test_no_answer_to_what_is_needed_ends_the_stream_because_nothing_is_spent_without_a_ledger() -> None:
    play(
        short(),
        (read(text("abc")), [Pause()]),
        (credited(None), [AskCredit(1, 200, is_short=True)]),
        (
            credited(None),
            [CANCEL, Cut(503, "ledger_unavailable"), Finish(), Settled(NO_LEDGER, "local", 10, 90)],
        ),
    )


def test_a_hold_that_is_gone_ends_the_stream_at_once() -> None:
    play(
        short(),
        (
            credited(Gone()),
            [CANCEL, Cut(503, "ledger_unavailable"), Finish(), Settled(NO_LEDGER, "local", 10, 90)],
        ),
    )


def test_a_budget_that_was_suspended_kills_the_stream() -> None:
    play(
        short(),
        (credited(QUOTA), []),
        (read(text("abc")), [Pause(), AskCredit(1, 200, is_short=True)]),
        (
            credited(SUSPENDED),
            [CANCEL, Cut(403, "forbidden"), Finish(), Settled(Outcome.KILLED, "local", 10, 90)],
        ),
    )


def test_an_answer_that_nobody_asked_for_adds_nothing() -> None:
    play(
        streaming(100),
        (granted(10**6), []),
        (credited(QUOTA), []),
        (read(text("x" * 93)), [Pause(), AskCredit(1, 200, is_short=True)]),
    )


def test_a_tool_call_needs_credit_for_the_framing_that_nobody_sees() -> None:
    begin = chunk(choice({"tool_calls": [{"index": 0, "id": "t1", "function": {"name": "f", "arguments": ""}}]}))
    play(
        streaming(50),
        (read(begin), [Pause(), AskCredit(7, 100, is_short=True)]),
        (granted(7), [wrote(begin), AskCredit(1, 16, is_short=False), Resume()]),
    )


def test_the_end_of_the_provider_waits_for_the_chunk_that_waits_for_credit() -> None:
    play(
        streaming(100),
        (read(text("b" * 100), finish()), [Pause(), AskCredit(8, 200, is_short=True)]),
        (ended(), []),
        (
            granted(200),
            [wrote(text("b" * 100), finish()), FINISHED, Finish(), Settled(COMPLETED, "local", 10, 100)],
        ),
    )


def test_a_failure_of_the_provider_waits_for_the_chunk_that_waits_for_credit() -> None:
    play(
        streaming(100),
        (read(text("b" * 100)), [Pause(), AskCredit(8, 200, is_short=True)]),
        (failed("reset"), []),
        (
            granted(200),
            [
                wrote(text("b" * 100)),
                CANCEL,
                Cut(502, "upstream_error"),
                Finish(),
                Settled(BROKEN, "local", 10, 100),
            ],
        ),
    )


def test_done_among_what_waits_for_credit_completes_once_it_is_there() -> None:
    play(
        streaming(100),
        (read(text("b" * 100), finish(), USAGE, DONE_EVENT), [Pause(), AskCredit(8, 200, is_short=True)]),
        (
            granted(200),
            [wrote(text("b" * 100), finish()), FINISHED, Finish(), Settled(COMPLETED, "provider", 12, 5)],
        ),
    )


def test_a_client_that_leaves_while_a_chunk_waits_is_not_charged_for_it() -> None:
    play(
        streaming(100),
        (read(text("abc"), text("b" * 100)), [wrote(text("abc")), Pause(), AskCredit(11, 200, is_short=True)]),
        (gone(), [CANCEL, Settled(CANCELLED, "local", 10, 3)]),
        (granted(200), []),
    )


def test_no_more_than_the_callers_own_limit_has_to_be_held() -> None:
    play(
        streaming(20, cap_tokens=20),
        (read(text("x" * 19)), [wrote(text("x" * 19))]),
        (read(text("x")), [wrote(text("x"))]),
        (read(text("x")), [Pause(), AskCredit(1, 1, is_short=True)]),
    )


# --- worst case ------------------------------------------------------------------------------------------------

CLAMPED: dict[str, Any] = {"metered": False, "clamp_tokens": 50, "cap_tokens": 50}


def clamped(**changes: Any) -> Exchange:
    under = exchange(**CLAMPED, **changes)
    play(
        under,
        (admitted(Granted(output_tokens=50, bound_by=QUOTA)), [CallUpstream()]),
        (sent(), []),
        (head(200), [Begin()] if changes.get("streamed", True) else []),
    )
    return under


def test_a_stream_that_our_limit_ended_is_no_answer_of_that_length_but_a_budgets_end() -> None:
    under = clamped()
    write, *rest = under.upstream_data(data_event(text("Hello", finish="length")), 0.0)
    assert rest == []
    assert event_of(write) == json.loads(text("Hello"))
    play(
        under,
        (read(USAGE), []),
        (
            read(DONE_EVENT),
            [
                CANCEL,
                Cut(402, "quota_exceeded", details=DETAILS),
                Finish(),
                Settled(QUOTA_EXCEEDED, "provider", 12, 5),
            ],
        ),
    )


def test_a_choice_that_stopped_by_itself_keeps_its_finish_reason() -> None:
    under = clamped(choices=2)
    both = chunk(choice({"content": "a"}, finish="stop"), choice({"content": "b"}, index=1, finish="length"))
    (write,) = under.upstream_data(data_event(both), 0.0)
    assert [each["finish_reason"] for each in event_of(write)["choices"]] == ["stop", None]


def test_chunks_after_a_rewritten_one_are_not_touched() -> None:
    under = clamped(choices=2)
    under.upstream_data(data_event(finish("length")), 0.0)
    play(under, (read(text("x", index=1)), [wrote(text("x", index=1))]))
    play(under, (read(finish(index=1)), [wrote(finish(index=1))]))


def test_the_callers_own_limit_is_an_ordinary_end() -> None:
    under = exchange(metered=False, cap_tokens=50)
    play(
        under,
        (admitted(Granted(output_tokens=50)), [CallUpstream()]),
        (sent(), []),
        (head(200), [Begin()]),
        (read(finish("length")), [wrote(finish("length"))]),
        (read(DONE_EVENT), [FINISHED, Finish(), Settled(COMPLETED, "local", 10)]),
    )


def test_hidden_output_that_was_cut_short_is_estimated_within_the_hold() -> None:
    def cut_after(seconds: float) -> Settle:
        under = calling(metered=False, cap_tokens=500, hidden_tokens_per_second=20)
        play(under, (head(200), [Begin()]), (read(text("Hel")), [wrote(text("Hel"))]))
        settle = under.client_gone(seconds)[-1]
        assert isinstance(settle, Settle)
        return settle

    assert cut_after(2.0).charge.counts == TokenCounts(input=10, output=3, reasoning=40)
    assert cut_after(2.0).charge.source == "estimate"
    assert cut_after(1000.0).charge.counts == TokenCounts(input=10, output=3, reasoning=497)


# --- clients that leave ----------------------------------------------------------------------------------------


def test_a_client_that_leaves_before_the_request_was_sent_pays_nothing() -> None:
    under = exchange()
    play(
        under,
        (admitted(Granted(output_tokens=500)), [CallUpstream()]),
        (gone(), [CANCEL, voided(CANCELLED)]),
        (head(200), []),
        (read(text("x")), []),
    )


def test_a_client_that_leaves_before_the_first_byte_pays_the_input() -> None:
    play(calling(), (gone(), [CANCEL, Settled(CANCELLED, "local", 10)]))
    play(calling(), (head(200), [Begin()]), (gone(), [CANCEL, Settled(CANCELLED, "local", 10)]))


def test_a_client_that_leaves_while_the_provider_refuses_pays_the_input_only_if_it_was_sent() -> None:
    play(calling(), (head(400), []), (gone(), [CANCEL, Settled(CANCELLED, "local", 10)]))


def test_a_client_that_leaves_in_the_stream_pays_what_was_forwarded() -> None:
    play(
        streaming(),
        (read(text("Hel")), [wrote(text("Hel"))]),
        (gone(), [CANCEL, Settled(CANCELLED, "local", 10, 3)]),
        (read(text("lo")), []),
        (gone(), []),
    )


def test_a_client_that_leaves_with_every_finish_reason_has_completed_and_its_usage_is_waited_for() -> None:
    play(
        streaming(),
        (read(text("Hello"), finish()), [wrote(text("Hello"), finish())]),
        (gone(), [Linger()]),
        (gone(), []),
        (read(text("more")), []),
        (read(USAGE, DONE_EVENT), [Settled(COMPLETED, "provider", 12, 5)]),
        (lingered(), []),
    )


@pytest.mark.parametrize(
    "event",
    [ended(), failed("reset"), drained(), read(b"garbage"), read(b'{"error": "x"}'), raw(b"x" * 5_000_000), lingered()],
)
def test_whatever_becomes_of_the_provider_after_that_it_has_completed(event: Event) -> None:
    under = streaming()
    play(under, (read(text("Hello"), finish()), [wrote(text("Hello"), finish())]), (gone(), [Linger()]))
    assert event(under)[-1] == Settled(COMPLETED, "local", 10, 5)
    assert under.phase is Phase.ENDED


def test_a_usage_that_does_not_come_in_time_is_not_waited_for() -> None:
    play(
        streaming(),
        (read(finish()), [wrote(finish())]),
        (lingered(), []),
        (gone(), [Linger()]),
        (lingered(), [CANCEL, Settled(COMPLETED, "local", 10)]),
    )


def test_a_client_that_leaves_after_one_of_two_finish_reasons_has_cancelled() -> None:
    play(
        streaming(choices=2),
        (read(finish()), [wrote(finish())]),
        (gone(), [CANCEL, Settled(CANCELLED, "local", 10)]),
    )


def test_a_client_that_leaves_after_our_limit_ended_its_answer_was_out_of_quota() -> None:
    under = clamped()
    under.upstream_data(data_event(finish("length")), 0.0)
    play(under, (gone(), [Linger()]), (read(DONE_EVENT), [CANCEL, Settled(QUOTA_EXCEEDED, "local", 10)]))


def test_what_waits_for_credit_after_the_last_finish_reason_is_read_for_its_usage_only() -> None:
    play(
        streaming(100),
        (
            read(finish(), text("b" * 100), USAGE),
            [wrote(finish()), Pause(), AskCredit(8, 200, is_short=True)],
        ),
        (ended(), []),
        (gone(), [Linger(), Settled(COMPLETED, "provider", 12, 5)]),
    )


# --- answers as a whole ----------------------------------------------------------------------------------------

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


# --- ends from outside -----------------------------------------------------------------------------------------


def test_a_drain_ends_a_request_in_every_phase() -> None:
    draining = Outcome.DRAINING
    error = Failed(503, "draining", 1)
    play(calling(), (drained(), [CANCEL, error, Settled(draining, "local", 10)]))
    play(calling(), (head(500), []), (drained(), [CANCEL, error, Settled(draining, "local", 10)]))
    play(
        streaming(),
        (read(text("Hel")), [wrote(text("Hel"))]),
        (drained(), [CANCEL, Cut(503, "draining"), Finish(), Settled(draining, "local", 10, 3)]),
        (drained(), []),
    )
    play(
        streaming(100),
        (read(text("b" * 100)), [Pause(), AskCredit(8, 200, is_short=True)]),
        (drained(), [CANCEL, Cut(503, "draining"), Finish(), Settled(draining, "local", 10)]),
    )


def test_a_suspended_project_kills_its_streams() -> None:
    error = Forbidden("the project is suspended", details={"reason": "suspended"})
    under = streaming()
    assert under.stop(Outcome.KILLED, error, 0.0) == [
        CANCEL,
        Cut(403, "forbidden", details={"reason": "suspended"}),
        Finish(),
        Settled(Outcome.KILLED, "local", 10),
    ]


def test_the_facts_of_an_end_explain_it() -> None:
    under = streaming()
    under.upstream_data(data_event(text("Hello")) + data_event(finish("st\x00p" + "x" * 100)), 0.0)
    settle = under.upstream_data(DONE, 0.0)[-1]
    assert isinstance(settle, Settle)
    assert settle.facts == {
        "chunks": 3,
        "finish_reasons": ["st\\x00p" + "x" * 36],
        "counted_output_tokens": 5,
        "held_output_tokens": 1000,
    }


def test_events_that_cannot_come_in_a_phase_change_nothing() -> None:
    under = exchange()
    play(
        under,
        (sent(), []),
        (head(200, EVENT_STREAM), []),
        (read(text("x")), []),
        (ended(), []),
        (failed("reset"), []),
        (lingered(), []),
        (granted(5), []),
    )
    assert under.phase is Phase.ADMITTING
    under = streaming()
    play(under, (admitted(Granted(output_tokens=5)), []), (head(500), []), (lingered(), []))
    assert under.phase is Phase.STREAMING
