"""One call on its HTTP/2 stream: what is counted per stream, and the way from a call to its connection."""

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
