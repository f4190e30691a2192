"""The edge's limits: every buffer, count and wait that a client could otherwise grow."""

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True, kw_only=True)
class EdgeLimits:
    """Limits of one listening edge. But for the first all are per connection or per stream; units are in the names."""

    connections: int = 10_000
    """Connections of clients at once. One more is closed at once: whoever opens thousands must not take the descriptors
    that the others need."""

    stream_buffer_bytes: int = 256 * KIB
    """Answer bytes kept for one stream whose client does not read, behind the first write that it did not take: that is
    kept whole, because it may be a whole answer, and its client may be reading. Beyond it the stream is cut."""

    write_buffer_high_bytes: int = 64 * KIB
    """The transport's write buffer at which all streams of the connection pause; they resume at a quarter."""

    control_buffer_bytes: int = 1024 * KIB
    """Write buffer at which the connection is aborted: only a client that makes us answer frames (PING,
    SETTINGS) without reading reaches it, because streams stopped long before (CVE-2019-9512, -9515)."""

    request_window_bytes: int = 64 * KIB
    """Body bytes that a client may send ahead of the application, per request. HTTP/2: the stream's window
    (no smaller than 65,535, or a client that has not read our SETTINGS yet would break it)."""

    connection_window_bytes: int = 1024 * KIB
    """HTTP/2 receive window of the connection. It is always replenished on receipt, so that a body that
    nobody reads stalls its own stream only."""

    concurrent_streams: int = 1024
    """HTTP/2 streams open at once on a connection; more are refused (REFUSED_STREAM: clients retry). Times
    `request_window_bytes` this bounds what one connection can make us hold: 64 MiB."""

    abandoned_requests: int = 64
    """HTTP/2 requests of a connection whose client has reset them while their work is not over yet. At so many, further
    ones are refused: to open and reset streams must not be a way to make us work on more than `concurrent_streams`."""

    resets: int = 1000
    """HTTP/2 streams that a client may reset at once (a page with many of them is closed); a thirtieth of it each
    second in the long run. Beyond, as with the next three, the connection is told ENHANCE_YOUR_CALM."""

    control_frames: int = 2000
    """HTTP/2 frames that carry nothing (PING, SETTINGS, PRIORITY, CONTINUATION, next to empty DATA) that may come at
    once; a tenth of it each second in the long run."""

    requests_burst: int = 2000
    """HTTP/2 requests that may come at once, and each second in the long run."""

    window_updates: int = 2000
    """HTTP/2 WINDOW_UPDATE frames that may come at once, and each second in the long run, beside two for each DATA
    frame that we send."""

    header_list_bytes: int = 64 * KIB
    """Size of a request's head: HTTP/2 header list (RFC 9113, 6.5.2), HTTP/1.1 request line and headers."""

    pipelined_bytes: int = 64 * KIB
    """HTTP/1.1: bytes of further requests kept while one is answered; then the socket is no longer read."""

    connection_requests: int | None = None
    """Requests after which a connection is ended gracefully (GOAWAY, `connection: close`). None: never."""

    idle_timeout_s: float = 75.0
    """A connection without a request is closed after this. Longer than the 60 s of common load balancers,
    which otherwise send a request into a closing connection."""

    head_timeout_s: float = 10.0
    """From a request's first byte to its complete head (HTTP/1.1), and to know the protocol at all."""

    body_timeout_s: float = 120.0
    """From the moment in which an application waits for a request's body to the body's end; then it is cut. Ten
    megabytes (the largest body by default) take so long at 0.7 Mbit/s."""

    stall_timeout_s: float = 60.0
    """A client that takes nothing for so long is cut, where no application watches: after `end`, and inside
    `await send()`."""

    close_timeout_s: float = 5.0
    """From our close to the socket's end; then it is aborted."""

    linger_timeout_s: float = 2.0
    """Where we end a connection on which the client may still send (an answer before the body's end, an error of
    HTTP/2): so long that is read and dropped, because closing with unread bytes makes the kernel send a reset that
    can destroy our last words (RFC 9112, 9.6)."""

    linger_bytes: int = 4096 * KIB
    """At most so much of such a rest."""

    def __post_init__(self) -> None:
        if self.request_window_bytes < 65_535:
            raise ValueError("request_window_bytes must be at least 65535")
        if self.connection_window_bytes < 65_535:
            raise ValueError("connection_window_bytes must be at least 65535")
