"""Nothing wakes up for a chunk: while hundreds pass, no task is made or resumed and the ledger is asked nothing more.

Gateway, edge and client share a loop here, and the simulator is a process of its own; the client is a protocol
without a task. What is counted besides is what the sidecar does by the clock.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import asyncpg
import pytest

from behest_proxy.app.asgi import client_app
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.settings import Settings
from fronts.caller import WIRES, Call, Wire, call
from proxy.edge_clients import run, running
from stack import Project, Stack

CHUNKS = 500
QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
_METHODS = ("execute", "executemany", "fetch", "fetchrow", "fetchval")


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


async def _counted(project: Project, token: str, folder: Path, wire: Wire, *, direct: bool) -> tuple[Counts, Call]:
    counts = Counts()
    _count_tasks(counts)
    with pytest.MonkeyPatch.context() as patch:
        _count_statements(counts, patch)
        async with _sidecar(project.stack, folder, direct=direct) as url:
            body = {"messages": QUESTION, "sim": {"output_tokens": CHUNKS, "chunk_interval_ms": 2}}
            await call(url, wire, token, {**body, "sim": {"output_tokens": 1}}, certificate=None)  # what is made once
            before = counts.copy()
            made = await call(url, wire, token, body, certificate=None)
            return counts.since(before), made


@pytest.mark.parametrize("wire", WIRES)
def test_no_task_and_no_statement_for_a_chunk(stack: Stack, tmp_path: Path, wire: Wire) -> None:
    project = stack.project()
    counts, made = run(_counted(project, project.mint(), tmp_path, wire, direct=True))
    assert len(made.events) > CHUNKS
    assert made.reads > CHUNKS // 2, "chunks that came together say nothing of one"
    assert 0 < counts.tasks < CHUNKS // 10, counts
    assert 0 < counts.steps < CHUNKS // 2, counts
    assert 0 < counts.statements < CHUNKS // 25, counts


def test_the_count_sees_a_server_that_resumes_a_task_for_each_chunk(stack: Stack, tmp_path: Path) -> None:
    project = stack.project()
    counts, made = run(_counted(project, project.mint(), tmp_path, "HTTP/1.1", direct=False))
    assert counts.steps > made.reads > CHUNKS // 2, counts
