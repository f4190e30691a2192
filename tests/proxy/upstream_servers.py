"""Tiny servers and a recording handler for the upstream client's tests: real sockets, every byte scripted."""

import asyncio
import gc
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, cast

import h2.config
import h2.connection
import h2.events
import h2.settings
import uvloop

from behest_proxy.upstream import UpstreamCall, UpstreamClient, UpstreamFailure, UpstreamRequest

LOOPS = ["asyncio", "uvloop"]
GENEROUS_S = 20.0


def run(main: Callable[[], Coroutine[Any, Any, None]], loop: str = "asyncio") -> None:
    """Run `main` on the named loop; it must leave no task and no open socket behind."""

    async def checked() -> None:
        await asyncio.wait_for(main(), 3 * GENEROUS_S)
        await eventually(lambda: len(asyncio.all_tasks()) == 1)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        runner.run(checked())
    gc.collect()


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until the condition holds; fail after a generous time."""
    deadline_s = time.monotonic() + GENEROUS_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        await asyncio.sleep(0.005)


class Recorder:
    """A handler that writes down what it is told, and checks the order of it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.failure: UpstreamFailure | None = None
        self.sent = 0
        self.ended = 0
        self.broken = 0
        self.over = asyncio.Event()
        self.begun = asyncio.Event()
        self.on_piece: Callable[[bytes], None] = lambda data: None

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def kind(self) -> str | None:
        return self.failure.kind if self.failure else None

    def on_request_sent(self) -> None:
        assert not self.over.is_set()
        self.sent += 1

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        assert not self.over.is_set()
        assert not self.status
        self.status = status
        self.headers = headers
        self.begun.set()

    def on_data(self, data: bytes) -> None:
        assert self.status
        assert not self.over.is_set()
        assert type(data) is bytes
        assert data
        self.pieces.append(data)
        self.on_piece(data)

    def on_end(self) -> None:
        assert self.status
        assert not self.over.is_set()
        self.ended += 1
        self.over.set()

    def on_failure(self, failure: UpstreamFailure) -> None:
        assert not self.over.is_set()
        self.failure = failure
        self.over.set()

    def on_broken(self) -> None:
        self.broken += 1


def a_request(
    url: str,
    *,
    body: bytes = b"{}",
    protocol: Literal["auto", "http1", "http2"] = "auto",
    connect_timeout_s: float = 5.0,
    first_byte_timeout_s: float = 10.0,
    idle_timeout_s: float = 10.0,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> UpstreamRequest:
    return UpstreamRequest(
        method="POST",
        url=url,
        headers=headers if headers is not None else [(b"Content-Type", b"application/json")],
        body=body,
        protocol=protocol,
        connect_timeout_s=connect_timeout_s,
        first_byte_timeout_s=first_byte_timeout_s,
        idle_timeout_s=idle_timeout_s,
    )


async def fetch(client: UpstreamClient, request: UpstreamRequest) -> Recorder:
    """Send, and wait for the end."""
    handler = Recorder()
    client.send(request, handler)
    await handler.over.wait()
    return handler


def start(client: UpstreamClient, request: UpstreamRequest) -> tuple[Recorder, UpstreamCall]:
    handler = Recorder()
    return handler, client.send(request, handler)


@asynccontextmanager
async def a_client(**options: Any) -> AsyncGenerator[UpstreamClient]:
    options.setdefault("environment", {})
    client = UpstreamClient(**options)
    try:
        yield client
    finally:
        await client.aclose()


# HTTP/1.1, every byte scripted.


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> tuple[bytes, bytes]:
        """Read one request; raises EOFError when the client closes instead."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return head, await self.reader.readexactly(length)

    async def send(self, *pieces: bytes) -> None:
        """Write the pieces, each in a TCP segment of its own as far as that can be had."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            if len(pieces) > 1:
                await asyncio.sleep(0)

    async def sees_close(self) -> bool:
        """Wait until the client has closed its side."""
        with suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        return True


class Http1Server:
    """Plays one script per connection."""

    def __init__(self) -> None:
        self.connections = 0
        self.port = 0
        self.open_now = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"


Script = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def http1_server(script: Script, *, tls: ssl.SSLContext | None = None) -> AsyncGenerator[Http1Server]:
    server = Http1Server()
    tasks: set[asyncio.Task[Any]] = set()
    errors: list[BaseException] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        server.connections += 1
        server.open_now += 1
        try:
            await script(Peer(reader, writer))
        except (EOFError, ConnectionError):
            pass
        except AssertionError as error:
            errors.append(error)
        except asyncio.CancelledError:
            pass
        finally:
            server.open_now -= 1
            tasks.discard(task)
            writer.transport.abort() if tls else writer.close()
            with suppress(ConnectionError, asyncio.CancelledError, ssl.SSLError):
                await writer.wait_closed()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        waiting = list(tasks)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await listener.wait_closed()
    assert not errors, errors


def answering(*pieces: bytes) -> Script:
    """A script that answers every request with the same bytes and keeps the connection."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(*pieces)

    return script


async def tunnel(peer: Peer, port: int) -> None:
    """Answer a CONNECT and copy bytes both ways until one side closes."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()

    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    copies: list[asyncio.Task[None]] = []
    try:
        await peer.send(b"HTTP/1.1 200 Connection established\r\nproxy-agent: x\r\n\r\n")
        copies += [asyncio.create_task(copy(peer.reader, writer)), asyncio.create_task(copy(reader, peer.writer))]
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        writer.transport.abort()
        for task in copies:
            task.cancel()
        await asyncio.gather(*copies, writer.wait_closed(), return_exceptions=True)


CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# HTTP/2.


class H2Request:
    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.body = bytearray()
        self.complete = False
        self.reset_code: int | None = None


class H2Peer(asyncio.Protocol):
    """The server's end of one HTTP/2 connection. Windows are given back unless `stingy`."""

    def __init__(self, server: "H2Server") -> None:
        self.server = server
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=server.settings)
        self.requests: dict[int, H2Request] = {}
        self.goaway = False
        self.closed = False
        self.pings = 0
        self.window_updates: list[int] = []
        self.window_opened = asyncio.Event()
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.server.peers.append(self)
        if not self.server.silent:
            self.h2.initiate_connection()
            self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.window_opened.set()

    def data_received(self, data: bytes) -> None:
        if self.server.silent:
            return
        for event in self.h2.receive_data(data):
            self.react(event)
        self.flush()

    def react(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            request = self.requests[event.stream_id] = H2Request()
            request.headers = {bytes(name): bytes(value) for name, value in event.headers}
            self.server.on_head(self, event.stream_id)
        elif isinstance(event, h2.events.DataReceived):
            self.requests[event.stream_id].body += event.data
            if not self.server.stingy and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self.requests[event.stream_id].complete = True
            self.server.on_request(self, event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self.requests[event.stream_id].reset_code = int(event.error_code or 0)
            self.window_opened.set()
        elif isinstance(event, h2.events.WindowUpdated):
            self.window_updates.append(event.stream_id or 0)
            self.window_opened.set()
        elif isinstance(event, h2.events.RemoteSettingsChanged):
            self.window_opened.set()
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = True
        elif isinstance(event, h2.events.PingReceived):
            self.pings += 1

    def flush(self) -> None:
        data = self.h2.data_to_send()
        if data and not self.transport.is_closing():
            self.transport.write(data)

    # What tests say.

    def head(self, stream_id: int, *headers: tuple[bytes, bytes], status: bytes = b"200", end: bool = False) -> None:
        self.h2.send_headers(stream_id, [(b":status", status), *headers], end_stream=end)
        self.flush()

    def data(self, stream_id: int, data: bytes, *, end: bool = False, padding: int | None = None) -> None:
        self.h2.send_data(stream_id, data, end_stream=end, pad_length=padding)
        self.flush()

    def reply(self, stream_id: int, body: bytes = b"hello") -> None:
        self.head(stream_id, (b"content-type", b"text/event-stream"))
        self.data(stream_id, body, end=True)

    async def stream(self, stream_id: int, body: bytes, *, end: bool = True) -> int:
        """Send as the windows open; return what was sent before a reset or the connection's end."""
        sent = 0
        while sent < len(body):
            if self.closed or self.requests[stream_id].reset_code is not None:
                return sent
            room = min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)
            if room <= 0:
                self.window_opened.clear()
                await self.window_opened.wait()
                continue
            piece = body[sent : sent + room]
            sent += len(piece)
            self.data(stream_id, piece, end=end and sent == len(body))
            await asyncio.sleep(0)
        return sent

    def raw(self, data: bytes) -> None:
        self.transport.write(data)


class H2Server:
    """`on_head` and `on_request` are called with the peer and the stream."""

    def __init__(self) -> None:
        self.port = 0
        self.scheme = "http"
        self.peers: list[H2Peer] = []
        self.settings: dict[h2.settings.SettingCodes, int] = {}
        self.stingy = False
        self.silent = False
        self.on_head: Callable[[H2Peer, int], None] = lambda peer, stream_id: None
        self.on_request: Callable[[H2Peer, int], None] = lambda peer, stream_id: peer.reply(stream_id)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/v1/chat/completions"

    @property
    def peer(self) -> H2Peer:
        assert len(self.peers) == 1
        return self.peers[0]


@asynccontextmanager
async def http2_server(
    *, tls: ssl.SSLContext | None = None, max_concurrent_streams: int | None = None
) -> AsyncGenerator[H2Server]:
    server = H2Server()
    if max_concurrent_streams is not None:
        server.settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = max_concurrent_streams
    listener = await asyncio.get_running_loop().create_server(lambda: H2Peer(server), "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    if tls:
        server.scheme = "https"
    try:
        yield server
    finally:
        for peer in server.peers:
            peer.transport.abort()
        await eventually(lambda: all(peer.closed for peer in server.peers))
        listener.close()
        await listener.wait_closed()
