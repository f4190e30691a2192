"""Sidecars that register, hold money, and die: for tests of what they leave behind."""

from typing import Any, Literal
from uuid import UUID, uuid4

import msgspec

from behest_ledger.holds import Answer, UsageLine
from behest_ledger.leases import Want
from behest_ledger.store import holders, holds, leases
from behest_ledger.store.holders import Checkpoint
from ledger.books import INPUT_RATE, OUTPUT_RATE, TENANT, Books, admission, granted


class Sidecar:
    """A holder, as the ledger sees it."""

    def __init__(self, books: Books, holder_id: UUID) -> None:
        self.books = books
        self.holder_id = holder_id

    @classmethod
    async def start(cls, books: Books) -> "Sidecar":
        """Register, and live for an hour; but the database, which started longer ago than the TTL, protects nobody."""
        sidecar = cls(books, uuid4())
        await holders.register(books.connection, sidecar.holder_id, "pod-1", 3600.0)
        await sidecar.execute("UPDATE ledger.holder SET ttl = interval '1 ms' WHERE holder_id = $1")
        return sidecar

    async def execute(self, statement: str) -> None:
        """Change something of this holder ($1)."""
        await self.books.connection.execute(statement, self.holder_id)

    async def die(self) -> None:
        """Be silent for longer than the TTL."""
        await self.execute("UPDATE ledger.holder SET expires_at = now() - interval '1 s' WHERE holder_id = $1")

    async def admit(self, **what: Any) -> tuple[UUID, Answer]:
        """Ask for an `admission(...)`."""
        asked = msgspec.structs.replace(admission(**what), holder_id=self.holder_id)
        return asked.request_id, await holds.admit(self.books.connection, asked)

    async def admitted(self, **what: Any) -> UUID:
        """A request that was granted."""
        one, answer = await self.admit(**what)
        granted(answer)
        return one

    async def lease(self, wants: dict[int, int]) -> dict[int, int]:
        """Bring the leases to these wants, by window; what is free in each then."""
        asked = [Want(TENANT, window, want) for window, want in wants.items()]
        found = await leases.lease(self.books.connection, self.holder_id, asked)
        return {window: free for (_, window), free in found.items()}

    async def checkpoint(self, one: UUID, *, input: int = 0, output: int = 0) -> None:  # noqa: A002 - it is one
        """Write how far a request has come."""
        assert await holders.checkpoint(self.books.connection, [checkpoint(one, input=input, output=output)]) == []


def checkpoint(one: UUID, *, input: int = 0, output: int = 0) -> Checkpoint:  # noqa: A002 - it is one
    """How far a request has come, at the rates of all requests here."""
    classes = [("input", input, INPUT_RATE), ("output", output, OUTPUT_RATE)]
    return Checkpoint(
        tenant_id=TENANT,
        request_id=one,
        lines=[
            UsageLine(class_=name, quantity=quantity, rate_pico=rate, amount_pico=quantity * rate, source="local")
            for name, quantity, rate in classes
            if quantity
        ],
    )


async def reap(books: Books, limit: int = 100) -> int:
    """Reap once; how many holds went to suspense."""
    found: int = await books.connection.fetchval("SELECT holds FROM ledger.reap_v1($1)", limit)
    return found


async def charge(books: Books, policy: Literal["checkpoint", "hold"], *, grace: str = "0 s") -> dict[UUID, int]:
    """Charge by policy once; the requests with their amounts."""
    rows = await books.connection.fetch(
        "SELECT request_id, amount_pico FROM ledger.charge_by_policy_v1($1::text::interval, $2)", grace, policy
    )
    return {row["request_id"]: int(row["amount_pico"]) for row in rows}


async def state(books: Books, one: UUID) -> str:
    """The state of a hold."""
    found: str = await books.connection.fetchval("SELECT state FROM ledger.hold WHERE request_id = $1", one)
    return found
