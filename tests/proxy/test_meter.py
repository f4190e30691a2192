"""The meter: what is counted never passes what the credit covers with its reserve."""

import math

from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.meter import (
    GRANT_MIN_TOKENS,
    RESERVE_PER_CHOICE_TOKENS,
    RESERVE_PER_TOOL_CALL_TOKENS,
    TRANCHE_MAX_TOKENS,
    Meter,
)

TOKENS = st.integers(0, 5000)
RATIOS = st.sampled_from([1.0, 1.1, 1.234, 1.35, 2.0])


def meter(*, credit: int, ratio: float = 1.0, choices: int = 1, cap: int | None = None, metered: bool = True) -> Meter:
    return Meter(ratio=ratio, choices=choices, credit_tokens=credit, cap_tokens=cap, metered=metered)


@given(RATIOS, st.integers(1, 4), st.one_of(st.none(), TOKENS), st.booleans(), st.data())
def test_the_credit_always_covers_the_count_and_its_reserve(
    ratio: float, choices: int, cap: int | None, metered: bool, data: st.DataObject
) -> None:
    under = meter(credit=data.draw(TOKENS), ratio=ratio, choices=choices, cap=cap, metered=metered)
    for step in data.draw(st.lists(st.sampled_from(["pay", "pay", "pay", "credit", "call"]), max_size=30)):
        before = (under.output, under.reasoning)
        if step == "credit":
            under.add_credit(data.draw(TOKENS))
        elif step == "call":
            under.reserve_tool_calls(1)
            if under.required_tokens(under.counted_tokens) > under.credit_tokens:
                assert not under.pay(0)
                under.reserve_tool_calls(-1)
        else:
            output, reasoning = data.draw(st.tuples(TOKENS, st.integers(0, 50)))
            required = under.required_tokens(under.counted_tokens + output + reasoning)
            missing = under.missing_tokens(output, reasoning)
            assert under.pay(output, reasoning) is (required <= under.credit_tokens)
            if (under.output, under.reasoning) == before and output + reasoning:
                assert missing == required - under.credit_tokens
                under.add_credit(missing)
                assert under.pay(output, reasoning)
        if under.counted_tokens:
            assert under.required_tokens(under.counted_tokens) <= under.credit_tokens


@given(TOKENS, st.sampled_from([1.0, 1.1, 1.35, 2.0]), st.integers(1, 4), st.one_of(st.none(), TOKENS))
def test_what_is_required_is_the_count_by_the_ratio_and_the_reserve_but_no_more_than_can_be_billed(
    counted: int, ratio: float, choices: int, cap: int | None
) -> None:
    required = meter(credit=0, ratio=ratio, choices=choices, cap=cap).required_tokens(counted)
    whole = math.ceil(round(counted * ratio, 6)) + RESERVE_PER_CHOICE_TOKENS * choices
    assert required == (whole if cap is None or whole <= cap else max(cap, counted))
    assert required >= counted


def test_a_ratio_between_whole_percents_is_rounded_up() -> None:
    assert meter(credit=0, ratio=1.234).required_tokens(1000) == 1240 + RESERVE_PER_CHOICE_TOKENS


def test_a_tool_call_needs_a_reserve_of_its_own() -> None:
    under = meter(credit=100)
    before = under.required_tokens(10)
    under.reserve_tool_calls(2)
    assert under.required_tokens(10) == before + 2 * RESERVE_PER_TOOL_CALL_TOKENS


def test_a_worst_case_hold_needs_no_reserve() -> None:
    under = meter(credit=100, ratio=1.35, metered=False)
    under.reserve_tool_calls(3)
    assert under.pay(100)
    assert not under.pay(1)
    assert under.missing_tokens(1, 0) == 1


def test_it_runs_low_at_half_of_the_last_tranche() -> None:
    under = meter(credit=108)
    assert under.pay(46)
    assert not under.runs_low
    assert under.pay(1)
    assert under.runs_low
    under.add_credit(200)
    assert not under.runs_low


@given(TOKENS, TOKENS, TOKENS, RATIOS, st.one_of(st.none(), TOKENS))
def test_it_runs_low_exactly_when_less_than_half_a_tranche_is_left(
    first: int, second: int, count: int, ratio: float, cap: int | None
) -> None:
    under = meter(credit=first, ratio=ratio, cap=cap)
    under.add_credit(second)
    if under.pay(count) and not under.is_covered:
        left = under.credit_tokens - under.required_tokens(count)
        assert under.runs_low is (left * 2 < second)


def test_it_never_runs_low_when_all_that_can_be_billed_is_held() -> None:
    under = meter(credit=50, cap=50)
    assert under.pay(50)
    assert not under.runs_low


def test_tranches_double_up_to_their_bound() -> None:
    under = meter(credit=512)
    wants: list[int] = []
    for _ in range(7):
        wants.append(under.next_want_tokens(1))
        under.add_credit(wants[-1])
    assert wants == [1024, 2048, 4096, 8192, TRANCHE_MAX_TOKENS, TRANCHE_MAX_TOKENS, TRANCHE_MAX_TOKENS]


@given(TOKENS, st.integers(1, 40_000), st.one_of(st.none(), TOKENS))
def test_a_wish_is_never_below_the_need_nor_above_what_can_be_billed(credit: int, need: int, cap: int | None) -> None:
    want = meter(credit=credit, cap=cap).next_want_tokens(need)
    assert want >= need
    assert want <= max(need, TRANCHE_MAX_TOKENS)
    if cap is None:
        assert want >= GRANT_MIN_TOKENS
    else:
        assert want == need or credit + want <= cap
