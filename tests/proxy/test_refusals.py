"""A budget's refusal as the caller sees it."""

import json

import msgspec

from behest_ledger.holds import Refused
from behest_proxy import refusals
from behest_proxy.errors import Forbidden, QuotaExceeded, RateLimited
from proxy.scripts import DETAILS, QUOTA


def test_a_budget_that_cannot_pay_says_its_balances_in_its_unit() -> None:
    error = refusals.shown(QUOTA)
    assert isinstance(error, QuotaExceeded)
    assert error.details == DETAILS
    assert error.message == (
        "budget shop/per-session cannot pay for this: 0.9 of 1 USD are spent and 0.1 held; it resets at"
        " 2030-01-01T00:00:00Z"
    )
    assert (b"x-should-retry", b"false") in error.headers()


def test_tokens_and_requests_are_whole_numbers() -> None:
    error = refusals.shown(Refused(reason="quota", budget="b", unit="tokens", limit=50_000, spent=49_999, remaining=1))
    assert error.details is not None
    assert (error.details["limit"], error.details["remaining"], error.details["resets_at"]) == ("50000", "1", None)
    assert error.message.endswith("49999 of 50000 tokens are spent and 0 held")


def test_a_rate_may_be_tried_again_later() -> None:
    error = refusals.shown(Refused(reason="rate", budget="free", unit="requests", limit=10, spent=10, retry_after_s=42))
    assert isinstance(error, RateLimited)
    assert (error.status, error.retry_after_s) == (429, 42)
    assert error.headers() == [(b"retry-after", b"42")]
    assert refusals.shown(Refused(reason="rate")).retry_after_s == 1


def test_a_rate_that_comes_back_tomorrow_is_not_tried_again_by_itself() -> None:
    error = refusals.shown(Refused(reason="rate", unit="requests", retry_after_s=61))
    assert error.headers() == [(b"retry-after", b"61"), (b"x-should-retry", b"false")]


def test_too_many_at_once_says_how_many_run() -> None:
    error = refusals.shown(
        Refused(reason="rate", budget="demo/tier:free:concurrency", unit="concurrency", limit=2, held=2)
    )
    assert isinstance(error, RateLimited)
    assert error.message == "limit demo/tier:free:concurrency is reached: 2 of 2 requests run at once"
    assert error.headers() == [(b"retry-after", b"1"), (b"x-should-retry", b"false")]
    assert error.details == {
        "budget": "demo/tier:free:concurrency", "scope": {}, "unit": "concurrency", "limit": "2", "spent": "0",
        "held": "2", "remaining": "0", "resets_at": None,
    }  # fmt: skip


def test_what_is_suspended_is_forbidden() -> None:
    error = refusals.shown(Refused(reason="suspended", what="project", name="shop"))
    assert isinstance(error, Forbidden)
    assert error.details == {"reason": "suspended", "what": "project", "name": "shop"}


def test_what_there_is_of_the_answer_comes_with_the_refusal() -> None:
    error = refusals.shown(QUOTA, partial=msgspec.Raw(b'{"id":"c1"}'))
    assert json.loads(error.envelope())["error"]["details"] == {**DETAILS, "partial": {"id": "c1"}}
