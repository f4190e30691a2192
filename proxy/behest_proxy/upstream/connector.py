"""From an origin to a connected transport: DNS, TCP, a proxy's CONNECT, TLS with ALPN. Cancellable at any await."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from behest_proxy.upstream.call import FailureKind
from behest_proxy.upstream.prepared import Origin
from behest_proxy.upstream.proxies import Proxies, Proxy, parse_address
from behest_proxy.upstream.tls_sessions import TlsSessions

Wire = Literal["http1", "http2"]

TlsContextFactory = Callable[[], ssl.SSLContext]
"""Makes a new context at each call: the client sets ALPN on it, once per protocol choice."""

_ALPN = {"auto": ["h2", "http/1.1"], "http1": ["http/1.1"], "http2": ["h2"]}

_ADDRESSES_MAX = 8
_ADDRESS_TRY_S = 1.0
"""How long an address is tried before the next one; the last has all the time that is left."""

_PROXY_HEAD_BYTES_MAX = 16 * 1024
_TLS_SHUTDOWN_TIMEOUT_S = 2.0


class ConnectFailed(Exception):
    """No connection to the origin; `kind` says what stood in the way."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind
        self.message = message


class Connected(msgspec.Struct, frozen=True, kw_only=True):
    """A connected transport, with what arrived before its connection object was made."""

    transport: asyncio.Transport
    raw: asyncio.Transport
    """The TCP transport below TLS, else `transport` itself: bytes may wait for the kernel in either."""

    wire: Wire
    absolute_form_proxy: Proxy | None
    """Set when requests go to a proxy in absolute form (RFC 9112, 3.2.2) and not through a tunnel."""

    early: bytes
    """Bytes that came together with the end of the handshake (an HTTP/2 server's SETTINGS)."""


def default_tls_context() -> ssl.SSLContext:
    """The system's trust store (`SSL_CERT_FILE` and `SSL_CERT_DIR` are honoured), host names verified."""
    return ssl.create_default_context()


class Connector:
    """Opens connections for every pool of a client."""

    def __init__(self, *, proxies: Proxies, tls_context_factory: TlsContextFactory) -> None:
        self._proxies = proxies
        self._tls_context_factory = tls_context_factory
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._sessions: dict[str, TlsSessions] = {}

    async def connect(
        self, origin: Origin, *, protocol: Literal["auto", "http1", "http2"], timeout_s: float
    ) -> Connected:
        """Raise ConnectFailed when no connection stands within `timeout_s`; a cancelled try leaves no socket."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._connect(origin, protocol)
        except TimeoutError:
            raise ConnectFailed("connect_timeout", f"{origin}: no connection in {timeout_s:g} s") from None
        except ssl.SSLError as error:
            raise ConnectFailed("tls", f"{origin}: {_describe_tls(error)}") from None
        except OSError as error:
            raise ConnectFailed("connect", f"{origin}: {error.strerror or type(error).__name__}") from None
        except UnicodeError:
            raise ConnectFailed("connect", f"{origin}: the host's name is no DNS name") from None

    async def _connect(self, origin: Origin, protocol: Literal["auto", "http1", "http2"]) -> Connected:
        proxy = self._proxies.proxy_for(origin)
        prelude = _Prelude()
        raw = await _connect_tcp(prelude, proxy.host if proxy else origin.host, (proxy or origin).port)
        try:
            absolute_form = proxy is not None and origin.scheme == "http" and protocol == "http1"
            if proxy is not None and not absolute_form:
                await _open_tunnel(raw, prelude, proxy, origin)
            if origin.scheme == "http":
                wire: Wire = "http2" if protocol == "http2" else "http1"
                transport = raw
            else:
                transport, prelude, wire = await self._secure(raw, origin, protocol)
            prelude.check(origin)
        except BaseException:
            raw.abort()
            raise
        return Connected(
            transport=transport,
            raw=raw,
            wire=wire,
            absolute_form_proxy=proxy if absolute_form else None,
            early=prelude.take(),
        )

    async def _secure(
        self, raw: asyncio.Transport, origin: Origin, protocol: Literal["auto", "http1", "http2"]
    ) -> tuple[asyncio.Transport, "_Prelude", Wire]:
        prelude = _Prelude()
        try:
            transport = await asyncio.get_running_loop().start_tls(
                raw,
                prelude,
                self._context_for(protocol),
                server_hostname=origin.host,
                ssl_shutdown_timeout=_TLS_SHUTDOWN_TIMEOUT_S,
            )
        except ConnectionError:
            raise ConnectFailed("tls", f"{origin}: closed during the TLS handshake") from None
        if transport is None:
            raise ConnectFailed("tls", f"{origin}: closed during the TLS handshake")
        agreed: Any = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        if agreed == "h2":
            return transport, prelude, "http2"
        if protocol == "http2":
            raise ConnectFailed("protocol", f"{origin}: the server did not agree to HTTP/2")
        return transport, prelude, "http1"

    def _context_for(self, protocol: str) -> ssl.SSLContext:
        context = self._contexts.get(protocol)
        if context is None:
            context = self._tls_context_factory()
            context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
            context.set_alpn_protocols(_ALPN[protocol])
            self._contexts[protocol] = context
            self._sessions[protocol] = TlsSessions(context)
        return context

    def keep_session(self, transport: asyncio.Transport, protocol: str) -> None:
        """The next connection to this one's host may take up its TLS session."""
        sessions = self._sessions.get(protocol)
        if sessions is not None:
            sessions.keep(transport)


class _Prelude(asyncio.Protocol):
    """Holds what arrives until the connection's own protocol object takes over."""

    def __init__(self) -> None:
        self.lost = False
        self._received = bytearray()
        self._waiter: asyncio.Future[None] | None = None

    def take(self) -> bytes:
        received = bytes(self._received)
        self._received.clear()
        return received

    def check(self, origin: Origin) -> None:
        """Raise ConnectFailed when the peer has left meanwhile."""
        if self.lost:
            raise ConnectFailed("connect", f"{origin}: closed as soon as it was open")

    async def read_head(self) -> bytes:
        """All bytes up to and with the first blank line. Raises ConnectionError when there is none."""
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            if self.lost or len(self._received) > _PROXY_HEAD_BYTES_MAX:
                raise ConnectionResetError("no answer")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        head = bytes(self._received[: end + 4])
        del self._received[: end + 4]
        return head

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._wake()

    def eof_received(self) -> None:
        self.lost = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.lost = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def _connect_tcp(prelude: _Prelude, host: str, port: int) -> asyncio.Transport:
    """Try the name's addresses one after the other; the first that answers is taken."""
    loop = asyncio.get_running_loop()
    if parse_address(host) is not None:
        addresses = [host]
    else:
        answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(answer[4][0]) for answer in answers][:_ADDRESSES_MAX]
    for address in addresses[:-1]:
        try:
            async with asyncio.timeout(_ADDRESS_TRY_S):
                transport, _ = await loop.create_connection(lambda: prelude, address, port)
                return transport
        except OSError:
            continue
    transport, _ = await loop.create_connection(lambda: prelude, addresses[-1], port)
    return transport


async def _open_tunnel(raw: asyncio.Transport, prelude: _Prelude, proxy: Proxy, origin: Origin) -> None:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    authority = f"{host}:{origin.port}".encode("ascii")
    request = b"CONNECT %b HTTP/1.1\r\nhost: %b\r\n" % (authority, authority)
    if proxy.authorization is not None:
        request += b"proxy-authorization: %b\r\n" % proxy.authorization
    raw.write(request + b"\r\n")
    try:
        head = await prelude.read_head()
    except ConnectionError:
        raise ConnectFailed("connect", f"{origin}: the proxy closed without an answer to CONNECT") from None
    version, _, rest = head.partition(b" ")
    status = rest[:3]
    if not version.startswith(b"HTTP/1.") or not status.isdigit():
        raise ConnectFailed("connect", f"{origin}: the proxy's answer to CONNECT is no HTTP")
    if not status.startswith(b"2"):
        raise ConnectFailed("connect", f"{origin}: the proxy answered {status.decode()} to CONNECT")


def _describe_tls(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate was refused: {error.verify_message}"
    return f"TLS failed: {error.reason or type(error).__name__}"
