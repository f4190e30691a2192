"""FOCUS as CSV (RFC 4180): null is an empty field, a time ends in Z, a number is a plain decimal."""

import csv
import io
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from functools import lru_cache

from behest_ledger.billing import BillingRow
from behest_ledger.focus.columns import Version, columns_of
from behest_ledger.focus.rows import Value, focus_row


class CsvFile:
    """Rows in, bytes out: the head comes with the first."""

    media_type = "text/csv; charset=utf-8"

    def __init__(self, version: Version) -> None:
        self._columns = columns_of(version)
        self._begun = False

    def written(self, rows: Iterable[BillingRow]) -> bytes:
        """The rows as the next bytes of the file."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\r\n")
        if not self._begun:
            self._begun = True
            writer.writerow(self._columns)
        for row in rows:
            values = focus_row(row)
            writer.writerow([_field(values[name]) for name in self._columns])
        return text.getvalue().encode()

    def ended(self) -> bytes:
        """What is left to write: the head, where there was no row."""
        return b"" if self._begun else self.written(())


def _field(value: Value) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    return plain(value) if isinstance(value, Decimal) else _time(value)


@lru_cache(maxsize=64)
def _time(value: datetime) -> str:
    """The same few hours and months stand in thousands of rows."""
    return value.strftime("%Y-%m-%dT%H:%M:%SZ")


def plain(value: Decimal) -> str:
    """The number without an exponent and without zeros that say nothing; with a point, so that every reader which
    guesses types from what it sees takes a column of numbers for decimals.
    """
    text = f"{value:f}"
    if "." not in text:
        return f"{text}.0"
    text = text.rstrip("0")
    return f"{text}0" if text.endswith(".") else text
