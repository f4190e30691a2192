"""What the ordinary chunks of one stream have in common: nearly all of it, so that most need no parsing.

A provider repeats the same 250 bytes around every few letters of text. Once a chunk was parsed and found ordinary, a
read that holds the same bytes with another JSON string in that one place is parsed to the same but for the text: that
is a comparison, a sixth of the cost of decoding it. Whatever differs anywhere else is no likeness, and is decoded.
"""

from behest_proxy.chunk import ChunkError, decode, plain_text

_PROBE = "what no provider says of its own accord"
_PATTERN_BYTES_MAX = 4096
_TRIES = 8
"""Chunks of a stream that are looked at. Where each one has something of its own (padding), none is like another."""


class Likeness:
    """Recognises reads that are whole ordinary events of the stream that it learned from."""

    __slots__ = ("_after", "_before", "_tries")

    def __init__(self) -> None:
        self._before = b""
        self._after = b""
        self._tries = _TRIES

    def texts_of(self, read: bytes) -> list[str] | None:
        """The text of each event in a read that is nothing but whole events like those before; None: parse it.

        The read must begin where an event begins. Its bytes may go on to the client as they are: each event is one
        `data` line and one blank line, and LF ends both. A text with escapes, quotes or anything unprintable is left to
        the parser.
        """
        before = self._before
        after = self._after
        if not before or not read.startswith(before) or not read.endswith(after):
            return None
        inner = read[len(before) : -len(after)]
        try:
            text = inner.decode()
        except UnicodeDecodeError:
            return None
        if "\\" in text:
            return None
        if '"' not in text:
            return [text] if text.isprintable() and len(read) >= len(before) + len(after) else None
        return self._texts_of_many(read)

    def _texts_of_many(self, read: bytes) -> list[str] | None:
        # Cut at the blank lines: to search for all that stands between two texts takes three times as long.
        before, after = self._before, self._after[:-2]
        begin, end = len(before), -len(after)
        least = len(before) + len(after)
        inner: list[bytes] = []
        for event in read[:-2].split(b"\n\n"):
            if not event.startswith(before) or not event.endswith(after) or len(event) < least:
                return None
            inner.append(event[begin:end])
        joined = b"\n".join(inner).decode()  # the read is UTF-8, and was cut at quotation marks
        texts = joined.split("\n")
        if '"' in joined or len(texts) != len(inner) or not all(map(str.isprintable, texts)):
            return None
        return texts

    def learn(self, payload: bytes, text: str) -> None:
        """Take an ordinary chunk, which adds `text`, as what others are likely to be like."""
        if not self._tries or not text:
            return
        self._tries -= 1
        if len(payload) > _PATTERN_BYTES_MAX or b"\n" in payload or b"\r" in payload:
            return
        try:
            before, found, after = payload.decode().partition(f'"{text}"')
        except UnicodeDecodeError:
            return
        before, after = before + '"', '"' + after
        if found and _is_text_between(before, after):
            self._before = f"data: {before}".encode()
            self._after = f"{after}\n\n".encode()


def _is_text_between(before: str, after: str) -> bool:
    """Whether the string between the two is the chunk's text, and not another member that happened to be equal."""
    try:
        return plain_text(decode(f"{before}{_PROBE}{after}".encode())) == _PROBE
    except ChunkError:
        return False
