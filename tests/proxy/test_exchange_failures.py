"""Providers that break, refuse or send garbage: what the client is told, and what it is charged."""

import json
from typing import Any

import pytest

from behest_ledger.charging import Outcome
from behest_ledger.holds import Granted
from behest_proxy.actions import (
    Begin,
    CallUpstream,
    Finish,
    Respond,
)
from behest_proxy.provider_errors import ERROR_BODY_BYTES_MAX
from behest_proxy.sse import data_event
from proxy.scripts import (
    BROKEN,
    CANCEL,
    COMPLETED,
    EVENT_STREAM,
    FINISHED,
    JSON,
    Cut,
    Failed,
    Settled,
    admitted,
    calling,
    choice,
    chunk,
    ended,
    event_of,
    exchange,
    failed,
    fed,
    finish,
    head,
    play,
    raw,
    read,
    streaming,
    text,
    usage,
    voided,
    wrote,
)


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
    cancel, write, *rest = fed(under, data_event(payload), 0.0)
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


@pytest.mark.parametrize(
    "headers", [[(b"content-type", b"text/html")], [*EVENT_STREAM, (b"content-encoding", b"gzip")]]
)
def test_a_page_or_a_compressed_answer_instead_of_a_stream_is_an_error_before_the_first_byte(headers: Any) -> None:
    play(
        calling(),
        (
            head(200, headers),
            [CANCEL, Failed(502, "server_error"), Settled(BROKEN, "none")],
        ),
        (raw(b"<html>"), []),
        (ended(), []),
    )


@pytest.mark.parametrize("headers", [[], [*EVENT_STREAM, (b"content-encoding", b"Identity")]])
def test_a_stream_without_a_content_type_or_with_no_coding_is_believed(headers: Any) -> None:
    play(calling(), (head(200, headers), [Begin()]))


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
    respond, *rest = fed(under, b"x", 0.0)
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
