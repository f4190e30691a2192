"""What `behest prices show` prints of one model: its prices by context, service and date, and who overrides them."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, time

from behest_ledger.configuration.globs import matches
from behest_ledger.configuration.snapshot import Configuration
from behest_ledger.money import usd_from_pico, usd_per_million_from_rate_pico
from behest_ledger.prices.book import ModelPrices, PriceBook
from behest_ledger.prices.manifest import prices_from_manifest
from behest_ledger.prices.rates import ClassRates, Rates
from behest_proxy.cli.prices_difference import context_label

ROW_HEADER = (
    *("PROVIDER", "MODEL", "CONTEXT", "INPUT", "CACHED", "CACHE WRITE", "OUTPUT", "REASONING", "AUDIO IN"),
    *("AUDIO OUT", "REQUEST"),
)
_COLUMNS = ("input", "cache_read", "cache_write", "output", "reasoning", "audio_input", "audio_output")


def rows_of(book: PriceBook, provider: str | None, model: str, *, at: datetime, in_full: bool) -> list[Sequence[str]]:
    """A row for each context tier; in full also for each service that is priced apart, and each later price."""
    found = book.find(provider, model)
    ordinary = book.resolve(provider, model, at=at)
    if found is None or ordinary is None:
        return []
    rows = list(_tiers(found[0], model, ordinary, ""))
    if not in_full:
        return rows
    for context in book.contexts(provider, model):
        rates = book.resolve(provider, model, at=at, context=context)
        if rates is not None and rates != ordinary:
            rows += _tiers(found[0], model, rates, context_label(context))
    for moment in _changes(found[1], at):
        rates = book.resolve(provider, model, at=moment)
        if rates is not None and rates != ordinary:
            rows += _tiers(found[0], model, rates, f"from {moment:%Y-%m-%d}")
    return rows


def details_of(book: PriceBook, provider: str | None, model: str) -> list[str]:
    """What a row has no room for."""
    found = book.find(provider, model)
    rates = book.resolve(provider, model)
    if found is None:
        return []
    entry = found[1]
    lines = []
    if entry.uncounted:
        units = ", ".join(entry.uncounted)
        lines.append(f"{model} is billed by {units}, which nothing here counts: only an Upstream can price it")
    if entry.uncounted_input:
        lines.append(f"{model}: only text has a price here, not {', '.join(entry.uncounted_input)}")
    if rates is not None and rates.fees:
        fees = ", ".join(f"{tool} {usd_from_pico(fee)} USD" for tool, fee in rates.fees)
        lines.append(f"{model}: each use of the provider's own tools costs {fees}; requests for them are refused here")
    times = [sheet.condition for sheet in entry.sheets if sheet.condition and sheet.condition.start_time is not None]
    if times:
        spans = ", ".join(f"{condition.start_time:%H:%M}-{condition.end_time:%H:%M}" for condition in times)
        lines.append(f"{model} has other prices at {spans} UTC")
    if entry.id != model:
        lines.append(f"{model} is priced as {entry.id}")
    return lines


def override_rows(configuration: Configuration, model: str) -> list[Sequence[str]]:
    """The prices that Upstream resources state for a model: they win over every book."""
    rows: list[Sequence[str]] = []
    for upstreams in configuration.upstreams.values():
        for upstream in upstreams:
            for entry in upstream.spec.models:
                if not matches(entry.name, model):
                    continue
                rates = prices_from_manifest(entry, upstream=upstream.qualified_name)
                if rates is not None:
                    what = "override, free" if rates.free else "override"
                    rows += _tiers(f"Upstream {upstream.qualified_name}", model, rates, what)
    return rows


def _changes(prices: ModelPrices, at: datetime) -> list[datetime]:
    """When other prices of this version begin, later than a moment."""
    days = {
        condition.start_date
        for sheet in prices.sheets
        if (condition := sheet.condition) is not None and condition.start_date is not None
    }
    moments = (datetime.combine(day, time(), UTC) for day in days)
    return sorted(moment for moment in moments if moment > at)


def _tiers(provider: str, model: str, rates: Rates, label: str) -> Iterator[Sequence[str]]:
    request = usd_from_pico(rates.request_pico) if rates.request_pico else "-"

    def context(text: str) -> str:
        return ", ".join(part for part in (label, text) if part) or "any"

    first = f"to {rates.tiers[0].start_input_tokens}" if rates.tiers else ""
    yield (provider, model, context(first), *_cells(rates, rates.base), request)
    for tier in rates.tiers:
        yield (provider, model, context(f"over {tier.start_input_tokens}"), *_cells(rates, tier.rates), request)


def _cells(rates: Rates, classes: ClassRates) -> list[str]:
    cells: list[str] = []
    for name in _COLUMNS:
        price = usd_per_million_from_rate_pico(classes.rate_pico(name))
        cells.append(price if name in rates.stated else f"({price})")
    return cells
