"""Compile the prices that the `genai-prices` package carries into a book of integers.

Importing the package's data takes a quarter of a second, and its own calculation over 100 µs: it is done once, when
prices are updated, and proxies read the compiled book from the ledger.

What does not divide is decided here. Some published numbers are not whole pico-USD per token, for two reasons: they
were computed with floats (1.0399999999999998 for 1.04), or they are a twelfth of something (0.0833...). So a number
is first rounded to 9 decimal places of USD per million tokens, which undoes the floats, and what is then still finer
than a pico-USD is rounded up: a charge is never below the price.
"""

import datetime as dt
import hashlib
import importlib.metadata
from collections.abc import Iterable
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from typing import Any

import msgspec

from behest_ledger.money import PICO_PER_TOKEN_PER_USD_PER_MILLION, PICO_PER_USD
from behest_ledger.prices.book import (
    BookDocument,
    Condition,
    ModelPrices,
    PriceBook,
    PriceSheet,
    ProviderPrices,
    TieredRate,
)
from behest_ledger.prices.matching import (
    AllOf,
    AnyOf,
    Clause,
    Contains,
    EndsWith,
    Equals,
    Regex,
    StartsWith,
)

PACKAGE = "genai-prices"

_CLASS_OF_PRICE = {
    "input_mtok": "input",
    "cache_read_mtok": "cache_read",
    "cache_write_mtok": "cache_write",
    "output_mtok": "output",
    "output_reasoning_mtok": "reasoning",
    "input_audio_mtok": "audio_input",
    "output_audio_mtok": "audio_output",
}
"""Prices by other units (images, searches, pages, hours) are left out: nothing here counts those units."""

_LONG_CACHE_PRICE = "cache_write_1h_mtok"
_LONG_CACHE = {"cache_ttl": "1h"}

_FLOAT_NOISE = Decimal("1e-9")


def compile_package_book(*, effective_from: dt.datetime | None = None) -> PriceBook:
    """The book of the installed package. Its version names the package's version and a hash of the content."""
    import genai_prices.data

    version = importlib.metadata.version(PACKAGE)
    document = compile_providers(genai_prices.data.providers, source=f"{PACKAGE} {version}")
    return PriceBook(document, version=book_version(document, version), effective_from=effective_from)


def book_version(document: BookDocument, package_version: str) -> str:
    """The version under which a document is stored: equal documents have equal versions."""
    digest = hashlib.sha256(msgspec.json.encode(document, order="deterministic")).hexdigest()
    return f"{PACKAGE}-{package_version}+{digest[:8]}"


def compile_providers(providers: Iterable[Any], *, source: str) -> BookDocument:
    """The document of the package's provider objects."""
    return BookDocument(source=source, providers=[_provider(provider) for provider in providers])


def rate_pico(price: Decimal) -> int:
    """Pico-USD per token in USD per million tokens: float noise undone, the rest rounded up."""
    exact = price.quantize(_FLOAT_NOISE, rounding=ROUND_HALF_EVEN) * PICO_PER_TOKEN_PER_USD_PER_MILLION
    return int(exact.to_integral_value(rounding=ROUND_CEILING))


def _provider(provider: Any) -> ProviderPrices:
    return ProviderPrices(
        id=provider.id,
        url_pattern=provider.api_pattern,
        models=[_model(model) for model in provider.models],
        provider_match=_clause(provider.provider_match) if provider.provider_match else None,
        model_match=_clause(provider.model_match) if provider.model_match else None,
        fallbacks=list(provider.fallback_model_providers or ()),
    )


def _model(model: Any) -> ModelPrices:
    priced = model.prices if isinstance(model.prices, list) else None
    sheets: list[tuple[Any, Any]]
    sheets = [(item.prices, item.constraint) for item in priced] if priced else [(model.prices, None)]
    variants = [variant for variant in model.price_variants or () if vars(variant.prices)]
    return ModelPrices(
        id=model.id,
        match=_clause(model.match),
        sheets=[_sheet(prices, constraint) for prices, constraint in sheets],
        variants=[
            *_long_cache_variants(variants, sheets),
            *(_sheet(variant.prices, variant.constraint, when=variant.when) for variant in variants),
        ],
        context_limit=model.context_window,
    )


def _long_cache_variants(variants: Iterable[Any], sheets: list[tuple[Any, Any]]) -> list[PriceSheet]:
    """Cache writes that live an hour cost more; as a variant, since usage does not tell them apart as a class.

    They come before the others and, among themselves, the more special ones and the later prices first: for each
    class the first that holds wins.
    """
    found = [
        _long_cache_sheet(variant.prices, variant.constraint, {**variant.when, **_LONG_CACHE}) for variant in variants
    ]
    found += [_long_cache_sheet(prices, constraint, _LONG_CACHE) for prices, constraint in reversed(sheets)]
    return [sheet for sheet in found if sheet is not None]


def _long_cache_sheet(prices: Any, constraint: Any, when: dict[str, str]) -> PriceSheet | None:
    price = vars(prices).get(_LONG_CACHE_PRICE)
    if price is None:
        return None
    return PriceSheet(rates={"cache_write": _rate(price)}, condition=_condition(constraint), when=when)


def _sheet(prices: Any, constraint: Any, *, when: dict[str, str] | None = None) -> PriceSheet:
    stated = vars(prices)
    per_thousand = stated.get("requests_kcount")
    return PriceSheet(
        rates={
            token_class: _rate(stated[name])
            for name, token_class in _CLASS_OF_PRICE.items()
            if stated.get(name) is not None
        },
        request_pico=_fee_pico(per_thousand) if per_thousand is not None else None,
        condition=_condition(constraint),
        when=dict(when or {}),
    )


def _rate(price: Any) -> TieredRate:
    if isinstance(price, Decimal):
        return TieredRate(base=rate_pico(price))
    return TieredRate(base=rate_pico(price.base), tiers=[(tier.start, rate_pico(tier.price)) for tier in price.tiers])


def _fee_pico(usd_per_thousand: Any) -> int:
    price = usd_per_thousand if isinstance(usd_per_thousand, Decimal) else usd_per_thousand.base
    return int((price * PICO_PER_USD / 1000).to_integral_value(rounding=ROUND_CEILING))


def _condition(constraint: Any) -> Condition | None:
    if constraint is None:
        return None
    if hasattr(constraint, "start_date"):
        return Condition(start_date=constraint.start_date)
    return Condition(start_time=_utc(constraint.start_time), end_time=_utc(constraint.end_time))


def _utc(time: dt.time) -> dt.time:
    if time.tzinfo is None:
        return time
    day = dt.date(2000, 1, 2)
    return dt.datetime.combine(day, time).astimezone(dt.UTC).time()


def _clause(clause: Any) -> Clause:
    (kind, value), *_ = vars(clause).items()
    match kind:
        case "equals":
            return Equals(value.lower())
        case "starts_with":
            return StartsWith(value.lower())
        case "ends_with":
            return EndsWith(value.lower())
        case "contains":
            return Contains(value.lower())
        case "regex":
            return Regex(value)
        case "or_":
            return AnyOf([_clause(part) for part in value])
        case "and_":
            return AllOf([_clause(part) for part in value])
        case _:
            raise ValueError(f"{PACKAGE} has a clause that is unknown here: {kind}")
