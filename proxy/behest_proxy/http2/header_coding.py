"""HPACK (RFC 7541) as a gateway needs it: header blocks are read in one walk, and written without any state.

`hpack` takes 0.2 ms for the head of a request, half of it to undo the Huffman code of a token that a client sends with
each of its requests, and 0.1 ms to write one. Its tables are used as they are, and its errors are raised.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from hpack import Decoder, Encoder
from hpack.exceptions import HPACKDecodingError, InvalidTableSizeError, OversizedHeaderListError
from hpack.huffman_table import decode_huffman
from hpack.struct import Header, NeverIndexedHeaderTuple
from hpack.table import HeaderTable, table_entry_size

_REMEMBERED = 1024
_REMEMBERED_BYTES_MAX = 2048
"""Of one string, coded: so all that is remembered is a few MiB at most, whoever sends what. Whether a whole string was
sent lately can be measured by who sends it too: that is of no use against tokens, whose every byte must be known."""
_TABLE_CHANGES_MAX = 2
"""In one block: the least and the last size since the block before (RFC 7541, 4.2)."""
_CODED_BYTES_MAX = 4
"""Of the Huffman code for one byte: 30 bits (RFC 7541, appendix B)."""
_NUMBER_BYTES_MAX = 5
"""Behind its prefix (RFC 7541, 5.1 leaves the bound to us): more than any length that is allowed here needs."""

_STATIC = HeaderTable.STATIC_TABLE
_STATIC_NAMES = {name: index for index, (name, _) in reversed(list(enumerate(_STATIC, 1)))}
_STATUSES = {value: bytes([0x80 | index]) for index, (name, value) in enumerate(_STATIC, 1) if name == b":status"}

_SECRET = frozenset({b"authorization", b"proxy-authorization", b"cookie", b"set-cookie", b"x-api-key", b"api-key"})
"""Nobody on the way may keep these in a table either (RFC 7541, 7.1.3)."""

remembered = lru_cache(_REMEMBERED)(decode_huffman)


class HeaderDecoder(Decoder):
    """Reads header blocks, within the bounds of `hpack.Decoder`."""

    def decode(  # type: ignore[override]  # h2 takes plain pairs
        self,
        data: bytes,
        raw: bool = True,  # noqa: ARG002 - as h2 asks
    ) -> list[Header]:
        """The header lines of a block, as bytes; `raw` asks for them, and nothing else is offered.

        Raises `HPACKDecodingError`, `InvalidTableIndex`, `InvalidTableSizeError` and `OversizedHeaderListError`.
        """
        headers: list[Header] = []
        size_bytes = position = changes = 0
        try:
            while position < len(data):
                first = data[position]
                if first & 0xE0 == 0x20:
                    changes += 1
                    if headers or changes > _TABLE_CHANGES_MAX:
                        raise HPACKDecodingError("a table's size that changes behind a header, or again and again")
                    position = self._resize(data, position)
                    continue
                header, position = self._line(data, position, first)
                headers.append(header)
                size_bytes += table_entry_size(header[0], header[1])
                if size_bytes > self.max_header_list_size:
                    raise OversizedHeaderListError(f"more than {self.max_header_list_size} bytes of headers")
        except IndexError:
            raise HPACKDecodingError("a block that ends too early") from None
        self._assert_valid_table_size()
        return headers

    def _line(self, data: bytes, position: int, first: int) -> tuple[Header, int]:
        """RFC 7541, 6.1 and 6.2: one header, and where the next one begins."""
        if first & 0x80:
            index, position = _number(data, position, 0x7F)
            return self._entry(index), position
        index, position = _number(data, position, 0x3F if first & 0x40 else 0x0F)
        if index:
            name = self._entry(index)[0]
        else:
            name, position = self._string(data, position)
        value, position = self._string(data, position)
        if first & 0x40:
            self.header_table.add(name, value)
        elif first & 0x10:
            return NeverIndexedHeaderTuple(name, value), position
        return (name, value), position

    def _string(self, data: bytes, position: int) -> tuple[bytes, int]:
        """RFC 7541, 5.2: a string, and where it ends."""
        is_coded = data[position] & 0x80
        size, begin = _number(data, position, 0x7F)
        end = begin + size
        if end > len(data):
            raise HPACKDecodingError("a string that ends behind its block")
        text = data[begin:end]
        if not is_coded:
            return text, end
        if size > _CODED_BYTES_MAX * self.max_header_list_size:
            raise OversizedHeaderListError(f"more than {self.max_header_list_size} bytes of headers")
        return remembered(text) if size <= _REMEMBERED_BYTES_MAX else decode_huffman(text), end

    def _entry(self, index: int) -> tuple[bytes, bytes]:
        return _STATIC[index - 1] if 0 < index <= len(_STATIC) else self.header_table.get_by_index(index)

    def _resize(self, data: bytes, position: int) -> int:
        """RFC 7541, 6.3."""
        size_bytes, position = _number(data, position, 0x1F)
        if size_bytes > self.max_allowed_table_size:
            raise InvalidTableSizeError("a table that is larger than allowed")
        self.header_table_size = size_bytes
        return position


class HeaderEncoder(Encoder):
    """Writes header blocks for which nothing has to be remembered, neither here nor by who reads them.

    A head is some 200 bytes longer that way: as much as a chunk.
    """

    def __init__(self) -> None:
        super().__init__()
        self._has_begun = False

    @property
    def header_table_size(self) -> int:
        """Of the dynamic table: there is none."""
        return 0

    @header_table_size.setter
    def header_table_size(self, value: int) -> None:
        """Whatever the other side allows, none is less."""

    def encode(self, headers: Iterable[Any], huffman: bool = True) -> bytes:  # noqa: ARG002 - it is not worth its time
        """The block of these lines: pairs of bytes. Whether by the `huffman` code is our choice: never."""
        # The first block says that the dynamic table has no room, for good (RFC 7541, 4.2).
        parts = [] if self._has_begun else [b"\x20"]
        self._has_begun = True
        for name, value in headers:
            if name == b":status":
                parts.append(_STATUSES.get(value) or b"\x08" + _sized(value))
            else:
                parts += (_named(name), _sized(value))
        return b"".join(parts)


def _number(data: bytes, position: int, prefix: int) -> tuple[int, int]:
    """RFC 7541, 5.1: a number, and where it ends. Raises IndexError where the block ends before it."""
    number = data[position] & prefix
    position += 1
    if number < prefix:
        return number, position
    for place in range(_NUMBER_BYTES_MAX):
        more = data[position]
        position += 1
        number += (more & 0x7F) << 7 * place
        if more < 0x80:
            return number, position
    raise HPACKDecodingError("a number that is too large")


@lru_cache(256)
def _named(name: bytes) -> bytes:
    """The beginning of a literal that is not indexed (RFC 7541, 6.2.2), for secrets nowhere (6.2.3), with its name."""
    kind = 0x10 if name in _SECRET else 0x00
    index = _STATIC_NAMES.get(name)
    if index is None:
        return bytes([kind]) + _sized(name)
    return bytes([kind | index] if index < 0x0F else [kind | 0x0F, index - 0x0F])


def _sized(text: bytes) -> bytes:
    """RFC 7541, 5.2: a string as it is, behind its length."""
    rest = len(text) - 0x7F
    if rest < 0:
        return bytes([len(text)]) + text
    size = bytearray(b"\x7f")
    while rest >= 0x80:
        size.append(rest & 0x7F | 0x80)
        rest >>= 7
    size.append(rest)
    return bytes(size) + text
