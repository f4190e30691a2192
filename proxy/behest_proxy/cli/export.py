"""`behest ledger export`: the bill as a file that tools of finance read."""

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Self, TextIO

from behest_ledger.billing import HOUR, BillingPeriodError, hours_between
from behest_ledger.focus.columns import VERSIONS
from behest_proxy.cli.database import add_database_arguments, dsn_from, ledger_errors_shown
from behest_proxy.cli.terminal import UserError

_BAR_WIDTH = 24


def add_export_parser(commands: Any) -> None:
    """Add `export` to the commands of `behest ledger`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="the bill as FOCUS, in CSV or Parquet",
        description="Write what was charged in a period as FOCUS, the FinOps Open Cost and Usage Specification: a row"
        " an hour, project, model, kind of token and price, with the labels of its admission. Periods that follow each"
        " other have every charge once, and their sums are the ledger's, to the last digit. Corrections are in the hour"
        " in which they were made.",
    )
    parser.add_argument("--format", choices=("focus",), default="focus", help="(default: %(default)s)")
    parser.add_argument(
        "--from",
        dest="begin",
        type=_moment,
        metavar="TIME",
        help="the first hour, in UTC: 2026-04-01 or 2026-04-01T08:00Z (default: the first of this month)",
    )
    parser.add_argument(
        "--to",
        dest="end",
        type=_moment,
        metavar="TIME",
        help="the hour after the last (default: the end of the last that is over)",
    )
    parser.add_argument("--per-session", action="store_true", help="a row for each user and session too")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="a .csv or .parquet file (default: CSV to standard output)"
    )
    parser.add_argument("--focus-version", choices=VERSIONS, default=VERSIONS[0], help="(default: %(default)s)")
    parser.add_argument("--project", metavar="TENANT:NAMESPACE/NAME", help="of one project only (default: all)")
    add_database_arguments(parser)


def run_export(arguments: argparse.Namespace) -> int:
    """Run `behest ledger export`."""
    from behest_ledger.focus.parquet_file import ParquetMissingError

    dsn = dsn_from(arguments)
    with ledger_errors_shown():
        over = asyncio.run(_hours_over(dsn))
    begin = arguments.begin or over.replace(day=1, hour=0)
    end = arguments.end or over
    try:
        hours_between(begin, end)
    except BillingPeriodError as error:
        raise UserError(str(error), "say --from and --to, such as --from 2026-04-01 --to 2026-05-01") from None
    try:
        file = _file_for(arguments.output, arguments.focus_version)
    except ParquetMissingError as error:
        raise UserError(str(error), "or name a .csv file") from None
    project = _project(arguments.project)
    with ledger_errors_shown(), _opened(arguments.output) as out:
        rows = asyncio.run(_export(dsn, file, out, begin, end, project, by_session=arguments.per_session))
    if end > over:
        sys.stderr.write(f"note: the hour that began at {over:%H:%M} UTC is not over: more may come into it\n")
    if arguments.output is not None:
        sys.stderr.write(f"{rows} rows: {arguments.output}\n")
    return 0


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no time such as 2026-04-01 or 2026-04-01T08:00Z") from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _project(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    tenant, colon, project = text.partition(":")
    if not colon or "/" not in project:
        raise UserError(f"--project {text} names no tenant and project", "write it as TENANT:NAMESPACE/NAME")
    return tenant, project


def _file_for(path: Path | None, version: Any) -> Any:
    from behest_ledger.focus.csv_file import CsvFile
    from behest_ledger.focus.parquet_file import ParquetFile

    if path is None or path.suffix == ".csv":
        return CsvFile(version)
    if path.suffix == ".parquet":
        return ParquetFile(version)
    raise UserError(f"{path} says no form", "name a .csv or a .parquet file")


@contextlib.contextmanager
def _opened(path: Path | None) -> Generator[BinaryIO]:
    """The file to write to. One that was not finished never has the name that was asked for."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = path.with_name(path.name + ".part")
    try:
        file = part.open("wb")
    except OSError as error:
        raise UserError(f"{part} cannot be written ({error.strerror})", "name another --output") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


async def _hours_over(dsn: str) -> datetime:
    from behest_ledger.store.billing import hours_over
    from behest_ledger.store.pool import connect

    connection = await connect(dsn)
    try:
        return await hours_over(connection)
    finally:
        await connection.close()


async def _export(
    dsn: str,
    file: Any,
    out: BinaryIO,
    begin: datetime,
    end: datetime,
    project: tuple[str, str] | None,
    *,
    by_session: bool,
) -> int:
    from behest_ledger.store.billing import billing_rows
    from behest_ledger.store.migrate import check_schema
    from behest_ledger.store.pool import connect

    count = 0
    connection = await connect(dsn)
    try:
        await check_schema(connection)
        with Progress(sys.stderr, begin, end) as progress:
            async for hour, rows in billing_rows(connection, begin, end, project=project, by_session=by_session):
                out.write(file.written(rows))
                count += len(rows)
                progress.at(hour, count)
            out.write(file.ended())
    finally:
        await connection.close()
    return count


class Progress:
    """How far it is, where somebody looks on; wiped away at the end."""

    def __init__(self, out: TextIO, begin: datetime, end: datetime) -> None:
        self._out = out
        self._begin = begin
        self._hours = (end - begin) / HOUR
        self._shown = out.isatty()
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last:
            self._out.write("\r\x1b[K")
            self._out.flush()

    def at(self, hour: datetime, rows: int) -> None:
        """That hour is being written."""
        if not self._shown:
            return
        done = (hour - self._begin) / HOUR / self._hours
        filled = int(done * _BAR_WIDTH)
        line = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {done:4.0%}  {hour:%Y-%m-%d %H:00}  {rows:,} rows"
        if line != self._last:
            self._last = line
            self._out.write(f"\r\x1b[K{line}")
            self._out.flush()
