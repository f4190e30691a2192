import datetime as dt
import json
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from genai_prices.data_snapshot import get_snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_ledger.money import usd_per_million_from_rate_pico
from behest_ledger.prices.book import PriceBook
from behest_ledger.prices.rates import Rates
from behest_ledger.prices.snapshot import RATE_PICO_MAX, PriceDataError, compile_file, compile_package_book, rate_pico
from behest_ledger.token_counts import TOKEN_CLASSES, TokenCounts

BOOK = compile_package_book()
NOW = dt.datetime(2026, 11, 22, 12, tzinfo=dt.UTC)
MOMENTS = st.integers(0, 2 * 366 * 24 * 60).map(
    lambda minutes: dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(minutes=minutes)
)
KEYS = [(provider.id, model.id) for provider in BOOK.document.providers for model in provider.models]


def providers(**model: Any) -> bytes:
    """A file as genai-prices publishes it, with one model; prices are written as they are, digit by digit."""
    entry = {"id": "m", "match": {"equals": "m"}, **model}
    provider = {"id": "p", "name": "P", "api_pattern": "https://api\\.p\\.example", "models": [entry]}
    return json.dumps([provider]).encode()


def rates_of(book: PriceBook, at: dt.datetime = NOW, **context: str) -> Rates:
    rates = book.resolve("p", "m", at=at, context=context)
    assert rates is not None
    return rates


@given(st.integers(0, RATE_PICO_MAX))
def test_every_whole_number_of_pico_usd_per_token_survives_its_way_through_a_file(pico: int) -> None:
    text = usd_per_million_from_rate_pico(pico)
    assert rate_pico(Decimal(text)) == pico
    # As a number, not as a string: a float on the way would not keep all of its digits.
    data = providers(prices={"input_mtok": 1, "output_mtok": 1}).replace(
        b'"input_mtok": 1', b'"input_mtok": ' + text.encode()
    )
    assert rates_of(compile_file(data, name="x")).base.input == pico


@given(st.decimals(0, 9000, places=12))
def test_what_does_not_divide_is_never_below_the_price_and_less_than_one_pico_usd_above(price: Decimal) -> None:
    exact = price * 10**6
    assert exact - Decimal("0.001") <= rate_pico(price) < exact + 1


@pytest.mark.parametrize("price", ["-1", "NaN", "Infinity", "1e30", "9000.000001", "-0.0000001"])
def test_what_is_no_price_is_refused(price: str) -> None:
    with pytest.raises(PriceDataError, match="is no price"):
        rate_pico(Decimal(price))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no JSON"),
        (b"[", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"{}", "list of providers"),
        (b"[]", "has no providers"),
        (b"[1]", "not as genai-prices publishes"),
        (b'{"source": "x", "providers": 1}', "no compiled price book"),
        (b'{"source": "x", "providers": []}', "has no providers"),
        (providers(prices={"input_mtok": -1, "output_mtok": 1}), "p/m: .*is no price"),
        (providers(prices={"input_mtok": 1e20, "output_mtok": 1}), "p/m: .*is no price"),
        (providers(prices=[]), "p/m"),
        (providers(match={"regex": "("}, prices={"input_mtok": 1, "output_mtok": 1}), "no regular expression"),
        (providers(match={"sounds_like": "m"}, prices={"input_mtok": 1}), "not as genai-prices publishes"),
    ],
)
def test_a_file_that_is_wrong_says_where(data: bytes, message: str) -> None:
    with pytest.raises(PriceDataError, match=message):
        compile_file(data, name="x")


def compiled(**sheet: Any) -> bytes:
    model = {"id": "m", "match": {"is": "equals", "text": "m"}, "sheets": [sheet]}
    return json.dumps(
        {"source": "ours", "providers": [{"id": "p", "url_pattern": "https://p", "models": [model]}]}
    ).encode()


@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        ({"rates": {"input": {"base": 0.5}}}, "no compiled price book"),
        ({"rates": {"input": {"base": -1}}}, "is no price of input"),
        ({"rates": {"inputs": {"base": 1}}}, "no class of tokens"),
        ({"rates": {"input": {"base": 1, "tiers": [[5, 1], [5, 2]]}}}, "not in order"),
        ({"rates": {}, "request_pico": -1}, "is no fee"),
    ],
)
def test_a_compiled_document_is_checked_too(sheet: dict[str, Any], message: str) -> None:
    with pytest.raises(PriceDataError, match=message):
        compile_file(compiled(**sheet), name="x")


def test_what_was_compiled_compiles_to_itself() -> None:
    again = compile_file(msgspec.json.encode(BOOK.document), name="export 1.json")
    assert again.document == BOOK.document
    assert again.version.startswith("export-1.json+")
    assert again.version.rpartition("+")[2] == BOOK.version.rpartition("+")[2]


def test_conditional_tiered_and_special_prices_of_a_file_are_all_there() -> None:
    data = providers(
        prices=[
            {"prices": {"input_mtok": 1, "output_mtok": {"base": 2, "tiers": [{"start": 1000, "price": 3}]}}},
            {
                "constraint": {"start_date": "2027-01-01"},
                "prices": {"input_mtok": 10, "output_mtok": 20, "requests_kcount": 5, "web_searches_kcount": 10},
            },
        ],
        price_variants=[
            {"when": {"service_tier": "flex"}, "prices": {"input_mtok": 0.5}},
            {"when": {"processing": "batch"}, "prices": {"output_mtok": 1}},
        ],
    )
    book = compile_file(data, name="x")
    now, later = rates_of(book), rates_of(book, at=dt.datetime(2027, 1, 1, tzinfo=dt.UTC))
    assert (now.base.input, now.base.output, now.at(1001).output) == (10**6, 2 * 10**6, 3 * 10**6)
    assert (later.base.input, later.request_pico) == (10**7, 5 * 10**9)
    assert later.fees == (("web_search", 10**10),)
    assert now.price_key != later.price_key
    flex, batch = rates_of(book, service_tier="flex"), rates_of(book, processing="batch")
    assert (flex.base.input, flex.base.output) == (500_000, 2 * 10**6)
    assert (batch.base.input, batch.base.output) == (10**6, 10**6)
    assert len({now.price_key, flex.price_key, batch.price_key}) == 3
    assert book.contexts("p", "m") == [{"service_tier": "flex"}, {"processing": "batch"}]
    assert book.unpriced("p", "m", {"service_tier": "turbo", "processing": "batch"}) == ["service_tier"]


def test_output_that_is_dearer_than_text_and_not_counted_has_no_price() -> None:
    text = {"input_mtok": 1, "output_mtok": 2}
    assert compile_file(providers(prices={**text, "output_image_mtok": 30}), name="x").resolve("p", "m") is None
    assert rates_of(compile_file(providers(prices={**text, "output_image_mtok": 2}), name="x")).base.output == 2 * 10**6
    spoken = rates_of(compile_file(providers(prices={**text, "input_audio_hours": 1}), name="x"))
    assert spoken.text_only
    assert BOOK.resolve("google", "gemini-2.5-flash-image", at=NOW) is None


@settings(max_examples=300)
@given(st.sampled_from(KEYS), st.integers(0, 10**6))
def test_a_name_is_found_as_the_same_model_whatever_was_asked_before(key: tuple[str, str], seed: int) -> None:
    """Matching depends on the name alone: not on the cache, and not on the order of questions."""
    provider, model = key
    fresh = PriceBook(BOOK.document, version=BOOK.version)
    other = KEYS[seed % len(KEYS)]
    fresh.find(*other)
    assert fresh.find(provider, model) == BOOK.find(provider, model)
    assert fresh.find(provider, model.upper()) == BOOK.find(provider, model)


@settings(max_examples=500)
@given(
    st.sampled_from(KEYS),
    st.dictionaries(
        st.sampled_from(["service_tier", "processing", "speed", "cache_ttl"]),
        st.sampled_from(["priority", "flex", "fast", "batch", "1h", "default"]),
        max_size=3,
    ),
    st.builds(TokenCounts, **dict.fromkeys(TOKEN_CLASSES, st.integers(0, 10**6))),
    MOMENTS,
)
def test_the_hold_covers_every_price_that_an_answer_of_the_book_can_carry(
    key: tuple[str, str], context: dict[str, str], counts: TokenCounts, at: dt.datetime
) -> None:
    rates = BOOK.resolve(*key, at=at, context=context)
    if rates is None:
        return
    dearest_input, dearest_output = rates.dearest_within(counts.input_tokens)
    held = counts.input_tokens * dearest_input + counts.output_tokens * dearest_output + rates.request_pico
    assert rates.amount_pico(counts) <= held
    assert sum(line.amount_pico for line in rates.lines(counts)) == rates.amount_pico(counts)
    assert BOOK.by_key(rates.price_key) == rates


@settings(max_examples=300)
@given(
    st.sampled_from([(p, m) for p in get_snapshot().providers for m in p.models]),
    st.sampled_from(
        [{}, {"service_tier": "priority"}, {"service_tier": "flex"}, {"processing": "batch"}, {"speed": "fast"}]
    ),
    MOMENTS,
)
def test_dates_times_and_services_select_the_prices_that_the_package_selects(
    entry: tuple[Any, Any], context: dict[str, str], at: dt.datetime
) -> None:
    provider, model = entry
    found = BOOK.find(provider.id, model.id)
    rates = BOOK.resolve(provider.id, model.id, at=at, context=context)
    if rates is None or found is None or found != (provider.id, found[1]) or found[1].id != model.id:
        return
    published = model.get_prices(at, context)
    for name in ("input", "output", "cache_read", "cache_write"):
        price = getattr(published, f"{name}_mtok")
        assert (name in rates.stated) == (price is not None)
        if price is not None:
            base = price if isinstance(price, Decimal) else price.base
            assert rates.base.rate_pico(name) == rate_pico(base)
