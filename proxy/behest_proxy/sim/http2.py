"""The simulator's HTTP/2: everything by the h2 library but DATA frames, which are composed by hand."""

import asyncio
from typing import cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from h2.stream import H2Stream

from behest_proxy.sim.answers import Headers
from behest_proxy.sim.player import Player
from behest_proxy.sim.routes import MAX_BODY_BYTES, IncomingRequest, Routes

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_MAX_STREAMS = 2_000
_BODY_WINDOW = 1024 * 1024


class _StreamWire:
    """One stream: its request until it is whole, then the wire of its response."""

    __slots__ = ("_connection", "_rest", "body", "headers", "player", "stream", "stream_id", "too_large")

    def __init__(self, connection: "Http2Connection", stream: H2Stream, stream_id: int, headers: Headers) -> None:
        self._connection = connection
        self._rest = b""
        self.stream = stream
        self.stream_id = stream_id
        self.headers = headers
        self.body = bytearray()
        self.too_large = False
        self.player: Player | None = None

    def start(self, status: int, headers: Headers, length: int | None) -> None:
        """Sends HEADERS."""
        sent = [(b":status", b"%d" % status), *headers]
        if length is not None:
            sent.append((b"content-length", b"%d" % length))
        self._connection.h2.send_headers(self.stream_id, sent)
        self._connection.flush()

    def send(self, data: bytes) -> bool:
        """Sends DATA as far as the windows go; the rest of this piece is kept for when they open."""
        self._rest = self._connection.write_data(self, data)
        return not self._rest and not self._connection.paused

    def resume(self) -> None:
        """A window or the socket opened."""
        if self._rest:
            self._rest = self._connection.write_data(self, self._rest)
        if not self._rest and not self._connection.paused and self.player is not None:
            self.player.resume()

    def finish(self) -> None:
        """Sends END_STREAM."""
        self._connection.forget(self)
        self._connection.h2.end_stream(self.stream_id)
        self._connection.flush()

    def reset(self, code: int) -> None:
        """Sends RST_STREAM."""
        self._connection.forget(self)
        self._connection.h2.reset_stream(self.stream_id, code)
        self._connection.flush()


class Http2Connection(asyncio.Protocol):
    """One connection and its streams."""

    def __init__(self, routes: Routes, *, loop: asyncio.AbstractEventLoop) -> None:
        self._routes = routes
        self._loop = loop
        # Header validation is the client's test, not ours; what is sent here is known to be well-formed.
        self.h2 = H2Connection(
            H2Configuration(client_side=False, header_encoding=None, validate_outbound_headers=False)
        )
        self._transport: asyncio.Transport | None = None
        self._wires: dict[int, _StreamWire] = {}
        self.paused = False

    # --- the connection -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._transport = cast(asyncio.Transport, transport)
        self.h2.initiate_connection()
        self.h2.update_settings(
            {
                SettingCodes.MAX_CONCURRENT_STREAMS: _MAX_STREAMS,
                SettingCodes.INITIAL_WINDOW_SIZE: _BODY_WINDOW,
            }
        )
        self.h2.increment_flow_control_window(_BODY_WINDOW)
        self.flush()

    def data_received(self, data: bytes) -> None:
        """Frames, whole or not."""
        try:
            events = self.h2.receive_data(data)
        except ProtocolError:
            self.flush()
            self._close()
            return
        opened = False
        for event in events:
            opened |= self._handle(event)
        self.flush()
        if opened:
            self._resume_all()

    def eof_received(self) -> bool:
        """The client has gone."""
        self._clients_went()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, by whomever."""
        del exc
        self._clients_went()
        self._transport = None

    def pause_writing(self) -> None:
        """The socket is full."""
        self.paused = True

    def resume_writing(self) -> None:
        """The socket has room."""
        self.paused = False
        self._resume_all()

    def close(self) -> None:
        """Ends the connection because the server ends."""
        for wire in self._wires.values():
            if wire.player is not None:
                wire.player.drop()
        self._wires.clear()
        if self._transport is not None:
            self._transport.abort()

    def _close(self) -> None:
        self._clients_went()
        if self._transport is not None:
            self._transport.close()

    def _clients_went(self) -> None:
        wires, self._wires = self._wires, {}
        for wire in wires.values():
            if wire.player is not None:
                wire.player.gone()

    def _resume_all(self) -> None:
        for wire in list(self._wires.values()):
            if self.paused:
                return
            wire.resume()

    # --- streams --------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> bool:
        """Takes one event; True where a window opened."""
        match event:
            case StreamReset(stream_id=int(stream_id), error_code=code):
                wire = self._wires.pop(stream_id, None)
                if wire is not None and wire.player is not None:
                    wire.player.gone(int(code or ErrorCodes.NO_ERROR))
            case DataReceived(stream_id=int(stream_id), data=bytes(data), flow_controlled_length=int(length)):
                self.h2.acknowledge_received_data(length, stream_id)
                self._take_body(stream_id, data)
            case RequestReceived(stream_id=int(stream_id), headers=headers):
                stream = self.h2.streams[stream_id]
                received = [(_as_bytes(name), _as_bytes(value)) for name, value in headers or ()]
                self._wires[stream_id] = _StreamWire(self, stream, stream_id, received)
            case StreamEnded(stream_id=int(stream_id)):
                self._answer(stream_id)
            case WindowUpdated() | RemoteSettingsChanged():
                return True
            case _:
                pass
        return False

    def _take_body(self, stream_id: int, data: bytes) -> None:
        wire = self._wires.get(stream_id)
        if wire is None or wire.too_large:
            return
        if len(wire.body) + len(data) > MAX_BODY_BYTES:
            wire.too_large = True
            wire.body.clear()
        else:
            wire.body += data

    def _answer(self, stream_id: int) -> None:
        wire = self._wires.get(stream_id)
        if wire is None:
            return
        pseudo = dict(wire.headers[:4])
        steps, record = self._routes.answer(
            IncomingRequest(
                method=pseudo.get(b":method", b"").decode("latin-1"),
                target=pseudo.get(b":path", b"").decode("latin-1"),
                http_version="2",
                headers=[header for header in wire.headers if not header[0].startswith(b":")],
                body=bytes(wire.body),
                too_large=wire.too_large,
            )
        )
        wire.body.clear()
        wire.player = Player(steps, wire, record, loop=self._loop)
        wire.player.play()

    # --- what wires write with ------------------------------------------------------------------------------

    def forget(self, wire: _StreamWire) -> None:
        """The response is over."""
        self._wires.pop(wire.stream_id, None)

    def flush(self) -> None:
        """Writes what h2 has queued."""
        data = self.h2.data_to_send()
        if data and self._transport is not None:
            self._transport.write(data)

    def write_data(self, wire: _StreamWire, data: bytes) -> bytes:
        """Writes DATA frames (RFC 9113, section 6.1) within both windows; returns what did not fit.

        This is `send_data` without its state machine, because it is done for every chunk. h2 keeps the windows:
        it adds WINDOW_UPDATEs to the two numbers that are lowered here. Nothing is queued in h2 at this point,
        because everything else flushes at once.
        """
        connection, stream = self.h2, wire.stream
        while data:
            size = min(
                len(data),
                connection.outbound_flow_control_window,
                stream.outbound_flow_control_window,
                connection.max_outbound_frame_size,
            )
            if size <= 0:
                break
            if self._transport is not None:
                frame = size.to_bytes(3, "big") + b"\0\0" + wire.stream_id.to_bytes(4, "big") + data[:size]
                self._transport.write(frame)
            connection.outbound_flow_control_window -= size
            stream.outbound_flow_control_window -= size
            data = data[size:]
        return data


def _as_bytes(value: bytes | str) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
