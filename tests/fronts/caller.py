"""A client that knows in which read each event came, over HTTP/1.1 and HTTP/2, with and without TLS."""

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset

Wire = Literal["HTTP/1.1", "HTTP/2"]
WIRES: Sequence[Wire] = ("HTTP/1.1", "HTTP/2")


class Call(asyncio.Protocol):
    """One streamed answer on a connection of its own."""

    def __init__(self, authority: str, token: str, body: dict[str, Any], *, leave_after: int | None = None) -> None:
        self.reads = 0
        """Reads that brought events."""
        self.text = b""
        """The body so far; over HTTP/1.1 with its chunked framing."""
        self.request_id = ""
        self.on_read: Callable[[], None] | None = None
        """Told of each read that brought events."""
        self.left_ns = 0
        """When it was aborted, by CLOCK_MONOTONIC."""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._authority, self._token, self._body = authority, token, json.dumps({**body, "stream": True}).encode()
        self._leave_after = leave_after
        self._lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes."""
        self._lost.set()
        if not self.over.done():
            self.over.set_exception(ConnectionError(f"the connection ended early: {exc}; {self.text[-300:]!r}"))

    async def close(self) -> None:
        """End the connection."""
        self._transport.abort()
        await self._lost.wait()

    @property
    def events(self) -> list[bytes]:
        """The payloads of all events."""
        return [line[6:] for line in self.text.splitlines() if line.startswith(b"data: ")]

    def _read(self, data: bytes, *, ended: bool) -> None:
        self.reads += b"data: " in data
        self.text += data
        if self.over.done():
            return
        if self.on_read is not None and b"data: " in data:
            self.on_read()
        if ended:
            self.over.set_result(None)
        elif self._leave_after is not None and self.text.count(b"data: ") >= self._leave_after:
            self._leave()
            self.left_ns = time.monotonic_ns()
            self.over.set_result(None)

    def _ask(self) -> None:
        raise AssertionError("each wire asks in its own way")

    def _leave(self) -> None:
        raise AssertionError("each wire leaves in its own way")


class Http1Call(Call):
    """Leaves by closing its connection."""

    def _ask(self) -> None:
        self._transport.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._authority}\r\nauthorization: Bearer {self._token}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(self._body)}\r\n\r\n".encode()
            + self._body
        )

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer, its head among them."""
        self._read(data, ended=(self.text + data).endswith(b"\r\n0\r\n\r\n"))
        if not self.request_id:
            _, found, after = self.text.lower().partition(b"x-request-id: ")
            self.request_id = after[:36].decode() if found else ""

    def _leave(self) -> None:
        self._transport.abort()


class Http2Call(Call):
    """Leaves by resetting its stream; the connection stays."""

    def _ask(self) -> None:
        self._h2 = H2Connection(H2Configuration(client_side=True))
        self._h2.initiate_connection()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", self._authority),
            (":path", "/v1/chat/completions"),
            ("authorization", f"Bearer {self._token}"),
            ("content-type", "application/json"),
        ]
        self._h2.send_headers(1, headers)
        self._h2.send_data(1, self._body, end_stream=True)
        self._transport.write(self._h2.data_to_send())

    def data_received(self, data: bytes) -> None:
        """Frames: those of one read count as one."""
        brought, ended = b"", False
        for event in self._h2.receive_data(data):
            match event:
                case ResponseReceived():
                    self.request_id = dict(event.headers or [])[b"x-request-id"].decode()
                case DataReceived():
                    brought += event.data or b""
                    self._h2.acknowledge_received_data(event.flow_controlled_length or 0, 1)
                case StreamEnded():
                    ended = True
                case StreamReset() if not self.over.done():
                    self.over.set_exception(ConnectionError(f"reset: {event.error_code}"))
                case _:
                    pass
        if (brought or ended) and not self.left_ns:
            self._read(brought, ended=ended)
        self._transport.write(self._h2.data_to_send())

    def _leave(self) -> None:
        self._h2.reset_stream(1, 8)
        self._transport.write(self._h2.data_to_send())


async def call(
    url: str,
    wire: Wire,
    token: str,
    body: dict[str, Any],
    *,
    certificate: str | None,
    leave_after: int | None = None,
    on_read: Callable[[], None] | None = None,
) -> Call:
    """Make a call and read it to its end, or leave after so many events: then the caller closes the connection.

    `certificate`: of the front, PEM. `on_read` is called for each read that brings events.
    """
    address = urlsplit(url)
    tls = None
    if certificate is not None:
        tls = ssl.create_default_context(cadata=certificate)
        tls.set_alpn_protocols(["h2" if wire == "HTTP/2" else "http/1.1"])
    made = Http2Call if wire == "HTTP/2" else Http1Call
    _, protocol = await asyncio.get_running_loop().create_connection(
        lambda: made(address.netloc, token, body, leave_after=leave_after),
        address.hostname or "",
        address.port or 0,
        ssl=tls,
    )
    protocol.on_read = on_read
    try:
        async with asyncio.timeout(30):
            await protocol.over
    finally:
        if not protocol.left_ns:
            await protocol.close()
    return protocol
