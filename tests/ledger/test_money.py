from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.money import (
    MoneyError,
    pico_from_usd,
    rate_pico_from_usd_per_million,
    usd_from_pico,
    usd_per_million_from_rate_pico,
)


@pytest.mark.parametrize(
    ("usd", "pico"), [("0", 0), ("1", 10**12), ("0.50", 5 * 10**11), ("0.000000000001", 1), ("1e3", 10**15)]
)
def test_an_amount_in_usd_is_a_whole_number_of_pico_usd(usd: str, pico: int) -> None:
    assert pico_from_usd(usd) == pico


def test_the_cheapest_published_rate_is_exact() -> None:
    # 3.625 nano-USD for a cached token: nano-USD would round it away.
    assert rate_pico_from_usd_per_million("0.003625") == 3625
    assert usd_per_million_from_rate_pico(3625) == "0.003625"


@pytest.mark.parametrize("text", ["", "x", "NaN", "Infinity", "-1", "-0.1", "0.0000000000001", "1e16", "1e999999"])
def test_what_is_no_whole_amount_is_refused(text: str) -> None:
    with pytest.raises(MoneyError):
        pico_from_usd(text)


@pytest.mark.parametrize(
    ("pico", "usd"), [(0, "0"), (1, "0.000000000001"), (15 * 10**11, "1.5"), (-15 * 10**11, "-1.5"), (10**13, "10")]
)
def test_an_amount_is_shown_without_trailing_zeros(pico: int, usd: str) -> None:
    assert usd_from_pico(pico) == usd


@given(st.integers(0, 10**27))
def test_what_is_shown_can_be_read_back(pico: int) -> None:
    assert pico_from_usd(usd_from_pico(pico)) == pico


@given(st.integers(0, 10**15), st.integers(0, 10**6))
def test_a_price_times_tokens_never_rounds(rate_pico: int, tokens: int) -> None:
    exact = Decimal(usd_per_million_from_rate_pico(rate_pico)) * tokens
    assert Decimal(usd_from_pico(rate_pico * tokens)) * 10**6 == exact
