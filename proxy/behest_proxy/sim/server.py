"""Listens: HTTP/1.1 and HTTP/2 with prior knowledge on one port, told apart by a connection's first bytes."""

import asyncio
import ssl
from pathlib import Path
from typing import Self, cast

from behest_proxy.sim.http1 import Http1Connection
from behest_proxy.sim.http2 import PREFACE, Http2Connection
from behest_proxy.sim.records import RequestLog
from behest_proxy.sim.routes import Routes
from behest_proxy.sim.text import warm

_BACKLOG = 1_024


class SimServer:
    """The simulator in this process. `start` in a running loop, `aclose` at the end; also a context manager.

    With `port` 0 the system chooses one. With a certificate and its key the port speaks TLS, with ALPN.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        recordings: Path | None = None,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._routes = Routes(recordings=recordings)
        self._tls = _tls_context(tls_cert, tls_key) if tls_cert is not None else None
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    @property
    def requests(self) -> RequestLog:
        """What was asked and what became of it."""
        return self._routes.requests

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as its base URL, once started."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self._port}/v1"

    async def start(self) -> int:
        """Listens and returns the port. Raises OSError where the address is taken."""
        warm()  # a third of a second that no first request should pay
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self._routes, self._connections, loop=loop),
            self._host,
            self._port,
            ssl=self._tls,
            backlog=_BACKLOG,
        )
        self._port = int(self._server.sockets[0].getsockname()[1])
        return self._port

    async def aclose(self) -> None:
        """Stops listening and ends every connection at once."""
        if self._server is not None:
            self._server.close()
            for connection in list(self._connections):
                connection.close()
            await self._server.wait_closed()
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _tls_context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


class _Connection(asyncio.Protocol):
    """A connection of either kind: sniffs its first bytes, then passes everything to the one that it is."""

    def __init__(self, routes: Routes, connections: "set[_Connection]", *, loop: asyncio.AbstractEventLoop) -> None:
        self._routes = routes
        self._connections = connections
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._first = b""
        self._spoken: Http1Connection | Http2Connection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._transport = cast(asyncio.Transport, transport)
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._spoken is not None:
            self._spoken.data_received(data)
            return
        self._first += data
        if self._first.startswith(PREFACE):
            self._speak(Http2Connection(self._routes, loop=self._loop))
        elif not PREFACE.startswith(self._first):
            self._speak(Http1Connection(self._routes, loop=self._loop))

    def _speak(self, spoken: Http1Connection | Http2Connection) -> None:
        assert self._transport is not None
        first, self._first = self._first, b""
        self._spoken = spoken
        spoken.connection_made(self._transport)
        spoken.data_received(first)

    def eof_received(self) -> bool:
        """The client ended its side."""
        return self._spoken.eof_received() if self._spoken is not None else False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._connections.discard(self)
        if self._spoken is not None:
            self._spoken.connection_lost(exc)

    def pause_writing(self) -> None:
        """The socket is full."""
        if self._spoken is not None:
            self._spoken.pause_writing()

    def resume_writing(self) -> None:
        """The socket has room."""
        if self._spoken is not None:
            self._spoken.resume_writing()

    def close(self) -> None:
        """Ends the connection at once."""
        if self._spoken is not None:
            self._spoken.close()
        elif self._transport is not None:
            self._transport.abort()
