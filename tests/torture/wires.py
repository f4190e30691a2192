"""How a client asks: HTTP/1.1 on a connection of its own, or one stream of an HTTP/2 connection that others share."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Protocol

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from hyperframe.frame import Frame, GoAwayFrame

PATH = "/v1/chat/completions"
WINDOW_BYTES = 1 << 20
CANCEL = 8
REFUSED_STREAM = 7


class NotProcessedError(ConnectionError):
    """The server said, or it is plain, that the request was never looked at."""


class Wire(Protocol):
    """One request."""

    async def head(self) -> tuple[int, Mapping[str, str]]:
        """Status and headers. Raises `OSError` or `asyncio.IncompleteReadError` where it breaks, as all here."""
        ...

    async def read(self) -> bytes:
        """What has come of the body; empty at its end."""
        ...

    def abort(self) -> None:
        """Go, whatever is still to come."""
        ...


class Http1Wire:
    """One connection for one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._raw = bytearray()
        self._left: int | None = None
        """Bytes of a body whose length was told."""

    @classmethod
    async def ask(cls, port: int, headers: Mapping[str, str], body: bytes) -> "Http1Wire":
        """Raises `NotProcessedError` where nobody listens."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError as error:
            raise NotProcessedError from error
        lines = [f"POST {PATH} HTTP/1.1", "host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write("\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body)
        return cls(reader, writer)

    async def head(self) -> tuple[int, Mapping[str, str]]:
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        if "content-length" in headers:
            self._left = int(headers["content-length"])
        return int(lines[0].split(" ")[1]), headers

    async def read(self) -> bytes:
        if self._left is not None:
            body = await self._reader.readexactly(self._left)
            self._left = 0
            return body
        while data := await self._reader.read(65_536):
            self._raw += data
            if body := self._unchunked():
                return body
        return b""

    def _unchunked(self) -> bytes:
        # RFC 9112, 7.1, as far as it has come.
        raw, at, body = self._raw, 0, list[bytes]()
        while (end := raw.find(b"\r\n", at)) >= 0:
            size = int(raw[at:end], 16)
            if len(raw) < end + 2 + size + 2:
                break
            body.append(bytes(raw[end + 2 : end + 2 + size]))
            at = end + 2 + size + 2
        del raw[:at]
        return b"".join(body)

    def abort(self) -> None:
        self._writer.transport.abort()


class Http2Wire:
    """One stream."""

    def __init__(self, connection: "Http2Connection", stream_id: int) -> None:
        self._connection = connection
        self._stream_id = stream_id
        self.events: asyncio.Queue[h2.events.Event | None] = asyncio.Queue()
        """None: the connection broke."""
        self._over = False

    async def _next(self) -> h2.events.Event:
        event = await self.events.get()
        match event:
            case None:
                self._over = True
                raise ConnectionResetError("the connection broke")
            case h2.events.StreamReset():
                self._over = True
                if int(event.error_code or 0) == REFUSED_STREAM:
                    raise NotProcessedError
                raise ConnectionResetError(f"reset with {event.error_code}")
            case h2.events.StreamEnded():
                self._over = True
            case _:
                pass
        return event

    async def head(self) -> tuple[int, Mapping[str, str]]:
        while True:
            event = await self._next()
            if isinstance(event, h2.events.ResponseReceived):
                headers = {bytes(name).decode(): bytes(value).decode() for name, value in event.headers or ()}
                return int(headers[":status"]), headers

    async def read(self) -> bytes:
        while not self._over:
            event = await self._next()
            if isinstance(event, h2.events.DataReceived) and event.data:
                return event.data
        return b""

    def abort(self) -> None:
        self._connection.forget(self._stream_id, reset=not self._over)


class _Machine(h2.connection.H2Connection):
    """`h2`'s client, which outlives a GOAWAY as RFC 9113, 6.8 asks of clients."""

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[h2.events.Event]]:
        event = h2.events.ConnectionTerminated()
        event.error_code = frame.error_code
        event.last_stream_id = frame.last_stream_id
        return [], [event]


class Http2Connection:
    """Many streams with prior knowledge, until the server goes away."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._machine = _Machine(h2.config.H2Configuration(client_side=True, header_encoding=None))
        self._streams: dict[int, Http2Wire] = {}
        self._machine.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES}
        )
        self._machine.initiate_connection()
        self._machine.increment_flow_control_window(1 << 24)
        self._flush()
        self.takes_more = True
        self._task = asyncio.create_task(self._run())

    def ask(self, headers: Mapping[str, str], body: bytes) -> Http2Wire:
        """One more stream. Raises `NotProcessedError`."""
        if self._writer.transport.is_closing():
            raise NotProcessedError
        try:
            stream_id = self._machine.get_next_available_stream_id()
            self._machine.send_headers(
                stream_id,
                [
                    (":method", "POST"),
                    (":path", PATH),
                    (":scheme", "http"),
                    (":authority", "localhost"),
                    *headers.items(),
                ],
            )
            self._machine.send_data(stream_id, body, end_stream=True)
        except h2.exceptions.ProtocolError as error:
            self.takes_more = False
            raise NotProcessedError from error
        wire = self._streams[stream_id] = Http2Wire(self, stream_id)
        self._flush()
        return wire

    def forget(self, stream_id: int, *, reset: bool) -> None:
        """Nobody reads this stream any more."""
        self._streams.pop(stream_id, None)
        if reset:
            with contextlib.suppress(h2.exceptions.ProtocolError):
                self._machine.reset_stream(stream_id, CANCEL)
                self._flush()
        if not self.takes_more and not self._streams:
            self.close()

    def close(self) -> None:
        """Break it."""
        self._writer.transport.abort()

    def _flush(self) -> None:
        data = self._machine.data_to_send()
        if not self._writer.transport.is_closing():
            self._writer.write(data)

    async def _run(self) -> None:
        try:
            with contextlib.suppress(OSError, h2.exceptions.ProtocolError):
                while data := await self._reader.read(65_536):
                    for event in self._machine.receive_data(data):
                        self._hear(event)
                    self._flush()
        finally:
            self.takes_more = False
            self.close()
            for wire in list(self._streams.values()):
                wire.events.put_nowait(None)

    def _hear(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ConnectionTerminated):
            self.takes_more = False
            for stream_id, wire in self._streams.items():
                if stream_id > (event.last_stream_id or 0):
                    refused = h2.events.StreamReset(stream_id=stream_id)
                    refused.error_code = REFUSED_STREAM
                    wire.events.put_nowait(refused)
        if isinstance(event, h2.events.DataReceived):
            self._machine.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
        to = self._streams.get(getattr(event, "stream_id", None) or 0)
        if to is not None:
            to.events.put_nowait(event)


class Http2Pool:
    """The connections of all HTTP/2 clients: one a sidecar, and another one where that takes no more."""

    def __init__(self) -> None:
        self._connections: dict[int, Http2Connection] = {}
        self._lock = asyncio.Lock()

    async def ask(self, port: int, headers: Mapping[str, str], body: bytes) -> Wire:
        """Raises `NotProcessedError` where nobody listens."""
        async with self._lock:
            connection = self._connections.get(port)
            if connection is None or not connection.takes_more:
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError as error:
                    raise NotProcessedError from error
                connection = self._connections[port] = Http2Connection(reader, writer)
            return connection.ask(headers, body)

    def close(self) -> None:
        """Break all."""
        for connection in self._connections.values():
            connection.close()
