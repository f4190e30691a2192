"""`behest ledger correct`: what a provider's invoice says, line by line, becomes corrections of the books."""

import argparse
import asyncio
import csv
import hashlib
import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from behest_ledger.corrections import (
    CLASSES,
    QUANTITY_MAX,
    RATE_PICO_MAX,
    Correction,
    CorrectionError,
    CorrectionsRefusedError,
)  # fmt: skip
from behest_proxy.cli.database import add_database_arguments, dsn_from, ledger_errors_shown
from behest_proxy.cli.terminal import UserError

if TYPE_CHECKING:
    from behest_ledger.store.corrections import Corrected

FIELDS = ("request_id", "class", "quantity", "rate_pico", "usage", "reason", "id", "tenant_id")
TEXT_MAX = 500
ERRORS_SHOWN_MAX = 20
FILE_BYTES_MAX = 32 << 20

_FORM = """\
A CSV file has a first line with the names of its columns, a JSONL file an object a line. Fields:
  request_id   whose charge is corrected
  class        input, cache_read, cache_write, output, reasoning, audio_input, audio_output or request (a fee)
  quantity     how many tokens of the class the whole request had; classes that are not named stay as they are
  usage        instead of both, in JSONL: the provider's usage object; classes that it does not name have none
  rate_pico    pico-USD per token; default: the rate of the request's price key
  reason, id   why, and under which id; default: --reason, and an id made from the file's contents
  tenant_id    whose request it is; named, it is found sooner
Lines of one request and id are one correction. All are applied, or none. The same id is applied to a request once.
"""


def add_correct_parser(commands: Any) -> None:
    """Add `correct` to the commands of `behest ledger`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "correct",
        help="charge ended requests anew, by a provider's invoice",
        description="Correct what ended requests were charged. More than was charged is spent as far as the budget of"
        " its time has room, and overrun beyond; less comes out of the overrun first.",
        epilog=_FORM,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--file", required=True, type=Path, metavar="FILE", help="corrections, .csv or .jsonl")
    parser.add_argument("--dry-run", action="store_true", help="show what would be changed, and change nothing")
    parser.add_argument("--id", metavar="ID", help="the id of all corrections in the file, say an invoice's number")
    parser.add_argument("--reason", metavar="TEXT", help="the reason of all that name none")
    add_database_arguments(parser)


def run_correct(arguments: argparse.Namespace) -> int:
    """Run `behest ledger correct`."""
    path: Path = arguments.file
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "name a file of corrections") from None
    if len(content) > FILE_BYTES_MAX:
        raise UserError(f"{path} has more than {FILE_BYTES_MAX >> 20} MiB", "divide it")
    try:
        corrections = read_corrections(
            content, jsonl=path.suffix != ".csv", correction_id=arguments.id, reason=arguments.reason
        )
        dsn = dsn_from(arguments)
        with ledger_errors_shown():
            done = asyncio.run(_correct(dsn, corrections, dry_run=arguments.dry_run))
    except CorrectionsRefusedError as refused:
        for wrong in refused.errors[:ERRORS_SHOWN_MAX]:
            print(f"{path}, {wrong}", file=sys.stderr)
        count = len(refused.errors)
        raise UserError(f"nothing was changed: {count} of its lines cannot be applied", f"correct {path}") from None
    _show(done, dry_run=arguments.dry_run)
    return 0


async def _correct(dsn: str, corrections: list[Correction], *, dry_run: bool) -> "list[Corrected]":
    from behest_ledger.store.corrections import correct
    from behest_ledger.store.migrate import check_schema
    from behest_ledger.store.pool import connect

    connection = await connect(dsn)
    try:
        await check_schema(connection)
        return await correct(connection, corrections, dry_run=dry_run)
    finally:
        await connection.close()


def _show(done: "list[Corrected]", *, dry_run: bool) -> None:
    from behest_ledger.money import usd_from_pico

    head = ("REQUEST", "OLD (USD)", "NEW (USD)", "DIFFERENCE", "RESULT")
    rows = [
        (
            str(one.request_id),
            usd_from_pico(one.old_pico),
            usd_from_pico(one.new_pico),
            _signed(one.new_pico - one.old_pico),
            one.result + (", overrun" if one.overrun else ""),
        )
        for one in done
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if 0 < column < 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    corrected = [one for one in done if one.result == "corrected"]
    total = sum(one.new_pico - one.old_pico for one in corrected)
    would = "would be corrected: nothing was changed" if dry_run else "corrected"
    print(f"{len(corrected)} of {len(done)} requests {would}, {_signed(total)} USD")


def _signed(amount_pico: int) -> str:
    from behest_ledger.money import usd_from_pico

    return ("+" if amount_pico > 0 else "") + usd_from_pico(amount_pico)


def read_corrections(content: bytes, *, jsonl: bool, correction_id: str | None, reason: str | None) -> list[Correction]:
    """The corrections in a file, in the order of their first lines.

    Raises `CorrectionsRefusedError` with everything that is wrong, by line and field.
    """
    default_id = correction_id or f"file {hashlib.sha256(content).hexdigest()[:16]}"
    errors: list[CorrectionError] = []
    found: dict[UUID, Correction] = {}
    try:
        text = content.decode("utf-8-sig")
        for place, members in _objects(text) if jsonl else _rows(text):
            try:
                one = _correction(place, members, default_id, reason)
                found[one.request_id] = _merged(found.get(one.request_id), one)
            except CorrectionError as error:
                errors.append(error)
    except UnicodeDecodeError as error:
        errors.append(CorrectionError(f"byte {error.start}", "is not UTF-8"))
    except csv.Error as error:
        errors.append(CorrectionError("the file", f"is no CSV: {error}"))
    except CorrectionError as error:
        errors.append(error)
    if not errors and not found:
        errors.append(CorrectionError("the file", "has no corrections"))
    if errors:
        raise CorrectionsRefusedError(errors)
    return list(found.values())


def _rows(text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, restval="")
    names = [name.strip() for name in reader.fieldnames or []]
    known = set(FIELDS) - {"usage"}
    if unknown := sorted(set(names) - known):
        raise CorrectionError("line 1", f"{unknown[0]}: there is no such column")
    if missing := sorted({"request_id", "class", "quantity"} - set(names)):
        raise CorrectionError("line 1", f"{missing[0]}: the column is missing")
    reader.fieldnames = names
    for row in reader:
        place = f"line {reader.line_num}"
        if None in row:
            raise CorrectionError(place, "has more cells than there are columns")
        yield place, {name: value.strip() for name, value in row.items() if value.strip()}


def _objects(text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            members = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise CorrectionError(place, f"is no JSON: {error}") from None
        if not isinstance(members, dict):
            raise CorrectionError(place, "is no JSON object")
        if unknown := sorted(set(members) - set(FIELDS)):
            raise CorrectionError(place, f"{unknown[0]}: there is no such field")
        yield place, members


def _correction(place: str, members: Mapping[str, Any], default_id: str, default_reason: str | None) -> Correction:
    shown_id = _text(place, members, "request_id", None)
    try:
        request_id = UUID(shown_id)
    except ValueError:
        raise CorrectionError(place, "request_id: is no id of a request") from None
    quantities, rates_pico = _usage(place, members) if "usage" in members else _line(place, members)
    return Correction(
        place=place,
        request_id=request_id,
        correction_id=_text(place, members, "id", default_id),
        reason=_text(place, members, "reason", default_reason),
        quantities=quantities,
        complete="usage" in members,
        rates_pico=rates_pico,
        tenant_id=_text(place, members, "tenant_id", "") or None,
    )


def _usage(place: str, members: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    from behest_proxy.usage import normalise

    for name in ("class", "quantity", "rate_pico"):
        if name in members:
            raise CorrectionError(place, f"{name}: not beside usage")
    usage = members["usage"]
    counts = normalise(usage).by_class() if isinstance(usage, dict) else {}
    if not counts:
        raise CorrectionError(place, "usage: names no tokens")
    return counts, {}


def _line(place: str, members: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    name = _text(place, members, "class", None)
    if name not in CLASSES:
        raise CorrectionError(place, f"class: must be one of {', '.join(CLASSES)}, not {name[:40]!r}")
    quantity = _whole(place, members, "quantity", QUANTITY_MAX)
    rates_pico = {name: _whole(place, members, "rate_pico", RATE_PICO_MAX)} if "rate_pico" in members else {}
    return {name: quantity}, rates_pico


def _text(place: str, members: Mapping[str, Any], name: str, default: str | None) -> str:
    value = members.get(name, default)
    if value is None:
        raise CorrectionError(place, f"{name}: is missing")
    if not isinstance(value, str) or len(value) > TEXT_MAX or "\0" in value:
        raise CorrectionError(place, f"{name}: must be a text of at most {TEXT_MAX} characters")
    return value


def _whole(place: str, members: Mapping[str, Any], name: str, most: int) -> int:
    value = members.get(name)
    if value is None:
        raise CorrectionError(place, f"{name}: is missing")
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise CorrectionError(place, f"{name}: must be a whole number from 0 to {most}, not {str(value)[:40]!r}")
    return value


def _merged(first: Correction | None, one: Correction) -> Correction:
    if first is None:
        return one
    for name in ("correction_id", "reason", "tenant_id"):
        if getattr(first, name) != getattr(one, name):
            field = name.removeprefix("correction_")
            raise CorrectionError(one.place, f"{field}: is another one than in {first.place}, for the same request")
    if first.complete or one.complete:
        raise CorrectionError(one.place, f"usage: the request has it in {first.place} already")
    if twice := set(first.quantities) & set(one.quantities):
        raise CorrectionError(one.place, f"class: {twice.pop()} is there twice for this request")
    return msgspec.structs.replace(
        first,
        quantities={**first.quantities, **one.quantities},
        rates_pico={**first.rates_pico, **one.rates_pico},
    )
