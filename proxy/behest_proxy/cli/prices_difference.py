"""Two price books side by side: what costs otherwise, by model, class, context and service."""

from datetime import datetime
from typing import NamedTuple

from behest_ledger.money import usd_from_pico, usd_per_million_from_rate_pico
from behest_ledger.prices.book import PriceBook
from behest_ledger.prices.rates import Rates

HEADER = ("PROVIDER", "MODEL", "CLASS", "STORED", "INSTALLED")


class Change(NamedTuple):
    """One price that differs; `-` where there is none."""

    provider: str
    model: str
    name: str
    """The class, such as `input`, `output over 200000`, `request` or `input (service_tier=flex)`."""
    stored: str
    """USD per million tokens; of `request` and `fee ...` USD for one."""
    installed: str


def difference(stored: PriceBook, installed: PriceBook, *, at: datetime) -> list[Change]:
    """Every price that differs at a moment."""
    keys = dict.fromkeys(
        (provider.id, model.id)
        for book in (stored, installed)
        for provider in book.document.providers
        for model in provider.models
    )
    changes: list[Change] = []
    for provider, model in keys:
        before = prices_of(stored, provider, model, at=at)
        after = prices_of(installed, provider, model, at=at)
        changes += [
            Change(provider, model, name, before.get(name, "-"), after.get(name, "-"))
            for name in dict.fromkeys((*before, *after))
            if before.get(name, "-") != after.get(name, "-")
        ]
    return changes


def prices_of(book: PriceBook, provider: str | None, model: str, *, at: datetime) -> dict[str, str]:
    """All prices that a book states for a model at a moment, as text, by what they are for."""
    ordinary = book.resolve(provider, model, at=at)
    if ordinary is None:
        return {}
    prices = _stated(ordinary)
    for context in book.contexts(provider, model):
        rates = book.resolve(provider, model, at=at, context=context)
        if rates is not None and rates != ordinary:
            label = context_label(context)
            prices |= {f"{name} ({label})": price for name, price in _stated(rates).items()}
    return prices


def context_label(context: dict[str, str]) -> str:
    """A price context as people read it: `service_tier=flex`."""
    return ", ".join(f"{name}={value}" for name, value in sorted(context.items()))


def _stated(rates: Rates) -> dict[str, str]:
    prices = {name: usd_per_million_from_rate_pico(rates.base.rate_pico(name)) for name in rates.stated}
    for tier in rates.tiers:
        prices |= {
            f"{name} over {tier.start_input_tokens}": usd_per_million_from_rate_pico(tier.rates.rate_pico(name))
            for name in rates.stated
        }
    if rates.request_pico:
        prices["request"] = usd_from_pico(rates.request_pico)
    prices |= {f"fee {tool}": usd_from_pico(fee) for tool, fee in rates.fees}
    return prices
