"""`behest prices`: show what models cost, compare the stored price book with the installed one, and update it."""

import argparse
import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from behest_ledger.money import usd_from_pico, usd_per_million_from_rate_pico
from behest_ledger.prices.book import PriceBook
from behest_ledger.prices.rates import ClassRates, Rates
from behest_proxy.cli.database import add_database_arguments, dsn_from, ledger_errors_shown
from behest_proxy.cli.tables import print_table
from behest_proxy.cli.terminal import Terminal, UserError

_EXAMPLES = """\
examples:
  behest prices show gpt-4o-mini claude-sonnet-4-5
  behest prices show --provider groq
  behest prices diff                 what an update would change
  behest prices update               store the installed package's prices as a new version

A newer package brings newer prices: pip install -U genai-prices. An Upstream resource may state its own.
"""

_HEADER = ("PROVIDER", "MODEL", "CONTEXT", "INPUT", "CACHED", "CACHE WRITE", "OUTPUT", "REASONING", "REQUEST")
_COLUMNS = ("input", "cache_read", "cache_write", "output", "reasoning")


def add_parser(subparsers: Any) -> None:
    """Add `behest prices`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "prices",
        help="show, compare and update the price book",
        description="Prices are USD per million tokens, of the provider's default service.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    show = actions.add_parser("show", help="what models cost now")
    show.add_argument("models", nargs="*", metavar="MODEL", help="default: all, of the provider")
    show.add_argument("--provider", metavar="NAME", help="whose prices (default: told by the model's name)")
    show.add_argument("--package", action="store_true", help="of the installed package, not of the database")

    actions.add_parser("diff", help="stored prices beside those of the installed package")

    update = actions.add_parser("update", help="store the installed package's prices as a new version")
    update.add_argument(
        "--effective-from", metavar="TIME", help="ISO 8601 with a zone, from when on they hold (default: now)"
    )
    for action in actions.choices.values():
        add_database_arguments(action)


def run(arguments: argparse.Namespace) -> int:
    """Do it. Raises `UserError` for what the person can put right."""
    actions = {"show": _show, "diff": _diff, "update": _update}
    with ledger_errors_shown():
        return asyncio.run(actions[arguments.action](arguments, Terminal()))


async def _show(arguments: argparse.Namespace, terminal: Terminal) -> int:
    if not arguments.models and not arguments.provider:
        raise UserError("there are thousands of prices", "name models, or a provider with --provider")
    now = datetime.now(UTC)
    book, origin = await _shown_book(arguments, now)
    provider = arguments.provider
    if provider is not None and book.provider_id(provider) is None:
        known = ", ".join(entry.id for entry in book.document.providers)
        raise UserError(f"the price book knows no provider {provider!r}", f"it knows {known}")
    found, unknown = _look_up(book, arguments.models, provider, now)
    rows = [row for provider_id, model, rates in found for row in _rows(provider_id, model, rates)]
    if rows:
        print_table(terminal, _HEADER, rows)
    terminal.note(f"USD per million tokens; a price in brackets is another class's. {book.version}, {origin}")
    for model in unknown:
        terminal.line(f"{model}: no price is known; state it in the Upstream resource, or say that it is free")
    return 1 if unknown else 0


def _look_up(
    book: PriceBook, models: Sequence[str], provider: str | None, at: datetime
) -> tuple[list[tuple[str, str, Rates]], list[str]]:
    found: list[tuple[str, str, Rates]] = []
    unknown: list[str] = []
    listed: list[str] = []
    if not models:
        provider_id = book.provider_id(provider or "")
        entries = next((entry.models for entry in book.document.providers if entry.id == provider_id), [])
        listed = [entry.id for entry in entries]
    for model in models or listed:
        entry = book.find(provider, model)
        rates = book.resolve(provider, model, at=at)
        if entry is None or rates is None:
            # Of a whole provider, what has no price per token (images, speech) is passed over.
            unknown += [] if listed else [model]
        else:
            found.append((entry[0], model, rates))
    return found, unknown


async def _shown_book(arguments: argparse.Namespace, now: datetime) -> tuple[PriceBook, str]:
    """The stored book where a database is named and holds one, else the installed package's."""
    if not arguments.package:
        try:
            dsn = dsn_from(arguments)
        except UserError:
            # No database is needed to look at prices.
            return _package_book(), "of the installed package (no database is named)"
        stored = await _stored_book(dsn, now)
        if stored is not None:
            return stored, f"stored, since {stored.effective_from:%Y-%m-%d}"
    return _package_book(), "of the installed package"


async def _diff(arguments: argparse.Namespace, terminal: Terminal) -> int:
    now = datetime.now(UTC)
    installed = _package_book()
    stored = await _stored_book(dsn_from(arguments), now)
    if stored is None:
        terminal.line("No prices are stored yet: behest prices update")
        return 0
    terminal.line(f"stored     {stored.version}")
    terminal.line(f"installed  {installed.version}")
    rows = difference(stored, installed, at=now)
    if not rows:
        terminal.line("They cost the same.")
        return 0
    print_table(terminal, ("PROVIDER", "MODEL", "CLASS", "STORED", "INSTALLED"), rows)
    return 0


def difference(stored: PriceBook, installed: PriceBook, *, at: datetime) -> list[tuple[str, str, str, str, str]]:
    """Every price that differs at a moment: provider, model, class, stored, installed; `-` where there is none."""
    keys = dict.fromkeys(
        (provider.id, model.id)
        for book in (stored, installed)
        for provider in book.document.providers
        for model in provider.models
    )
    rows: list[tuple[str, str, str, str, str]] = []
    for provider, model in keys:
        before = _prices(stored.resolve(provider, model, at=at))
        after = _prices(installed.resolve(provider, model, at=at))
        rows += [
            (provider, model, name, before.get(name, "-"), after.get(name, "-"))
            for name in dict.fromkeys((*before, *after))
            if before.get(name, "-") != after.get(name, "-")
        ]
    return rows


def _prices(rates: Rates | None) -> dict[str, str]:
    if rates is None:
        return {}
    prices = {name: usd_per_million_from_rate_pico(rates.base.rate_pico(name)) for name in rates.stated}
    for tier in rates.tiers:
        prices |= {
            f"{name} over {tier.start_input_tokens}": usd_per_million_from_rate_pico(tier.rates.rate_pico(name))
            for name in rates.stated
        }
    if rates.request_pico:
        prices["request"] = usd_from_pico(rates.request_pico)
    return prices


async def _update(arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.store.configuration import connected
    from behest_ledger.store.prices import store_book

    effective_from = _moment(arguments.effective_from)
    book = _package_book()
    async with connected(dsn_from(arguments)) as connection:
        added = await store_book(connection, book, effective_from=effective_from)
    since = f", from {effective_from:%Y-%m-%d %H:%M} UTC on" if arguments.effective_from else ""
    terminal.line(f"prices/{book.version} {'created' + since if added else 'unchanged'}")
    return 0


def _moment(text: str | None) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is no time", "write it as 2026-12-01T00:00:00Z") from None
    if moment.tzinfo is None:
        raise UserError(f"{text!r} has no time zone", f"write it as {text}Z")
    return moment.astimezone(UTC)


async def _stored_book(dsn: str, at: datetime) -> PriceBook | None:
    from behest_ledger.store.configuration import connected
    from behest_ledger.store.prices import load_current_book

    async with connected(dsn) as connection:
        return await load_current_book(connection, at)


def _package_book() -> PriceBook:
    from behest_ledger.prices.snapshot import compile_package_book

    return compile_package_book()


def _rows(provider: str, model: str, rates: Rates) -> list[Sequence[str]]:
    request = usd_from_pico(rates.request_pico) if rates.request_pico else "-"
    rows: list[Sequence[str]] = [(provider, model, "any", *_cells(rates, rates.base), request)]
    if rates.tiers:
        rows[0] = (provider, model, f"to {rates.tiers[0].start_input_tokens}", *rows[0][3:])
    rows += [
        (provider, model, f"over {tier.start_input_tokens}", *_cells(rates, tier.rates), request)
        for tier in rates.tiers
    ]
    return rows


def _cells(rates: Rates, classes: ClassRates) -> list[str]:
    cells: list[str] = []
    for name in _COLUMNS:
        price = usd_per_million_from_rate_pico(classes.rate_pico(name))
        cells.append(price if name in rates.stated else f"({price})")
    return cells
