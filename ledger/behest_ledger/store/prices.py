"""Price books in PostgreSQL: versions are added and never changed, so that every charge can name its price.

Every function may also raise the errors of `store.errors`.
"""

from datetime import datetime
from typing import Any

import msgspec

from behest_ledger.prices.book import BookDocument, PriceBook
from behest_ledger.store.errors import LedgerError, mapped
from behest_ledger.store.pool import Connection

_INSERT = """
INSERT INTO ledger.price_book (version, source, document, effective_from)
VALUES ($1, $2, $3::text::jsonb, $4) ON CONFLICT (version) DO NOTHING RETURNING version
"""
_CURRENT = """
SELECT version, document::text AS document, effective_from FROM ledger.price_book
WHERE effective_from <= $1 ORDER BY effective_from DESC, created_at DESC, version DESC LIMIT 1
"""
_ONE = "SELECT version, document::text AS document, effective_from FROM ledger.price_book WHERE version = $1"


class PriceVersionError(LedgerError):
    """Another book is stored under the version."""


async def store_book(connection: Connection, book: PriceBook, *, effective_from: datetime) -> bool:
    """Add a book that holds from a moment on; False: this version was there already, and stays as it is.

    Raises `PriceVersionError` where the version is there with other prices.
    """
    document = msgspec.json.encode(book.document).decode()
    with mapped():
        async with connection.transaction():
            added = await connection.fetchval(_INSERT, book.version, book.document.source, document, effective_from)
            if added is not None:
                await connection.fetchval("SELECT ledger.bump_configuration_v1(NULL)")
                return True
    stored = await load_book(connection, book.version)
    if stored is not None and stored.document != book.document:
        raise PriceVersionError(f"the price book {book.version} is stored with other prices")
    return False


async def load_current_book(connection: Connection, at: datetime) -> PriceBook | None:
    """The book that holds at a moment, None where none is stored."""
    with mapped():
        row = await connection.fetchrow(_CURRENT, at)
    return _book(row)


async def load_book(connection: Connection, version: str) -> PriceBook | None:
    """The book of a version, to price again what was charged by it."""
    with mapped():
        row = await connection.fetchrow(_ONE, version)
    return _book(row)


def _book(row: Any) -> PriceBook | None:
    if row is None:
        return None
    document = msgspec.json.decode(row["document"], type=BookDocument)
    return PriceBook(document, version=row["version"], effective_from=row["effective_from"])
