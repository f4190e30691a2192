"""Clients and servers for the edge's tests: a raw HTTP/2 client with its hands on the windows, a raw HTTP/1 one."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import pytest
import uvloop
from hyperframe.frame import Frame, GoAwayFrame

from behest_proxy.edge.direct import direct_stream
from behest_proxy.edge.host import AsgiApplication, Receive, Scope, Send
from behest_proxy.edge.limits import EdgeLimits
from behest_proxy.edge.served import ServedRequest
from behest_proxy.edge.server import BoundAddress, TlsFiles, serve

GENEROUS_S = 20.0
LOOPS = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, loop: str = "uvloop") -> T:
    """Run a test under uvloop (production) or asyncio's own loop, bounded in time."""
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop

    async def bounded() -> T:
        async with asyncio.timeout(3 * GENEROUS_S):
            return await main

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(bounded())


@dataclass
class Running:
    """A server that runs; `stop` triggers the graceful shutdown and waits for its end."""

    addresses: Sequence[BoundAddress]
    trigger: asyncio.Event
    task: asyncio.Task[None]

    @property
    def port(self) -> int:
        return self.addresses[0].port

    @property
    def url(self) -> str:
        return self.addresses[0].url

    async def stop(self) -> None:
        self.trigger.set()
        await self.task


@asynccontextmanager
async def running(
    app: AsgiApplication,
    *,
    limits: EdgeLimits | None = None,
    on_refused: Callable[[], None] | None = None,
    tls: TlsFiles | None = None,
    graceful_timeout_s: float = 2.0,
    binds: Sequence[str] = ("127.0.0.1:0",),
    insecure_binds: Sequence[str] = (),
) -> AsyncGenerator[Running]:
    loop = asyncio.get_running_loop()
    bound: asyncio.Future[Sequence[BoundAddress]] = loop.create_future()
    trigger = asyncio.Event()
    task = loop.create_task(
        serve(
            app,
            binds=binds,
            insecure_binds=insecure_binds,
            tls=tls,
            limits=limits,
            on_refused=on_refused,
            shutdown_trigger=trigger.wait,
            graceful_timeout_s=graceful_timeout_s,
            on_bound=bound.set_result,
        )
    )
    await until(lambda: task.done() or bound.done())
    if task.done():
        task.result()
    server = Running(bound.result(), trigger, task)
    try:
        yield server
    finally:
        await server.stop()


async def until(condition: Callable[[], object], *, timeout_s: float = GENEROUS_S) -> None:
    """Wait until something becomes true; fails after a generous time."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


class _ClientMachine(h2.connection.H2Connection):
    """`h2`'s client, which outlives a GOAWAY as RFC 9113 asks of clients."""

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[h2.events.Event]]:
        event = h2.events.ConnectionTerminated()
        event.error_code = frame.error_code
        event.last_stream_id = frame.last_stream_id
        return [], [event]


@dataclass
class Answer:
    """What came on one stream."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    frames: int = 0
    ended: bool = False
    reset_code: int | None = None

    @property
    def over(self) -> bool:
        return self.ended or self.reset_code is not None


class RawH2:
    """An HTTP/2 client over asyncio streams. `acknowledge=False` never opens a window by itself."""

    def __init__(self, *, acknowledge: bool) -> None:
        self.machine = _ClientMachine(h2.config.H2Configuration(client_side=True, header_encoding=None))
        self.answers: dict[int, Answer] = {}
        self.goaways: list[tuple[int, int]] = []  # last stream id, error code
        self.closed = False
        self.unacknowledged = 0
        self._acknowledge = acknowledge
        self._next_id = 1

    async def open(
        self,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        window: int = 65_535,
        receive_buffer: int | None = None,
    ) -> None:
        self.reader, self.writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=tls, limit=receive_buffer or 2**16
        )
        self.machine.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.machine.initiate_connection()
        self.flush()
        self._reading = asyncio.get_running_loop().create_task(self._read())

    def flush(self) -> None:
        self.writer.write(self.machine.data_to_send())

    def request(
        self,
        path: str = "/",
        *,
        method: str = "GET",
        body: bytes | None = None,
        end: bool = True,
        headers: Sequence[tuple[str, str]] = (),
    ) -> int:
        stream_id = self._next_id
        self._next_id += 2
        self.answers[stream_id] = Answer()
        pseudo = [
            (":method", method),
            (":path", path),
            (":scheme", "http"),
            (":authority", "test.local"),
        ]
        self.machine.send_headers(stream_id, [*pseudo, *headers], end_stream=end and body is None)
        if body is not None:
            self.machine.send_data(stream_id, body, end_stream=end)
        self.flush()
        return stream_id

    async def get(self, path: str = "/", **options: Any) -> Answer:
        """One request, waited for."""
        answer = self.answers[self.request(path, **options)]
        await until(lambda: answer.over or self.closed)
        return answer

    def reset(self, stream_id: int) -> None:
        self.machine.reset_stream(stream_id, 8)
        self.flush()

    def open_window(self, size: int, stream_id: int | None = None) -> None:
        self.machine.increment_flow_control_window(size, stream_id)
        self.flush()

    async def _read(self) -> None:
        try:
            while data := await self.reader.read(2**16):
                for event in self.machine.receive_data(data):
                    self._note(event)
                self.flush()
        except (ConnectionError, h2.exceptions.ProtocolError):
            pass
        finally:
            self.closed = True

    def _note(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.ResponseReceived():
                answer = self.answers[event.stream_id]
                headers = dict(event.headers)
                answer.status = int(headers[b":status"])
                answer.headers = headers
            case h2.events.DataReceived():
                answer = self.answers[event.stream_id or 0]
                answer.body += event.data or b""
                answer.frames += 1
                if self._acknowledge:
                    self.machine.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
                else:
                    self.unacknowledged += event.flow_controlled_length or 0
            case h2.events.StreamEnded():
                self.answers[event.stream_id].ended = True
            case h2.events.StreamReset():
                self.answers[event.stream_id].reset_code = int(event.error_code or 0)
            case h2.events.ConnectionTerminated():
                self.goaways.append((event.last_stream_id or 0, int(event.error_code or 0)))
            case _:
                pass

    async def aclose(self) -> None:
        self._reading.cancel()
        self.writer.close()
        await asyncio.wait([self._reading])
        with suppress(ConnectionError):
            await self.writer.wait_closed()


@asynccontextmanager
async def raw_h2(port: int, *, acknowledge: bool = True, **options: Any) -> AsyncGenerator[RawH2]:
    client = RawH2(acknowledge=acknowledge)
    await client.open(port, **options)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def raw_tcp(
    port: int, *, tls: ssl.SSLContext | None = None
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def application(serve_request: Callable[[Scope, Receive, Send], Awaitable[None]]) -> AsgiApplication:
    """An ASGI application from its http part, with an agreeable lifespan."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        await serve_request(scope, receive, send)

    return app


async def read_body(receive: Receive) -> bytes:
    """The whole request body."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionError(message["type"])
        body += message["body"]
        if not message["more_body"]:
            return bytes(body)


async def answer(send: Send, body: bytes, *, status: int = 200) -> None:
    """An ordinary ASGI answer."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-length", b"%d" % len(body)), (b"content-type", b"text/plain")],
        }
    )
    await send({"type": "http.response.body", "body": body})


def stream_of(scope: Scope) -> ServedRequest:
    stream = direct_stream(scope)
    assert isinstance(stream, ServedRequest)
    return stream


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with method, path, query and body."""
    body = await read_body(receive)
    head = f"{scope['http_version']} {scope['method']} {scope['path']} {scope['query_string'].decode()} "
    await answer(send, head.encode() + body)
