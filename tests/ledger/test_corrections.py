"""Corrections as values: which quantity at which rate."""

from uuid import UUID

import pytest

from behest_ledger.corrections import Correction, CorrectionError, corrected_lines
from behest_ledger.holds import UsageLine
from behest_ledger.prices.rates import ClassRates, ContextTier, Rates

CHEAP = ClassRates.of({"input": 3, "output": 10})
DEAR = ClassRates.of({"input": 6, "output": 20})
RATES = Rates(
    price_key="1/p/m#0", base=CHEAP, tiers=(ContextTier(start_input_tokens=100, rates=DEAR),), request_pico=50
)


def line(name: str, quantity: int, rate: int) -> UsageLine:
    return UsageLine(class_=name, quantity=quantity, rate_pico=rate, amount_pico=quantity * rate, source="local")


CHARGED = {"input": line("input", 5, 4), "output": line("output", 7, 9), "request": line("request", 1, 50)}


def corrected(rates: Rates | None = RATES, **what: object) -> list[tuple[str, int, int, str]]:
    correction = Correction(place="line 1", request_id=UUID(int=1), correction_id="i", reason="r", **what)  # type: ignore[arg-type]
    lines = corrected_lines(CHARGED, correction, rates)
    assert all(one.amount_pico == one.quantity * one.rate_pico for one in lines)
    return [(one.class_, one.quantity, one.rate_pico, one.source) for one in lines]


def test_a_class_is_charged_anew_at_the_rate_of_the_price_key_and_the_others_stay() -> None:
    assert corrected(quantities={"output": 8}) == [
        ("input", 5, 4, "local"), ("output", 8, 10, "provider"), ("request", 1, 50, "local"),
    ]  # fmt: skip


def test_a_complete_usage_replaces_every_token_and_no_fee() -> None:
    assert corrected(quantities={"input": 101, "reasoning": 2}, complete=True) == [
        ("input", 101, 6, "provider"), ("reasoning", 2, 20, "provider"), ("request", 1, 50, "local"),
    ]  # fmt: skip


def test_without_a_book_the_rate_of_the_charge_holds_and_a_given_rate_always_does() -> None:
    assert corrected(None, quantities={"output": 8, "input": 0}) == [
        ("output", 8, 9, "provider"), ("request", 1, 50, "local"),
    ]  # fmt: skip
    assert corrected(quantities={"output": 8}, rates_pico={"output": 1})[1] == ("output", 8, 1, "provider")
    assert corrected(quantities={"request": 2})[2] == ("request", 2, 50, "provider")


def test_a_class_without_any_rate_is_an_error_that_says_what_to_give() -> None:
    with pytest.raises(CorrectionError, match=r"^line 1: rate_pico: .* no known rate for reasoning; give one$"):
        corrected(None, quantities={"reasoning": 8})
