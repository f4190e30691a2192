"""Frames: how records lie in a file so that damage to one costs no other.

A frame is `MAGIC` (4 bytes), the payload's length and its CRC-32 (4 bytes each, little-endian), and the payload. The
checksum starts from the length, so that a changed length is a changed checksum.

A reader walks from frame to frame. Where there is none it looks for the next place that is one, checksum and all, and
counts what it skipped. Could it be led to believe in a record that somebody smuggled into another one's text? No: text
in a record is UTF-8, and no byte of `MAGIC` ever occurs in UTF-8 (RFC 3629, section 1). Read as a length, those bytes
are too large as well, so that rubbish full of them costs no time.
"""

import struct
import zlib
from collections.abc import Iterator

import msgspec

MAGIC = b"\xfe\xc1\xf8\xff"
PAYLOAD_BYTES_MAX = 256 * 1024
"""More is no record: they are about half a kilobyte."""

_HEADER = struct.Struct("<4sII")
HEADER_BYTES = _HEADER.size


class Damage(msgspec.Struct, kw_only=True):
    """What a replay could not use. All zero after a clean end, and nearly always after a kill."""

    regions: int = 0
    """Places in the record files that are no frame. One at the very end of a file is a write that was cut short."""
    bytes: int = 0
    """The size of those places."""
    unknown_records: int = 0
    """Whole records that this version cannot read: another version's kinds."""
    slots: int = 0
    """Slots that hold what nobody writes, and files of slots that end inside of one."""
    orphans: int = 0
    """Requests of which something is known, but neither their admission nor their end: they cannot be settled."""

    def __bool__(self) -> bool:
        return bool(self.regions or self.unknown_records or self.slots or self.orphans)


def frame(payload: bytes) -> bytes:
    """The frame of a payload."""
    return _HEADER.pack(MAGIC, len(payload), zlib.crc32(payload, len(payload))) + payload


def payloads(data: bytes, damage: Damage) -> Iterator[bytes]:
    """The payloads of all whole frames, in their order. Never raises; what is skipped is added to `damage`."""
    at = 0
    while at < len(data):
        payload = _payload_at(data, at)
        if payload is not None:
            yield payload
            at += HEADER_BYTES + len(payload)
            continue
        found = data.find(MAGIC, at + 1)
        while found >= 0 and _payload_at(data, found) is None:
            found = data.find(MAGIC, found + 1)
        end = found if found >= 0 else len(data)
        damage.regions += 1
        damage.bytes += end - at
        at = end


def _payload_at(data: bytes, at: int) -> bytes | None:
    """The payload of the frame at this place; None: there is no whole frame."""
    start = at + HEADER_BYTES
    if start > len(data):
        return None
    magic, length, checksum = _HEADER.unpack_from(data, at)
    # An empty payload is none: a magic in front of zeros, as a power loss leaves them, would be one.
    if magic != MAGIC or not 0 < length <= PAYLOAD_BYTES_MAX or start + length > len(data):
        return None
    payload = data[start : start + length]
    return payload if zlib.crc32(payload, length) == checksum else None
