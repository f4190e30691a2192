"""Event streams: bytes as they come from a provider in, payloads of whole events out, and the events we write.

The rules are those of WHATWG HTML, "Server-sent events", section "Parsing an event stream": lines end with LF,
CRLF or CR, a byte order mark at the start is ignored, comments and unknown fields are ignored, several `data`
lines are joined with LF, a blank line ends an event. `id` and `retry` steer reconnection, which is not the
provider's business here, so they are dropped.

Almost every read of a provider's stream is a run of `data: {...}` events, each with one blank line behind it. Such
a read is recognised by counting its line ends, and cut by one `split`: no line of it is looked at in Python.
"""

from collections.abc import Sequence

EVENT_BYTES_MAX = 4 * 1024 * 1024
"""Default bound on one event. The largest known events carry images or audio as base64."""

KEEP_ALIVE = b": ka\n"
"""A comment with one line end: a blank line after it would make an event of nothing, on which clients die."""

DONE_PAYLOAD = b"[DONE]"
DONE = b"data: [DONE]\n\n"

_BOM = b"\xef\xbb\xbf"
_DATA = b"data: "
_END = b"\n\n"
_BETWEEN = _END + _DATA
# As numbers, because `in` and `find` are several times faster with them (measured on CPython 3.11).
_LF = 10
_CR = 13


class SseTooLarge(ValueError):
    """One event is larger than the bound, so the stream cannot be followed any further."""


class NamedEvent(bytes):
    """The payload of an event whose `event:` field is not `message`; `name` is that field, for instance `error`."""

    name: str

    @classmethod
    def of(cls, payload: bytes, name: str) -> "NamedEvent":
        """The payload, with its event's name."""
        event = cls(payload)
        event.name = name
        return event


def is_error_event(payload: bytes) -> bool:
    """Whether its provider named it an error."""
    return isinstance(payload, NamedEvent) and payload.name == "error"


SseEvent = bytes
"""An event is its payload; the few that have a name are `NamedEvent`."""


class SseFramer:
    """Cuts the bytes of one stream into events, wherever the reads were cut."""

    __slots__ = ("_after_cr", "_event_bytes_max", "_irregular", "_rest", "_rest_bytes", "_start")

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._event_bytes_max = event_bytes_max
        # Everything behind the last blank line, in pieces, so that a large event in many reads is joined once.
        self._rest: list[bytes] = []
        self._rest_bytes = 0
        self._irregular = True  # the start of the stream is not seen yet, or the last byte was a CR
        self._start: bytes | None = b""  # what may become a byte order mark; None behind the start
        self._after_cr = False

    @property
    def is_between_events(self) -> bool:
        """The next byte begins an event, as far as is known: nothing of one is kept, and no CR waits for its LF."""
        return not self._rest and not self._irregular

    def feed(self, data: bytes) -> list[SseEvent]:
        """The payloads of the events that end in `data`, the next bytes of the stream.

        Raises `SseTooLarge`; the events before the large one in the same read are lost with it.
        """
        if self._irregular or _CR in data:
            data = self._with_plain_line_ends(data)
        size = len(data)
        if not self._rest and data[-2:] == _END and data[:6] == _DATA and size <= self._event_bytes_max:
            if data.find(_LF) == size - 2:
                return [data[6:-2]]
            payloads = data[6:-2].split(_BETWEEN)
            # With two line ends per event, none is inside a payload: that is the ordinary stream.
            if data.count(_LF) == 2 * len(payloads):
                return payloads
        return self._feed_in_pieces(data)

    def finish(self) -> list[SseEvent]:
        """The event that the end of the stream left without its blank line, if it holds a `data` field.

        The standard discards it. Some providers close right behind their last line, even without its line end,
        so it is handed out: where it is `[DONE]` or whole JSON, the stream was whole; a cut one does not decode.
        """
        rest = b"".join(self._rest)
        self._rest.clear()
        self._rest_bytes = 0
        return _events(rest)

    def _feed_in_pieces(self, data: bytes) -> list[SseEvent]:
        """The same for a read that is no run of whole ordinary events: cut inside one, comments, names."""
        # The blank line itself may be cut in two.
        ends_here = _END in data or (data[:1] == b"\n" and self._rest and self._rest[-1][-1:] == b"\n")
        if not ends_here:
            self._keep(data)
            return []
        block = b"".join((*self._rest, data)) if self._rest else data
        self._rest.clear()
        self._rest_bytes = 0
        end = block.rfind(_END)
        self._keep(block[end + 2 :])
        return self._split(block[:end])

    def _keep(self, rest: bytes) -> None:
        if not rest:
            return
        self._rest.append(rest)
        self._rest_bytes += len(rest)
        if self._rest_bytes > self._event_bytes_max:
            raise SseTooLarge(f"an event is larger than {self._event_bytes_max} bytes")

    def _split(self, block: bytes) -> list[SseEvent]:
        """The events of a block that ends with a whole event, its blank line taken off."""
        if block[:6] == _DATA and len(block) <= self._event_bytes_max:
            payloads = block[6:].split(_BETWEEN)
            if block.count(_LF) == 2 * len(payloads) - 2:
                return payloads
        events: list[SseEvent] = []
        for text in block.split(_END):
            if len(text) > self._event_bytes_max:
                raise SseTooLarge(f"an event is larger than {self._event_bytes_max} bytes")
            events += _events(text)
        return events

    def _with_plain_line_ends(self, data: bytes) -> bytes:
        """`data` with LF for every line end, without the byte order mark at the start of the stream."""
        if self._start is not None:
            data = self._start + data
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._start = data
                return b""
            self._start = None
            data = data.removeprefix(_BOM)
        if self._after_cr and data:
            # The CR was taken for the line end; an LF behind it belongs to it.
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if data:
            self._after_cr = data.endswith(b"\r")
        self._irregular = self._after_cr
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _events(text: bytes) -> list[SseEvent]:
    """The event in the lines of `text`, of which only the outer ones may be blank; none where there is no data."""
    lines: list[bytes] = []
    name = b""
    for line in text.split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            lines.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    if not lines:
        return []
    payload = b"\n".join(lines)
    if name in (b"", b"message"):
        return [payload]
    return [NamedEvent.of(payload, name.decode("utf-8", "replace"))]


def data_event(payload: bytes) -> bytes:
    """The event that carries a JSON text, on one data line.

    Line ends between the tokens of the text become spaces; inside JSON strings there are none (RFC 8259, section 7).
    """
    if _LF in payload or _CR in payload:
        payload = payload.replace(b"\n", b" ").replace(b"\r", b" ")
    return b"data: %b\n\n" % payload


def data_events(payloads: Sequence[bytes]) -> bytes:
    """The events of several JSON texts, to be written at once."""
    if len(payloads) == 1:
        return data_event(payloads[0])
    events = b"data: %b\n\n" % _BETWEEN.join(payloads)
    if events.count(_LF) == 2 * len(payloads) and _CR not in events:
        return events
    return b"".join(map(data_event, payloads))
