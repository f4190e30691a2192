"""What a client's connection is in both versions of HTTP: its socket and addresses, its one timer, its endings."""

import asyncio
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

from behest_proxy.edge.direct import Header
from behest_proxy.edge.heads import Address, http_scope, peer_address
from behest_proxy.edge.host import EdgeHost


class ClientConnection(asyncio.Protocol, ABC):
    """A connection on the host's books from its first byte to its last. It has one timer at a time."""

    transport: asyncio.Transport
    _scheme: str
    _client: Address | None
    _server: Address | None

    def __init__(self, host: EdgeHost) -> None:
        self.host = host
        self.write_paused = False
        self.is_open = False
        self._timer: asyncio.TimerHandle | None = None
        self._lingering_bytes: int | None = None  # None: not lingering; else what may still be dropped

    # --- what each version of HTTP does its own way

    @abstractmethod
    def drain(self) -> None:
        """Take no further requests, finish the running ones, then close."""

    @abstractmethod
    def cut(self) -> None:
        """End every running request visibly, then close behind what is buffered."""

    @abstractmethod
    def _lose(self) -> None:
        """Tell every running request, once, that its client is gone."""

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note where the connection leads, bound what its socket buffers, and book it."""
        self.transport = cast("asyncio.Transport", transport)
        self.is_open = True
        high = self.host.limits.write_buffer_high_bytes
        self.transport.set_write_buffer_limits(high=high, low=high // 4)
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        self._scheme = "http" if tls is None else "https"
        self._client = peer_address(transport.get_extra_info("peername"))
        self._server = peer_address(transport.get_extra_info("sockname"))
        self.host.add(self)

    def eof_received(self) -> bool:
        """The client closed its side: over TCP that cannot be told from a close, so its requests end."""
        self._lose()
        self._close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone; requests that were running learn of it now."""
        del exc
        self.is_open = False
        self._cancel_timer()
        self._lose()
        self.host.remove(self)

    # --- requests

    def _scope_of(self, *, http_version: str, method: bytes, target: bytes, headers: list[Header]) -> dict[str, Any]:
        """The ASGI scope of a request that came here. Raises `BadHead` where the head makes none."""
        return http_scope(
            http_version=http_version,
            method=method,
            target=target,
            headers=headers,
            scheme=self._scheme,
            client=self._client,
            server=self._server,
            state=self.host.state,
        )

    # --- endings

    def abort(self) -> None:
        """Drop the socket with whatever is buffered: clients see that their answers have no end."""
        self.is_open = False
        self._lose()
        self.transport.abort()

    def _close(self) -> None:
        """Close behind what is buffered; abort when the client does not take that either."""
        if self.is_open:
            self.is_open = False
            self._shut()

    def _shut(self) -> None:
        self.transport.close()
        self._call_later(self.host.limits.close_timeout_s, self.abort)

    def _linger(self) -> None:
        """Close our side behind what is buffered, and drop for a while what the client still sends.

        Closing a socket with unread bytes makes the kernel send a reset, which can overtake our last words.
        """
        if self.is_open:
            self.is_open = False
            self._lingering_bytes = self.host.limits.linger_bytes
            if self.transport.can_write_eof():  # TLS has no half of a close
                self.transport.write_eof()
            self._call_later(self.host.limits.linger_timeout_s, self._shut)

    def _drop(self, data: bytes) -> None:
        """What came behind our close: read, so that no reset is sent, but not without end."""
        if self._lingering_bytes is not None:
            self._lingering_bytes -= len(data)
            if self._lingering_bytes < 0:
                self.abort()

    def _call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Set the timer, in place of what it was set to."""
        self._cancel_timer()
        self._timer = self.host.loop.call_later(delay_s, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
