"""The price book: which model costs what, from when, and in which service tier, as integers only.

A book is a document (the form in which it is stored, `BookDocument`) and an index over it (`PriceBook`). It is
never changed: new prices are a new version, and a price key of an old one is still answered by the old one.
"""

import datetime as dt
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import TypeAlias, TypeVar

import msgspec

from behest_ledger.prices.hosts import url_fits
from behest_ledger.prices.matching import Clause, ModelIndex, clause_matches, dashed_dates
from behest_ledger.prices.rates import ClassRates, ContextTier, Rates
from behest_ledger.token_counts import TOKEN_CLASSES

CACHE_ENTRIES_MAX = 4096
MODEL_LENGTH_MAX = 256

PriceContext: TypeAlias = Mapping[str, str]
"""What distinguishes a request's price beside its model, as the book names it: `service_tier`, `cache_ttl`,
`processing`, `speed`. Without it the price is that of the provider's default service."""


class TieredRate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One class's rate: pico-USD per token, and from which input length another one holds."""

    base: int
    tiers: list[tuple[int, int]] = []
    """(start in input tokens, rate), ascending."""


class Condition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a price holds, in UTC. Absent members hold always."""

    start_date: dt.date | None = None
    """The first day."""
    start_time: dt.time | None = None
    """Of every day; with `end_time`. An end before the start is on the next day."""
    end_time: dt.time | None = None

    def holds(self, moment: dt.datetime) -> bool:
        """Whether the price holds at a moment (with a time zone)."""
        moment = moment.astimezone(dt.UTC)
        if self.start_date is not None and moment.date() < self.start_date:
            return False
        if self.start_time is None or self.end_time is None:
            return True
        time = moment.time()
        if self.end_time < self.start_time:
            return time >= self.start_time or time < self.end_time
        return self.start_time <= time < self.end_time


class PriceSheet(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Some rates, and when they hold."""

    rates: dict[str, TieredRate] = {}
    """By token class."""
    request_pico: int | None = None
    fees: dict[str, int] = {}
    """Pico-USD for each use of a tool that the provider runs itself, by the tool: `web_search` and so on."""
    condition: Condition | None = None
    when: dict[str, str] = {}
    """For a variant: the price context that selects it."""


class ModelPrices(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model: how it is recognised, and all its prices."""

    id: str
    match: Clause
    sheets: list[PriceSheet]
    """The last one that holds wins; the first where none holds."""
    variants: list[PriceSheet] = []
    """Overrides by price context: for each class the first that holds wins."""
    context_limit: int | None = None
    """Input tokens at most, where it is known."""
    uncounted: list[str] = []
    """Units of output that nothing here counts and that cost more than tokens of text. Such a model has no rates."""
    uncounted_input: list[str] = []
    """The same of input: then the rates are those of text alone."""


class ProviderPrices(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A provider: how it is recognised, and its models."""

    id: str
    url_pattern: str
    models: list[ModelPrices]
    provider_match: Clause | None = None
    """Recognises other spellings of the provider's id."""
    model_match: Clause | None = None
    """Recognises the provider by a model's name alone."""
    fallbacks: list[str] = []
    """Providers whose prices hold for models that this one resells."""


class BookDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored."""

    source: str
    """Where it was compiled from."""
    providers: list[ProviderPrices]


class _StoredDocument(msgspec.Struct, frozen=True):
    source: str
    providers: list[msgspec.Raw]


def read_document(text: str | bytes) -> BookDocument:
    """A stored document, whose equal parts are one object: most models cost what another one does, and a sidecar keeps
    the book for as long as it lives. Nobody may change its lists.

    Raises `msgspec.DecodeError`.
    """
    stored = msgspec.json.decode(text, type=_StoredDocument)
    sheets: dict[bytes, PriceSheet] = {}
    clauses: dict[bytes, Clause] = {}
    lists: dict[bytes, list[PriceSheet]] = {}
    empty: list[str] = []

    def shared(found: list[PriceSheet]) -> list[PriceSheet]:
        one_each = [sheets.setdefault(msgspec.json.encode(sheet), sheet) for sheet in found]
        return lists.setdefault(msgspec.json.encode(found), one_each)

    def compact(model: ModelPrices) -> ModelPrices:
        return msgspec.structs.replace(
            model,
            match=clauses.setdefault(msgspec.json.encode(model.match), model.match),
            sheets=shared(model.sheets),
            variants=shared(model.variants),
            uncounted=model.uncounted or empty,
            uncounted_input=model.uncounted_input or empty,
        )

    providers: list[ProviderPrices] = []
    for raw in stored.providers:  # one by one, so that what is dropped makes room for the next
        provider = msgspec.json.decode(raw, type=ProviderPrices)
        models = [compact(model) for model in provider.models]
        providers.append(msgspec.structs.replace(provider, models=models))
    return BookDocument(source=stored.source, providers=providers)


class PriceBook:
    """An index over a book's document. Look-ups are cached; the cache is bounded."""

    def __init__(self, document: BookDocument, *, version: str, effective_from: dt.datetime | None = None) -> None:
        self.document = document
        self.version = version
        self.effective_from = effective_from
        """Prices are looked up as of this moment where a look-up names none; None: as of the last start date."""
        self._providers = {provider.id: provider for provider in document.providers}
        self._indexes: dict[str, ModelIndex] = {}
        self._found: OrderedDict[tuple[str | None, str], tuple[str, ModelPrices] | None] = OrderedDict()
        self._by_url: OrderedDict[str, str | None] = OrderedDict()
        self._rates: OrderedDict[tuple[str, str, int, tuple[int, ...]], Rates | None] = OrderedDict()

    def resolve(
        self,
        provider: str | None,
        model: str,
        *,
        at: dt.datetime | None = None,
        context: PriceContext | None = None,
    ) -> Rates | None:
        """The rates of a model, None where the book has none: such a model is refused unless a resource prices it.

        Without a provider the model's name decides, for the providers that can be told by it. `at` is the moment
        of the request, with a time zone. A model that the book lists without rates for input and output is None.
        """
        found = self.find(provider, model)
        if found is None:
            return None
        provider_id, prices = found
        moment = self._moment(at)
        sheet = _sheet_at(prices, moment)
        variants = tuple(
            index
            for index, variant in enumerate(prices.variants if context else ())
            if _selected(variant, moment, context or {})
        )
        return self._rates_of(provider_id, prices, sheet, variants)

    def unpriced(
        self, provider: str | None, model: str, context: PriceContext, *, at: dt.datetime | None = None
    ) -> list[str]:
        """The members of a price context that no price of the model is about: what they cost is not known."""
        found = self.find(provider, model)
        moment = self._moment(at)
        priced = {
            name
            for variant in (found[1].variants if found else ())
            if _selected(variant, moment, context)
            for name in variant.when
        }
        return [name for name in context if name not in priced]

    def contexts(self, provider: str | None, model: str) -> list[dict[str, str]]:
        """The price contexts for which a model has prices of its own."""
        found = self.find(provider, model)
        seen = {tuple(sorted(variant.when.items())): variant.when for variant in (found[1].variants if found else ())}
        return list(seen.values())

    def _moment(self, at: dt.datetime | None) -> dt.datetime:
        return at or self.effective_from or _LAST_MOMENT

    def by_key(self, price_key: str) -> Rates | None:
        """The rates under a price key of this version, None for a key that is none of its keys."""
        match = re.fullmatch(r"(?P<version>[^/]+)/(?P<provider>[^/]+)/(?P<model>.+?)#(?P<rest>[0-9.]+)", price_key)
        if match is None or match["version"] != self.version:
            return None
        provider = self._providers.get(match["provider"])
        if provider is None:
            return None
        prices = next((entry for entry in provider.models if entry.id == match["model"]), None)
        sheet, *variants = (int(part) for part in match["rest"].split(".") if part)
        if prices is None or sheet >= len(prices.sheets) or any(v >= len(prices.variants) for v in variants):
            return None
        return self._rates_of(provider.id, prices, sheet, tuple(variants))

    def find(self, provider: str | None, model: str) -> tuple[str, ModelPrices] | None:
        """The provider's id and the entry under which the book has a model, None where it has none."""
        if len(model) > MODEL_LENGTH_MAX:
            return None
        key = (provider, model.lower())
        if key not in self._found:
            self._found[key] = self._search(*key)
            _trim(self._found)
        return self._found[key]

    def provider_id(self, name: str) -> str | None:
        """The book's id for a provider's name in whatever spelling, None where it knows none."""
        normal = name.lower().strip()
        if normal in self._providers:
            return normal
        for provider in self.document.providers:
            if provider.provider_match and clause_matches(provider.provider_match, normal):
                return provider.id
        return None

    def provider_for_url(self, url: str) -> str | None:
        """The provider at a base URL, None where it is none that the book knows."""
        if url not in self._by_url:
            fits = (provider.id for provider in self.document.providers if url_fits(provider.url_pattern, url))
            self._by_url[url] = next(fits, None)
            _trim(self._by_url)
        return self._by_url[url]

    def provider_for_model(self, model: str) -> str | None:
        """The provider that a model's name alone tells, None for names that several share or nobody knows."""
        lowered = model.lower()
        for provider in self.document.providers:
            if provider.model_match and clause_matches(provider.model_match, lowered):
                return provider.id
        return None

    def _search(self, provider: str | None, model: str) -> tuple[str, ModelPrices] | None:
        provider_id = self.provider_for_model(model) if provider is None else self.provider_id(provider)
        if provider_id is None:
            return None
        for name in dict.fromkeys((model, dashed_dates(model))):
            for candidate in (provider_id, *self._providers[provider_id].fallbacks):
                position = self._index(candidate).find(name) if candidate in self._providers else None
                if position is not None:
                    return candidate, self._providers[candidate].models[position]
        return None

    def _index(self, provider_id: str) -> ModelIndex:
        if provider_id not in self._indexes:
            models = self._providers[provider_id].models
            self._indexes[provider_id] = ModelIndex([model.match for model in models])
        return self._indexes[provider_id]

    def _rates_of(self, provider_id: str, prices: ModelPrices, sheet: int, variants: tuple[int, ...]) -> Rates | None:
        key = (provider_id, prices.id, sheet, variants)
        if key not in self._rates:
            number = ".".join(str(part) for part in (sheet, *variants))
            price_key = f"{self.version}/{provider_id}/{prices.id}#{number}"
            self._rates[key] = _rates(price_key, prices, sheet, variants)
            _trim(self._rates)
        return self._rates[key]


_LAST_MOMENT = dt.datetime.max.replace(tzinfo=dt.UTC)


_KeyT = TypeVar("_KeyT")
_ValueT = TypeVar("_ValueT")


def _trim(cache: OrderedDict[_KeyT, _ValueT]) -> None:
    while len(cache) > CACHE_ENTRIES_MAX:
        cache.popitem(last=False)


def _sheet_at(prices: ModelPrices, moment: dt.datetime) -> int:
    for index in range(len(prices.sheets) - 1, -1, -1):
        condition = prices.sheets[index].condition
        if condition is None or condition.holds(moment):
            return index
    return 0


def _selected(variant: PriceSheet, moment: dt.datetime, context: PriceContext) -> bool:
    if variant.condition is not None and not variant.condition.holds(moment):
        return False
    return all(context.get(name) == value for name, value in variant.when.items())


def _rates(price_key: str, prices: ModelPrices, sheet: int, variants: tuple[int, ...]) -> Rates | None:
    rates: dict[str, TieredRate] = {}
    fees: dict[str, int] = {}
    request_pico: int | None = None
    for source in (*(prices.variants[index] for index in variants), prices.sheets[sheet]):
        for token_class, rate in source.rates.items():
            rates.setdefault(token_class, rate)
        for tool, fee in source.fees.items():
            fees.setdefault(tool, fee)
        if request_pico is None:
            request_pico = source.request_pico
    if "input" not in rates or "output" not in rates or prices.uncounted:
        return None
    starts = sorted({start for rate in rates.values() for start, _ in rate.tiers})
    return Rates(
        price_key=price_key,
        base=ClassRates.of({name: rate.base for name, rate in rates.items()}),
        tiers=tuple(
            ContextTier(
                start_input_tokens=start,
                rates=ClassRates.of({name: _rate_above(rate, start) for name, rate in rates.items()}),
            )
            for start in starts
        ),
        request_pico=request_pico or 0,
        stated=tuple(name for name in TOKEN_CLASSES if name in rates),
        fees=tuple(sorted(fees.items())),
        text_only=bool(prices.uncounted_input),
        free=not request_pico and all(rate.base == 0 and not rate.tiers for rate in rates.values()),
    )


def _rate_above(rate: TieredRate, start: int) -> int:
    """The rate of a class for requests with more input than `start`."""
    return next((pico for from_tokens, pico in reversed(rate.tiers) if from_tokens <= start), rate.base)
