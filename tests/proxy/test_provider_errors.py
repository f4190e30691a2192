"""A provider's refusals and failures as the caller sees them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.errors import ShownError, UpstreamError, UpstreamTimeout
from behest_proxy.provider_errors import (
    RETRY_AFTER_S_MAX,
    PassedThrough,
    ProviderRefused,
    UpstreamRateLimited,
    failed,
    refused,
    reported,
)

ENVELOPE = b'{"error": {"message": "no such model", "code": "model_not_found"}}'


def test_a_refusal_in_an_envelope_goes_on_to_the_letter() -> None:
    assert refused(404, [], ENVELOPE) == PassedThrough(404, ENVELOPE)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": "no"}', b'{"detail": "no"}', b"\xff", b"[" * 9999])
def test_a_refusal_without_an_envelope_gets_one(body: bytes) -> None:
    answer = refused(422, [], body)
    assert isinstance(answer, PassedThrough)
    assert answer.status == 422
    error = json.loads(answer.body)["error"]
    assert error["code"] == "upstream_refused"
    assert set(error) == {"code", "message", "type", "param"}
    assert error["message"].endswith(": no" if b'"error": "no"' in body else "it gave no reason")


@pytest.mark.parametrize("status", [301, 304, 401, 403, 407, 500, 503, 599])
def test_what_is_not_the_callers_fault_says_nothing_of_the_providers_body(status: int) -> None:
    answer = refused(status, [(b"retry-after", b"5")], b'{"error": {"message": "key sk-1 is bad"}}')
    assert isinstance(answer, ProviderRefused)
    assert (answer.status, answer.shown_code) == (502, "server_error")
    assert "sk-1" not in answer.envelope().decode()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"7", 7),
        (b"0", 0),
        (b"999999", RETRY_AFTER_S_MAX),
        (b"9" * 9000, RETRY_AFTER_S_MAX),
        (b"soon", 1),
        (b"-5", 1),
        (b"", 1),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_rate_limit_says_when_to_come_again(value: bytes, seconds: int) -> None:
    answer = refused(429, [(b"retry-after", value)], b'{"error": {"message": "slow down"}}')
    assert isinstance(answer, UpstreamRateLimited)
    assert (answer.status, answer.shown_code, answer.retry_after_s) == (429, "upstream_rate_limited", seconds)
    assert "slow down" in answer.message
    assert (b"retry-after", b"%d" % max(1, seconds)) in answer.headers()


def test_a_message_is_cut_at_its_bound() -> None:
    answer = refused(429, [], json.dumps({"error": {"message": "x" * 10_000}}).encode())
    assert isinstance(answer, ShownError)
    assert len(answer.message) < 600


@pytest.mark.parametrize("kind", ["connect_timeout", "first_byte_timeout", "idle_timeout"])
def test_a_provider_that_is_too_slow_is_a_timeout(kind: str) -> None:
    assert isinstance(failed(kind, in_stream=False), UpstreamTimeout)
    assert isinstance(failed(kind, in_stream=True), UpstreamTimeout)


def test_a_call_that_broke_has_a_code_of_its_own_inside_a_stream() -> None:
    assert failed("reset", in_stream=True).shown_code == "upstream_error"
    assert failed("reset", in_stream=False).shown_code == "server_error"


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters())),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["message", "code", "type", "x"]), inner)
    ),
    max_leaves=5,
)


@given(ANYTHING)
def test_whatever_a_provider_reports_can_be_shown(error: Any) -> None:
    shown = reported(error)
    assert isinstance(shown, UpstreamError)
    event = json.loads(shown.terminal_event().removeprefix(b"data: ").partition(b"\n\n")[0])
    assert event["error"]["code"] == "upstream_error"
    assert set(event["error"].get("details", {}).get("upstream", {})) <= {"code", "type", "message"}
