"""Nothing wakes up for a chunk: while hundreds pass, no task is made or resumed and the ledger is asked nothing more.

Provider, gateway, edge and client share a loop here; provider and client are protocols without a task, and a chunk is
said when the one before it was read, so that each comes alone however busy the machine is. What is counted besides is
what the sidecar does by the clock.
"""

import asyncio
import socket
from collections.abc import AsyncGenerator, Coroutine, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import asyncpg
import pytest

from behest_proxy.app.asgi import client_app
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.settings import Settings
from fronts.caller import WIRES, Call, Wire, call
from proxy.edge_clients import run, running
from proxy.upstream_servers import CHUNKED_HEAD, chunk
from stack import Project, Stack

CHUNKS = 500
QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
_METHODS = ("execute", "executemany", "fetch", "fetchrow", "fetchval")


class Provider(asyncio.Protocol):
    """Says the next chunk when it is told to; the first by itself. It serves one connection after the other."""

    def __init__(self, port: socket.socket) -> None:
        self.url = f"http://127.0.0.1:{port.getsockname()[1]}/v1"
        self.chunks = 1
        """Of each answer from now on."""
        self._listening = port
        self._transports: list[asyncio.Transport] = []
        self._asked = b""
        self._said = 0

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[None]:
        server = await asyncio.get_running_loop().create_server(lambda: self, sock=self._listening)
        try:
            yield
        finally:
            server.close()
            for transport in self._transports:
                transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transports.append(cast("asyncio.Transport", transport))

    def data_received(self, data: bytes) -> None:
        self._asked += data
        head, whole, body = self._asked.partition(b"\r\n\r\n")
        if whole and len(body) == int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]):
            self._asked, self._said = b"", 0
            self._transports[-1].write(CHUNKED_HEAD)
            self.next()

    def next(self) -> None:
        """One more chunk, or behind the last the end."""
        self._said += 1
        if self._said <= self.chunks:
            self._transports[-1].write(chunk(b'data: {"choices":[{"index":0,"delta":{"content":" so"}}]}\n\n'))
        elif self._said == self.chunks + 1:
            end = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
            self._transports[-1].write(chunk(end) + b"0\r\n\r\n")


@pytest.fixture
def provider() -> Provider:
    return Provider(socket.create_server(("127.0.0.1", 0)))


@dataclass
class Counts:
    """What happened on the loop."""

    tasks: int = 0
    steps: int = 0
    """How often a task was resumed."""
    statements: int = 0

    def since(self, before: "Counts") -> "Counts":
        return Counts(self.tasks - before.tasks, self.steps - before.steps, self.statements - before.statements)

    def copy(self) -> "Counts":
        return self.since(Counts())


class _Counted(Coroutine[Any, Any, Any]):
    """A task's coroutine that counts how often it is resumed."""

    def __init__(self, inner: Coroutine[Any, Any, Any], counts: Counts) -> None:
        self._inner, self._counts = inner, counts

    def send(self, value: Any) -> Any:
        self._counts.steps += 1
        return self._inner.send(value)

    def throw(self, kind: Any, value: Any = None, traceback: TracebackType | None = None) -> Any:
        self._counts.steps += 1
        return self._inner.throw(value if value is not None else kind)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise AssertionError("only a task runs this")


def _count_tasks(counts: Counts) -> None:
    def factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> "asyncio.Task[Any]":
        counts.tasks += 1
        return asyncio.Task(_Counted(work, counts), loop=loop, **options)

    asyncio.get_running_loop().set_task_factory(factory)


def _count_statements(counts: Counts, patch: pytest.MonkeyPatch) -> None:
    for name in _METHODS:
        inner = getattr(asyncpg.Connection, name)

        def counted(self: Any, *arguments: Any, _inner: Any = inner, **options: Any) -> Any:
            counts.statements += 1
            return _inner(self, *arguments, **options)

        patch.setattr(asyncpg.Connection, name, counted)


@asynccontextmanager
async def _sidecar(stack: Stack, folder: Path, *, direct: bool) -> AsyncGenerator[str]:
    """A sidecar on this loop. Not direct: its edge offers no direct writes, as other servers do not."""
    key_file = folder / "signing.pem"
    key_file.write_bytes(stack.signing_key.private_pem())
    gateway = Gateway(Settings(database_url=stack.dsn, signing_key_file=key_file))
    app = client_app(gateway)

    async def without_direct_writes(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "extensions": {}} if scope["type"] == "http" else scope, receive, send)

    await gateway.start()
    try:
        async with running(app if direct else without_direct_writes) as server:
            yield f"http://127.0.0.1:{server.port}"
    finally:
        await gateway.aclose()


async def _counted(
    project: Project, provider: Provider, token: str, folder: Path, wire: Wire, *, direct: bool
) -> tuple[Counts, Call]:
    counts = Counts()
    _count_tasks(counts)
    with pytest.MonkeyPatch.context() as patch:
        _count_statements(counts, patch)
        async with provider.serving(), _sidecar(project.stack, folder, direct=direct) as url:

            async def ask() -> Call:
                return await call(url, wire, token, {"messages": QUESTION}, certificate=None, on_read=provider.next)

            await ask()  # what is made once
            provider.chunks = CHUNKS
            before = counts.copy()
            made = await ask()
            return counts.since(before), made


@pytest.mark.parametrize("wire", WIRES)
def test_no_task_and_no_statement_for_a_chunk(stack: Stack, provider: Provider, tmp_path: Path, wire: Wire) -> None:
    project = stack.project(upstream_url=provider.url)
    counts, made = run(_counted(project, provider, project.mint(), tmp_path, wire, direct=True))
    assert len(made.events) > CHUNKS
    assert made.reads >= CHUNKS, "chunks that come together say nothing of one"
    assert 0 < counts.tasks < CHUNKS // 10, counts
    assert 0 < counts.steps < CHUNKS // 2, counts
    assert 0 < counts.statements < CHUNKS // 25, counts


def test_the_count_sees_a_server_that_resumes_a_task_for_each_chunk(
    stack: Stack, provider: Provider, tmp_path: Path
) -> None:
    project = stack.project(upstream_url=provider.url)
    counts, made = run(_counted(project, provider, project.mint(), tmp_path, "HTTP/1.1", direct=False))
    assert counts.steps > made.reads >= CHUNKS, counts
