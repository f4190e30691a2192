"""The three ways an HTTP/1.1 body is framed (RFC 9112, 6): chunked, by length, until the connection closes.

A reader is fed what one read brought and returns the body bytes in it, joined, so that a read with a hundred small
chunks costs the handler one call. After `complete`, what came behind the body is in `surplus`.
"""

from typing import Protocol

_HEX = b"0123456789abcdefABCDEF"
_SIZE_LINE_BYTES_MAX = 4 * 1024
_SIZE_DIGITS_MAX = 15
_TRAILER_BYTES_MAX = 32 * 1024
_MANY_BYTES_MIN = 1024
"""From so much on it is worth looking whether a read is a run of whole chunks."""


class MalformedBody(Exception):
    """The peer's framing is none."""


class BodyReader(Protocol):
    """Finds the body's bytes in what the socket brings."""

    complete: bool
    """The body has ended; nothing may be fed any more."""

    surplus: bool
    """Bytes came behind the end: the connection cannot be used again."""

    ends_with_connection: bool
    """A clean close of the connection is this body's end."""

    def feed(self, data: bytes) -> bytes:
        """The body bytes in `data`. Raises MalformedBody."""
        ...


class LengthReader:
    """A body with `content-length`."""

    ends_with_connection = False

    def __init__(self, length: int) -> None:
        self.complete = length == 0
        self.surplus = False
        self._remaining = length

    def feed(self, data: bytes) -> bytes:
        """The body bytes in `data`."""
        size = len(data)
        if size < self._remaining:
            self._remaining -= size
            return data
        self.complete = True
        if size == self._remaining:
            return data
        self.surplus = True
        return data[: self._remaining]


class CloseReader:
    """A body that ends with the connection."""

    complete = False
    surplus = False
    ends_with_connection = True

    def feed(self, data: bytes) -> bytes:
        """Everything."""
        return data


class ChunkedReader:
    """A chunked body (RFC 9112, 7.1). Extensions and trailers are read and dropped; bare LF is refused."""

    __slots__ = (
        "_expects_crlf",
        "_in_trailers",
        "_line",
        "_remaining",
        "_trailer_bytes",
        "complete",
        "surplus",
    )
    ends_with_connection = False

    def __init__(self) -> None:
        self.complete = False
        self.surplus = False
        self._remaining = 0
        """Payload bytes of the chunk in progress."""
        self._line = b""
        """The start of a line whose end has not come yet; the CRLF behind a payload counts as an empty line."""
        self._expects_crlf = False
        self._in_trailers = False
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """The payload bytes in `data`, of all its chunks together. Raises MalformedBody."""
        if not (self._remaining or self._line or self._expects_crlf or self._in_trailers) and data[-2:] == b"\r\n":
            # Nearly every read is one whole chunk.
            found = data.find(b"\r\n")
            line = data[:found]
            if 0 < found < 8 and not line.strip(_HEX) and int(line, 16) == len(data) - found - 4 > 0:
                return data[found + 2 : -2]
        if self._line:
            data = self._line + data
            self._line = b""
        position, size = 0, len(data)
        is_run_likely = True
        parts: list[bytes] = []
        while position < size:
            if self._remaining:
                end = min(position + self._remaining, size)
                self._remaining -= end - position
                parts.append(data[position:end])
                position = end
                self._expects_crlf = not self._remaining
                continue
            if is_run_likely and size - position >= _MANY_BYTES_MIN and not (self._expects_crlf or self._in_trailers):
                is_run_likely = False
                payloads, bytes_taken = _whole_chunks(data[position:])
                parts += payloads
                position += bytes_taken
                continue
            found = data.find(b"\r\n", position)
            if found < 0:
                self._keep(data[position:])
                break
            if self._expects_crlf:
                if found != position:
                    raise MalformedBody("a chunk is longer than its size")
                self._expects_crlf = False
            elif self._in_trailers:
                if self._end_of_trailers(found - position):
                    self.surplus = found + 2 < size
                    break
            else:
                self._remaining = self._parse_size(data[position:found])
                self._in_trailers = not self._remaining
            position = found + 2
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _keep(self, start: bytes) -> None:
        if len(start) > _SIZE_LINE_BYTES_MAX:
            raise MalformedBody("a line between chunks is too long")
        if self._expects_crlf and start != b"\r":
            raise MalformedBody("a chunk is longer than its size")
        self._line = start

    def _end_of_trailers(self, line_bytes: int) -> bool:
        self._trailer_bytes += line_bytes + 2
        if self._trailer_bytes > _TRAILER_BYTES_MAX:
            raise MalformedBody("the trailers are too long")
        self.complete = not line_bytes
        return self.complete

    @staticmethod
    def _parse_size(line: bytes) -> int:
        # int() alone would also take signs, spaces, underscores and 0x.
        if line.strip(_HEX):
            line = line.partition(b";")[0].rstrip(b" \t")
        if not line or line.strip(_HEX) or len(line) > _SIZE_DIGITS_MAX:
            raise MalformedBody("a chunk's size is no hexadecimal number")
        return int(line, 16)


def _whole_chunks(data: bytes) -> tuple[list[bytes], int]:
    """The payloads of the whole chunks that `data` begins with, and the bytes that these take with their framing.

    All of them or none: where a payload holds a line end itself, or a line anything but a size, nothing is taken.
    """
    lines = data.split(b"\r\n")
    rest = lines[len(lines) - 1 & ~1 :]  # what follows the last whole pair of lines
    sizes, payloads = lines[: len(lines) - len(rest) : 2], lines[1 : len(lines) - len(rest) : 2]
    if payloads and not payloads[-1]:  # the chunk that ends the body
        rest = [sizes.pop(), payloads.pop(), *rest]
    if (
        not all(payloads)
        or not all(sizes)
        or b"".join(sizes).strip(_HEX)
        or max(map(len, sizes), default=0) > _SIZE_DIGITS_MAX
        or [int(size, 16) for size in sizes] != list(map(len, payloads))
    ):
        return [], 0
    return payloads, len(data) - sum(map(len, rest)) - 2 * (len(rest) - 1)
