"""A journal in memory: it survives the kill of its process, and a lost node takes it along."""

from collections.abc import Sequence
from uuid import UUID

from behest_ledger.journal import Acknowledged, Carried, Ended, Extended, JournalError, NoSlot, Record, Slot, Unfinished
from behest_ledger.journal.history import History
from behest_ledger.journal.slots import read_slots
from behest_proxy.app.memory import Memory
from simulation.world import Process

SLOTS_MAX = 64
_BYTES = 64


class Disk:
    """What stays of a process: its records, and its slots as the kernel has them."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.slots: dict[UUID, bytearray] = {}
        self.is_full = False


class _Slot(Slot):
    """A slot whose process may be killed right after a store."""

    __slots__ = ("process",)
    process: Process

    def store(self, output: int, reasoning: int, chunks: int) -> None:
        super().store(output, reasoning, chunks)
        self.process.boundary()

    def mark_sent(self) -> None:
        super().mark_sent()
        self.process.boundary()


class MemoryJournal:
    """The journal's promises without its files. What counts for what is the real `History`, `Slot` and `records`."""

    def __init__(self, disk: Disk, process: Process) -> None:
        self._disk = disk
        self._process = process
        self._taken: dict[UUID, Slot] = {}
        history = History()
        for record in disk.records:
            history.add(record)
        for request_id, progress in read_slots(b"".join(disk.slots.values()))[0]:
            history.add_slot(request_id, progress)
        self._left = {one.request_id: one for one in history.unfinished()}
        self._live = set(self._left)
        disk.slots.clear()
        disk.records[:] = [record for one in self._left.values() for record in _records_of(one)]

    def slot(self, request_id: UUID) -> Slot | NoSlot:
        """See `Journal`."""
        if len(self._taken) >= SLOTS_MAX:
            return NoSlot(SLOTS_MAX)
        data = self._disk.slots[request_id] = bytearray(_BYTES)
        slot = _Slot(self, 0, memoryview(data).cast("Q"), request_id)  # type: ignore[arg-type]
        slot.process = self._process
        self._taken[request_id] = slot
        return slot

    def freed(self, _number: int, request_id: UUID) -> None:
        """For `Slot.free`."""
        del self._taken[request_id]
        del self._disk.slots[request_id]

    def append(self, record: Record) -> None:
        """See `Journal`."""
        self._process.boundary()
        request_id = record.request_id
        try:
            if self._disk.is_full:
                raise JournalError("the disk is full")
            if request_id in self._live or not isinstance(record, (Acknowledged, Extended)):
                self._disk.records.append(record)
                self._live.add(request_id)
        finally:
            if isinstance(record, Acknowledged):
                self._finish(request_id)
        self._process.boundary()

    def _finish(self, request_id: UUID) -> None:
        slot = self._taken.get(request_id)
        if slot is not None:
            slot.free()
        self._left.pop(request_id, None)
        self._live.discard(request_id)

    def unfinished(self) -> list[Unfinished]:
        """See `Journal`."""
        return list(self._left.values())

    def sync(self) -> None:
        """See `Journal`. In memory everything is as durable as can be."""

    def probe(self) -> bool:
        """See `Journal`."""
        return not self._disk.is_full

    def close(self) -> None:
        """See `Journal`."""


class SimulatedMemory(Memory):
    """The sidecar's memory on a journal in memory."""

    def __init__(self, disk: Disk, process: Process) -> None:
        self._journal = MemoryJournal(disk, process)  # type: ignore[assignment]


def _records_of(one: Unfinished) -> Sequence[Record]:
    records: list[Record] = []
    if one.admitted is not None:
        records.append(one.admitted)
    if one.granted_tokens:
        records.append(Extended(request_id=one.request_id, granted_tokens=one.granted_tokens))
    if one.progress is not None:
        records.append(Carried(request_id=one.request_id, progress=one.progress))
    if one.settlement is not None:
        records.append(Ended(settlement=one.settlement))
    return records
