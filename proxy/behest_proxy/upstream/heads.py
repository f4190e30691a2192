"""Heads over HTTP/1.1 (RFC 9112): a request's is written, an answer's is read from its bytes.

What goes out was made safe before (`prepared`); what comes in is checked here. An answer whose end two readers could
find in different places is refused, and so is a header that continues on the next line (5.2 leaves that to a gateway).
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

HEAD_BYTES_MAX = 64 * 1024
_LENGTH_DIGITS_MAX = 19
_INTERIM_MAX = 32
"""Interim answers before the one that counts."""

Header = tuple[bytes, bytes]

_BEGINNING = b"HTTP/1."
_END = re.compile(rb"\n\r?\n")
"""A line may end without its carriage return (2.2)."""
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?\r?\n")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r?\n")


class MalformedHead(ValueError):
    """What came is no head of an answer. The message quotes nothing of it."""


class AnswerHead(NamedTuple):
    """What an answer says before its body."""

    status: int
    headers: list[Header]
    """In the order in which they came, names in lower case."""
    length: int | None
    """Of the body, in bytes; None: the answer does not say."""
    is_chunked: bool
    keeps_alive: bool
    """Another request may follow on this connection (9.3). An HTTP/1.0 peer's `keep-alive` is not taken up."""


def composed(method: bytes, target: bytes, headers: Iterable[Header]) -> bytes:
    """The head of a request whose parts are known to be safe: see `prepared.prepare`."""
    lines = b"".join([b"%b: %b\r\n" % header for header in headers])
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (method, target, lines)


class HeadReader:
    """Reads from a connection until the head of the answer is whole; interim answers (1xx) are passed over."""

    __slots__ = ("_interim", "_kept", "_searched")

    def __init__(self) -> None:
        self._kept = bytearray()
        """Of a head that has begun: what came of it so far."""
        self._searched = 0
        self._interim = 0

    def feed(self, data: bytes) -> tuple[AnswerHead, bytes] | None:
        """The head and what came behind it, once it is whole. Raises `MalformedHead`."""
        whole: bytes | bytearray = data
        if self._kept:
            self._kept += data
            whole = self._kept
        begin = 0
        while True:
            if not whole.startswith(_BEGINNING[: len(whole) - begin], begin):
                raise MalformedHead("malformed head of the answer")
            found = _END.search(whole, max(begin, self._searched))
            if (len(whole) if found is None else found.end()) - begin > HEAD_BYTES_MAX:
                raise MalformedHead("the head of the answer is too large")
            if found is None:
                break
            head = _parsed(whole, begin, found.end())
            begin = found.end()
            if head is not None:
                return head, bytes(whole[begin:])
            self._interim += 1
            if self._interim > _INTERIM_MAX:
                raise MalformedHead("interim answers, and no end of them")
        if whole is data:
            self._kept = bytearray(data[begin:])
        else:
            del self._kept[:begin]
        self._searched = max(0, len(self._kept) - 2)
        return None


def _parsed(data: bytes | bytearray, begin: int, end: int) -> AnswerHead | None:
    """The head that stands there; None for an interim one. Raises `MalformedHead`."""
    line = _STATUS_LINE.match(data, begin, end)
    if line is None:
        raise MalformedHead("malformed head of the answer")
    status = int(line[2])
    headers: list[Header] = []
    position = line.end()
    while (line_of_header := _HEADER.match(data, position, end)) is not None:
        name, value = line_of_header.groups()
        headers.append((name.lower(), value.strip(b" \t")))
        position = line_of_header.end()
    if data[position:end] not in (b"\r\n", b"\n"):
        raise MalformedHead("malformed head of the answer")
    if status == 101:
        raise MalformedHead("an answer that switches protocols, unasked")
    return None if status < 200 else _framed(status, headers, minor_version=int(line[1]))


def _framed(status: int, headers: list[Header], *, minor_version: int) -> AnswerHead:
    """Where the body ends (6.3): chunks count more than a length, and nobody reuses the connection then."""
    length: int | None = None
    is_chunked = False
    keeps_alive = minor_version > 0
    for name, value in headers:
        if name == b"content-length":
            said = _length(value)
            if length is not None and said != length:
                raise MalformedHead("an answer with two lengths")
            length = said
        elif name == b"transfer-encoding":
            if is_chunked or value.lower() != b"chunked":
                raise MalformedHead("an answer in a transfer coding that is not offered")
            is_chunked = True
        elif name == b"connection" and b"close" in (option.strip() for option in value.lower().split(b",")):
            keeps_alive = False
    if status in (204, 304):
        # Of a 304 a length is that of what it does not send. A 204 has none: whoever says so may send it after all.
        is_plain = not is_chunked and (status == 304 or not length)
        return AnswerHead(status, headers, 0, False, keeps_alive and is_plain)
    if is_chunked:
        return AnswerHead(status, headers, None, True, keeps_alive and length is None)
    return AnswerHead(status, headers, length, False, keeps_alive)


def _length(value: bytes) -> int:
    """One length, or the same one repeated (RFC 9110, 8.6)."""
    said = {part.strip(b" \t") for part in value.split(b",")}
    text = said.pop()
    if said or not text.isdigit() or len(text) > _LENGTH_DIGITS_MAX:
        raise MalformedHead("an answer without a proper length")
    return int(text)
