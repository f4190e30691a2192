"""The simulator's HTTP/1.1: heads by h11, body chunks written by hand, one response at a time."""

import asyncio
from typing import cast

import h11

from behest_proxy.sim.answers import Headers
from behest_proxy.sim.player import Player
from behest_proxy.sim.routes import MAX_BODY_BYTES, IncomingRequest, Routes

_MAX_WAITING_BYTES = 256 * 1024
"""Of requests that come before the last one is answered. Reading goes on meanwhile, to see the client go."""


class Http1Connection(asyncio.Protocol):
    """One connection, and the wire of its current response."""

    def __init__(self, routes: Routes, *, loop: asyncio.AbstractEventLoop) -> None:
        self._routes = routes
        self._loop = loop
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=64 * 1024)
        self._transport: asyncio.Transport | None = None
        self._player: Player | None = None
        self._request: h11.Request | None = None
        self._body = bytearray()
        self._too_large = False
        self._chunked = True
        self._paused = False
        self._length: int | None = None

    # --- the connection -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests, whole or not."""
        self._connection.receive_data(data)
        if self._player is None:
            self._read_requests()
        elif len(self._connection.trailing_data[0]) > _MAX_WAITING_BYTES:
            self._close()

    def eof_received(self) -> bool:
        """A client that ends its side has gone: what half-closes and still reads is no API client."""
        self._client_went()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, by whomever."""
        del exc
        self._client_went()
        self._transport = None

    def pause_writing(self) -> None:
        """The socket is full."""
        self._paused = True

    def resume_writing(self) -> None:
        """The socket has room."""
        self._paused = False
        if self._player is not None:
            self._player.resume()

    def close(self) -> None:
        """Ends the connection because the server ends."""
        if self._player is not None:
            self._player.drop()
            self._player = None
        if self._transport is not None:
            self._transport.abort()

    def _client_went(self) -> None:
        if self._player is not None:
            self._player.gone()
            self._player = None

    def _close(self) -> None:
        self._client_went()
        if self._transport is not None:
            self._transport.close()

    # --- requests -------------------------------------------------------------------------------------------

    def _read_requests(self) -> None:
        while self._player is None:
            try:
                event = self._connection.next_event()
            except h11.RemoteProtocolError:
                self._close()
                return
            if event is h11.NEED_DATA:
                self._invite_body()
                return
            if event is h11.PAUSED:
                return
            if isinstance(event, h11.Request):
                self._request = event
                self._body.clear()
                self._too_large = False
            elif isinstance(event, h11.Data):
                self._take_body(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self._answer()
            elif isinstance(event, h11.ConnectionClosed):
                self._close()
                return

    def _invite_body(self) -> None:
        if self._connection.they_are_waiting_for_100_continue:
            self._write(self._connection.send(h11.InformationalResponse(status_code=100, headers=[])))

    def _take_body(self, data: bytes | bytearray | memoryview) -> None:
        if self._too_large or len(self._body) + len(data) > MAX_BODY_BYTES:
            self._too_large = True
            self._body.clear()
        else:
            self._body += data

    def _answer(self) -> None:
        request = self._request
        assert request is not None
        version = request.http_version
        self._chunked = version >= b"1.1"
        steps, record = self._routes.answer(
            IncomingRequest(
                method=request.method.decode("ascii"),
                target=request.target.decode("latin-1"),
                http_version=version.decode("ascii"),
                headers=[(bytes(name), bytes(value)) for name, value in request.headers],
                body=bytes(self._body),
                too_large=self._too_large,
            )
        )
        self._body.clear()
        self._player = Player(steps, self, record, loop=self._loop)
        self._player.play()

    # --- the wire of the current response -------------------------------------------------------------------

    def start(self, status: int, headers: Headers, length: int | None) -> None:
        """Sends the head."""
        self._length = length
        framing = (b"content-length", b"%d" % length) if length is not None else None
        bodiless = status in (204, 304)
        if framing is None and self._chunked and not bodiless:
            framing = (b"transfer-encoding", b"chunked")
        sent = headers if framing is None else [*headers, framing]
        self._write(self._connection.send(h11.Response(status_code=status, headers=sent)))

    def send(self, data: bytes) -> bool:
        """Sends a piece of the body."""
        if self._length is not None:
            self._write(self._connection.send(h11.Data(data=data)))
        elif self._chunked and data:
            # What h11 would write (RFC 9112, section 7.1), without its events: this is done for every chunk.
            self._write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._write(data)
        return not self._paused

    def finish(self) -> None:
        """Ends the response; the next request's turn comes in the next turn of the loop."""
        self._player = None
        self._write(self._connection.send(h11.EndOfMessage()))
        if self._connection.our_state is h11.MUST_CLOSE:
            self._close()
            return
        self._connection.start_next_cycle()
        self._loop.call_soon(self._read_requests)

    def reset(self, code: int) -> None:
        """HTTP/1.1 knows no reset: what was sent still arrives, then the connection ends before the body."""
        del code
        self._player = None
        self._close()

    def _write(self, data: bytes | None) -> None:
        if data and self._transport is not None:
            self._transport.write(data)
