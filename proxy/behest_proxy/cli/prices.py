"""`behest prices`: show what models cost, compare the stored price book with the installed one, and update it."""

import argparse
import asyncio
from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from typing import Any

import msgspec

from behest_ledger.prices.book import PriceBook
from behest_proxy.cli.database import add_database_arguments, dsn_from, ledger_errors_shown
from behest_proxy.cli.prices_difference import HEADER, difference
from behest_proxy.cli.prices_rows import ROW_HEADER, details_of, override_rows, rows_of
from behest_proxy.cli.prices_update import book_from, moment_of, update
from behest_proxy.cli.tables import print_document, print_table
from behest_proxy.cli.terminal import Terminal, UserError

_EXAMPLES = """\
examples:
  behest prices show gpt-4o-mini claude-sonnet-4-5
  behest prices show gemini-2.5-flash --at 2027-01-01
  behest prices show --provider groq
  behest prices diff                 what an update would change
  behest prices update               store the installed package's prices as a new version
  behest prices update --from prices.json --effective-from 2026-12-01T00:00:00Z

A newer package brings newer prices: pip install -U genai-prices. Nothing is downloaded while Behest runs. An Upstream
resource may state its own prices, which win over all of these.
"""


def add_parser(subparsers: Any) -> None:
    """Add `behest prices`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "prices",
        help="show, compare and update the price book",
        description="Prices are USD per million tokens, of the provider's default service where nothing else is said.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    show = actions.add_parser("show", help="what models cost: by class, context, service and date")
    show.add_argument("models", nargs="*", metavar="MODEL", help="default: all, of the provider")
    show.add_argument("--provider", metavar="NAME", help="whose prices (default: told by the model's name)")
    show.add_argument("--at", metavar="DATE", help="at this date or time (default: now)")
    show.add_argument("--package", action="store_true", help="of the installed package, not of the database")

    diff = actions.add_parser("diff", help="stored prices beside those of the installed package")
    diff.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: table")

    change = actions.add_parser("update", help="store the installed package's prices as a new version")
    change.add_argument(
        "--effective-from", metavar="TIME", help="ISO 8601 with a zone, from when on they hold (default: now)"
    )
    change.add_argument("--yes", "-y", action="store_true", help="do not ask")
    change.add_argument(
        "--accept-changes", action="store_true", help="also where prices rise or fall a hundredfold, or to nothing"
    )

    export = actions.add_parser("export", help="print the compiled prices as JSON, for --from")
    export.add_argument("--package", action="store_true", help="of the installed package, not of the database")

    for action in (diff, change):
        action.add_argument(
            "--from",
            dest="source",
            metavar="FILE",
            help="instead of the installed package's: JSON as genai-prices publishes it, or as `export` prints it",
        )
    for action in actions.choices.values():
        add_database_arguments(action)


def run(arguments: argparse.Namespace) -> int:
    """Do it. Raises `UserError` for what the person can put right."""
    actions = {"show": _show, "diff": _diff, "update": update, "export": _export}
    with ledger_errors_shown():
        return asyncio.run(actions[arguments.action](arguments, Terminal()))


async def _show(arguments: argparse.Namespace, terminal: Terminal) -> int:
    if not arguments.models and not arguments.provider:
        raise UserError("there are thousands of prices", "name models, or a provider with --provider")
    at = _day(arguments.at)
    book, origin = await _shown_book(arguments, at)
    provider = arguments.provider
    if provider is not None and book.provider_id(provider) is None:
        known = ", ".join(entry.id for entry in book.document.providers)
        raise UserError(f"the price book knows no provider {provider!r}", f"it knows {known}")
    overrides = await _overrides(arguments)
    rows: list[Sequence[str]] = []
    details: list[str] = []
    unknown: list[str] = []
    for model in arguments.models or _models_of(book, provider):
        found = rows_of(book, provider, model, at=at, in_full=bool(arguments.models))
        stated = [row for row in overrides if row[1] == model] if arguments.models else []
        rows += [*found, *stated]
        if arguments.models:
            details += details_of(book, provider, model)
            # Of a whole provider, what has no price per token (images, speech) is passed over.
            unknown += [] if found or stated else [model]
    if rows:
        print_table(terminal, ROW_HEADER, rows)
    for line in details:
        terminal.note(line)
    terminal.note(
        f"USD per million tokens; a price in brackets is another class's. {book.version}, {origin};"
        f" source: {book.document.source}; at {at:%Y-%m-%d %H:%M} UTC"
    )
    for model in unknown:
        terminal.line(f"{model}: no price is known; state it in the Upstream resource, or say that it is free")
    return 1 if unknown else 0


def _models_of(book: PriceBook, provider: str | None) -> list[str]:
    provider_id = book.provider_id(provider or "")
    return [model.id for entry in book.document.providers if entry.id == provider_id for model in entry.models]


def _day(text: str | None) -> datetime:
    """A time, or a date: the beginning of that day in UTC."""
    if text is not None and len(text) == len("2026-12-01"):
        try:
            return datetime.combine(date.fromisoformat(text), time(), UTC)
        except ValueError:
            raise UserError(f"{text!r} is no date", "write it as 2026-12-01") from None
    return moment_of(text)


async def _shown_book(arguments: argparse.Namespace, at: datetime) -> tuple[PriceBook, str]:
    """The stored book where a database is named and holds one, else the installed package's."""
    if not arguments.package:
        try:
            dsn = dsn_from(arguments)
        except UserError:
            # No database is needed to look at prices.
            return book_from(None), "of the installed package (no database is named)"
        stored = await _stored_book(dsn, at)
        if stored is not None:
            return stored, f"stored, since {stored.effective_from:%Y-%m-%d %H:%M} UTC"
    return book_from(None), "of the installed package"


async def _overrides(arguments: argparse.Namespace) -> list[Sequence[str]]:
    """What Upstream resources say of the models that are asked for, where a database is named."""
    from behest_ledger.store.configuration import connected, load_configuration

    if arguments.package or not arguments.models:
        return []
    try:
        dsn = dsn_from(arguments)
    except UserError:
        return []
    async with connected(dsn) as connection:
        configuration = await load_configuration(connection, None)
    return [row for model in arguments.models for row in override_rows(configuration, model)]


async def _diff(arguments: argparse.Namespace, terminal: Terminal) -> int:
    now = datetime.now(UTC)
    installed = book_from(arguments.source)
    stored = await _stored_book(dsn_from(arguments), now)
    if arguments.output == "json":
        changes = [] if stored is None else difference(stored, installed, at=now)
        keys = ("provider", "model", "class", "stored", "installed")
        document = {
            "stored": stored.version if stored is not None else None,
            "installed": installed.version,
            "unit": "USD per million tokens",
            "changes": [
                dict(zip(keys, (text if text != "-" else None for text in row), strict=True)) for row in changes
            ],
        }
        print_document(terminal, document, "json")
        return 0
    if stored is None:
        terminal.line("No prices are stored yet: behest prices update")
        return 0
    terminal.line(f"stored     {stored.version}")
    terminal.line(f"installed  {installed.version}")
    rows = difference(stored, installed, at=now)
    if not rows:
        terminal.line("They cost the same.")
        return 0
    print_table(terminal, HEADER, rows)
    return 0


async def _export(arguments: argparse.Namespace, terminal: Terminal) -> int:
    book = None if arguments.package else await _stored_book(dsn_from(arguments), datetime.now(UTC))
    document = (book_from(None) if book is None else book).document
    terminal.line(msgspec.json.encode(document).decode())
    return 0


async def _stored_book(dsn: str, at: datetime) -> PriceBook | None:
    from behest_ledger.store.configuration import connected
    from behest_ledger.store.prices import load_current_book

    async with connected(dsn) as connection:
        return await load_current_book(connection, at)
