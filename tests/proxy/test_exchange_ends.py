"""Clients that leave, and ends from outside: who pays for what in which phase."""

import pytest

from behest_ledger.charging import Outcome
from behest_ledger.holds import Granted
from behest_proxy.actions import (
    AskCredit,
    Begin,
    CallUpstream,
    Finish,
    Linger,
    Pause,
    Settle,
)
from behest_proxy.errors import Forbidden
from behest_proxy.sse import DONE, data_event
from behest_proxy.terms import Phase
from proxy.scripts import (
    CANCEL,
    CANCELLED,
    COMPLETED,
    DONE_EVENT,
    EVENT_STREAM,
    QUOTA_EXCEEDED,
    USAGE,
    Cut,
    Event,
    Failed,
    Settled,
    admitted,
    calling,
    clamped,
    drained,
    ended,
    exchange,
    failed,
    fed,
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
    voided,
    wrote,
)

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
    fed(under, data_event(finish("length")), 0.0)
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
    fed(under, data_event(text("Hello")) + data_event(finish("st\x00p" + "x" * 100)), 0.0)
    settle = fed(under, DONE, 0.0)[-1]
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
