"""What goes into the upstream client and what comes out: request, handler, call, failure."""

from typing import Literal, Protocol

import msgspec

FailureKind = Literal[
    "connect",
    "connect_timeout",
    "tls",
    "refused_stream",
    "reset",
    "closed",
    "protocol",
    "first_byte_timeout",
    "idle_timeout",
]


class UpstreamRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request to a provider. The client adds `host` (or `:authority`) and `content-length` itself."""

    method: str
    url: str
    """Absolute, `http` or `https`, no user information; a fragment is not sent."""

    headers: list[tuple[bytes, bytes]]
    """Names in any case. Hop-by-hop headers, `host` and `content-length` are dropped."""

    body: bytes = b""
    protocol: Literal["auto", "http1", "http2"] = "auto"
    """`auto`: HTTP/1.1 for `http`, what ALPN agrees on for `https`. `http2` on `http` is prior knowledge."""

    connect_timeout_s: float = 10.0
    """From `send` to a connection that carries the call: queueing, DNS, TCP, a proxy's CONNECT, TLS."""

    first_byte_timeout_s: float = 120.0
    """From the last progress of sending the request to the answer's head."""

    idle_timeout_s: float = 60.0
    """Between body bytes; it does not run while the call is paused."""

    def __repr__(self) -> str:
        """Without headers and body: they hold keys and prompts, and a repr ends up in logs."""
        return f"UpstreamRequest({self.method} {self.protocol}, {len(self.body)} bytes)"


class UpstreamFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a call ended without a clean end of the body.

    - `connect`: DNS, TCP or a proxy refused; or more calls than the client carries to one origin.
    - `connect_timeout`: no connection in `connect_timeout_s`.
    - `tls`: handshake, certificate or host name.
    - `refused_stream`: the peer said twice that it did not process the request (RFC 9113, 8.7).
    - `reset`: the peer reset the stream or the TCP connection.
    - `closed`: the peer closed before the end, or this client was closed.
    - `protocol`: bytes that are no HTTP, or a body that is not as long as announced.
    - `first_byte_timeout`, `idle_timeout`: the peer was silent for too long.
    """

    kind: FailureKind
    message: str
    """For logs and operators. It names neither header values nor body bytes."""

    request_sent: bool
    """Whether `on_request_sent` had been called: the peer may have processed the request."""

    head_received: bool
    """Whether `on_head` had been called."""


class UpstreamHandler(Protocol):
    """Whom a call tells. Every method is called synchronously, from the event loop's thread.

    Never from inside `send`, `cancel` or `pause`; from inside `resume` what was held back is delivered. After
    `cancel()` nothing is called; else exactly one of `on_end` and `on_failure`, last. While the call is paused
    nothing is called but `on_request_sent`, `on_head` and a failure with no bytes held back before it.
    An exception out of any of them cancels the call, is logged, and is followed by `on_broken`.
    """

    def on_request_sent(self) -> None:
        """The whole request is with the kernel (HTTP/1.1) or all its frames are written (HTTP/2). At most once."""
        ...

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """The answer's head, lower-case names; 1xx answers are skipped, any other status is a head."""
        ...

    def on_data(self, data: bytes) -> None:
        """Body bytes, never empty: all that one read from the socket brought for this call, in one piece."""
        ...

    def on_end(self) -> None:
        """The body ended as its framing says it must."""
        ...

    def on_failure(self, failure: UpstreamFailure) -> None:
        """The call ended otherwise."""
        ...

    def on_broken(self) -> None:
        """One of the others raised, also one of the last two: the call is over, and nothing more comes."""
        ...


class UpstreamCall(Protocol):
    """A handle on one call. Every method may be called at any time, also after the end, where it does nothing."""

    def cancel(self) -> None:
        """Give the call up now: HTTP/1.1 closes the connection, HTTP/2 resets the stream with CANCEL."""
        ...

    def pause(self) -> None:
        """Stop reading for this call; others on the same connection go on."""
        ...

    def resume(self) -> None:
        """Deliver what came meanwhile (at most a window of 256 KiB, or one read) and read on."""
        ...
