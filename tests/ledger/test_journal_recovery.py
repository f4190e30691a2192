from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.charging import Outcome
from behest_ledger.holds import Admission, UsageLine, void
from behest_ledger.journal import Admitted, Progress, Unfinished, settlement_of
from behest_ledger.prices.rates import ClassRates, ContextTier, Rates
from behest_ledger.token_counts import TOKEN_CLASSES, TokenCounts

REQUEST = UUID("01998000-0000-7000-8000-000000000001")
HOLDER = UUID("11111111-2222-4333-8444-555555555555")
RATES = Rates(
    price_key="book-1/openai/gpt-4o",
    base=ClassRates.of({"input": 10, "cache_read": 1, "output": 100}),
    tiers=(ContextTier(start_input_tokens=1000, rates=ClassRates.of({"input": 20, "output": 200, "reasoning": 300})),),
    request_pico=7,
)
ADMISSION = Admission(
    tenant_id="shop",
    request_id=REQUEST,
    holder_id=HOLDER,
    attributes={"project": "shop/cart", "user": "ann"},
    price_key=RATES.price_key,
    input_tokens=60,
    input_amount_pico=600,
    output_rate_pico=100,
    need_tokens=1,
    want_tokens=512,
    shares=2,
)
COUNTS = TokenCounts(input=50, cache_read=10)


def left(progress: Progress | None, *, counts: TokenCounts = COUNTS, rates: Rates = RATES) -> Unfinished:
    admitted = Admitted.of(ADMISSION, input_counts=counts, rates=rates)
    return Unfinished(request_id=REQUEST, admitted=admitted, progress=progress, granted_tokens=512)


def line(token_class: str, quantity: int, rate_pico: int) -> UsageLine:
    return UsageLine(
        class_=token_class, quantity=quantity, rate_pico=rate_pico, amount_pico=quantity * rate_pico, source="local"
    )


INPUT_LINES = [line("input", 50, 10), line("cache_read", 10, 1)]
FEE_LINE = line("request", 1, 7)


def test_a_request_that_was_not_sent_is_void() -> None:
    settlement = settlement_of(left(Progress()))
    assert settlement is not None
    empty = void("shop", REQUEST, Outcome.CRASHED)
    assert msgspec.structs.replace(settlement, facts={}) == empty
    assert settlement.facts["recovered"] is True


def test_a_request_that_was_sent_and_not_answered_costs_its_input() -> None:
    settlement = settlement_of(left(Progress(sent=True)))
    assert settlement is not None
    assert (settlement.state, settlement.outcome, settlement.source) == ("settled", Outcome.CRASHED, "local")
    assert settlement.requests == 1
    assert settlement.lines == [*INPUT_LINES, FEE_LINE]
    assert settlement.amount_pico == 50 * 10 + 10 + 7
    assert (settlement.input_tokens, settlement.output_tokens) == (60, 0)


def test_an_answer_cut_by_a_crash_costs_its_input_and_what_was_forwarded() -> None:
    settlement = settlement_of(left(Progress(sent=True, first_byte=True, output=20, reasoning=4, chunks=9)))
    assert settlement is not None
    assert settlement.lines == [*INPUT_LINES, line("output", 20, 100), line("reasoning", 4, 100), FEE_LINE]
    assert settlement.amount_pico == sum(one.amount_pico for one in settlement.lines)
    assert (settlement.input_tokens, settlement.output_tokens) == (60, 24)
    assert settlement.facts == {
        "recovered": True,
        "chunks": 9,
        "counted_output_tokens": 24,
        "held_output_tokens": 512,
        "first_byte": True,
        "price_key": RATES.price_key,
        "holder_id": str(HOLDER),
        "attributes": {"project": "shop/cart", "user": "ann"},
    }


@pytest.mark.parametrize("progress", [Progress(output=3), Progress(reasoning=3), Progress(chunks=1, sent=True)])
def test_what_was_forwarded_is_charged_even_where_its_first_byte_was_not_noted(progress: Progress) -> None:
    settlement = settlement_of(left(progress))
    assert settlement is not None
    assert settlement.state == "settled"
    assert settlement.output_tokens == progress.output + progress.reasoning
    assert settlement.input_tokens == 60


def test_a_long_input_is_charged_by_the_tier_that_was_fixed_for_it() -> None:
    counts = TokenCounts(input=1001)
    settlement = settlement_of(left(Progress(sent=True, output=2, reasoning=1, chunks=1), counts=counts))
    assert settlement is not None
    assert [one.rate_pico for one in settlement.lines] == [20, 200, 300, 7]


def test_a_request_that_had_ended_is_settled_as_it_ended() -> None:
    own = void("shop", REQUEST, Outcome.CLIENT_CANCELLED)
    assert settlement_of(Unfinished(request_id=REQUEST, settlement=own)) is own
    assert settlement_of(msgspec.structs.replace(left(Progress(output=5)), settlement=own)) is own


def test_where_the_slot_is_lost_nothing_is_guessed() -> None:
    assert settlement_of(left(None)) is None


@given(
    st.builds(TokenCounts, **{name: st.integers(0, 10**6) for name in TOKEN_CLASSES[:3]}),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
def test_the_charge_is_what_the_pricing_function_says(counts: TokenCounts, output: int, reasoning: int) -> None:
    progress = Progress(sent=True, first_byte=True, output=output, reasoning=reasoning, chunks=1)
    settlement = settlement_of(left(progress, counts=counts))
    assert settlement is not None
    whole = msgspec.structs.replace(counts, output=output, reasoning=reasoning)
    assert settlement.amount_pico == RATES.amount_pico(whole)
    assert settlement == settlement_of(left(progress, counts=counts))
    assert msgspec.json.decode(msgspec.json.encode(settlement)) is not None
