"""Compile the prices that the `genai-prices` package or a file of its form carries into a book of integers.

Importing the package's data takes a quarter of a second, and its own calculation over 100 µs: it is done once, when
prices are updated, and proxies read the compiled book from the ledger.

What does not divide is decided here. Some published numbers are not whole pico-USD per token, for two reasons: they
were computed with floats (1.0399999999999998 for 1.04), or they are a twelfth of something (0.0833...). So a number
is first rounded to 9 decimal places of USD per million tokens, which undoes the floats, and what is then still finer
than a pico-USD is rounded up: a charge is never below the price. What is no price (negative, not finite, so large
that an amount would not fit) is an error that names the model; numbers of a file are read as decimals, never as floats.
"""

import datetime as dt
import hashlib
import importlib.metadata
import json
import re
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
from behest_ledger.token_counts import TOKEN_CLASSES

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

_TOOL_OF_PRICE = {
    "web_searches_kcount": "web_search",
    "social_searches_kcount": "social_search",
    "storage_searches_kcount": "storage_search",
    "code_executions_kcount": "code_execution",
}
"""Prices of a thousand uses of tools that the provider runs itself."""

_OUTPUT_UNITS = ("output_image_mtok", "output_video_mtok", "output_audio_hours")
_INPUT_UNITS = (
    *("input_image_mtok", "input_video_mtok", "audio_hours", "input_audio_hours", "input_pixels"),
    *("input_document_kpages", "input_annotated_document_kpages"),
)
"""What usage does not tell apart from text. It matters where it is dearer than text, or no number of tokens at all."""

_LONG_CACHE_PRICE = "cache_write_1h_mtok"
_LONG_CACHE = {"cache_ttl": "1h"}

_FLOAT_NOISE = Decimal("1e-9")
RATE_PICO_MAX = 9 * 10**9
"""9,000 USD per million tokens: times the largest count that is believed, an amount still fits 64 bits."""
_VERSION_NAME = re.compile(r"[^A-Za-z0-9._-]+")


class PriceDataError(ValueError):
    """Price data that cannot be compiled; the message names the provider and model where one is at fault."""


def compile_package_book(*, effective_from: dt.datetime | None = None) -> PriceBook:
    """The book of the installed package. Its version names the package's version and a hash of the content."""
    import genai_prices.data

    version = importlib.metadata.version(PACKAGE)
    document = compile_providers(genai_prices.data.providers, source=f"{PACKAGE} {version}")
    return PriceBook(document, version=book_version(document, version), effective_from=effective_from)


def compile_file(text: bytes, *, name: str, effective_from: dt.datetime | None = None) -> PriceBook:
    """The book in a file: the JSON of genai-prices (a list of providers), or a document that was compiled here.

    Raises `PriceDataError`.
    """
    try:
        raw = json.loads(text, parse_float=Decimal)
    except (ValueError, RecursionError) as error:
        raise PriceDataError(f"it is no JSON ({error})") from None
    compiled = isinstance(raw, dict) and isinstance(raw.get("source"), str)
    if compiled:
        try:
            document = msgspec.json.decode(text, type=BookDocument)
        except msgspec.DecodeError as error:
            raise PriceDataError(f"it is no compiled price book ({error})") from None
        check_document(document)
    else:
        document = compile_providers(_parsed(raw), source=f"file {name}")
    label = _VERSION_NAME.sub("-", name)[:60] or "file"
    return PriceBook(document, version=_version(document, label), effective_from=effective_from)


def _parsed(raw: Any) -> list[Any]:
    """The package's own objects of a file in its form."""
    import genai_prices.types as types

    parse: Any = getattr(types, "_providers_from_raw", None)
    if parse is None:
        raise PriceDataError("the installed genai-prices reads no files: give it a compiled document")
    if not isinstance(raw, list):
        raise PriceDataError("it must be a list of providers, as genai-prices publishes it, or a compiled document")
    try:
        providers: list[Any] = parse(raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PriceDataError(f"it is not as genai-prices publishes it ({reason})") from None
    return providers


def book_version(document: BookDocument, package_version: str) -> str:
    """The version under which the package's document is stored: equal documents have equal versions."""
    return _version(document, f"{PACKAGE}-{package_version}")


def _version(document: BookDocument, name: str) -> str:
    digest = hashlib.sha256(msgspec.json.encode(document, order="deterministic")).hexdigest()
    return f"{name}+{digest[:8]}"


def compile_providers(providers: Iterable[Any], *, source: str) -> BookDocument:
    """The document of the package's provider objects. Raises `PriceDataError`."""
    document = BookDocument(source=source, providers=[_provider(provider) for provider in providers])
    check_document(document)
    return document


def check_document(document: BookDocument) -> None:
    """Raises `PriceDataError` for what no book may hold, whoever compiled it."""
    if not document.providers:
        raise PriceDataError("it has no providers")
    for provider in document.providers:
        if "/" in provider.id:
            raise PriceDataError(f"provider {provider.id}: its id would break price keys")
        _check_clauses(provider.id, provider.provider_match, provider.model_match)
        for model in provider.models:
            where = f"{provider.id}/{model.id}"
            if not model.sheets:
                raise PriceDataError(f"{where}: it has no prices")
            _check_clauses(where, model.match)
            for sheet in (*model.sheets, *model.variants):
                _check_sheet(where, sheet)


def _check_sheet(where: str, sheet: PriceSheet) -> None:
    for token_class, rate in sheet.rates.items():
        if token_class not in TOKEN_CLASSES:
            raise PriceDataError(f"{where}: {token_class!r} is no class of tokens")
        starts = [start for start, _ in rate.tiers]
        if starts != sorted(set(starts)) or any(start < 0 for start in starts):
            raise PriceDataError(f"{where}: the tiers of {token_class} are not in order")
        for pico in (rate.base, *(pico for _, pico in rate.tiers)):
            if not 0 <= pico <= RATE_PICO_MAX:
                raise PriceDataError(f"{where}: {pico} pico-USD is no price of {token_class}")
    for pico in (sheet.request_pico or 0, *sheet.fees.values()):
        if not 0 <= pico <= RATE_PICO_MAX * 1000:
            raise PriceDataError(f"{where}: {pico} pico-USD is no fee")


def _check_clauses(where: str, *clauses: Clause | None) -> None:
    for clause in clauses:
        match clause:
            case Regex():
                try:
                    re.compile(clause.text)
                except re.error as error:
                    raise PriceDataError(f"{where}: {clause.text!r} is no regular expression ({error})") from None
            case AnyOf() | AllOf():
                _check_clauses(where, *clause.clauses)
            case _:
                pass


def rate_pico(price: Decimal) -> int:
    """Pico-USD per token in USD per million tokens: float noise undone, the rest rounded up.

    Raises `PriceDataError` for what is no price.
    """
    return _pico(price, PICO_PER_TOKEN_PER_USD_PER_MILLION, RATE_PICO_MAX)


def _pico(price: Any, scale: int, pico_max: int) -> int:
    if not isinstance(price, Decimal) or not price.is_finite() or price < 0 or price * scale > pico_max:
        raise PriceDataError(f"{price!r} is no price")
    exact = price.quantize(_FLOAT_NOISE, rounding=ROUND_HALF_EVEN) * scale
    return int(exact.to_integral_value(rounding=ROUND_CEILING))


def _provider(provider: Any) -> ProviderPrices:
    return ProviderPrices(
        id=provider.id,
        url_pattern=provider.api_pattern,
        models=[_model(provider.id, model) for model in provider.models],
        provider_match=_clause(provider.provider_match) if provider.provider_match else None,
        model_match=_clause(provider.model_match) if provider.model_match else None,
        fallbacks=list(provider.fallback_model_providers or ()),
    )


def _model(provider_id: str, model: Any) -> ModelPrices:
    try:
        return _compiled(model)
    except PriceDataError as error:
        raise PriceDataError(f"{provider_id}/{model.id}: {error}") from None


def _compiled(model: Any) -> ModelPrices:
    priced = model.prices if isinstance(model.prices, list) else None
    sheets: list[tuple[Any, Any]]
    sheets = [(item.prices, item.constraint) for item in priced] if priced is not None else [(model.prices, None)]
    variants = [variant for variant in model.price_variants or () if vars(variant.prices)]
    stated = [vars(prices) for prices, _ in sheets] + [vars(variant.prices) for variant in variants]
    return ModelPrices(
        id=model.id,
        match=_clause(model.match),
        sheets=[_sheet(prices, constraint) for prices, constraint in sheets],
        variants=[
            *_long_cache_variants(variants, sheets),
            *(_sheet(variant.prices, variant.constraint, when=variant.when) for variant in variants),
        ],
        context_limit=model.context_window,
        uncounted=_uncounted(stated, _OUTPUT_UNITS, "output_mtok"),
        uncounted_input=_uncounted(stated, _INPUT_UNITS, "input_mtok"),
    )


def _uncounted(stated: list[dict[str, Any]], units: tuple[str, ...], text: str) -> list[str]:
    """Which of some units a model is billed by beside text, where that may cost more than text."""
    found = [
        unit
        for prices in stated
        for unit in units
        if (price := prices.get(unit)) is not None
        and not (unit.endswith("_mtok") and prices.get(text) is not None and _highest(price) <= _lowest(prices[text]))
    ]
    return list(dict.fromkeys(found))


def _highest(price: Any) -> Decimal:
    return price if isinstance(price, Decimal) else max(price.base, *(tier.price for tier in price.tiers))


def _lowest(price: Any) -> Decimal:
    return price if isinstance(price, Decimal) else min(price.base, *(tier.price for tier in price.tiers))


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
        fees={tool: _fee_pico(stated[name]) for name, tool in _TOOL_OF_PRICE.items() if stated.get(name) is not None},
        condition=_condition(constraint),
        when=dict(when or {}),
    )


def _rate(price: Any) -> TieredRate:
    if not hasattr(price, "tiers"):
        return TieredRate(base=rate_pico(price))
    return TieredRate(base=rate_pico(price.base), tiers=[(tier.start, rate_pico(tier.price)) for tier in price.tiers])


def _fee_pico(usd_per_thousand: Any) -> int:
    """Pico-USD for one, in USD for a thousand. Where it is tiered the dearest: a fee does not know the context."""
    return _pico(_highest(usd_per_thousand), PICO_PER_USD // 1000, RATE_PICO_MAX * 1000)


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
            raise PriceDataError(f"{PACKAGE} has a clause that is unknown here: {kind}")
