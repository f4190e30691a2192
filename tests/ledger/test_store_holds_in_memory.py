"""The ledger in memory is the ledger: the same operations on both, and every answer, balance and posting compared."""

import asyncio
import random
import time
from collections import Counter
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from behest_ledger.holds import Admission, Extension, Refused, Settlement
from behest_ledger.leases import Want
from behest_ledger.store import holders, holds, leases
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.holders import Checkpoint
from behest_ledger.store.pool import connect
from ledger.books import HOLDER, TENANT, Books, Window, admission, new_id, settlement
from ledger.memory_connection import MemoryConnection
from ledger.memory_holders import MemoryLedger
from ledger.sidecars import checkpoint
from ledger.test_store_holds_machine import Bookkeeping

STEPS = 250
BUDGETS: dict[str, dict[str, Any]] = {
    "money": {"limit": 30_000},
    "mine": {"limit": 12_000, "per": ["user"]},
    "talk": {"limit": 5000, "per": ["session"], "period": "hour", "alignment": "rolling"},
    "tokens": {"limit": 3000, "unit": "tokens"},
    "input": {"limit": 900, "unit": "tokens", "kind": "input"},
    "output": {"limit": 2000, "unit": "tokens", "kind": "output", "scope": {"user": "a%"}},
    "calls": {"limit": 60, "unit": "requests", "refusal": "rate", "period": "day", "alignment": "rolling"},
    "watched": {"limit": 100, "enforcement": "soft", "labels": {"app": "shop"}},
}


class Both:
    """Two ledgers to which the same is done."""

    def __init__(self, books: Books, seed: int) -> None:
        self.books = books
        self.memory = MemoryLedger(time.time)
        self.connections: list[Any] = [books.connection, MemoryConnection(self.memory)]
        self.random = random.Random(seed)
        self.asked: list[Admission] = []
        self.seqs: dict[UUID, int] = {}
        self.holders: list[UUID] = []
        self.budgets = {name: dict(row) for name, row in BUDGETS.items()}

    async def each(self, call: Any, *arguments: Any, **named: Any) -> Any:
        """What both answer, which must be the same."""
        answers: list[Any] = []
        for connection in self.connections:
            try:
                answers.append(_comparable(await call(connection, *arguments, **named)))
            except LedgerError as error:
                answers.append(type(error))
        assert answers[0] == answers[1], (call, arguments)
        return answers[0]

    async def put(self, name: str) -> None:
        for books in (self.books, Books("", self.connections[1])):
            await books.budget(name, **self.budgets[name])

    def tokens(self, most: int = 40) -> int:
        return self.random.randrange(most)

    def one(self) -> UUID:
        known = self.random.random() < 0.95 and self.asked
        return self.random.choice(self.asked[-12:]).request_id if known else new_id()

    # --- operations --------------------------------------------------------------------------------------------

    async def admit(self) -> None:
        pick = self.random
        if self.asked and pick.random() < 0.1:
            asked = pick.choice(self.asked)
        else:
            asked = admission(
                input=self.tokens(),
                need=self.tokens(20),
                want=self.tokens(200),
                shares=pick.randint(1, 4),
                user=pick.choice(["ann", "bob"]),
                session=pick.choice(["s1", "s2"]),
                labels={"app": pick.choice(["shop", "blog"])},
            )
            asked = msgspec.structs.replace(asked, holder_id=pick.choice([*self.holders[-3:] * 4, UUID(int=7)]))
            self.asked.append(asked)
        await self.each(holds.admit, asked)

    async def extend(self) -> None:
        asked: dict[UUID, Extension] = {}
        for _ in range(self.random.randint(1, 3)):
            one = self.one()
            self.seqs[one] = seq = self.seqs.get(one, 0) + self.random.randint(0, 1)
            asked[one] = Extension(
                tenant_id=TENANT, request_id=one, seq=seq, need_tokens=self.tokens(), want_tokens=self.tokens(100)
            )
        await self.each(holds.extend, list(asked.values()), shares=self.random.randint(1, 4))

    async def settle(self) -> None:
        items: list[Settlement] = []
        for _ in range(self.random.randint(1, 4)):
            sent = self.random.random() < 0.8
            charged = sorted(key[1] for key in self.memory.policy_charged)
            one = self.random.choice(charged) if charged and self.random.random() < 0.2 else self.one()
            items.append(settlement(one, input=self.tokens(), output=self.tokens(150), sent=sent))
        await self.each(holds.settle, items)

    async def checkpoint(self) -> None:
        reached: list[Checkpoint] = [checkpoint(self.one(), input=self.tokens(), output=self.tokens())]
        await self.each(holders.checkpoint, reached)

    async def lease(self) -> None:
        windows = self.random.sample(sorted(self.memory.windows), min(3, len(self.memory.windows)))
        wants = [Want(TENANT, window, self.random.choice([0, 50, 400, 3000])) for window in windows]
        await self.each(leases.lease, self.random.choice([*self.holders[-3:] * 4, UUID(int=7)]), wants)

    async def change(self) -> None:
        row = self.budgets[self.random.choice(sorted(self.budgets))]
        row["limit"] = row["limit"] * self.random.choice([60, 90, 100, 120, 200]) // 100
        row["suspended"] = self.random.random() < 0.05
        if self.random.random() < 0.2:
            row["enforcement"] = self.random.choice(["hard", "soft"])
        for name in self.budgets:
            if self.budgets[name] is row:
                await self.put(name)

    async def end_windows(self) -> None:
        name = self.random.choice(["talk", "calls"])
        await self.books.age(name, "1 s")
        for window in self.memory.windows.values():
            if window.budget_id == f"demo/{name}" and window.ends_at is not None:
                window.ends_at = min(window.ends_at, time.time())

    async def register(self) -> None:
        if len(self.holders) < 3 or self.random.random() < 0.3:
            one = UUID(int=self.random.getrandbits(128))
            self.holders.append(one)
        else:
            one = self.random.choice(self.holders)
        await self.each(holders.register, one, "pod-1", 3600.0)
        # The server started longer ago than the TTL: that protects nobody.
        await self.books.connection.execute("UPDATE ledger.holder SET ttl = interval '1 ms'")
        for row in self.memory.holders.values():
            row.ttl_s = 0.001

    async def die(self) -> None:
        if self.holders:
            one = self.random.choice(self.holders[-3:])
            await self.books.connection.execute(
                "UPDATE ledger.holder SET expires_at = now() - interval '1 s' WHERE holder_id = $1", one
            )
            self.memory.holders[one].expires_at = time.time() - 1
            await self.each(holders.renew, one)

    async def leave(self) -> None:
        await self.each(holders.unregister, self.random.choice([*self.holders, UUID(int=1)]))

    async def reap(self) -> None:
        limit = self.random.choice([1, 100])
        row = await self.books.connection.fetchrow("SELECT * FROM ledger.reap_v1($1)", limit)
        assert dict(row) == self.memory.reap_v1(limit)

    async def charge(self) -> None:
        policy: Literal["checkpoint", "hold"] = self.random.choice(["checkpoint", "hold"])
        rows = await self.books.connection.fetch("SELECT * FROM ledger.charge_by_policy_v1('0 s', $1, 2)", policy)
        mine = self.memory.charge_by_policy_v1(timedelta(), policy, 2)
        assert [(row["request_id"], int(row["amount_pico"])) for row in rows] == [
            (row["request_id"], row["amount_pico"]) for row in mine
        ]

    async def somebody_dies_and_comes_back(self) -> None:
        for name, row in self.budgets.items():
            row.update(limit=1_000_000, suspended=False)
            await self.put(name)
        self.holders.clear()
        await self.register()
        for _ in range(6):
            await self.admit()
        await self.die()
        for _ in range(4):
            await self.reap()
            await self.charge()
        for _ in range(6):
            await self.settle()

    # --- comparison --------------------------------------------------------------------------------------------

    async def compare(self) -> None:
        memory, fetch = self.memory, self.books.connection.fetch
        windows = [
            (w.window_id, w.budget, w.subject, w.limit, w.ceiling, w.spent, w.held, w.suspense, w.overrun, w.live)
            for w in await self.books.windows()
        ]
        assert windows == [
            (w.window_id, w.budget_id, w.subject, w.limit, w.ceiling, w.spent, w.held, w.suspense, w.overrun, w.live)
            for w in memory.windows.values()
        ]
        rows = await fetch("SELECT request_id, state, granted_output_tokens, last_seq FROM ledger.hold")
        assert {tuple(row) for row in rows} == {
            (key[1], hold.state, hold.granted, hold.last_seq) for key, hold in memory.holds.items()
        }
        rows = await fetch("SELECT request_id, window_id, held::bigint FROM ledger.hold_line")
        assert {tuple(row) for row in rows} == {
            (key[1], window, held) for key, hold in memory.holds.items() for window, held in hold.lines.items()
        }
        rows = await fetch("SELECT source_id, window_id, seq, debit, credit, amount::bigint FROM ledger.posting")
        assert Counter(map(_posting, rows)) == Counter(map(_posting, memory.postings))
        rows = await fetch(
            "SELECT request_id, entry, class, quantity, rate_pico::bigint, amount_pico::bigint FROM ledger.usage_line"
        )
        assert Counter(tuple(row) for row in rows) == Counter(memory.usage_lines)
        rows = await fetch(
            "SELECT request_id, outcome, source, input_tokens, output_tokens, amount_pico::bigint"
            " FROM ledger.request_now"
        )
        names = ("outcome", "source", "input_tokens", "output_tokens", "amount_pico")
        assert {tuple(row) for row in rows} == {
            (key[1], *(row[name] for name in names)) for key, row in memory.requests.items()
        }
        rows = await fetch("SELECT window_id, holder_id, free::bigint, new_live, seq FROM ledger.lease")
        assert {tuple(row) for row in rows} == {
            (window_id, holder, lease.free, lease.new_live, lease.seq)
            for window_id, of_window in memory.leases.items()
            for holder, lease in of_window.items()
        }
        for window_id, account in memory.accounts.items():
            w = memory.windows[window_id]
            leased = account.get("leased", 0)
            balances = {"held": w.held - leased, "spent": w.spent, "suspense": w.suspense, "overrun": w.overrun}
            assert {name: account.get(name, 0) for name in balances} == balances


def _posting(row: Any) -> tuple[Any, ...]:
    source, window, seq, *moved = row
    # What configuration does has an id that nobody asks for.
    return (None if seq == 0 and "funding" in moved else source, window, seq, *moved)


def _comparable(answer: Any) -> Any:
    if isinstance(answer, list):
        return Counter(answer)  # rows come in any order
    if isinstance(answer, dict):
        return {key: _comparable(value) for key, value in answer.items()}
    if isinstance(answer, Refused):
        return msgspec.structs.replace(
            answer, resets_at="later" if answer.resets_at else None, retry_after_s=int(bool(answer.retry_after_s))
        )
    if getattr(answer, "bound_by", None) is not None:
        return msgspec.structs.replace(answer, bound_by=_comparable(answer.bound_by))
    return answer


@pytest.mark.parametrize("seed", range(5))
def test_both_ledgers_do_the_same_whatever_is_asked_of_them(dsn: str, seed: int) -> None:
    async def main() -> None:
        connection: Any = await connect(dsn)
        await connection.execute("SET synchronous_commit = off")
        both = Both(Books(dsn, connection), seed)
        for name in both.budgets:
            await both.put(name)
        await both.register()
        weights = {
            both.lease: 14,
            both.admit: 30, both.extend: 20, both.settle: 16, both.checkpoint: 10, both.change: 6, both.end_windows: 3,
            both.register: 4, both.die: 3, both.leave: 1, both.reap: 8, both.charge: 6,
        }  # fmt: skip
        try:
            for operation in both.random.choices(list(weights), list(weights.values()), k=STEPS):
                await operation()
            await both.compare()
            await both.somebody_dies_and_comes_back()
            await both.compare()
            assert "corrected" in {hold.state for hold in both.memory.holds.values()}
        finally:
            await connection.close()

    asyncio.run(main())


class MemoryBooks(Books):
    """Books whose rows are looked up in memory."""

    async def windows(self, budget: str | None = None) -> list[Window]:
        ledger: MemoryLedger = self.connection.ledger
        return [
            Window(
                window_id=w.window_id, budget=w.budget_id, subject=w.subject, limit=w.limit, ceiling=w.ceiling,
                spent=w.spent, held=w.held, suspense=w.suspense, overrun=w.overrun, live=w.live,
            )
            for w in ledger.windows.values()
            if budget is None or w.budget_id == f"demo/{budget}"
        ]  # fmt: skip

    async def findings(self) -> list[Any]:
        return []


class InMemory(Bookkeeping):
    """The machine of the books, on a ledger in memory."""

    books_of = MemoryBooks

    async def opened(self) -> Any:
        connection = MemoryConnection(MemoryLedger(time.time))
        await holders.register(connection, HOLDER, "pod-1", 3600.0)
        return connection


def test_the_ledger_in_memory_agrees_with_the_model_of_the_books() -> None:
    run_state_machine_as_test(
        InMemory,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            database=None,
        ),
    )
