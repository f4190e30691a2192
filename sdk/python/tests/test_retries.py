"""What is tried again, how often, and after how long."""

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
from behest.retries import Retries

FATAL = [
    BehestBadRequestError,
    BehestAuthError,
    BehestQuotaError,
    BehestForbiddenError,
    BehestNotFoundError,
    BehestConflictError,
]


@pytest.mark.parametrize("error", FATAL)
def test_what_another_try_cannot_help_is_not_tried_again(error: type[BehestError]) -> None:
    assert Retries().wait_s(error("no", retry_after=1), is_safe=True) is None


def test_a_call_whose_key_is_under_way_elsewhere_is_tried_again_when_the_gateway_says() -> None:
    running = BehestConflictError("runs", code="in_progress", retry_after=1, may_retry=True)
    retries = Retries()
    assert [retries.wait_s(running, is_safe=True) for _ in range(4)] == [1.0, 1.0, 2.0, None]


def test_networks_and_servers_are_tried_again_after_half_a_second_one_and_two() -> None:
    for failure in (BehestConnectionError("cut"), BehestServerError("bad", status=502)):
        retries = Retries()
        assert [retries.wait_s(failure, is_safe=True) for _ in range(4)] == [0.5, 1.0, 2.0, None]


def test_what_gets_somewhere_may_fail_again_as_often() -> None:
    retries = Retries()
    for _ in range(3):
        retries.wait_s(BehestConnectionError("cut"), is_safe=True)
    retries.progressed()
    assert retries.wait_s(BehestConnectionError("cut"), is_safe=True) == 0.5


def test_a_rate_limit_is_obeyed_for_as_long_as_it_says_but_not_for_hours() -> None:
    assert Retries().wait_s(BehestRateLimitError("slow", retry_after=7), is_safe=False) == 7
    assert Retries().wait_s(BehestRateLimitError("slow"), is_safe=True) is None
    assert Retries().wait_s(BehestRateLimitError("slow", retry_after=3600), is_safe=True) is None


def test_a_server_that_names_a_later_time_gets_it() -> None:
    assert Retries().wait_s(BehestServerError("busy", status=503, retry_after=3), is_safe=True) == 3
    assert Retries().wait_s(BehestServerError("busy", status=503, retry_after=300), is_safe=True) is None


def test_what_may_have_been_carried_out_is_repeated_only_where_that_is_safe() -> None:
    assert Retries().wait_s(BehestConnectionError("cut"), is_safe=False) is None
    assert Retries().wait_s(BehestConnectionError("refused", request_sent=False), is_safe=False) == 0.5


def test_the_gateway_can_say_that_a_retry_will_not_help() -> None:
    assert Retries().wait_s(BehestServerError("bug", status=500, may_retry=False), is_safe=True) is None


def test_nothing_is_tried_again_where_nobody_wants_it() -> None:
    assert Retries(0).wait_s(BehestConnectionError("refused", request_sent=False), is_safe=True) is None
