"""Answers and terminal events become the errors that their statuses mean."""

import json
import pickle

import pytest

from behest import (
    BehestAuthError,
    BehestBadRequestError,
    BehestConflictError,
    BehestConnectionError,
    BehestError,
    BehestForbiddenError,
    BehestNotFoundError,
    BehestQuotaError,
    BehestRateLimitError,
    BehestServerError,
)
from behest.errors import answer_error, event_error

CLASSES = {
    400: BehestBadRequestError,
    401: BehestAuthError,
    402: BehestQuotaError,
    403: BehestForbiddenError,
    404: BehestNotFoundError,
    405: BehestBadRequestError,
    409: BehestConflictError,
    413: BehestBadRequestError,
    429: BehestRateLimitError,
    500: BehestServerError,
    502: BehestServerError,
    503: BehestServerError,
    504: BehestServerError,
}
HEADERS = {"x-trace-id": "t", "x-request-id": "r", "retry-after": "3", "x-should-retry": "false"}


@pytest.mark.parametrize(("status", "expected"), CLASSES.items())
def test_each_status_has_its_class_before_a_stream_and_in_it(status: int, expected: type[BehestError]) -> None:
    members = {"code": "some_code", "message": "so", "param": "n", "details": {"budget": "a/b"}, "status": status}
    answered = answer_error(status, HEADERS, json.dumps({"error": members}).encode())
    assert type(answered) is expected
    assert (answered.status, answered.code, answered.param) == (status, "some_code", "n")
    assert (answered.trace_id, answered.request_id, answered.retry_after) == ("t", "r", 3)
    assert (answered.details, answered.message, answered.may_retry) == ({"budget": "a/b"}, "so", False)
    told = event_error(members, HEADERS)
    assert type(told) is expected
    assert (told.status, told.code, told.trace_id, told.details) == (status, "some_code", "t", {"budget": "a/b"})
    assert told.may_retry is None, "the headers of a stream say nothing about its end"


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>Bad Gateway</html>", b"[]", b'{"error": "text"}', b'{"error": {"code": 7, "details": []}}', b"\xff"],
)
def test_an_answer_that_is_not_the_gateways_is_an_error_too(body: bytes) -> None:
    error = answer_error(502, {}, body)
    assert type(error) is BehestServerError
    assert (error.status, error.code, error.details) == (502, None, {})
    assert "502" in str(error)


@pytest.mark.parametrize("text", ["Wed, 21 Oct 2026 07:28:00 GMT", "-1", "1.5", "", "9" * 5000])
def test_only_whole_seconds_are_a_time_to_wait(text: str) -> None:
    assert answer_error(429, {"retry-after": text}, b"").retry_after is None


@pytest.mark.parametrize("status", [None, 200, True, "402", 700])
def test_a_terminal_event_without_a_status_is_the_servers_fault(status: object) -> None:
    error = event_error({"code": "x", "message": "y", "status": status}, {})
    assert (type(error), error.status, error.code) == (BehestServerError, 500, "x")


def test_errors_survive_being_pickled() -> None:
    error = answer_error(402, HEADERS, b'{"error": {"code": "quota_exceeded", "message": "gone", "details": {"a": 1}}}')
    error.partial_text = "so far"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is BehestQuotaError
    assert vars(again) == vars(error)
    cut = pickle.loads(pickle.dumps(BehestConnectionError("cut", request_sent=False)))
    assert (cut.code, cut.request_sent) == ("network_error", False)


def test_a_redirect_is_an_error() -> None:
    assert type(answer_error(302, {}, b"")) is BehestError
