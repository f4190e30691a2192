import datetime as dt
import itertools
from decimal import Decimal

import msgspec
import pytest
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ConditionalPrice, ModelInfo
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.configuration.kinds import ModelEntry, Prices
from behest_ledger.prices.book import (
    CACHE_ENTRIES_MAX,
    BookDocument,
    Condition,
    ModelPrices,
    PriceBook,
    PriceSheet,
    ProviderPrices,
    TieredRate,
    read_document,
)
from behest_ledger.prices.manifest import prices_from_manifest
from behest_ledger.prices.matching import Equals, StartsWith
from behest_ledger.prices.rates import ClassRates, ContextTier, Rates
from behest_ledger.prices.snapshot import compile_package_book, rate_pico
from behest_ledger.token_counts import TOKEN_CLASSES, TokenCounts

BOOK = compile_package_book()
NOW = dt.datetime(2026, 11, 22, 12, tzinfo=dt.UTC)


def resolved(provider: str | None, model: str, **context: str) -> Rates:
    rates = BOOK.resolve(provider, model, at=NOW, context=context)
    assert rates is not None
    return rates


# Values that can be read on the providers' price pages


@pytest.mark.parametrize(
    ("provider", "model", "input_pico", "cached_pico", "output_pico"),
    [
        ("openai", "gpt-4o-mini", 150_000, 75_000, 600_000),
        ("openai", "gpt-4o-mini-2024-07-18", 150_000, 75_000, 600_000),
        ("openai", "GPT-4o", 2_500_000, 1_250_000, 10_000_000),
        (None, "gpt-4o-mini", 150_000, 75_000, 600_000),
        (None, "o3", 2_000_000, 500_000, 8_000_000),
        ("anthropic", "claude-sonnet-4-5", 3_000_000, 300_000, 15_000_000),
        ("google", "gemini-2.5-flash", 300_000, 30_000, 2_500_000),
    ],
)
def test_known_prices_are_whole_pico_usd(
    provider: str | None, model: str, input_pico: int, cached_pico: int, output_pico: int
) -> None:
    rates = resolved(provider, model)
    assert (rates.base.input, rates.base.cache_read, rates.base.output) == (input_pico, cached_pico, output_pico)
    assert not rates.free


def test_a_thousand_tokens_of_gpt_4o_mini_cost_what_a_person_computes() -> None:
    counts = TokenCounts(input=1000, cache_read=200, output=300, reasoning=50)
    # 0.15, 0.075 and 0.60 USD per million: 150 + 15 + 180 + 30 micro-USD.
    assert resolved("openai", "gpt-4o-mini").amount_pico(counts) == 375 * 10**6


def test_anthropics_cache_writes_cost_more_and_longer_ones_more_still() -> None:
    assert resolved("anthropic", "claude-sonnet-4-5").base.cache_write == 3_750_000
    assert resolved("anthropic", "claude-sonnet-4-5", cache_ttl="1h").base.cache_write == 6_000_000
    assert resolved("anthropic", "claude-sonnet-4-5").dearest_within(1)[0] >= 3_750_000


def test_a_service_tier_is_another_price_and_not_the_base() -> None:
    base, priority = resolved("openai", "gpt-4o-mini"), resolved("openai", "gpt-4o-mini", service_tier="priority")
    assert (priority.base.input, priority.base.output) == (250_000, 1_000_000)
    assert priority.price_key != base.price_key
    assert resolved("openai", "gpt-4o-mini", service_tier="default") == base
    assert resolved("openai", "gpt-4o-mini", service_tier="unheard-of") == base


def test_a_long_input_costs_more_from_the_first_token_on() -> None:
    rates = resolved("google", "gemini-2.5-pro")
    assert rates.at(200_000).input == 1_250_000
    assert rates.at(200_001).input == 2_500_000
    assert rates.at(200_001).output == 15_000_000
    assert rates.dearest_within(200_000) == (1_250_000, 10_000_000)
    assert rates.dearest_within(200_001) == (2_500_000, 15_000_000)


def test_a_class_without_a_price_has_that_of_its_direction() -> None:
    rates = resolved("openai", "gpt-4o-mini")
    assert rates.stated == ("input", "cache_read", "output")
    assert rates.base.cache_write == rates.base.audio_input == rates.base.input
    assert rates.base.reasoning == rates.base.audio_output == rates.base.output


def test_a_model_that_nobody_prices_has_no_rates() -> None:
    assert BOOK.resolve("openai", "gpt-0-imaginary", at=NOW) is None
    assert BOOK.resolve(None, "llama-of-our-own", at=NOW) is None
    assert BOOK.resolve("no-such-provider", "gpt-4o", at=NOW) is None
    assert BOOK.resolve("openai", "gpt-4o" * 100, at=NOW) is None
    # Listed without any price, and listed with a price for input alone.
    assert BOOK.resolve("google", "gemma-3", at=NOW) is None
    assert BOOK.resolve("openai", "text-embedding-3-small", at=NOW) is None


def test_a_resold_model_has_the_price_of_its_maker() -> None:
    reseller = BOOK.find("azure", "o3-pro")
    assert reseller is not None
    assert BOOK.resolve("azure", "o3-pro", at=NOW) is not None


@pytest.mark.parametrize(
    ("url", "provider"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://api.anthropic.com/v1", "anthropic"),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "google"),
        ("https://openrouter.ai/api/v1", "openrouter"),
        ("https://api.openai.com.evil.example/v1", None),
        ("http://127.0.0.1:9000/v1", None),
        ("", None),
    ],
)
def test_a_base_url_tells_the_provider(url: str, provider: str | None) -> None:
    # The package's patterns are not anchored at the end: a look-alike host is priced as what it looks like.
    assert BOOK.provider_for_url(url) == provider


# The whole snapshot


def test_every_model_of_the_snapshot_compiles_and_is_found_as_the_package_finds_it() -> None:
    snapshot = get_snapshot()
    for provider in snapshot.providers:
        for model in provider.models:
            try:
                _, wanted = snapshot.find_provider_model(model.id, None, provider.id, None)
            except LookupError:
                assert BOOK.find(provider.id, model.id) is None
            else:
                found = BOOK.find(provider.id, model.id)
                assert found is not None, model.id
                assert found[1].id == wanted.id


def test_every_rate_of_the_snapshot_is_the_published_one_to_a_pico_usd() -> None:
    for provider in get_snapshot().providers:
        for model in provider.models:
            rates = BOOK.resolve(provider.id, model.id, at=NOW)
            found = BOOK.find(provider.id, model.id)
            if rates is None or found is None or found[1].id != model.id or found[0] != provider.id:
                continue
            published = model.get_prices(NOW)
            for name in ("input", "output", "cache_read", "cache_write"):
                price = getattr(published, f"{name}_mtok")
                if price is None:
                    assert name not in rates.stated
                    continue
                base = price if isinstance(price, Decimal) else price.base
                exact = base * 10**6
                assert exact - Decimal("0.001") <= rates.base.rate_pico(name) < exact + 1, (provider.id, model.id)


def test_the_books_prices_are_those_that_the_package_computes() -> None:
    """For usage that both can express: one pico-USD of difference per token at most, from rounding up."""
    counts = TokenCounts(input=150_000, cache_read=90_000, output=7_000)
    for provider, model in (("openai", "gpt-5"), ("google", "gemini-2.5-pro"), ("anthropic", "claude-opus-4-5")):
        info = _package_model(provider, model)
        usage = {"input_tokens": counts.input_tokens, "cache_read_tokens": 90_000, "output_tokens": 7_000}
        total = info.get_prices(NOW).calc_price(usage)["total_price"]
        assert resolved(provider, model).amount_pico(counts) == int(total * 10**12)


def _package_model(provider: str, model: str) -> ModelInfo:
    return get_snapshot().find_provider_model(model, None, provider, None)[1]


def test_float_noise_is_undone_and_what_does_not_divide_is_rounded_up() -> None:
    assert rate_pico(Decimal("0.18000000000000002")) == 180_000
    assert rate_pico(Decimal("1.0399999999999998")) == 1_040_000
    assert rate_pico(Decimal("0.08333333333333334")) == 83_334
    assert rate_pico(Decimal("0.003625")) == 3_625


def test_compiling_twice_makes_the_same_version() -> None:
    assert compile_package_book().version == BOOK.version
    assert BOOK.version.startswith("genai-prices-")


# Keys, dates, caches


def test_a_price_key_leads_back_to_its_rates() -> None:
    for provider, model, context in (
        ("openai", "gpt-4o-mini", {}),
        ("openai", "gpt-4o-mini", {"service_tier": "priority"}),
        ("fireworks", "accounts/fireworks/models/deepseek-v3", {}),
    ):
        rates = BOOK.resolve(provider, model, at=NOW, context=context)
        if rates is not None:
            assert BOOK.by_key(rates.price_key) == rates
    for wrong in ("", "other/openai/gpt-4o#0", f"{BOOK.version}/openai/gpt-4o#9", f"{BOOK.version}/openai/gpt-4o#0.99"):
        assert BOOK.by_key(wrong) is None


def small_book(*sheets: PriceSheet) -> PriceBook:
    model = ModelPrices(id="m", match=Equals("m"), sheets=list(sheets))
    family = ModelPrices(id="x-family", match=StartsWith("x-"), sheets=list(sheets))
    provider = ProviderPrices(id="p", url_pattern="https://p", models=[model, family])
    return PriceBook(BookDocument(source="test", providers=[provider]), version="v")


def sheet(rate: int, **condition: dt.date | dt.time) -> PriceSheet:
    return PriceSheet(
        rates={"input": TieredRate(base=rate), "output": TieredRate(base=rate)},
        condition=Condition(**condition) if condition else None,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    )


def test_a_price_holds_from_its_start_date_on() -> None:
    book = small_book(sheet(1), sheet(2, start_date=dt.date(2026, 6, 1)))
    before = book.resolve("p", "m", at=dt.datetime(2026, 5, 31, 23, 59, tzinfo=dt.UTC))
    # Still May in UTC.
    east = book.resolve("p", "m", at=dt.datetime(2026, 6, 1, 1, 0, tzinfo=dt.timezone(dt.timedelta(hours=2))))
    after = book.resolve("p", "m", at=dt.datetime(2026, 6, 1, tzinfo=dt.UTC))
    assert before is not None
    assert after is not None
    assert before == east
    assert (before.base.input, after.base.input) == (1, 2)
    assert before.price_key != after.price_key


def test_a_price_holds_at_its_time_of_day() -> None:
    book = small_book(sheet(1), sheet(2, start_time=dt.time(22, 30), end_time=dt.time(6, 0)))

    def at(hour: int, minute: int) -> int:
        rates = book.resolve("p", "m", at=dt.datetime(2026, 1, 1, hour, minute, tzinfo=dt.UTC))
        assert rates is not None
        return rates.base.input

    assert [at(22, 29), at(22, 30), at(5, 59), at(6, 0)] == [1, 2, 2, 1]


def test_look_ups_of_unknown_models_do_not_fill_the_memory() -> None:
    book = small_book(sheet(1))
    for number in range(CACHE_ENTRIES_MAX + 100):
        book.resolve("p", f"x-{number}")
        book.resolve("p", f"unknown-{number}")
    assert len(book._found) <= CACHE_ENTRIES_MAX  # pyright: ignore[reportPrivateUsage]


# Amounts

RATE = st.integers(0, 10**9)
TOKENS = st.integers(0, 10**7)
CLASS_RATES = st.builds(ClassRates, **dict.fromkeys(TOKEN_CLASSES, RATE))
COUNTS = st.builds(TokenCounts, **dict.fromkeys(TOKEN_CLASSES, TOKENS))


@st.composite
def rates_with_tiers(draw: st.DrawFn) -> Rates:
    starts = sorted(draw(st.sets(st.integers(0, 10**7), max_size=3)))
    tiers = tuple(ContextTier(start_input_tokens=start, rates=draw(CLASS_RATES)) for start in starts)
    return Rates(price_key="k", base=draw(CLASS_RATES), tiers=tiers, request_pico=draw(RATE))


@given(rates_with_tiers(), COUNTS, st.integers(0, 3))
def test_an_amount_is_the_sum_of_its_lines(rates: Rates, counts: TokenCounts, requests: int) -> None:
    lines = rates.lines(counts, requests)
    assert sum(line.amount_pico for line in lines) == rates.amount_pico(counts, requests)
    assert all(line.amount_pico == line.quantity * line.rate_pico for line in lines)
    assert len({line.token_class for line in lines}) == len(lines)


@given(CLASS_RATES, RATE, COUNTS, COUNTS)
def test_more_tokens_never_cost_less(base: ClassRates, fee: int, counts: TokenCounts, more: TokenCounts) -> None:
    rates = Rates(price_key="k", base=base, request_pico=fee)
    both = TokenCounts(**{name: getattr(counts, name) + getattr(more, name) for name in TOKEN_CLASSES})
    assert rates.amount_pico(both) >= rates.amount_pico(counts)


@given(rates_with_tiers(), COUNTS)
def test_the_dearest_rates_cover_any_usage(rates: Rates, counts: TokenCounts) -> None:
    dearest_input, dearest_output = rates.dearest_within(counts.input_tokens)
    bound = counts.input_tokens * dearest_input + counts.output_tokens * dearest_output + rates.request_pico
    assert rates.amount_pico(counts) <= bound
    more_input, more_output = rates.dearest_within(counts.input_tokens + 1_000_000)
    assert dearest_input <= more_input
    assert dearest_output <= more_output


def test_in_the_snapshot_a_longer_context_is_never_cheaper() -> None:
    """So there, too, more tokens never cost less."""
    for provider in BOOK.document.providers:
        for model in provider.models:
            rates = BOOK.resolve(provider.id, model.id, at=NOW)
            steps = [rates.base, *(tier.rates for tier in rates.tiers)] if rates else []
            for lower, higher in itertools.pairwise(steps):
                assert all(lower.rate_pico(name) <= higher.rate_pico(name) for name in TOKEN_CLASSES), model.id


# Prices of manifests


def test_a_manifests_prices_win_and_are_exact() -> None:
    prices = Prices(input="0.15", output="0.60", cache_read="0.003625", request="0.01")
    rates = prices_from_manifest(ModelEntry(name="m", prices=prices), upstream="demo/openai")
    assert rates is not None
    assert (rates.base.input, rates.base.output, rates.base.cache_read) == (150_000, 600_000, 3_625)
    assert rates.request_pico == 10**10
    assert rates.base.reasoning == 600_000
    assert rates.price_key.startswith("demo/openai/m@")


def test_a_manifest_that_changes_its_prices_changes_their_key() -> None:
    keys = {
        rates.price_key
        for price in ("1", "2")
        if (rates := prices_from_manifest(ModelEntry(name="m", prices=Prices(input=price, output="1"))))
    }
    assert len(keys) == 2


def test_free_must_be_said() -> None:
    assert prices_from_manifest(ModelEntry(name="m")) is None
    rates = prices_from_manifest(ModelEntry(name="m", free=True))
    assert rates is not None
    assert rates.free
    assert rates.amount_pico(TokenCounts(input=10**6, output=10**6)) == 0


def test_conditional_prices_of_the_package_keep_their_order() -> None:
    """The last that holds wins there and here."""
    for provider in get_snapshot().providers:
        entry = next(each for each in BOOK.document.providers if each.id == provider.id)
        for model, compiled in zip(provider.models, entry.models, strict=True):
            sheets = model.prices if isinstance(model.prices, list) else [ConditionalPrice(prices=model.prices)]
            assert len(compiled.sheets) == len(sheets)


def test_a_stored_document_is_read_as_it_was_written_with_one_object_for_equal_sheets() -> None:
    document = compile_package_book().document
    read = read_document(msgspec.json.encode(document))
    assert read == document
    sheets = [sheet for provider in read.providers for model in provider.models for sheet in model.sheets]
    assert len({id(sheet) for sheet in sheets}) == len({msgspec.json.encode(sheet) for sheet in sheets}) < len(sheets)
