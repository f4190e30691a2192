"""HTTP/2 frames as bytes (RFC 9113, 4.1 and 6): what is read and written without `h2`."""

from struct import Struct
from typing import Final

DATA: Final = 0x0
HEADERS: Final = 0x1
PUSH_PROMISE: Final = 0x5
GOAWAY: Final = 0x7
CONTINUATION: Final = 0x9

END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8

HEAD_BYTES: Final = 9

HEADER_BLOCK_TYPES: Final = frozenset({HEADERS, PUSH_PROMISE, CONTINUATION})

read_head: Final = Struct(">BHBBI").unpack_from
"""(length's upper 8 bits, length's lower 16 bits, type, flags, stream id with its reserved bit)."""

_WINDOW_UPDATE: Final = Struct(">BHBBII")
_GOAWAY_HEAD: Final = Struct(">II")


class Tail:
    """The incomplete frame at the end of a read, until the next reads have completed it."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._needed_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._bytes)

    def keep(self, rest: bytes, *, needed_bytes: int) -> None:
        """Keep an incomplete frame; it says nothing before `needed_bytes` are there."""
        self._bytes += rest
        self._needed_bytes = needed_bytes

    def complete(self, data: bytes) -> bytes:
        """The kept bytes and `data`, or nothing while that is no whole frame."""
        self._bytes += data
        if len(self._bytes) < self._needed_bytes:
            return b""
        data = bytes(self._bytes)
        self._bytes.clear()
        return data


def window_update(stream_id: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame; stream 0 is the connection."""
    return _WINDOW_UPDATE.pack(0, 4, 0x8, 0, stream_id, increment)


def end_of_stream(stream_id: int) -> bytes:
    """An empty DATA frame with END_STREAM: what `h2` is told of a body that was read past it."""
    return Struct(">BHBBI").pack(0, 0, DATA, END_STREAM, stream_id)


def read_goaway(payload: bytes) -> tuple[int, int]:
    """(last stream id, error code). Raises ValueError when the frame is too short."""
    if len(payload) < _GOAWAY_HEAD.size:
        raise ValueError("GOAWAY is too short")
    last_stream_id, error_code = _GOAWAY_HEAD.unpack_from(payload)
    return last_stream_id & 0x7FFFFFFF, error_code


def without_padding(payload: bytes) -> bytes:
    """A PADDED DATA frame's data (RFC 9113, 6.1). Raises ValueError when the padding is longer than the frame."""
    if not payload or payload[0] >= len(payload):
        raise ValueError("padding is longer than its frame")
    return payload[1 : len(payload) - payload[0]]
