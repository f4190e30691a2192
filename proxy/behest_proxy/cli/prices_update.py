"""`behest prices update`: what would change, whether it can be meant, and the new version."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from behest_ledger.money import pico_from_usd
from behest_ledger.prices.book import PriceBook
from behest_proxy.cli.database import dsn_from
from behest_proxy.cli.prices_difference import HEADER, Change, difference
from behest_proxy.cli.tables import print_table
from behest_proxy.cli.terminal import Terminal, UserError

SHOWN_MAX = 40
"""Changes that are printed; `behest prices diff` prints all."""
ABSURD_FACTOR = 100
LOST_MODELS_MIN = 10
FILE_BYTES_MAX = 64 * 1024 * 1024


class _Doubts(NamedTuple):
    changes: list[Change]
    lost_models: int
    models: int


async def update(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Store the installed package's prices, or a file's, as a new version. Raises `UserError`."""
    from behest_ledger.store.configuration import connected
    from behest_ledger.store.prices import load_current_book, store_book

    effective_from = moment_of(arguments.effective_from)
    book = book_from(arguments.source)
    async with connected(dsn_from(arguments)) as connection:
        stored = await load_current_book(connection, effective_from)
        if stored is not None and stored.document != book.document:
            _judge(stored, book, arguments, terminal, at=effective_from)
            if not arguments.yes and not _agreed(terminal):
                raise UserError("nothing was stored", "answer y, or say --yes")
        version = await store_book(connection, book, effective_from=effective_from)
    since = f", from {effective_from:%Y-%m-%d %H:%M} UTC on" if arguments.effective_from else ""
    terminal.line(f"prices/{version} created{since}" if version else f"prices/{book.version} unchanged")
    return 0


def book_from(source: str | None) -> PriceBook:
    """The book of a file, or of the installed package. Raises `UserError`."""
    from behest_ledger.prices.snapshot import PriceDataError, compile_file, compile_package_book

    try:
        if source is None:
            return compile_package_book()
        text = Path(source).read_bytes()
        if len(text) > FILE_BYTES_MAX:
            raise UserError(f"{source} is too large", "give it a file of prices")
        return compile_file(text, name=Path(source).stem)
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror})", "name a JSON file of prices") from None
    except PriceDataError as error:
        where = source or "the installed genai-prices"
        raise UserError(f"{where}: {error}", "nothing was stored; give it another file or version") from None


def moment_of(text: str | None) -> datetime:
    """A time that a person wrote, with its zone; now where none is written. Raises `UserError`."""
    if text is None:
        return datetime.now(UTC)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is no time", "write it as 2026-12-01T00:00:00Z") from None
    if moment.tzinfo is None:
        raise UserError(f"{text!r} has no time zone", f"write it as {text}Z")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise UserError(f"{text!r} is no time", "write it as 2026-12-01T00:00:00Z") from None


def _judge(
    stored: PriceBook, book: PriceBook, arguments: argparse.Namespace, terminal: Terminal, *, at: datetime
) -> None:
    changes = difference(stored, book, at=at)
    terminal.line(f"stored  {stored.version}")
    terminal.line(f"new     {book.version}")
    if changes:
        print_table(terminal, HEADER, changes[:SHOWN_MAX])
        if len(changes) > SHOWN_MAX:
            terminal.note(f"and {len(changes) - SHOWN_MAX} more: behest prices diff")
    else:
        terminal.line("Now they cost the same.")
    doubts = _doubts(stored, book, changes, at=at)
    for change in doubts.changes:
        terminal.line(f"absurd: {change.provider} {change.model} {change.name}: {change.stored} -> {change.installed}")
    if doubts.lost_models:
        terminal.line(f"absurd: {doubts.lost_models} of {doubts.models} models would have no price any more")
    if (doubts.changes or doubts.lost_models) and not arguments.accept_changes:
        raise UserError(
            "these changes can hardly be meant, and nothing was stored", "look, and say --accept-changes if they are"
        )


def _doubts(stored: PriceBook, book: PriceBook, changes: Sequence[Change], *, at: datetime) -> _Doubts:
    absurd = [change for change in changes if _is_absurd(change.stored, change.installed)]
    models = [
        (provider.id, model.id)
        for provider in stored.document.providers
        for model in provider.models
        if stored.resolve(provider.id, model.id, at=at) is not None
    ]
    lost = sum(book.resolve(provider, model, at=at) is None for provider, model in models)
    # Providers withdraw models all the time; half of all at once is a file that was cut.
    many = lost >= LOST_MODELS_MIN and lost * 2 > len(models)
    return _Doubts(absurd, lost if many else 0, len(models))


def _is_absurd(before: str, after: str) -> bool:
    """A hundred times dearer or cheaper, or free all of a sudden."""
    if "-" in (before, after):
        return False
    low, high = sorted((pico_from_usd(before), pico_from_usd(after)))
    if low == 0:
        return after == "0"
    return high >= low * ABSURD_FACTOR


def _agreed(terminal: Terminal) -> bool:
    if not sys.stdin.isatty():
        return False
    terminal.line("Store these prices? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
