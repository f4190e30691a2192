"""The events of replies in PostgreSQL, for clients who lost some, and idempotency keys.

A reply is one *generation*, with all its attempts. It is written beside its stream, some events at a time; nothing of
it moves money. Every function may also raise the errors of `store.errors`.
"""

from collections.abc import Sequence
from typing import Any, Literal
from uuid import UUID

import msgspec

from behest_ledger.store.pool import Connection, asking
from behest_ledger.vault import Vault

KEYS_MAX = 10_000
"""Idempotency keys of one user of a project, in 24 hours."""

State = Literal["running", "broken", "whole"]
Verdict = Literal["kept", "wanted", "lost", "gone"]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Some events of a generation, or its end, or both."""

    tenant_id: str
    generation_id: UUID
    epoch: int
    first_event: int
    """The number of its first event; they begin with 1."""
    events: tuple[bytes, ...]
    state: State = "running"
    message: bytes | None = None
    """The reply as a message of its thread, closed for that: with the end."""
    ending: bytes | None = None
    """What came behind the events, or the answer as a whole."""


class Claimed(msgspec.Struct, frozen=True):
    """What became of a claim."""

    state: str
    """"claimed", "running" or "whole"; of a key "new", "conflict", "keys", or its generation's state."""
    epoch: int = 1
    generation_id: UUID | None = None
    after: int = 0
    """Of a key: its answer begins behind this event."""


async def write(source: Connection, vault: Vault, pieces: Sequence[Piece]) -> dict[UUID, Verdict]:
    """Write pieces of generations, at most one of each. What is written again changes nothing.

    The answer says what is to be thought of each: "kept"; "wanted", somebody waits for its writer to stop; "lost",
    another attempt has taken it over; "gone", it was deleted.
    """
    async with asking(source) as connection:
        rows: list[Any] = await connection.fetch(
            "SELECT generation_id, verdict FROM ledger.write_generations_v1($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            [piece.tenant_id for piece in pieces],
            [piece.generation_id for piece in pieces],
            [piece.epoch for piece in pieces],
            [piece.first_event for piece in pieces],
            [len(piece.events) for piece in pieces],
            [
                _closed(vault, piece, f"events {piece.first_event}", b"".join(piece.events)) if piece.events else None
                for piece in pieces
            ],
            [piece.state for piece in pieces],
            [piece.message for piece in pieces],
            [None if piece.ending is None else _closed(vault, piece, "ending", piece.ending) for piece in pieces],
        )
    return {row["generation_id"]: row["verdict"] for row in rows}


async def load_events(
    source: Connection, vault: Vault, *, tenant_id: str, generation_id: UUID
) -> tuple[list[bytes], bytes | None]:
    """The events that were written, in their order, and the ending. Raises `SealingError` where they do not open.

    Where an attempt was lost between two pieces, what comes behind the gap is left out.
    """
    async with asking(source) as connection:
        rows: list[Any] = await connection.fetch(
            "SELECT first_event, data FROM ledger.generation_chunk WHERE tenant_id = $1 AND generation_id = $2"
            " ORDER BY first_event",
            tenant_id,
            generation_id,
        )
        ending: bytes | None = await connection.fetchval(
            "SELECT ending FROM ledger.generation WHERE tenant_id = $1 AND generation_id = $2", tenant_id, generation_id
        )
    events: list[bytes] = []
    for row in rows:
        if row["first_event"] != len(events) + 1:
            break
        place = f"events {row['first_event']}"
        data = vault.opened(row["data"], tenant_id=tenant_id, owner=generation_id, place=place)
        events += split_events(data)
    if ending is not None:
        ending = vault.opened(ending, tenant_id=tenant_id, owner=generation_id, place="ending")
    return events, ending


async def claim(
    source: Connection,
    *,
    tenant_id: str,
    generation_id: UUID,
    holder_id: UUID,
    force: bool = False,
    instead_of: UUID | None = None,
    after: int | None = None,
) -> Claimed | None:
    """Take over a generation that did not come to its end; one that runs is only wanted, unless forced.

    The idempotency key of `instead_of` stands for it from then on; its answer begins behind `after`, by default behind
    the last event. None: there is none.
    """
    async with asking(source) as connection:
        row = await connection.fetchrow(
            "SELECT state, epoch FROM ledger.claim_generation_v1($1, $2, $3, $4, $5, $6)",
            tenant_id,
            generation_id,
            holder_id,
            force,
            instead_of,
            after,
        )
    return None if row is None else Claimed(row["state"], row["epoch"], generation_id)


async def claim_key(
    source: Connection,
    *,
    tenant_id: str,
    project_id: str,
    user_id: str,
    key_sha256: bytes,
    request_sha256: bytes,
    generation_id: UUID,
    holder_id: UUID,
) -> Claimed:
    """Take an idempotency key for a request, or learn what became of it: the generation that it stands for."""
    async with asking(source) as connection:
        row = await connection.fetchrow(
            "SELECT state, generation_id, after_event FROM ledger.claim_key_v1($1, $2, $3, $4, $5, $6, $7, $8)",
            tenant_id,
            project_id,
            user_id,
            key_sha256,
            request_sha256,
            generation_id,
            holder_id,
            KEYS_MAX,
        )
    return Claimed(row["state"], generation_id=row["generation_id"], after=row["after_event"])


async def release_key(source: Connection, *, tenant_id: str, generation_id: UUID) -> None:
    """Forget the key of a request that came to nothing."""
    async with asking(source) as connection:
        await connection.execute("SELECT ledger.release_key_v1($1, $2)", tenant_id, generation_id)


def split_events(data: bytes) -> list[bytes]:
    """Whole events as they are written to clients, one by one: none of them has a blank line inside."""
    return [event + b"\n\n" for event in data.split(b"\n\n")[:-1]]


def _closed(vault: Vault, piece: Piece, place: str, content: bytes) -> bytes:
    return vault.closed(content, tenant_id=piece.tenant_id, owner=piece.generation_id, place=place)
