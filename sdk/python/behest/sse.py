"""The events of a stream, from its bytes, however they are cut (WHATWG HTML, "Server-sent events").

The `openai` package's own parser makes an event of a comment that is followed by a blank line once an id was seen, so
it cannot read a stream with ids.
"""

import re
from dataclasses import dataclass

__all__ = ["EVENT_BYTES_MAX", "Event", "EventReader", "EventTooLargeError"]

EVENT_BYTES_MAX = 16 * 1024 * 1024
"""More than any chunk has, base64 images included; it bounds what a broken server can make a client remember."""

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventTooLargeError(Exception):
    """One event has more than `EVENT_BYTES_MAX` bytes."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event with data."""

    data: str
    id: str | None
    """Of this event's own block: not inherited from an earlier one."""


class EventReader:
    """Reads one stream. What stands behind the last blank line is no event, as the specification has it."""

    def __init__(self) -> None:
        self._rest = b""
        """The line that has begun."""
        self._is_first = True
        self._skips_line_feed = False
        """The last byte was a carriage return: a line feed behind it belongs to it."""
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._id: str | None = None

    def feed(self, data: bytes) -> list[Event]:
        """The events that these bytes complete. Raises `EventTooLargeError`."""
        if self._skips_line_feed and data:
            data, self._skips_line_feed = data.removeprefix(b"\n"), False
        seen = len(self._rest)
        data = self._rest + data
        if self._is_first:
            if len(data) < 3 and _BYTE_ORDER_MARK.startswith(data):
                self._rest = data
                return []
            data, self._is_first, seen = data.removeprefix(_BYTE_ORDER_MARK), False, 0
        events: list[Event] = []
        begin = 0
        for end in _LINE_END.finditer(data, seen):
            event = self._line(data[begin : end.start()])
            if event is not None:
                events.append(event)
            begin = end.end()
        self._skips_line_feed = data.endswith(b"\r")
        self._rest = data[begin:]
        if len(self._rest) + self._data_bytes > EVENT_BYTES_MAX:
            raise EventTooLargeError(f"an event of more than {EVENT_BYTES_MAX} bytes")
        return events

    def _line(self, line: bytes) -> Event | None:
        if not line:
            return self._blank()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value)
        elif name == b"id" and b"\0" not in value:
            self._id = value.decode("utf-8", "replace")
        return None  # comments have no name; event and retry say nothing that we use

    def _blank(self) -> Event | None:
        data, event_id = self._data, self._id
        self._data, self._data_bytes, self._id = [], 0, None
        return Event(b"\n".join(data).decode("utf-8", "replace"), event_id) if data else None
