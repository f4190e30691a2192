"""What a process says to others, counted on the way: proxies that may end it at its n-th call, or be away.

The operator speaks plain HTTP to one proxy, which speaks TLS to the API server, and PostgreSQL's protocol to the other.
A call is what changes something or asks for it: a request that is no watch, a statement of SQL. Nothing in the product
knows of it.
"""

import asyncio
import re
import ssl
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import yaml

from cluster.control_plane import ControlPlane

_T = TypeVar("_T")
_REQUEST = re.compile(rb"(GET|POST|PUT|PATCH|DELETE) (\S+) HTTP/1\.1\r\n")
_SQL_CALLS = (b"Q", b"P", b"B")
"""Simple queries; statements that are parsed, or bound again."""


@dataclass
class Calls:
    """Calls of one process, over all of its connections."""

    seen: list[str] = field(default_factory=list)
    ends_at: int | None = None
    """The number of the call with which the process ends."""
    end: Callable[[], None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, ends_at: int | None = None, end: Callable[[], None] | None = None) -> None:
        """Count anew."""
        with self._lock:
            self.seen = []
            self.ends_at, self.end = ends_at, end

    def saw(self, call: str) -> Callable[[], None] | None:
        """Count one; what ends the process, where it is the last."""
        with self._lock:
            self.seen.append(call)
            return self.end if self.ends_at is not None and len(self.seen) >= self.ends_at else None


class Proxy:
    """One listener before one server, in a loop of its own thread."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, target: tuple[str, int], calls: Calls, context: ssl.SSLContext | None
    ) -> None:
        self._loop = loop
        self._target = target
        self._calls = calls
        self._context = context
        self._open: set[asyncio.StreamWriter] = set()
        self._away = False
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def go_away(self) -> None:
        """Break every connection, and take no new one."""
        self._run(self._leave())

    def come_back(self) -> None:
        """Take connections again."""
        self._away = False

    def close(self) -> None:
        """End it."""
        self._server.close()
        self.go_away()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _leave(self) -> None:
        self._away = True
        while self._open:
            for writer in list(self._open):
                writer.transport.abort()
            await asyncio.sleep(0.01)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self._open.add(to_client)
        to_server: asyncio.StreamWriter | None = None
        try:
            if self._away:
                return
            server, to_server = await asyncio.open_connection(*self._target, ssl=self._context)
            self._open.add(to_server)
            back = asyncio.create_task(_pipe(server, to_client))
            try:
                await self._forward(client, to_server)
            finally:
                back.cancel()
                await asyncio.wait([back])
        except OSError:
            return
        finally:
            for writer in (to_client, to_server):
                if writer is not None:
                    self._open.discard(writer)
                    writer.transport.abort()

    async def _forward(self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
        is_sql, greeted = self._context is None, False
        while data := await client.read(262_144):
            end: Callable[[], None] | None = None
            for call in _sql(data, greeted) if is_sql else _http(data):
                end = self._calls.saw(call) or end
            greeted = True
            if end is not None and len(self._calls.seen) % 2:
                # Before it is done; else after: the answer is lost.
                end()
                return
            to_server.write(data)
            await to_server.drain()
            if end is not None:
                end()
                return


def _http(data: bytes) -> list[str]:
    found = ((method.decode(), path.decode()) for method, path in _REQUEST.findall(data))
    return [f"{method} {path}" for method, path in found if "watch=" not in path]


def _sql(data: bytes, greeted: bool) -> list[str]:
    """The statements in what a client wrote; clients of these tests write whole messages at once."""
    calls: list[str] = []
    at = 0
    while greeted and at + 5 <= len(data):
        kind, length = data[at : at + 1], int.from_bytes(data[at + 1 : at + 5])
        if kind in _SQL_CALLS:
            calls.append(f"SQL {kind.decode()} " + data[at + 5 : at + 165].decode("utf-8", "replace").strip("\0"))
        at += 1 + length
    return calls


async def _pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(262_144):
            sink.write(data)
            await sink.drain()
    sink.transport.abort()


@dataclass
class Ways:
    """Both ways of an operator to the world."""

    calls: Calls
    kubernetes: Proxy
    ledger: Proxy
    kubeconfig: Path
    dsn: str


@contextmanager
def counted_ways(plane: ControlPlane, kubeconfig: Path, dsn: str) -> Generator[Ways]:
    """Proxies before the API server and the ledger, and what to tell an operator so that it takes them."""
    calls = Calls()
    api, database = urlsplit(plane.url), urlsplit(dsn)
    assert api.hostname is not None
    assert api.port is not None
    assert database.hostname is not None
    assert database.port is not None
    context = ssl.create_default_context(cafile=str(plane.certificate_authority))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True, name="counting proxies")
    thread.start()
    kubernetes = Proxy(loop, (api.hostname, api.port), calls, context)
    ledger = Proxy(loop, (database.hostname, database.port), calls, None)
    document = yaml.safe_load(kubeconfig.read_text())
    document["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{kubernetes.port}"}
    counted = kubeconfig.with_suffix(".counted")
    counted.write_text(yaml.safe_dump(document))
    login = database.netloc.rpartition("@")[0]
    try:
        yield Ways(
            calls,
            kubernetes,
            ledger,
            counted,
            urlunsplit(database._replace(netloc=f"{login}@127.0.0.1:{ledger.port}")),
        )
    finally:
        kubernetes.close()
        ledger.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
