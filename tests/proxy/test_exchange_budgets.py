"""Admission, tranches of credit, and clamped worst cases: nothing is forwarded that was not paid before."""

import json
from typing import Any

import pytest

from behest_ledger.charging import Outcome
from behest_ledger.holds import Gone, Granted
from behest_ledger.token_counts import TokenCounts
from behest_proxy.actions import (
    AskCredit,
    Begin,
    CallUpstream,
    Fail,
    Finish,
    Pause,
    Resume,
    Settle,
    Write,
)
from behest_proxy.exchange import Exchange
from behest_proxy.sse import DONE, data_event
from behest_proxy.terms import Phase
from proxy.scripts import (
    BROKEN,
    CANCEL,
    CANCELLED,
    COMPLETED,
    DETAILS,
    DONE_EVENT,
    FINISHED,
    NO_LEDGER,
    QUOTA,
    QUOTA_EXCEEDED,
    SUSPENDED,
    USAGE,
    Cut,
    Event,
    Failed,
    Settled,
    admitted,
    calling,
    choice,
    chunk,
    clamped,
    credited,
    drained,
    ended,
    event_of,
    exchange,
    failed,
    fed,
    finish,
    gone,
    granted,
    head,
    play,
    read,
    sent,
    streaming,
    text,
    usage,
    voided,
    wrote,
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


def test_a_stream_that_our_limit_ended_is_no_answer_of_that_length_but_a_budgets_end() -> None:
    under = clamped()
    write, *rest = fed(under, data_event(text("Hello", finish="length")), 0.0)
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


SHORT = chunk(usage=usage(12, 3))
"""Less than the limit: the model's context was full, or something of the provider's own ended it."""


def test_a_stream_that_ended_before_our_limit_was_reached_ends_for_its_length() -> None:
    under = clamped()
    play(under, (read(text("Hel")), [wrote(text("Hel"))]))
    (write,) = fed(under, data_event(finish("length")), 0.0)
    assert event_of(write)["choices"][0]["finish_reason"] is None
    play(under, (read(SHORT), []))
    write, *rest = fed(under, data_event(DONE_EVENT), 0.0)
    assert isinstance(write, Write)
    end, done = write.data.split(b"\n\n", 1)
    members = json.loads(end.removeprefix(b"data: "))
    assert members["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
    assert members["id"] == json.loads(text("Hel"))["id"]
    assert done == DONE
    assert rest == [Finish(), Settled(COMPLETED, "provider", 12, 3)]


def test_two_choices_reach_our_limit_only_where_both_used_it() -> None:
    for used, outcome in ((10, QUOTA_EXCEEDED), (8, QUOTA_EXCEEDED), (7, COMPLETED)):
        under = clamped(choices=2)
        fed(under, data_event(finish("length")) + data_event(finish("length", index=1)), 0.0)
        fed(under, data_event(chunk(usage=usage(12, used))), 0.0)
        *_, settle = fed(under, data_event(DONE_EVENT), 0.0)
        assert settle == Settled(outcome, "provider", 12, used)


def test_a_choice_that_stopped_by_itself_keeps_its_finish_reason() -> None:
    under = clamped(choices=2)
    both = chunk(choice({"content": "a"}, finish="stop"), choice({"content": "b"}, index=1, finish="length"))
    (write,) = fed(under, data_event(both), 0.0)
    assert [each["finish_reason"] for each in event_of(write)["choices"]] == ["stop", None]


def test_chunks_after_a_rewritten_one_are_not_touched() -> None:
    under = clamped(choices=2)
    fed(under, data_event(finish("length")), 0.0)
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


@pytest.mark.parametrize(("told", "charged"), [((5000, 39), (5000, 39)), ((20_000, 141), (10_000, 40))])
@pytest.mark.parametrize(("end", "outcome"), [(credited(QUOTA), QUOTA_EXCEEDED), (gone(), CANCELLED)])
def test_usage_that_waits_behind_text_nobody_paid_for_is_charged_as_far_as_that_was_passed_on(
    end: Event, outcome: Outcome, told: tuple[int, int], charged: tuple[int, int]
) -> None:
    under = streaming(100)
    fed(under, data_event(text("a" * 40)), 0.0)
    fed(under, data_event(text("a" * 101)) + data_event(finish()) + data_event(chunk(usage=usage(*told))), 0.0)
    *_, settle = end(under)
    assert settle == Settled(outcome, "provider", *charged)


def test_hidden_output_that_was_cut_short_is_estimated_within_the_hold() -> None:
    def cut_after(seconds: float) -> Settle:
        under = calling(metered=False, cap_tokens=500, hidden_tokens_per_second=20)
        play(under, (head(200), [Begin()]), (read(text("Hel")), [wrote(text("Hel"))]))
        settle = under.client_gone(seconds)[-1]
        assert isinstance(settle, Settle)
        return settle

    assert cut_after(2.0).charge.counts == TokenCounts(input=10, output=3, reasoning=37)
    assert cut_after(2.0).charge.source == "estimate"
    assert cut_after(1000.0).charge.counts == TokenCounts(input=10, output=3, reasoning=497)
    assert cut_after(0.1).charge.counts == TokenCounts(input=10, output=3)


def test_a_model_that_thinks_is_charged_an_estimate_also_when_it_was_left_before_its_first_byte() -> None:
    under = calling(metered=False, cap_tokens=500, hidden_tokens_per_second=20)
    assert under.client_gone(2.0)[-1] == Settled(CANCELLED, "estimate", 10, 0, 40)
