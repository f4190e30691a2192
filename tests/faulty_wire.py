"""A wire to PostgreSQL with faults: it stands still, breaks, refuses, and loses answers to what was committed.

It reads as much of the protocol (PostgreSQL's documentation, "Frontend/Backend Protocol") as it needs to know which
statement goes by: `Parse` names a statement, `Bind` uses it.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

Way = Literal["lost", "silent", "late"]
"""What happens to a statement: its answer is `lost` and the connection breaks; it is never answered and the connection
stays `silent`; or the connection breaks at once and the statement arrives `late`: at `let_late_ones_through`.
"""

_UNTYPED = (80877103, 80877104)  # SSLRequest, GSSENCRequest: startup messages before the startup message
_READY = b"Z\x00\x00\x00\x05I"
"""ReadyForQuery outside of a transaction: what was asked is committed or rolled back."""


@dataclass(kw_only=True)
class _Rule:
    text: bytes
    way: Way
    times: int


class FaultyWire:
    """Listens on a port of its own and passes everything on to one server, except where it is told otherwise.

    Its methods are called in the loop that it was started in; `on_a_thread` gives one for tests without a loop.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._late = asyncio.Event()
        self._rules: list[_Rule] = []
        self.refuses = False
        """New connections are broken at once, as if nobody listened."""
        self.delay_s = 0.0
        """How much later everything arrives."""
        self.hits = 0
        """How many statements a rule was applied to."""
        self.port = 0

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def aclose(self) -> None:
        """Break everything."""
        if self._server is not None:
            self._server.close()
        self._flows.set()
        self._late.set()
        self.cut()
        for connection in list(self._connections):
            await connection.ended.wait()

    def cut(self) -> None:
        """Break every connection; new ones are taken."""
        for connection in list(self._connections):
            connection.abort()

    def away(self) -> None:
        """The server is gone: connections break, new ones too, until `back`."""
        self.refuses = True
        self.cut()

    def stall(self) -> None:
        """Nothing passes in either direction, and nobody is told, until `back`."""
        self._flows.clear()

    def back(self) -> None:
        """All is well again."""
        self.refuses = False
        self.delay_s = 0.0
        self._flows.set()

    def spoil(self, text: str, way: Way, *, times: int = 1) -> None:
        """Do this to the next so many statements whose SQL contains the text. Late ones wait for their own word."""
        if way == "late":
            self._late.clear()
        self._rules.append(_Rule(text=text.encode(), way=way, times=times))

    def let_late_ones_through(self) -> None:
        """Let the statements arrive that were kept."""
        self._late.set()

    # --- what passes -------------------------------------------------------------------------------------------

    def rule_for(self, sql: bytes) -> Way | None:
        """What is done to this statement."""
        for rule in self._rules:
            if rule.times and rule.text in sql:
                rule.times -= 1
                self.hits += 1
                return rule.way
        return None

    async def flow(self) -> None:
        """Wait as long as the wire does."""
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        await self._flows.wait()

    async def lateness(self) -> None:
        """Wait until late statements may arrive."""
        await self._late.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            writer.transport.abort()
            return
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            await connection.run(self._target)
        finally:
            self._connections.discard(connection)


class _Connection:
    def __init__(self, wire: FaultyWire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._wire = wire
        self._reader, self._writer = reader, writer
        self._server_writer: asyncio.StreamWriter | None = None
        self._statements: dict[bytes, bytes] = {}
        self._way: Way | None = None
        self.ended = asyncio.Event()

    def abort(self) -> None:
        """Break it on both sides."""
        self._writer.transport.abort()
        if self._server_writer is not None:
            self._server_writer.transport.abort()

    async def run(self, target: tuple[str, int]) -> None:
        try:
            await self._wire.flow()
            server_reader, self._server_writer = await asyncio.open_connection(*target)
            pumps = [asyncio.create_task(self._to_server()), asyncio.create_task(self._to_client(server_reader))]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                if self._way == "late":
                    await asyncio.wait(pumps)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass
        finally:
            self.abort()
            self.ended.set()

    async def _message(self, *, typed: bool) -> bytes:
        head = await self._reader.readexactly(5 if typed else 4)
        return head + await self._reader.readexactly(int.from_bytes(head[-4:]) - 4)

    async def _to_server(self) -> None:
        assert self._server_writer is not None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                first = await self._message(typed=False)
                await self._wire.flow()
                self._server_writer.write(first)
                if int.from_bytes(first[4:8]) not in _UNTYPED:
                    break
            while True:
                message = await self._message(typed=True)
                self._look(message)
                if self._way == "late":
                    # Sync follows in the same write: without it the server would not answer, and not commit.
                    message += await self._message(typed=True) + await self._message(typed=True)
                    self._writer.transport.abort()
                    await self._wire.lateness()
                    self._server_writer.write(message)
                    await self._server_writer.drain()
                    return
                await self._wire.flow()
                self._server_writer.write(message)
                await self._server_writer.drain()

    def _look(self, message: bytes) -> None:
        if message[:1] == b"P":
            name, sql, _ = message[5:].split(b"\0", 2)
            self._statements[name] = sql
        elif message[:1] == b"B" and self._way is None:
            _, name, _ = message[5:].split(b"\0", 2)
            self._way = self._wire.rule_for(self._statements.get(name, b""))

    async def _to_client(self, server: asyncio.StreamReader) -> None:
        lost = b""
        with contextlib.suppress(OSError):
            while data := await server.read(65_536):
                if self._way is None:
                    await self._wire.flow()
                    self._writer.write(data)
                    await self._writer.drain()
                    continue
                lost += data
                if lost.endswith(_READY) and self._way != "silent":
                    return


def through(dsn: str, wire: FaultyWire) -> str:
    """The same database, by way of the wire."""
    parts = urlsplit(dsn)
    login, at, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{login}{at}127.0.0.1:{wire.port}"))


def wire_to(dsn: str) -> FaultyWire:
    """A wire to the server of this DSN."""
    parts = urlsplit(dsn)
    return FaultyWire(parts.hostname or "127.0.0.1", parts.port or 5432)


@asynccontextmanager
async def faulty_wire(dsn: str) -> AsyncGenerator[tuple[FaultyWire, str]]:
    """A wire that is started, and the DSN by way of it."""
    wire = wire_to(dsn)
    await wire.start()
    try:
        yield wire, through(dsn, wire)
    finally:
        await wire.aclose()


class ThreadedWire:
    """A wire in a loop of its own."""

    def __init__(self, dsn: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.wire = wire_to(dsn)
        asyncio.run_coroutine_threadsafe(self.wire.start(), loop).result(10)
        self.dsn = through(dsn, self.wire)

    def do(self, what: Callable[[FaultyWire], None]) -> None:
        """Do something to the wire; it is done when this returns."""

        async def call() -> None:
            what(self.wire)

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def cut(self) -> None:
        """See `FaultyWire.cut`."""
        self.do(FaultyWire.cut)

    def away(self) -> None:
        """See `FaultyWire.away`."""
        self.do(FaultyWire.away)

    def stall(self) -> None:
        """See `FaultyWire.stall`."""
        self.do(FaultyWire.stall)

    def back(self) -> None:
        """See `FaultyWire.back`."""
        self.do(FaultyWire.back)

    def spoil(self, text: str, way: Way, *, times: int = 1) -> None:
        """See `FaultyWire.spoil`."""
        self.do(lambda wire: wire.spoil(text, way, times=times))

    def let_late_ones_through(self) -> None:
        """See `FaultyWire.let_late_ones_through`."""
        self.do(FaultyWire.let_late_ones_through)


@contextmanager
def wire_on_a_thread(dsn: str) -> Generator[ThreadedWire]:
    """A wire for tests without a loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        wire = ThreadedWire(dsn, loop)
        try:
            yield wire
        finally:
            asyncio.run_coroutine_threadsafe(wire.wire.aclose(), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
