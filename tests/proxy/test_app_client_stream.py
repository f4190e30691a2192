"""The same application under a server that offers no direct writes, and the queue that serves it there."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from hypercorn.asyncio import serve
from hypercorn.config import Config

from behest_ledger.store.pool import connect
from behest_proxy.app.asgi import client_app
from behest_proxy.app.client_stream import BUFFER_BYTES_HIGH, BUFFER_BYTES_MAX, QueuedStream, client_stream
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.settings import Settings
from stack import Project, Stack

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]


@asynccontextmanager
async def _served_by_hypercorn(stack: Stack, folder: Path) -> AsyncGenerator[str]:
    """A second sidecar on the same ledger, as any ASGI server would run it."""
    key_file = folder / "signing.pem"
    key_file.write_bytes(stack.signing_key.private_pem())
    gateway = Gateway(Settings(database_url=stack.dsn, signing_key_file=key_file))
    await gateway.start()
    config = Config()
    with socket.create_server(("127.0.0.1", 0)) as listening:  # who comes before it accepts waits
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config.bind = [f"fd://{listening.detach()}"]
    config.errorlog = None
    stopped = asyncio.Event()
    serving = asyncio.create_task(serve(client_app(gateway), config, shutdown_trigger=stopped.wait))
    try:
        yield url
    finally:
        stopped.set()
        await serving
        await gateway.aclose()


@asynccontextmanager
async def _connected(stack: Stack) -> AsyncGenerator[Any]:
    connection = await connect(stack.dsn)
    try:
        yield connection
    finally:
        await connection.close()


def test_the_application_streams_and_is_cancelled_under_another_server(stack: Stack, tmp_path: Path) -> None:
    project: Project = stack.project()
    headers = {"Authorization": f"Bearer {project.mint()}"}

    def body(**sim: Any) -> dict[str, Any]:
        return {"messages": QUESTION, "stream": True, "sim": sim}

    async def scenario() -> tuple[str, httpx.Response]:
        async with _served_by_hypercorn(stack, tmp_path) as url, httpx.AsyncClient(base_url=url) as client:
            whole = await client.post("/v1/chat/completions", headers=headers, json=body(output_tokens=50))
            plain = await client.post("/v1/chat/completions", headers=headers, json={"messages": QUESTION})
            async with client.stream(
                "POST",
                "/v1/chat/completions",
                headers=headers,
                json=body(output_tokens=10_000, chunk_interval_ms=5),
            ) as answer:
                seen = 0
                async for _ in answer.aiter_lines():
                    seen += 1
                    if seen == 20:
                        break
            async with _connected(stack) as connection:
                count = "SELECT count(*) FROM ledger.request WHERE project_id = $1"
                async with asyncio.timeout(30):
                    while await connection.fetchval(count, project.project_id) < 3:
                        await asyncio.sleep(0.02)
            return whole.text, plain

    text, plain = asyncio.run(scenario())
    assert text.endswith("data: [DONE]\n\n")
    assert plain.json()["usage"]["completion_tokens"] == 64
    rows = project.settled(number=3)
    assert [row["outcome"] for row in rows] == ["completed", "completed", "client_cancelled"]
    assert [row["output_tokens"] for row in rows[:2]] == [50, 64]


class _Server:
    """ASGI's `send` and `receive`, with a client that can stop reading and leave."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.left = asyncio.Event()

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.sent.append(message)

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}


def test_what_was_written_is_sent_in_its_order() -> None:
    async def scenario() -> list[Any]:
        server = _Server()
        stream = QueuedStream(server.send, server.receive)
        stream.begin(200, [(b"a", b"b")])
        stream.write(b"one")
        stream.write(b"two")
        stream.end()
        await stream.run()
        return server.sent

    start, *bodies = asyncio.run(scenario())
    assert (start["status"], start["headers"]) == (200, [(b"a", b"b")])
    assert [(body["body"], body["more_body"]) for body in bodies] == [(b"one", True), (b"two", True), (b"", False)]


def test_a_client_that_does_not_read_pauses_the_stream_and_resumes_it_when_it_does() -> None:
    async def scenario() -> list[str]:
        server = _Server()
        server.reads.clear()
        stream = QueuedStream(server.send, server.receive)
        told: list[str] = []
        stream.on_resume = lambda: told.append("resume")
        running = asyncio.create_task(stream.run())
        stream.begin(200, [])
        while not stream.paused:
            stream.write(b"x" * 1000)
            await asyncio.sleep(0)
        assert stream.buffered_bytes <= BUFFER_BYTES_HIGH + 1000
        server.reads.set()
        while stream.paused:
            await asyncio.sleep(0)
        stream.end()
        await running
        return told

    assert asyncio.run(scenario()) == ["resume"]


def test_a_client_that_lets_too_much_pile_up_is_given_up_once() -> None:
    async def scenario() -> tuple[list[str], int]:
        server = _Server()
        server.reads.clear()
        stream = QueuedStream(server.send, server.receive)
        told: list[str] = []
        stream.on_gone = lambda: told.append("gone")
        for _ in range(2 * BUFFER_BYTES_MAX // 1000):
            stream.write(b"x" * 1000)
        return told, stream.buffered_bytes

    told, buffered = asyncio.run(scenario())
    assert told == ["gone"]
    assert buffered <= BUFFER_BYTES_HIGH + BUFFER_BYTES_MAX + 2000


def test_one_large_write_is_no_reason_to_give_a_client_up_and_its_pause_lasts_until_the_end_of_it_is_told() -> None:
    async def scenario() -> tuple[list[str], int]:
        server, taken = _Server(), asyncio.Semaphore(0)

        async def send(message: Any) -> None:
            await taken.acquire()
            server.sent.append(message)

        stream = QueuedStream(send, server.receive)
        told: list[str] = []
        stream.on_gone = lambda: told.append("gone")
        stream.on_resume = lambda: told.append("resume")
        running = asyncio.create_task(stream.run())
        stream.begin(200, [])
        stream.write(b"x" * 2 * BUFFER_BYTES_MAX)
        stream.write(b"y" * (BUFFER_BYTES_HIGH - 1000))
        for _ in range(2):  # the head and the large one
            taken.release()
        while stream.buffered_bytes > BUFFER_BYTES_HIGH:
            await asyncio.sleep(0)
        stream.write(b"z")
        assert (stream.paused, told) == (True, [])
        for _ in range(3):
            taken.release()
        while stream.paused:
            await asyncio.sleep(0)
        stream.end()
        await running
        return told, sum(len(message.get("body", b"")) for message in server.sent)

    assert asyncio.run(scenario()) == (["resume"], 2 * BUFFER_BYTES_MAX + BUFFER_BYTES_HIGH - 999)


def test_a_disconnect_is_told_once_and_not_after_the_end() -> None:
    async def scenario(*, ended: bool) -> list[str]:
        server = _Server()
        stream = QueuedStream(server.send, server.receive)
        told: list[str] = []
        stream.on_gone = lambda: told.append("gone")
        watching = asyncio.create_task(stream.watch())
        if ended:
            stream.end()
        server.left.set()
        await watching
        return told

    assert asyncio.run(scenario(ended=False)) == ["gone"]
    assert asyncio.run(scenario(ended=True)) == []


def test_our_own_edge_is_preferred() -> None:
    async def nothing(_message: Any = None) -> None: ...

    direct = object()
    assert client_stream({"extensions": {"behest.direct": {"stream": direct}}}, nothing, nothing) is direct
    assert isinstance(client_stream({}, nothing, nothing), QueuedStream)
