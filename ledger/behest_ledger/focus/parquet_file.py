"""FOCUS as Parquet, by pyarrow (the extra `finops`): decimals stay decimals, times are UTC."""

import io
from collections.abc import Iterable
from typing import Any

from behest_ledger.billing import BillingRow
from behest_ledger.focus.columns import KINDS, Version, columns_of
from behest_ledger.focus.rows import focus_row

PRECISION, SCALE = 38, 12
"""Of every number: a pico-USD is its last digit."""

GROUP_ROWS = 20_000
"""Rows of a row group: so many are in memory before they are written, in columns."""
_PIECE_ROWS = 1000
"""Rows that are in memory as objects of Python, which take ten times as much."""


class ParquetMissingError(Exception):
    """pyarrow is not installed."""


class ParquetFile:
    """Rows in, bytes out, a row group at a time."""

    media_type = "application/vnd.apache.parquet"

    def __init__(self, version: Version) -> None:
        """Raises `ParquetMissingError`."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ParquetMissingError("Parquet needs pyarrow: pip install 'behest-sidecar[finops]'") from None
        types = {
            "text": pa.string(),
            "json": pa.string(),
            "decimal": pa.decimal128(PRECISION, SCALE),
            "time": pa.timestamp("us", tz="UTC"),
        }
        self._pyarrow: Any = pa
        self._columns = columns_of(version)
        self._schema = pa.schema([(name, types[KINDS[name]]) for name in self._columns])
        self._bytes = io.BytesIO()
        self._writer: Any = pq.ParquetWriter(self._bytes, self._schema, compression="zstd")
        self._waiting: list[dict[str, Any]] = []
        self._group: list[Any] = []
        self._group_rows = 0

    def written(self, rows: Iterable[BillingRow]) -> bytes:
        """The next bytes of the file, where the rows have filled a group."""
        for row in rows:
            values = focus_row(row)
            self._waiting.append({name: values[name] for name in self._columns})
            if len(self._waiting) >= min(_PIECE_ROWS, GROUP_ROWS):
                self._to_columns()
        return self._taken()

    def ended(self) -> bytes:
        """The last group and the foot."""
        self._to_columns()
        self._write_group()
        self._writer.close()
        return self._taken()

    def _to_columns(self) -> None:
        self._group.append(self._pyarrow.Table.from_pylist(self._waiting, schema=self._schema))
        self._group_rows += len(self._waiting)
        self._waiting.clear()
        if self._group_rows >= GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        if self._group_rows:
            self._writer.write_table(self._pyarrow.concat_tables(self._group))
        self._group.clear()
        self._group_rows = 0

    def _taken(self) -> bytes:
        taken = self._bytes.getvalue()
        # The writer knows its place by counting, not by asking: what was taken may go.
        self._bytes.seek(0)
        self._bytes.truncate()
        return taken
