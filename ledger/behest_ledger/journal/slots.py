"""Slots: one 64-byte place in a memory-mapped file per live request, for what changes with every read.

A store here is in the kernel's page cache at once, without a system call: it survives `kill -9`, and costs a sixth
of a microsecond. Words of 8 bytes in the machine's own order:

| word | what |
|---|---|
| 0, 1 | request id, upper and lower half; both zero: the slot is free |
| 2 | output tokens |
| 3 | reasoning tokens |
| 4 | chunks |
| 5 | `_MARK`, and in its low bits the flags |
| 6, 7 | zero |

Why a kill at any moment leaves nothing false to read:

- Every store is one aligned word, one machine instruction through a `memoryview` of words. `struct.pack_into` will not
  do: it clears its target first, and a reader sees the zeros (12 % of the looks from another process did).
- The kernel stops a process between two instructions, so what was stored before is there, and nothing after.
- A slot's counters and flags only grow. Between two of a store's words the reader sees the old count of one and the
  new count of another, and each is at least what the client had before.
- When a slot is taken, the counters are cleared first and the id is written last; when it is freed, the id is cleared
  first. So one request's id never stands beside another's counters. An id that is half written names nobody.
"""

import contextlib
import mmap
import os
import struct
from pathlib import Path
from uuid import UUID

import msgspec

from behest_ledger.journal.records import Progress

SLOT_BYTES = 64
COUNT_MAX = 1 << 40
"""No answer has so many tokens or chunks: a higher number was not written by us."""

_WORDS = SLOT_BYTES // 8
_ID_UPPER, _ID_LOWER, _OUTPUT, _REASONING, _CHUNKS, _FLAGS = range(6)
_SENT = 1
_FIRST_BYTE = 2
_MARK = 0x6265_6865_7374_0000
"""Upper bits of the flags of every slot that was ever taken."""
_LOWER_HALF = (1 << 64) - 1

_slot_words = struct.Struct(f"={_WORDS}Q")


class NoSlot(msgspec.Struct, frozen=True):
    """All slots are taken: the request must not be admitted. False where a slot is true."""

    slots_max: int

    def __bool__(self) -> bool:
        return False


class Slot:
    """The place of one live request. Its methods never raise while counts are in range, also not after `free`."""

    __slots__ = ("_number", "_table", "_words", "request_id")

    def __init__(self, table: "SlotTable", number: int, words: "memoryview[int]", request_id: UUID) -> None:
        """Take a free place."""
        words[_OUTPUT] = 0
        words[_REASONING] = 0
        words[_CHUNKS] = 0
        words[_FLAGS] = _MARK
        words[_ID_LOWER] = request_id.int & _LOWER_HALF
        words[_ID_UPPER] = request_id.int >> 64
        self._table = table
        self._number = number
        self._words = words
        self.request_id = request_id

    def store(self, output: int, reasoning: int, chunks: int) -> None:
        """All that will have been forwarded, including what is written next. Call it BEFORE the client's write."""
        words = self._words
        words[_OUTPUT] = output
        words[_REASONING] = reasoning
        words[_CHUNKS] = chunks

    def mark_sent(self) -> None:
        """The whole request was handed to the provider's connection: its input may be billed from now on."""
        self._words[_FLAGS] |= _SENT

    def mark_first_byte(self) -> None:
        """The first byte of a successful answer came."""
        self._words[_FLAGS] |= _FIRST_BYTE

    def free(self) -> None:
        """Give the place back. Repeating it does nothing, and later stores go nowhere."""
        words, self._words = self._words, _nowhere
        if words is _nowhere:
            return
        words[_ID_UPPER] = 0
        words[_ID_LOWER] = 0
        self._table.freed(self._number, self.request_id)


_nowhere: "memoryview[int]" = memoryview(bytearray(SLOT_BYTES)).cast("Q")


class SlotTable:
    """The file of slots of a living process."""

    def __init__(self, descriptor: int, slots_max: int) -> None:
        """Use `create`."""
        self.descriptor = descriptor
        self.slots_max = slots_max
        self._map = mmap.mmap(descriptor, slots_max * SLOT_BYTES)
        self._words = memoryview(self._map).cast("Q")
        # Taken from the end: the slots in use stay on few pages.
        self._free = list(range(slots_max - 1, -1, -1))
        self._taken: dict[UUID, Slot] = {}

    @classmethod
    def create(cls, path: Path, slots_max: int) -> "SlotTable":
        """Make a file of free slots and put it in the place of an older one, as the last step. Raises `OSError`.

        The zeros are written and synced, not left as a hole: a store into a hole on a full disk is a SIGBUS.
        """
        temporary = path.with_name(path.name + ".new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            rest = bytes(slots_max * SLOT_BYTES)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
            table = cls(descriptor, slots_max)
            temporary.replace(path)
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        return table

    def take(self, request_id: UUID) -> Slot | NoSlot:
        """A free slot. Raises `ValueError` for an id that has one, or that is half zero (no UUIDv7 is)."""
        if request_id in self._taken or not request_id.int >> 64 or not request_id.int & _LOWER_HALF:
            raise ValueError(f"{request_id} cannot have a slot")
        if not self._free:
            return NoSlot(self.slots_max)
        number = self._free.pop()
        at = number * _WORDS
        slot = self._taken[request_id] = Slot(self, number, self._words[at : at + _WORDS], request_id)
        return slot

    def taken(self, request_id: UUID) -> Slot | None:
        """The slot of a request that has one."""
        return self._taken.get(request_id)

    def freed(self, number: int, request_id: UUID) -> None:
        """For `Slot.free` alone."""
        del self._taken[request_id]
        self._free.append(number)

    def close(self) -> None:
        """Let go of the file. The slots stay as they are: what is live now is unfinished."""
        self._taken.clear()
        self._free.clear()
        self._words.release()
        # A slot that somebody still has keeps the map alive; the last one to go takes it along.
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.descriptor)


def read_slots(data: bytes) -> tuple[list[tuple[UUID, Progress]], int]:
    """The taken slots in a file's bytes, and how many places hold what nobody writes. Never raises."""
    found: list[tuple[UUID, Progress]] = []
    whole = len(data) - len(data) % SLOT_BYTES
    bad = int(whole != len(data))
    for words in _slot_words.iter_unpack(data[:whole]):
        if not words[_ID_UPPER] or not words[_ID_LOWER]:
            continue
        flags = words[_FLAGS] ^ _MARK
        counts = words[_OUTPUT], words[_REASONING], words[_CHUNKS]
        if flags & ~(_SENT | _FIRST_BYTE) or max(counts) > COUNT_MAX or any(words[_FLAGS + 1 :]):
            bad += 1
            continue
        progress = Progress(
            output=counts[0],
            reasoning=counts[1],
            chunks=counts[2],
            sent=bool(flags & _SENT),
            first_byte=bool(flags & _FIRST_BYTE),
        )
        found.append((UUID(int=words[_ID_UPPER] << 64 | words[_ID_LOWER]), progress))
    return found, bad
