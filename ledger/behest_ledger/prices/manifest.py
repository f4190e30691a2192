"""Rates from an Upstream resource: what its author wrote wins over every book."""

import hashlib

import msgspec

from behest_ledger.configuration.kinds import ModelEntry
from behest_ledger.money import pico_from_usd, rate_pico_from_usd_per_million
from behest_ledger.prices.rates import ClassRates, Rates
from behest_ledger.token_counts import TOKEN_CLASSES


def prices_from_manifest(entry: ModelEntry, *, upstream: str = "upstream") -> Rates | None:
    """The rates that a model entry states, zero where it says free, None where it says neither.

    `upstream` is the resource's `<namespace>/<name>`, for the price key; the key also holds a hash of the prices, so
    that an edited manifest makes another key. The entry has passed validation.
    """
    if entry.free:
        zero = ClassRates.of({"input": 0, "output": 0})
        return Rates(price_key=f"{upstream}/{entry.name}@free", base=zero, stated=("input", "output"), free=True)
    if entry.prices is None:
        return None
    known = {
        name: rate_pico_from_usd_per_million(price)
        for name in TOKEN_CLASSES
        if (price := getattr(entry.prices, name)) is not None
    }
    request = entry.prices.request
    return Rates(
        price_key=f"{upstream}/{entry.name}@{_digest(entry)}",
        base=ClassRates.of(known),
        request_pico=pico_from_usd(request) if request is not None else 0,
        stated=tuple(known),
    )


def _digest(entry: ModelEntry) -> str:
    return hashlib.sha256(msgspec.json.encode(entry.prices)).hexdigest()[:8]
