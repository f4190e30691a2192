"""Corrections of ended requests, all of a file or none: read what is charged, price what is known better, write both.

The database knows one way to change a charge (`ledger.correct_one_v1`): new entries on the windows of the admission.
This is its way in for people. What comes late by itself, a journal after the policy, takes the other: a settlement.
"""

from collections.abc import Sequence
from typing import Any, Literal
from uuid import UUID

import msgspec

from behest_ledger.corrections import SOURCE, Correction, CorrectionError, CorrectionsRefusedError, corrected_lines
from behest_ledger.holds import UsageLine
from behest_ledger.prices.rates import Rates
from behest_ledger.store.errors import mapped
from behest_ledger.store.pool import Connection
from behest_ledger.store.prices import load_book

Result = Literal["corrected", "already", "unchanged"]

REQUESTS_MAX = 1000
"""Requests that one transaction corrects: their windows are locked until it ends."""

_REFUSALS = {
    "unknown": "request_id: no request {0} was ever admitted",
    "open": "request_id: request {0} has not ended yet; correct it when it has",
    "put away": "request_id: the month of request {0} was put away; it cannot be corrected any more",
}


class Corrected(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one correction."""

    request_id: UUID
    result: Result
    number: int | None
    """How often this request was corrected, with this one; None where nothing was."""
    old_pico: int
    new_pico: int
    overrun: bool
    """It went beyond what the budget could pay."""


class _Charged(msgspec.Struct):
    """A request as it is charged now."""

    tenant_id: str
    price_key: str
    amount_pico: int
    lines: dict[str, UsageLine]


async def correct(
    connection: Connection, corrections: Sequence[Correction], *, dry_run: bool = False
) -> list[Corrected]:
    """Apply all corrections in one transaction, in their order; with `dry_run` undo it at the end.

    Raises `CorrectionsRefusedError` with everything that is wrong, `LedgerUnavailableError` (unknown result: send them
    again, the same ones move nothing twice) and `LedgerConflictError`: nothing was changed.
    """
    if len(corrections) > REQUESTS_MAX:
        raise CorrectionsRefusedError(
            [CorrectionError(corrections[REQUESTS_MAX].place, f"more than {REQUESTS_MAX} requests; divide the file")]
        )
    with mapped():
        transaction = connection.transaction()
        await transaction.start()
        try:
            done = await _correct(connection, corrections)
        except BaseException:
            await transaction.rollback()
            raise
        await (transaction.rollback() if dry_run else transaction.commit())
    return done


async def _correct(connection: Connection, corrections: Sequence[Correction]) -> list[Corrected]:
    charged = await _charged(connection, corrections)
    books: dict[str, Rates | None] = {}
    unpriced: dict[UUID, CorrectionError] = {}
    items: list[dict[str, Any]] = []
    for correction in corrections:
        now = charged.get(correction.request_id)
        lines: list[UsageLine] = []
        if now is not None:
            if now.price_key not in books:
                books[now.price_key] = await _rates(connection, now.price_key)
            try:
                lines = corrected_lines(now.lines, correction, books[now.price_key])
            except CorrectionError as error:
                unpriced[correction.request_id] = error
        items.append(
            {
                "tenant_id": now.tenant_id if now is not None else correction.tenant_id or "",
                "request_id": correction.request_id,
                "correction_id": correction.correction_id,
                "reason": correction.reason,
                "source": SOURCE,
                "lines": lines,
            }
        )
    rows = await connection.fetch(
        "SELECT request_id, result, number, overrun FROM ledger.correct_v1($1::text::jsonb)",
        msgspec.json.encode(items).decode(),
    )
    errors: list[CorrectionError] = []
    for correction, row in zip(corrections, rows, strict=True):
        if row["result"] in _REFUSALS:
            errors.append(CorrectionError(correction.place, _REFUSALS[row["result"]].format(correction.request_id)))
        elif correction.request_id in unpriced and row["result"] != "already":
            errors.append(unpriced[correction.request_id])
    if errors:
        raise CorrectionsRefusedError(errors)
    return [
        Corrected(
            request_id=row["request_id"],
            result=row["result"],
            number=row["number"],
            old_pico=charged[row["request_id"]].amount_pico,
            new_pico=sum(line.amount_pico for line in item["lines"])
            if row["result"] == "corrected"
            else charged[row["request_id"]].amount_pico,
            overrun=row["overrun"],
        )
        for item, row in zip(items, rows, strict=True)
    ]


async def _charged(connection: Connection, corrections: Sequence[Correction]) -> dict[UUID, _Charged]:
    """The requests as they are charged, locked until the transaction ends."""
    ids = [correction.request_id for correction in corrections]
    tenants = [correction.tenant_id for correction in corrections]
    # The months keep the search within their partitions where no tenant is named.
    holds = await connection.fetch(
        "SELECT h.tenant_id, h.request_id, h.price_key FROM ledger.hold h"
        " JOIN unnest($1::text[], $2::uuid[]) AS i (tenant_id, request_id)"
        "   ON h.month = ledger.month_of_v1(i.request_id) AND h.request_id = i.request_id"
        "  AND (i.tenant_id IS NULL OR h.tenant_id = i.tenant_id)"
        " WHERE h.month = ANY (ARRAY(SELECT DISTINCT ledger.month_of_v1(u) FROM unnest($2::uuid[]) AS u))"
        " ORDER BY h.tenant_id, h.month, h.request_id FOR UPDATE OF h",
        tenants,
        ids,
    )
    charged = {row["request_id"]: _Charged(row["tenant_id"], row["price_key"], 0, {}) for row in holds}
    if len(charged) < len(holds):
        raise CorrectionsRefusedError([CorrectionError("tenant_id", "several tenants have one of these ids; name it")])
    rows = await connection.fetch(
        "SELECT r.request_id, u.class, u.quantity, u.rate_pico::text, u.amount_pico::text, u.source"
        " FROM unnest($1::text[], $2::uuid[]) AS i (tenant_id, request_id)"
        " JOIN ledger.request_now r ON r.tenant_id = i.tenant_id AND r.month = ledger.month_of_v1(i.request_id)"
        "   AND r.request_id = i.request_id"
        " JOIN ledger.usage_line u ON u.tenant_id = r.tenant_id AND u.month = r.month AND u.request_id = r.request_id"
        "   AND u.entry = 2 * r.corrections",
        [row["tenant_id"] for row in holds],
        [row["request_id"] for row in holds],
    )
    for row in rows:
        now = charged[row["request_id"]]
        line = msgspec.convert(dict(row), UsageLine, strict=False)
        now.lines[line.class_] = line
        now.amount_pico += line.amount_pico
    return charged


async def _rates(connection: Connection, price_key: str) -> Rates | None:
    """The rates of a price key, where they come from a book: a resource's own prices are in no book."""
    book = await load_book(connection, price_key.partition("/")[0])
    return book.by_key(price_key) if book is not None else None
