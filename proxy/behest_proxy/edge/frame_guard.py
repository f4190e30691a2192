"""What a client's HTTP/2 frames may cost us, reckoned from their headers before `h2` looks at them.

A frame of nine bytes costs its sender nothing and us some 30 µs of parsing and perhaps an answer; a read of 256 KiB
holds 28,000 of them. The known floods are made of such frames: PING, SETTINGS and empty frames (CVE-2019-9512, -9515,
-9518), streams opened and reset (CVE-2023-44487) or made to be reset (CVE-2025-8671), CONTINUATION (CVE-2024-27316),
window updates, bodies of one byte a frame. A useful client sends few of them: each kind has a bucket that refills; a
connection whose bucket is empty is told ENHANCE_YOUR_CALM (RFC 9113, 7) and ends.
"""

from dataclasses import dataclass

from behest_proxy.edge.limits import EdgeLimits

_PREFACE_BYTES = 24
_HEAD_BYTES = 9
_DATA, _HEADERS, _RST_STREAM, _WINDOW_UPDATE = 0x0, 0x1, 0x3, 0x8
_END_STREAM = 0x1
_SMALL_DATA_BYTES = 64
"""A piece of a body that carries less than it costs."""


@dataclass(slots=True)
class _Bucket:
    """So many at once, so many a second in the long run."""

    burst: float
    per_second: float
    left: float
    at_s: float

    def take(self, count: float, now_s: float) -> bool:
        """Whether there were so many left; they are gone now."""
        self.left = min(self.burst, self.left + (now_s - self.at_s) * self.per_second) - count
        self.at_s = now_s
        return self.left >= 0


class FrameGuard:
    """Counts the frames of one connection. Pure: bytes and times come in, a reason to end the connection comes out."""

    __slots__ = ("_control", "_head", "_requests", "_resets", "_skip", "_updates")

    def __init__(self, limits: EdgeLimits, now_s: float) -> None:
        """The first bytes to come are the connection preface."""
        self._skip = _PREFACE_BYTES
        self._head = b""
        control, resets, requests = limits.control_frames, limits.resets, limits.requests_burst
        self._control = _Bucket(control, control / 10, control, now_s)
        self._resets = _Bucket(resets, resets / 30, resets, now_s)
        self._requests = _Bucket(requests, requests, requests, now_s)
        self._updates = _Bucket(limits.window_updates, limits.window_updates, limits.window_updates, now_s)

    def sent(self, frames: int) -> None:
        """So many DATA frames went out: each may be answered with an update of its stream's window and of ours."""
        self._updates.left += 2 * frames

    def was_reset(self, now_s: float) -> str | None:
        """The client made us reset a stream, which costs as much as if it had."""
        return None if self._resets.take(1, now_s) else "too many streams were reset"

    def admit(self, data: bytes, now_s: float) -> str | None:
        """The next bytes of the connection: why it must end before they are parsed, or None."""
        if len(data) < self._skip:
            self._skip -= len(data)
            return None
        control = resets = requests = updates = 0
        head, position = self._head, self._skip
        if head:
            data = head + data
        size = len(data)
        while position + _HEAD_BYTES <= size:
            length = int.from_bytes(data[position : position + 3], "big")
            kind = data[position + 3]
            if kind == _DATA:
                control += length < _SMALL_DATA_BYTES and not data[position + 4] & _END_STREAM
            elif kind == _HEADERS:
                requests += 1
            elif kind == _WINDOW_UPDATE:
                updates += 1
            elif kind == _RST_STREAM:
                resets += 1
            else:
                control += 1
            position += _HEAD_BYTES + length
        self._head = data[position:] if position < size else b""
        self._skip = max(0, position - size)
        if control and not self._control.take(control, now_s):
            return "too many frames that carry nothing"
        if resets and not self._resets.take(resets, now_s):
            return "too many streams were reset"
        if requests and not self._requests.take(requests, now_s):
            return "too many requests at once"
        if updates and not self._updates.take(updates, now_s):
            return "too many window updates"
        return None
