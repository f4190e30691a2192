"""Holders: the sidecar's word that it lives, and how far its streams have come.

A holder is one process under an id of its own. While it renews, its holds are its own. When it has been silent for its
TTL, the keeper fences it for good: its holds go to suspense, its admissions answer `Gone`, and its renewals fail.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import msgspec

from behest_ledger.holds import UsageLine
from behest_ledger.store.pool import Connection, asking
from behest_ledger.token_counts import INPUT_CLASSES, OUTPUT_CLASSES

TTL_S = 120.0
"""How long a holder is believed to live after a renewal."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What one open request would be charged if it ended now: charged so if its sidecar and journal are lost."""

    tenant_id: str
    request_id: UUID
    lines: Sequence[UsageLine]
    """One a class. Only class, quantity and rate are stored."""

    def __post_init__(self) -> None:
        if len({line.class_ for line in self.lines}) != len(self.lines):
            raise ValueError("a class has two lines")


async def register(pool: Connection, holder_id: UUID, name: str, ttl_s: float = TTL_S) -> None:
    """Begin to live. `holder_id` is new, made by this process; `name` is for people (pod or host).

    Repeating it is a renewal. Raises `LedgerRefusedError` for an id that has ended, and `LedgerUnavailableError`.
    """
    await _value(pool, "SELECT ledger.register_holder_v1($1, $2, $3)", holder_id, name, timedelta(seconds=ttl_s))


async def renew(pool: Connection, holder_id: UUID, ttl_s: float = TTL_S) -> bool:
    """Live on for `ttl_s` from the time this was sent, at least. False: it is too late, the holder must end its
    streams and register under another id.

    Raises `LedgerUnavailableError`: then the former promise counts.
    """
    found = await _value(pool, "SELECT ledger.renew_holder_v1($1, $2)", holder_id, timedelta(seconds=ttl_s))
    return found is not None


async def unregister(pool: Connection, holder_id: UUID) -> bool:
    """End cleanly. False: something is still open, so the holder is left to expire.

    Raises `LedgerUnavailableError`.
    """
    return bool(await _value(pool, "SELECT ledger.unregister_holder_v1($1)", holder_id))


async def checkpoint(pool: Connection, checkpoints: Sequence[Checkpoint]) -> list[UUID]:
    """Write how far streams have come, in one statement; never less than before, and only for open holds.

    Returns the requests whose hold was busy at this moment: send these again next time. Losing a checkpoint loses no
    money, it only makes the charge after a lost node lower. Raises `LedgerUnavailableError`.
    """
    async with asking(pool) as connection:
        rows = await connection.fetch(
            "SELECT * FROM ledger.checkpoint_batch_v1($1, $2, $3, $4, $5, $6::text[]::jsonb[])",
            [item.tenant_id for item in checkpoints],
            [item.request_id for item in checkpoints],
            [sum(line.quantity for line in item.lines if line.class_ in INPUT_CLASSES) for item in checkpoints],
            [sum(line.quantity for line in item.lines if line.class_ in OUTPUT_CLASSES) for item in checkpoints],
            [sum(line.quantity * line.rate_pico for line in item.lines) for item in checkpoints],
            [_lines(item) for item in checkpoints],
        )
    return [row[0] for row in rows]


def _lines(item: Checkpoint) -> str:
    return msgspec.json.encode(
        [{"class": line.class_, "quantity": line.quantity, "rate_pico": line.rate_pico} for line in item.lines]
    ).decode()


async def _value(pool: Connection, query: str, *arguments: object) -> Any:
    async with asking(pool) as connection:
        return await connection.fetchval(query, *arguments)
