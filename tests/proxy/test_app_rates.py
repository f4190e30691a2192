from datetime import UTC, datetime, timedelta

import pytest

from behest_ledger.holds import Gone, Granted, Rate, Refused
from behest_proxy.app.rates import rate_headers

NOW = datetime(2026, 4, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (timedelta(seconds=0.2), b"1s"),
        (timedelta(seconds=-3), b"0s"),
        (timedelta(seconds=60), b"1m0s"),
        (timedelta(hours=11, minutes=2, seconds=3), b"11h2m3s"),
    ],
)
def test_the_time_until_a_reset_is_written_as_openai_writes_it(left: timedelta, text: bytes) -> None:
    rate = Rate(unit="tokens", limit=5, remaining=3, resets_at=NOW + left)
    assert rate_headers(Granted(output_tokens=1, rates=(rate,)), NOW) == [
        (b"x-ratelimit-limit-tokens", b"5"),
        (b"x-ratelimit-remaining-tokens", b"3"),
        (b"x-ratelimit-reset-tokens", text),
    ]


def test_of_several_rates_the_one_with_least_left_is_told() -> None:
    rates = tuple(Rate(unit="requests", limit=limit, remaining=limit - 7) for limit in (100, 10))
    assert rate_headers(Granted(output_tokens=1, rates=rates), NOW) == [
        (b"x-ratelimit-limit-requests", b"10"),
        (b"x-ratelimit-remaining-requests", b"3"),
    ]


def test_without_a_tier_nothing_is_told() -> None:
    refused = Refused(reason="quota", budget="demo/it", unit="requests", limit=3)
    for answer in (None, Gone(), Granted(output_tokens=1), refused):
        assert rate_headers(answer, NOW) == []
