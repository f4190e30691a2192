"""A connection that speaks the store's statements to a ledger in memory, as asyncpg would to PostgreSQL."""

import re
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import msgspec

from behest_ledger.store import holds
from ledger.memory_holders import MemoryLedger

Row = dict[str, Any] | tuple[Any, ...]

_NAME = re.compile(r"ledger\.(\w+)\(")
_OTHER = {holds.ANY_SUSPENDED: "any_suspended", holds.SUSPENDED_REQUESTS: "suspended_requests"}
"""Statements that are no call of a function; what is left asks for the configuration's version."""


class Statements:
    """From a statement of the store to a call of the ledger in memory, and its answer as rows."""

    def __init__(self, ledger: MemoryLedger) -> None:
        self.ledger = ledger
        self._known: dict[str, Callable[..., list[Row]]] = {}

    def execute(self, query: str, arguments: Sequence[Any]) -> list[Row]:
        """Carry out one statement. Raises what asyncpg raises."""
        call = self._known.get(query)
        if call is None:
            match = _NAME.search(query)
            name = match[1] if match else _OTHER.get(query, "version")
            call = self._known[query] = getattr(self, f"_{name}")
        return call(*arguments)

    def _admit_batch_v1(self, holder: UUID, items: str, _tenants: object = None) -> list[Row]:
        decoded: list[dict[str, Any]] = msgspec.json.decode(items)
        for item in decoded:
            item["request_id"] = UUID(item["request_id"])
        rows = self.ledger.admit_batch_v1(holder, decoded)
        return [{"request_id": row["request_id"], "answer": _json(row["answer"]), "rates": "[]"} for row in rows]

    def _extend_batch_v1(self, *arguments: Any) -> list[Row]:
        rows = self.ledger.extend_batch_v1(*arguments)
        return [{"request_id": row["request_id"], "answer": _json(row["answer"])} for row in rows]

    def _settle_batch_v1(self, items: str) -> list[Row]:
        decoded: list[dict[str, Any]] = msgspec.json.decode(items)
        for item in decoded:
            item["request_id"] = UUID(item["request_id"])
        return list(self.ledger.settle_batch_v1(decoded))

    def _lease_batch_v1(self, *arguments: Any) -> list[Row]:
        return list(self.ledger.lease_batch_v1(*arguments))

    def _register_holder_v1(self, *arguments: Any) -> list[Row]:
        return [(self.ledger.register_holder_v1(*arguments),)]

    def _renew_holder_v1(self, *arguments: Any) -> list[Row]:
        return [(self.ledger.renew_holder_v1(*arguments),)]

    def _unregister_holder_v1(self, *arguments: Any) -> list[Row]:
        return [(self.ledger.unregister_holder_v1(*arguments),)]

    def _checkpoint_batch_v1(
        self, tenants: Any, requests: Any, inputs: Any, outputs: Any, amounts: Any, lines: Sequence[str]
    ) -> list[Row]:
        decoded = [msgspec.json.decode(line) for line in lines]
        busy = self.ledger.checkpoint_batch_v1(tenants, requests, inputs, outputs, amounts, decoded)
        return [(request,) for request in busy]

    def _put_budget_v1(self, row: str) -> list[Row]:
        self.ledger.put_budget_v1(msgspec.json.decode(row))
        return []

    def _any_suspended(self) -> list[Row]:
        return [(any(budget["suspended"] for budget in self.ledger.budgets.values()),)]

    def _suspended_requests(self, items: str) -> list[Row]:
        found: list[Row] = []
        for item in msgspec.json.decode(items):
            budgets = self.ledger.matching(item["tenant_id"], item["attributes"])
            if names := [budget["budget_id"] for budget in budgets if budget["suspended"]]:
                found.append({"request_id": UUID(item["request_id"]), "budget_id": min(names)})
        return found

    def _version(self) -> list[Row]:
        return [(1,)]


class MemoryConnection:
    """What the store uses of an asyncpg connection or pool. Answers come at once."""

    def __init__(self, ledger: MemoryLedger) -> None:
        self.ledger = ledger
        self._statements = Statements(ledger)

    async def fetch(self, query: str, *arguments: Any) -> list[Row]:
        """All rows."""
        return self._statements.execute(query, arguments)

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        """The first column of the first row."""
        row = self._statements.execute(query, arguments)[0]
        return row[0] if isinstance(row, tuple) else next(iter(row.values()))

    async def execute(self, query: str, *arguments: Any) -> None:
        """No rows."""
        self._statements.execute(query, arguments)

    async def close(self) -> None:
        """Nothing to close."""


def _json(answer: dict[str, Any]) -> str:
    return msgspec.json.encode(answer).decode()
