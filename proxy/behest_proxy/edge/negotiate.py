"""Which HTTP a new connection speaks: ALPN under TLS, else the client's first bytes.

HTTP/2 in clear text comes by prior knowledge only (RFC 9113, 3.3): its preface begins like no HTTP/1.1
request of ours. The `Upgrade: h2c` way is deprecated and not offered.
"""

import asyncio
import ssl
from typing import cast

from behest_proxy.edge.host import EdgeHost
from behest_proxy.edge.http1 import Http1Connection
from behest_proxy.edge.http2 import Http2Connection

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Negotiation(asyncio.Protocol):
    """The first protocol of every connection; it hands the transport on and is forgotten."""

    def __init__(self, host: EdgeHost) -> None:
        self._host = host
        self._first = b""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Under TLS all is known; otherwise wait for the first bytes."""
        self._transport = cast("asyncio.Transport", transport)
        if not self._host.has_room():
            self._transport.abort()
            return
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None:
            self._hand_on(Http2Connection if tls.selected_alpn_protocol() == "h2" else Http1Connection)
            return
        self._host.add(self)
        self._timer = self._host.loop.call_later(self._host.limits.idle_timeout_s, self.abort)

    def data_received(self, data: bytes) -> None:
        """Enough bytes to tell the preface from a request line, or wait for more."""
        self._first += data
        head = self._first[: len(PREFACE)]
        if not PREFACE.startswith(head):
            self._hand_on(Http1Connection)
        elif len(head) == len(PREFACE):
            self._hand_on(Http2Connection)

    def _hand_on(self, kind: type[Http1Connection | Http2Connection]) -> None:
        assert self._transport is not None
        transport, self._transport = self._transport, None
        self.connection_lost(None)
        protocol = kind(self._host)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._first:
            protocol.data_received(self._first)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left without a word, or the transport was handed on."""
        del exc
        if self._timer is not None:
            self._timer.cancel()
        self._host.remove(self)

    def drain(self) -> None:
        """Nothing runs here: close."""
        self.abort()

    def cut(self) -> None:
        """Nothing runs here: close."""
        self.abort()

    def abort(self) -> None:
        """Drop the socket."""
        if self._transport is not None:
            self._transport.abort()
