"""One call on its HTTP/2 stream: what is counted per stream, and the way from a call to its connection."""

from collections.abc import Iterable
from typing import Protocol

from behest_proxy.upstream.live_call import LiveCall


class StreamOwner(Protocol):
    """The connection, as a stream sees it."""

    def cancel(self, stream: "Stream") -> None:
        """Its call is over for the call's owner."""
        ...

    def give_back(self, stream: "Stream") -> None:
        """Its call takes bytes again."""
        ...


class Stream:
    """A call's carrier on a multiplexed connection."""

    __slots__ = (
        "_connection",
        "body_sent",
        "by_hand",
        "call",
        "ended",
        "expected_bytes",
        "number",
        "owed_bytes",
        "parts",
        "reads_before",
        "received_bytes",
    )

    def __init__(self, connection: StreamOwner, call: LiveCall, *, number: int, reads_before: int) -> None:
        self._connection = connection
        self.call = call
        self.number = number
        """The stream's identifier on the wire."""
        self.reads_before = reads_before
        """Reads of the connection before this stream: unchanged means that the peer has said nothing since."""
        self.body_sent = 0
        self.by_hand = False
        """Its DATA does not pass through `h2`."""
        self.ended = False
        """The peer has sent its last byte: there is no window to open any more."""
        self.expected_bytes: int | None = None
        self.received_bytes = 0
        self.owed_bytes = 0
        """Received, and not yet given back to the peer's window for this stream."""
        self.parts: list[bytes] = []
        """What the read in progress brought."""

    def send_fields(self) -> list[tuple[bytes, bytes]]:
        """The request's pseudo-header and header fields (RFC 9113, 8.3.1)."""
        request = self.call.request
        return [
            (b":method", request.method),
            (b":scheme", request.origin.scheme.encode("ascii")),
            (b":authority", request.origin.authority.encode("ascii")),
            (b":path", request.target),
            *request.headers,
        ]

    def receive_fields(self, fields: Iterable[tuple[bytes, bytes]]) -> None:
        """Take the answer's head and tell the call. Raises ValueError for a status that is none."""
        status = 0
        headers: list[tuple[bytes, bytes]] = []
        for name, value in fields:
            if name == b":status":
                status = int(value)
            elif not name.startswith(b":"):
                headers.append((name, value))
                if name == b"content-length":
                    self.expected_bytes = int(value)
        self.by_hand = self.expected_bytes is None
        if status in (204, 304):
            self.expected_bytes = None
        self.call.head(status, headers)

    def take_parts(self) -> bytes:
        """What the read in progress brought, joined."""
        payload = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        self.parts.clear()
        return payload

    @property
    def body_unsent(self) -> bool:
        """Some of the request's body was not sent."""
        return self.body_sent < len(self.call.request.body)

    @property
    def is_short(self) -> bool:
        """The answer ended before, or behind, the length that it had announced."""
        return self.expected_bytes is not None and self.received_bytes != self.expected_bytes

    def dropped(self, call: LiveCall) -> None:
        """See `Carrier.dropped`."""
        del call
        self._connection.cancel(self)

    def paused(self, call: LiveCall) -> None:
        """Nothing to do: the window of a paused call is not given back."""

    def resumed(self, call: LiveCall) -> None:
        """See `Carrier.resumed`."""
        del call
        self._connection.give_back(self)
