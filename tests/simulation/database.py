"""The database of a simulated world, and the link to it: late, lost, repeated, restarted."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import asyncpg

from behest_ledger.store.pool import COMMAND_TIMEOUT_S
from ledger.memory_connection import Row, Statements
from ledger.memory_holders import MemoryLedger
from simulation.plan import Faults
from simulation.world import Process, World

SLOW_S = 7.0
"""Longer than the store waits for an answer."""


class Database:
    """A server with one ledger. A statement is carried out at once and whole, when it arrives."""

    def __init__(self, world: World, ledger: MemoryLedger, faults: Faults, latency_s: float) -> None:
        self.world = world
        self.ledger = ledger
        self.statements = Statements(ledger)
        self.faults = faults
        self.latency_s = latency_s
        self.is_up = True
        self.life = 0
        self.version = 1
        self.after: Callable[[str], None] = lambda _name: None
        """Called after every statement that was carried out."""

    # --- its fate ----------------------------------------------------------------------------------------------

    def outage(self, for_s: float, *, restart: bool) -> None:
        """Nobody reaches it for a while; or it is restarted, which every session feels."""
        if not self.is_up:
            return
        self.is_up = False
        self.world.note(f"the database is {'restarted' if restart else 'away'} for {for_s:.2f} s")
        if restart:
            self.life += 1
        self.world.after(for_s, self._back, restart)

    def _back(self, restarted: bool) -> None:
        self.is_up = True
        if restarted:
            self.ledger.server_started_at = self.world.wall_s
        self.world.note("the database is back")

    # --- the link ----------------------------------------------------------------------------------------------

    def send(self, process: Process, query: str, arguments: Sequence[Any], answer: Any) -> None:
        """A statement on its way. `answer` is a future of the process; it may never be answered."""
        world, faults = self.world, self.faults
        pick = world.random.random
        delay_s = self._delay_s()
        if not self.is_up:
            # A network that is away says nothing; a server that is away refuses.
            if pick() < 0.5:
                process.arrives(delay_s, _fail, answer, ConnectionRefusedError("the database is away"))
            return
        if faults.lost_before and pick() < faults.lost_before:
            self._lose(process, answer)
            return
        if faults.slow and pick() < faults.slow:
            delay_s += pick() * SLOW_S
        if faults.repeated and pick() < faults.repeated:
            world.after(delay_s + pick() * 2 * SLOW_S, self._repeat, query, arguments)
        world.after(delay_s, self._arrive, process, query, arguments, answer, self.life)

    def _delay_s(self) -> float:
        return self.latency_s * (0.5 + self.world.random.random()) if self.latency_s else 0.0

    def _lose(self, process: Process, answer: Any) -> None:
        pick = self.world.random.random
        if pick() >= self.faults.silent:
            process.arrives(self._delay_s(), _fail, answer, ConnectionResetError("the connection is lost"))

    def _repeat(self, query: str, arguments: Sequence[Any]) -> None:
        # Not admissions: a refusal leaves nothing in the books, and nobody asks again whom it has reached.
        if self.is_up and any(name in query for name in ("settle_batch", "extend_batch", "checkpoint_batch")):
            with contextlib.suppress(asyncpg.PostgresError):  # nobody is there to read it
                self._execute(query, arguments, "again ")

    def _arrive(self, process: Process, query: str, arguments: Sequence[Any], answer: Any, life: int) -> None:
        faults, pick = self.faults, self.world.random.random
        if not self.is_up or life != self.life:
            process.arrives(0.0, _fail, answer, ConnectionResetError("the server closed the connection"))
            return
        if faults.conflict and pick() < faults.conflict:
            error: Exception = asyncpg.SerializationError("simulated")
            if pick() < 0.5:
                error = asyncpg.DeadlockDetectedError("simulated")
            process.arrives(self._delay_s(), _fail, answer, error)
            return
        if faults.busy and pick() < faults.busy:
            process.arrives(self._delay_s(), _fail, answer, asyncpg.LockNotAvailableError("simulated"))
            return
        try:
            rows = self._execute(query, arguments, "")
        except asyncpg.PostgresError as error:
            process.arrives(self._delay_s(), _fail, answer, error)
            return
        if faults.lost_after and pick() < faults.lost_after:
            self._lose(process, answer)
            return
        process.arrives(self._delay_s(), _succeed, answer, rows)

    def _execute(self, query: str, arguments: Sequence[Any], again: str) -> list[Row]:
        if "configuration_version" in query:
            return [(self.version,)]
        if not arguments or "suspended" in query:
            return self.statements.execute(query, arguments)
        name = query[query.index("ledger.") + 7 : query.index("(", query.index("ledger."))]
        rows = self.statements.execute(query, arguments)
        if name != "renew_holder_v1":
            self.world.note(f"ledger {again}{name} {_shown(arguments)} -> {_shown(rows)}")
        self.after(name)
        return rows


class Pool:
    """What the store of one process uses of an asyncpg pool."""

    def __init__(self, database: Database, process: Process) -> None:
        self._database = database
        self._process = process

    async def fetch(self, query: str, *arguments: Any) -> list[Row]:
        """All rows."""
        self._process.boundary()
        answer = self._process.create_future()
        # As the pool is told to: after so long the result is unknown.
        timer = self._process.call_later(COMMAND_TIMEOUT_S, _fail, answer, TimeoutError())
        self._database.send(self._process, query, arguments, answer)
        try:
            rows: list[Row] = await answer
        finally:
            timer.cancel()
        self._process.boundary()
        return rows

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        """The first column of the first row."""
        row = (await self.fetch(query, *arguments))[0]
        return row[0] if isinstance(row, tuple) else next(iter(row.values()))

    def terminate(self) -> None:
        """Nothing to end."""


def _succeed(answer: Any, rows: list[Row]) -> None:
    if not answer.done():
        answer.set_result(rows)


def _fail(answer: Any, error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 600 else text[:600] + "..."
