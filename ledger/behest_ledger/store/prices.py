"""Price books in PostgreSQL: versions are added and never changed, so that every charge can name its price.

Every function may also raise the errors of `store.errors`.
"""

from datetime import datetime
from itertools import count
from typing import Any

import msgspec

from behest_ledger.prices.book import PriceBook, read_document
from behest_ledger.store.errors import LedgerError, mapped
from behest_ledger.store.pool import Connection

_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('ledger.price_book', 0))"
_INSERT = """
INSERT INTO ledger.price_book (version, source, document, effective_from) VALUES ($1, $2, $3::text::jsonb, $4)
"""
_CURRENT_VERSION = """
SELECT version FROM ledger.price_book
WHERE effective_from <= $1 ORDER BY effective_from DESC, created_at DESC, version DESC LIMIT 1
"""
_CURRENT = f"""
SELECT version, document::text AS document, effective_from, created_at FROM ledger.price_book
WHERE version = ({_CURRENT_VERSION})
"""  # noqa: S608 - nothing comes from outside
_NEXT = "SELECT min(effective_from) FROM ledger.price_book WHERE effective_from > $1"
_NAMES = "SELECT version FROM ledger.price_book"
_ONE = "SELECT version, document::text AS document, effective_from FROM ledger.price_book WHERE version = $1"
_ALL = "SELECT version, source, effective_from, created_at FROM ledger.price_book ORDER BY effective_from, created_at"


class PriceVersionError(LedgerError):
    """Another book is stored under the version."""


class StoredVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One version, without its prices."""

    version: str
    source: str
    effective_from: datetime
    created_at: datetime


async def store_book(connection: Connection, book: PriceBook, *, effective_from: datetime) -> str | None:
    """Add a book that holds from a moment on, and return the version under which it is stored.

    None: at that moment a book with these prices holds already, and nothing was stored. Prices that held before and
    shall hold again are a version of their own (`...~2`): a price key tells what held when. Raises
    `PriceVersionError` where the version is there with other prices.
    """
    document = msgspec.json.encode(book.document).decode()
    with mapped():
        async with connection.transaction():
            await connection.execute(_LOCK)
            current = _book(await connection.fetchrow(_CURRENT, effective_from))
            if current is not None and current.document == book.document:
                return None
            names = {row["version"] for row in await connection.fetch(_NAMES)}
            version = book.version
            if version in names:
                stored = _book(await connection.fetchrow(_ONE, version))
                if stored is not None and stored.document != book.document:
                    raise PriceVersionError(f"the price book {version} is stored with other prices")
                version = next(name for number in count(2) if (name := f"{book.version}~{number}") not in names)
            await connection.execute(_INSERT, version, book.document.source, document, effective_from)
            await connection.fetchval("SELECT ledger.bump_configuration_v1(NULL)")
            return version


async def load_current_book(
    connection: Connection, at: datetime, *, known: PriceBook | None = None
) -> PriceBook | None:
    """The book that holds at a moment, None where none is stored. `known` is returned where it is that one still."""
    with mapped():
        if known is not None and await connection.fetchval(_CURRENT_VERSION, at) == known.version:
            return known
        row = await connection.fetchrow(_CURRENT, at)
    return _book(row)


async def next_change(connection: Connection, at: datetime) -> datetime | None:
    """When the first book begins to hold that does not hold yet."""
    with mapped():
        moment: datetime | None = await connection.fetchval(_NEXT, at)
    return moment


async def list_versions(connection: Connection) -> list[StoredVersion]:
    """All versions, in the order in which they begin to hold."""
    with mapped():
        return [StoredVersion(**dict(row)) for row in await connection.fetch(_ALL)]


async def load_book(connection: Connection, version: str) -> PriceBook | None:
    """The book of a version, to price again what was charged by it."""
    with mapped():
        row = await connection.fetchrow(_ONE, version)
    return _book(row)


def _book(row: Any) -> PriceBook | None:
    if row is None:
        return None
    return PriceBook(read_document(row["document"]), version=row["version"], effective_from=row["effective_from"])
