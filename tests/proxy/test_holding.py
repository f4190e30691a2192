"""What is held before a request is sent: always enough for what the provider may bill."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.prices.rates import ClassRates, ContextTier, Rates
from behest_proxy.holding import METERED_SHARES, UNKNOWN_LIMIT_TOKENS, WORST_CASE_SHARES, HoldPlan, limit_for, plan
from behest_proxy.meter import FIRST_TRANCHE_TOKENS, Meter
from behest_proxy.models import ModelFacts
from behest_proxy.request import ChatRequest, InputCount, parse

RATES = Rates(
    price_key="k",
    base=ClassRates.of({"input": 2, "cache_write": 3, "output": 8, "reasoning": 9}),
    tiers=(ContextTier(start_input_tokens=1000, rates=ClassRates.of({"input": 5, "output": 20})),),
    request_pico=7,
)
VISIBLE = ModelFacts(visible_only=True, output_limit_tokens=4096)
HIDING = ModelFacts(output_limit_tokens=4096)
LIMITS = st.one_of(st.none(), st.integers(1, 100_000))


def request(*, stream: bool = True, choices: int = 1, limit: int | None = None) -> ChatRequest:
    members = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream, "n": choices, "max_tokens": limit}
    return parse(msgspec.json.encode(members))


def planned(
    facts: ModelFacts, *, stream: bool = True, choices: int = 1, limit: int | None = None, input_tokens: int = 10
) -> HoldPlan:
    count = InputCount(best_tokens=input_tokens, bound_tokens=input_tokens, exact=True)
    return plan(request(stream=stream, choices=choices, limit=limit), facts, RATES, count)


def test_what_is_seen_in_full_is_held_in_tranches() -> None:
    hold = planned(VISIBLE)
    assert hold.metered
    assert (hold.need_tokens, hold.want_tokens, hold.shares) == (16, FIRST_TRANCHE_TOKENS, METERED_SHARES)
    assert hold.limit_tokens is None


def test_hidden_output_and_answers_as_a_whole_are_held_at_their_worst() -> None:
    for hold in (planned(HIDING), planned(VISIBLE, stream=False)):
        assert not hold.metered
        assert (hold.want_tokens, hold.shares, hold.limit_tokens) == (4096, WORST_CASE_SHARES, 4096)
    assert planned(HIDING, limit=100, choices=2).want_tokens == 200
    assert planned(ModelFacts(), choices=3).want_tokens == 3 * UNKNOWN_LIMIT_TOKENS


def test_a_limit_of_the_caller_that_no_model_reaches_holds_what_the_model_can_give() -> None:
    assert planned(HIDING, limit=2**31 - 1).want_tokens == 4096


def test_the_input_is_held_at_the_dearest_rate_that_the_answer_can_carry() -> None:
    hold = planned(VISIBLE)
    assert (hold.input_tokens, hold.input_amount_pico, hold.output_rate_pico) == (10, 10 * 3 + 7, 9)
    hold = planned(VISIBLE, input_tokens=1001)
    assert (hold.input_amount_pico, hold.output_rate_pico) == (1001 * 5 + 7, 20)


@given(st.booleans(), st.booleans(), st.integers(1, 128), LIMITS, LIMITS)
def test_a_need_is_within_its_wish_and_lets_every_choice_begin(
    visible: bool, stream: bool, choices: int, limit: int | None, model_limit: int | None
) -> None:
    facts = ModelFacts(visible_only=visible, output_limit_tokens=model_limit)
    hold = planned(facts, stream=stream, choices=choices, limit=limit)
    assert 1 <= hold.need_tokens <= hold.want_tokens
    assert hold.need_tokens >= choices
    if limit is not None:
        assert hold.want_tokens <= limit * choices


@given(st.booleans(), st.booleans(), st.integers(1, 128), LIMITS, LIMITS, st.data())
def test_the_hold_covers_whatever_the_provider_may_bill(
    visible: bool, stream: bool, choices: int, limit: int | None, model_limit: int | None, data: st.DataObject
) -> None:
    facts = ModelFacts(visible_only=visible, output_limit_tokens=model_limit)
    hold = planned(facts, stream=stream, choices=choices, limit=limit)
    granted = data.draw(st.integers(hold.need_tokens, hold.want_tokens))
    output = limit_for(hold, granted_tokens=granted, choices=choices)
    if hold.metered:
        # The provider is told nothing; the meter covers every token before it goes on.
        assert (output.send_tokens, output.lowered_by_budget) == (None, False)
        assert output.cap_tokens == (None if limit is None else limit * choices)
        under = Meter(ratio=1.0, choices=choices, credit_tokens=granted, cap_tokens=output.cap_tokens, metered=True)
        assert under.pay(1) or output.cap_tokens is not None
        return
    assert output.cap_tokens is not None
    assert output.cap_tokens <= granted
    told = output.send_tokens if output.send_tokens is not None else hold.limit_tokens
    assert told is not None
    assert told * choices == output.cap_tokens
    if output.send_tokens is not None and hold.limit_tokens is not None:
        assert output.send_tokens <= hold.limit_tokens
    assert output.lowered_by_budget is (granted < hold.want_tokens)
