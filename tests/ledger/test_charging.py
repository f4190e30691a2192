import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.charging import Charge, Evidence, Outcome, charge
from behest_ledger.token_counts import OUTPUT_CLASSES, TOKEN_CLASSES, TokenCounts

COUNTED = TokenCounts(input=100, cache_read=7, output=20, reasoning=3)
INPUT = TokenCounts(input=100, cache_read=7)
PROVIDER = TokenCounts(input=90, cache_read=10, output=15)
NOTHING = TokenCounts()

COUNTS = st.builds(TokenCounts, **dict.fromkeys(TOKEN_CLASSES, st.integers(0, 10**6)))
OUTPUT = st.builds(TokenCounts, **dict.fromkeys(OUTPUT_CLASSES, st.integers(0, 10**6)))
EVIDENCE = st.builds(
    Evidence,
    request_sent=st.booleans(),
    first_byte=st.booleans(),
    counted=COUNTS,
    provider=st.none() | COUNTS,
    forwarded_since_provider=st.just(NOTHING) | OUTPUT,
    hidden_tokens=st.just(0) | st.integers(0, 10**6),
)
OUTCOMES = st.sampled_from(Outcome)

STOPPED = [Outcome.CLIENT_CANCELLED, Outcome.KILLED, Outcome.DRAINING]
UPSTREAM_FAULTS = [Outcome.UPSTREAM_ERROR, Outcome.UPSTREAM_TIMEOUT]
AFTER_FIRST_BYTE = [outcome for outcome in Outcome if outcome is not Outcome.REFUSED]


def evidence(*, sent: bool = True, first_byte: bool = True, provider: TokenCounts | None = None) -> Evidence:
    return Evidence(request_sent=sent, first_byte=first_byte, counted=COUNTED, provider=provider)


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("first_byte", [False, True])
def test_what_was_not_sent_costs_nothing_and_gives_its_request_back(outcome: Outcome, first_byte: bool) -> None:
    charged = charge(outcome, evidence(sent=False, first_byte=first_byte, provider=PROVIDER))
    assert charged == Charge(counts=NOTHING, source="none", sent=False)


def test_a_refused_request_costs_nothing() -> None:
    assert charge(Outcome.REFUSED, evidence()).counts == NOTHING


@pytest.mark.parametrize("outcome", STOPPED)
def test_a_request_stopped_before_the_first_byte_costs_its_input(outcome: Outcome) -> None:
    assert charge(outcome, evidence(first_byte=False)) == Charge(counts=INPUT, source="local", sent=True)


@pytest.mark.parametrize("outcome", UPSTREAM_FAULTS)
def test_an_upstream_that_fails_before_the_first_byte_costs_no_tokens_but_a_request(outcome: Outcome) -> None:
    assert charge(outcome, evidence(first_byte=False)) == Charge(counts=NOTHING, source="none", sent=True)


@pytest.mark.parametrize("outcome", AFTER_FIRST_BYTE)
def test_without_usage_what_was_forwarded_is_charged_whatever_the_end(outcome: Outcome) -> None:
    assert charge(outcome, evidence()) == Charge(counts=COUNTED, source="local", sent=True)


@pytest.mark.parametrize("outcome", AFTER_FIRST_BYTE)
def test_the_providers_usage_wins_whatever_the_end_even_when_it_is_lower(outcome: Outcome) -> None:
    assert charge(outcome, evidence(provider=PROVIDER)) == Charge(counts=PROVIDER, source="provider", sent=True)


def test_the_providers_usage_counts_even_if_it_came_before_the_first_byte_of_output() -> None:
    charged = charge(Outcome.UPSTREAM_ERROR, evidence(first_byte=False, provider=PROVIDER))
    assert charged == Charge(counts=PROVIDER, source="provider", sent=True)


def test_what_was_forwarded_after_the_last_cumulative_usage_is_added_to_it() -> None:
    since = TokenCounts(output=4, reasoning=1, audio_output=2)
    told = msgspec.structs.replace(evidence(provider=PROVIDER), forwarded_since_provider=since)
    charged = charge(Outcome.CLIENT_CANCELLED, told)
    assert charged.counts == TokenCounts(input=90, cache_read=10, output=19, reasoning=1, audio_output=2)
    assert charged.source == "local"


def test_a_cut_stream_with_hidden_output_is_charged_an_estimate_of_it() -> None:
    hidden = msgspec.structs.replace(evidence(), hidden_tokens=50)
    cut = charge(Outcome.CLIENT_CANCELLED, hidden)
    assert (cut.counts.reasoning, cut.counts.output, cut.source) == (53, 20, "estimate")
    early = charge(Outcome.CLIENT_CANCELLED, msgspec.structs.replace(hidden, first_byte=False))
    assert (early.counts, early.source) == (TokenCounts(input=100, cache_read=7, reasoning=50), "estimate")
    assert charge(Outcome.COMPLETED, hidden) == Charge(counts=COUNTED, source="local", sent=True)
    told = msgspec.structs.replace(hidden, provider=PROVIDER)
    assert charge(Outcome.CLIENT_CANCELLED, told).counts == PROVIDER


@given(OUTCOMES, EVIDENCE)
def test_nobody_is_ever_charged_more_than_there_is_evidence_for(outcome: Outcome, found: Evidence) -> None:
    charged = charge(outcome, found)
    since = found.forwarded_since_provider
    for name in TOKEN_CLASSES:
        most = getattr(found.counted, name) + (found.hidden_tokens if name == "reasoning" else 0)
        if found.provider is not None:
            most = getattr(found.provider, name) + getattr(since, name)
        assert 0 <= getattr(charged.counts, name) <= most


@given(OUTCOMES, EVIDENCE)
def test_something_is_charged_only_for_what_was_sent_and_says_who_counted(outcome: Outcome, found: Evidence) -> None:
    charged = charge(outcome, found)
    assert charged.sent == found.request_sent
    if charged.source == "none":
        assert charged.counts == NOTHING
    if not found.request_sent or outcome is Outcome.REFUSED:
        assert charged.source == "none"
    elif found.provider is not None:
        assert charged.source == ("local" if found.forwarded_since_provider.output_tokens else "provider")
    else:
        assert charged.source != "provider"


@given(OUTCOMES, EVIDENCE, st.integers(0, 10**6))
def test_more_forwarded_never_costs_less(outcome: Outcome, found: Evidence, more: int) -> None:
    longer = msgspec.structs.replace(
        found, counted=msgspec.structs.replace(found.counted, output=found.counted.output + more)
    )
    assert charge(outcome, longer).counts.output_tokens >= charge(outcome, found).counts.output_tokens
