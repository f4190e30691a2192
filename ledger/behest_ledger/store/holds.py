"""Admit, extend and settle: the three calls that move money, one round trip each."""

import asyncio
import re
from collections.abc import Collection, Sequence
from typing import Literal
from uuid import UUID

import msgspec

from behest_ledger.holds import Admission, Answer, Extension, Gone, Granted, Rate, Refused, Settlement
from behest_ledger.store.errors import LedgerConflictError, mapped
from behest_ledger.store.pool import Connection, asking

Result = Literal["settled", "already", "corrected", "unknown"]
"""`corrected`: the hold had been charged by policy, because its holder was gone; now it is charged this instead."""

ADMIT_ATTEMPTS_MAX = 3
"""A conflict moved nothing, so an admission is asked again; after this many it fails."""

_ADMIT_ONLY = "SELECT request_id, answer::text FROM ledger.admit_batch_v1($1, $2::text::jsonb)"
_ADMIT_AND_TELL = """
WITH admitted AS MATERIALIZED (SELECT * FROM ledger.admit_batch_v1($1, $2::text::jsonb))
SELECT request_id, answer::text, ledger.rates_of_v1(
    $3, ARRAY(SELECT jsonb_array_elements_text(answer -> 'windows')::bigint))::text AS rates FROM admitted
"""

_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


class Settled(msgspec.Struct, frozen=True):
    """What became of one settlement."""

    request_id: UUID
    result: Result
    overrun: bool
    """The charge went beyond what the budget could pay: the provider did not keep its word."""


async def admit(pool: Connection, admission: Admission) -> Answer:
    """Hold money for one request in all windows that match it, or in none.

    Raises `LedgerUnavailableError`: then the result is unknown, and the caller must void the request. Raises
    `LedgerConflictError` after several conflicts and `LedgerRefusedError`: nothing is held.
    """
    return (await admit_batch(pool, [admission]))[admission.request_id]


async def admit_batch(pool: Connection, admissions: Sequence[Admission]) -> dict[UUID, Answer]:
    """Admit several requests of one holder in one commit: each is answered for itself.

    Raises as `admit` does, for all of them; `LedgerRefusedError` may be about only one.
    """
    for attempt in range(1, ADMIT_ATTEMPTS_MAX):
        try:
            return await _admit_batch(pool, admissions)
        except LedgerConflictError:
            await asyncio.sleep(0.005 * 2**attempt)
    return await _admit_batch(pool, admissions)


async def _admit_batch(pool: Connection, admissions: Sequence[Admission]) -> dict[UUID, Answer]:
    (holder_id,) = {admission.holder_id for admission in admissions}
    # Who has a tier is told its rates: looked up in the same round trip, and for nobody else.
    tenants = sorted({admission.tenant_id for admission in admissions if admission.attributes.get("tier")})
    query, more = (_ADMIT_AND_TELL, [tenants]) if tenants else (_ADMIT_ONLY, [])
    async with asking(pool) as connection:
        rows = await connection.fetch(query, holder_id, _jsonb(admissions), *more)
    return {
        row["request_id"]: _with_rates(answer_from_json(row["answer"]), row["rates"] if tenants else "[]")
        for row in rows
    }


def _with_rates(answer: Answer, rates: str) -> Answer:
    if rates == "[]" or not isinstance(answer, Granted):
        return answer
    return msgspec.structs.replace(answer, rates=msgspec.json.decode(rates, type=tuple[Rate, ...], strict=False))


async def extend(pool: Connection, extensions: Sequence[Extension], *, shares: int) -> dict[UUID, Answer]:
    """More output tokens for several open holds, in one commit.

    Raises `LedgerUnavailableError` (unknown result) and `LedgerConflictError`.
    """
    async with asking(pool) as connection:
        rows = await connection.fetch(
            "SELECT request_id, answer::text FROM ledger.extend_batch_v1($1, $2, $3, $4, $5, $6)",
            [extension.tenant_id for extension in extensions],
            [extension.request_id for extension in extensions],
            [extension.seq for extension in extensions],
            [extension.need_tokens for extension in extensions],
            [extension.want_tokens for extension in extensions],
            shares,
        )
    return {row["request_id"]: answer_from_json(row["answer"]) for row in rows}


async def settle(pool: Connection, settlements: Sequence[Settlement]) -> list[Settled]:
    """End several requests in one commit; repeating it moves nothing.

    Raises `LedgerUnavailableError` (unknown result), `LedgerConflictError` and `LedgerRefusedError`.
    """
    async with asking(pool) as connection:
        rows = await connection.fetch(
            "SELECT request_id, result, overrun FROM ledger.settle_batch_v1($1::text::jsonb)", _jsonb(settlements)
        )
    return [Settled(row["request_id"], row["result"], row["overrun"]) for row in rows]


def _jsonb(value: object) -> str:
    """JSON that `jsonb` takes: it has no place for the character NUL, which a provider's answer may well contain."""
    text = msgspec.json.encode(value).decode()
    return _NUL.sub(r"\1\\ufffd", text) if "\\u0000" in text else text


class _Verdict(msgspec.Struct):
    verdict: Literal["granted", "refused", "void"]


def answer_from_json(text: str) -> Answer:
    """The typed form of what `ledger.admit_batch_v1` and `ledger.extend_batch_v1` answer."""
    verdict = msgspec.json.decode(text, type=_Verdict).verdict
    if verdict == "void":
        return Gone()
    # strict=False: balances come as decimal strings, for they can be larger than a JSON reader's integers.
    if verdict == "granted":
        return msgspec.json.decode(text, type=Granted, strict=False)
    return msgspec.json.decode(text, type=Refused, strict=False)


SUSPENDED_REQUESTS = """
SELECT i.request_id, min(b.budget_id) AS budget_id
FROM jsonb_to_recordset($1::text::jsonb) AS i(request_id uuid, tenant_id text, attributes jsonb)
JOIN ledger.budget b ON b.tenant_id = i.tenant_id AND b.suspended AND b.deleted_at IS NULL
    AND NOT EXISTS (SELECT FROM jsonb_each_text(b.scope) s
                    WHERE coalesce(i.attributes ->> s.key, '') NOT LIKE s.value)
    AND (b.workload_labels IS NULL OR i.attributes -> 'labels' @> b.workload_labels)
GROUP BY i.request_id
"""
ANY_SUSPENDED = "SELECT EXISTS (SELECT FROM ledger.budget b WHERE b.suspended AND b.deleted_at IS NULL)"


async def suspended_requests(connection: Connection, admissions: Collection[Admission]) -> dict[UUID, str]:
    """Of these live requests those that a suspended budget binds, with its name: also one that came after them.

    Raises `LedgerUnavailableError`.
    """
    if not admissions:
        return {}
    with mapped():
        if not await connection.fetchval(ANY_SUSPENDED):
            return {}
        items = [
            {"request_id": str(item.request_id), "tenant_id": item.tenant_id, "attributes": item.attributes}
            for item in admissions
        ]
        rows = await connection.fetch(SUSPENDED_REQUESTS, msgspec.json.encode(items).decode())
    return {row["request_id"]: row["budget_id"] for row in rows}
