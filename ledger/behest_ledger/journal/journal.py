"""The journal of one process: what it must remember of its requests across a kill.

Not for several threads, except `sync`.
"""

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Self
from uuid import UUID

from behest_ledger.journal import records
from behest_ledger.journal.errors import JournalError
from behest_ledger.journal.folder import JournalFolder
from behest_ledger.journal.frames import Damage, payloads
from behest_ledger.journal.history import History, Unfinished
from behest_ledger.journal.records import Acknowledged, Admitted, Carried, Ended, Extended, Record
from behest_ledger.journal.segments import Segments
from behest_ledger.journal.slots import NoSlot, Slot, SlotTable, read_slots

logger = logging.getLogger(__name__)

SEGMENTS_KEPT = 2
"""Closed segments that are left to finish by themselves; what is live in older ones is carried over."""

_BEGINNINGS = (Admitted, Ended)
"""A request is live from one of these on."""


class _Live:
    """The frames of a request that is not finished, as they would be written again."""

    __slots__ = ("admitted", "carried", "ended", "extended", "segment")

    def __init__(self, segment: int) -> None:
        self.segment = segment
        """The oldest segment that has a frame of it."""
        self.admitted = b""
        self.extended = b""
        self.carried = b""
        self.ended = b""

    def keep(self, record: Record, frame: bytes) -> None:
        match record:
            case Admitted():
                self.admitted = frame
            case Extended():
                self.extended = frame
            case Carried():
                self.carried = frame
            case Ended():
                self.ended = frame
            case Acknowledged():
                pass

    def frames(self) -> bytes:
        return b"".join((self.admitted, self.extended, self.carried, self.ended))


class Journal:
    """See the package for what it promises, and in which order its caller does things."""

    def __init__(self, folder: JournalFolder, *, slots_max: int, segment_bytes_max: int, segments_max: int) -> None:
        """Use `open`."""
        self.damage = Damage()
        """What of an earlier life could not be used."""
        self._folder = folder
        self._slots_max = slots_max
        self._segment_bytes_max = segment_bytes_max
        self._segments_max = segments_max
        self._segments = Segments(folder)
        self._table: SlotTable | None = None
        self._live: dict[UUID, _Live] = {}
        self._pins: dict[int, dict[UUID, None]] = {}
        """Per segment, ascending: the requests whose oldest frame it has. The last one is written to."""
        self._last_number = 0
        self._left: dict[UUID, Unfinished] = {}
        self._carry_credit_bytes = 0
        """How much may be carried over: what is not used at once is saved up for a larger request."""
        self._closed = False

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        slots_max: int = 4096,
        segment_bytes_max: int = 8 * 1024 * 1024,
        segments_max: int = 64,
    ) -> "Journal":
        """Lock the folder, read what an earlier life left, and begin.

        Where the disk is full what was left can still be read and acknowledged, and `writable` is False. Raises
        `JournalLockedError`, and `JournalError` for a folder that cannot be used or read.
        """
        if slots_max < 1 or segment_bytes_max < 1 or segments_max < SEGMENTS_KEPT + 2:
            raise ValueError("a journal needs a slot, a byte and four segments")
        held = JournalFolder.open(folder)
        journal = cls(held, slots_max=slots_max, segment_bytes_max=segment_bytes_max, segments_max=segments_max)
        try:
            journal._replay()
        except OSError as error:
            held.close()
            raise JournalError(f"the journal {folder} cannot be read: {error.strerror}") from error
        if held.moved_aside is not None:
            logger.warning("another version's journal was put aside, unread: %s", held.moved_aside)
        if journal.damage:
            logger.warning("not all of the journal %s could be used: %s", folder, journal.damage)
        try:
            journal._begin()
        except JournalError as error:
            logger.warning("the journal cannot be written yet: %s", error)
        return journal

    def close(self) -> None:
        """Sync and let go. What is live stays unfinished. Repeating it does nothing."""
        if self._closed:
            return
        try:
            self.sync()
        except JournalError as error:
            logger.warning("at the end: %s", error)
        self._closed = True
        self._segments.close()
        if self._table is not None:
            self._table.close()
            self._table = None
        self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what is written ---------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """The last write and the last sync worked. False: admit nothing; `probe` finds out when it is over."""
        segments = self._segments
        return segments.is_open and not segments.write_failed and not segments.sync_failed

    def append(self, record: Record) -> None:
        """Hand a record to the kernel: from here on it survives a kill of this process.

        Raises `JournalError`; then the record is not there, and nothing else is lost. `Acknowledged` finishes the
        request in any case, and frees its slot: at worst its settlement is found again and sent once more, which
        moves nothing in the books.
        """
        request_id = record.request_id
        live = self._live.get(request_id)
        if live is None and not isinstance(record, _BEGINNINGS):
            if isinstance(record, Acknowledged):
                self._finish(request_id)
            return  # nothing here needs it
        frame = records.encode(record)
        if isinstance(record, Acknowledged):
            try:
                self._write(frame, request_id)
            finally:
                self._finish(request_id)
            return
        self._write(frame, request_id)
        if live is None:
            number = self._last_number
            live = self._live[request_id] = _Live(number)
            self._pins[number][request_id] = None
        live.keep(record, frame)

    def probe(self) -> bool:
        """Whether it is writable, tried where it was not. Call it now and then while it is not."""
        if not self.writable:
            with contextlib.suppress(JournalError):
                self._write(records.PAD, None)
        return self.writable

    def sync(self) -> None:
        """Make durable what was written so far, slots too, and remove finished segments.

        It waits for the disk: call it once a second, in a thread. Raises `JournalError`.
        """
        if self._closed:
            return
        table = self._table
        self._segments.sync(also=None if table is None else table.descriptor)

    def slot(self, request_id: UUID) -> Slot | NoSlot:
        """A place for what changes with every read. Take it before `Admitted` is written.

        `NoSlot`: refuse the admission. Raises `ValueError` for an id that has a slot already.
        """
        if self._table is None:
            return NoSlot(0)
        return self._table.take(request_id)

    def put_aside(self, request_id: UUID) -> None:
        """The books refuse the settlement of a request that has ended: its slot is free, and its records stay.

        They are what the next life finds unfinished, and sends again.
        """
        slot = None if self._table is None else self._table.taken(request_id)
        if slot is not None:
            slot.free()

    # --- what was left -----------------------------------------------------------------------------------------

    def unfinished(self) -> list[Unfinished]:
        """What an earlier life left and nobody has acknowledged yet, the oldest first: see `recovery`."""
        return list(self._left.values())

    @property
    def moved_aside(self) -> Path | None:
        """Where the files of another version, which were found here, are now."""
        return self._folder.moved_aside

    def _replay(self) -> None:
        history = History()
        for number in self._folder.segments():
            self._last_number = number
            self._pins[number] = {}
            for payload in payloads(self._folder.segment(number).read_bytes(), self.damage):
                record = records.decode(payload)
                if record is not None:
                    history.add(record)
                elif not records.is_padding(payload):
                    self.damage.unknown_records += 1
        with contextlib.suppress(FileNotFoundError):
            slots, self.damage.slots = read_slots(self._folder.slots.read_bytes())
            for request_id, progress in slots:
                history.add_slot(request_id, progress)
        self.damage.orphans = history.orphans
        self.damage.regions += self._folder.format_damaged
        for one in history.unfinished():
            self._left[one.request_id] = one
            live = self._live[one.request_id] = _Live(self._last_number)
            for record in _records_of(one):
                live.keep(record, records.encode(record))

    # --- segments ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Write all that is live into a new segment, durably; then nothing older is needed.

        In an order that may end anywhere: until the new segment is durable the old ones and the old slots stay, and
        what is found twice counts once.
        """
        if self._closed:
            raise JournalError("the journal is closed")
        self._last_number += 1
        number = self._last_number
        older = list(self._pins)
        self._segments.close()  # also after a failed sync: what is written here replaces it
        try:
            self._segments.begin(number)
            carried = b"".join(live.frames() for live in self._live.values())
            if carried:
                self._segments.write(carried)
            self._segments.sync_failed = False  # not before: until then the thread's sync may remove nothing
            self._segments.sync()
            if self._table is None:
                self._table = SlotTable.create(self._folder.slots, self._slots_max)
        except (JournalError, OSError) as error:
            self._segments.abandon(number)
            self._segments.write_failed = True
            raise JournalError(f"the journal {self._folder.path} cannot be written: {error}") from error
        self._pins = {number: dict.fromkeys(self._live)}
        for live in self._live.values():
            live.segment = number
        for old in older:
            self._segments.drop(old)
        self._segments.write_failed = False
        with contextlib.suppress(JournalError):  # it only removes them; the next sync tries again
            self._segments.sync()

    def _write(self, frame: bytes, request_id: UUID | None) -> None:
        """Write the frame of a request, and carry over a little of what others have in old segments."""
        segments = self._segments
        if segments.sync_failed or not segments.is_open:
            self._begin()
        moved: list[UUID] = []
        if len(self._pins) > SEGMENTS_KEPT + 1:
            frame, moved = self._with_carried(frame, request_id)
        size_bytes = segments.size_bytes
        if size_bytes and size_bytes + len(frame) > self._segment_bytes_max:
            self._rotate()
        segments.write(frame)
        if moved:
            for one in moved:
                live = self._live[one]
                del self._pins[live.segment][one]
                live.segment = self._last_number
                self._pins[self._last_number][one] = None
            self._collect()

    def _rotate(self) -> None:
        """Begin the next segment, and empty old ones into it where they do not become empty by themselves."""
        if len(self._pins) + self._segments.dropped >= self._segments_max:
            self._segments.sync()  # removes what is dropped; otherwise the thread's work
            if len(self._pins) >= self._segments_max:
                self._segments.write_failed = True
                raise JournalError(f"the journal {self._folder.path} is full: {self._segments_max} segments are in use")
        self._segments.begin(self._last_number + 1)
        self._last_number += 1
        self._pins[self._last_number] = {}
        self._collect()

    def _with_carried(self, frame: bytes, request_id: UUID | None) -> tuple[bytes, list[UUID]]:
        """A frame with frames of other requests out of the oldest segment: in all no more than were written new.

        A little with each record, because all at once the streams would stand still meanwhile.
        """
        self._carry_credit_bytes += len(frame)
        frames = [frame]
        moved: list[UUID] = []
        for one in self._pins[next(iter(self._pins))]:
            if one == request_id:
                continue
            carried = self._live[one].frames()
            if len(carried) > self._carry_credit_bytes:
                break
            self._carry_credit_bytes -= len(carried)
            frames.append(carried)
            moved.append(one)
        else:
            self._carry_credit_bytes = 0
        return b"".join(frames), moved

    def _finish(self, request_id: UUID) -> None:
        slot = None if self._table is None else self._table.taken(request_id)
        if slot is not None:
            slot.free()
        self._left.pop(request_id, None)
        live = self._live.pop(request_id, None)
        if live is not None:
            pins = self._pins.get(live.segment)
            if pins is not None:
                pins.pop(request_id, None)
            self._collect()

    def _collect(self) -> None:
        """Drop the oldest segments as far as they are finished: never one before an older one."""
        if not self._segments.is_open:
            return
        while len(self._pins) > 1:
            oldest = next(iter(self._pins))
            if self._pins[oldest]:
                return
            del self._pins[oldest]
            self._segments.drop(oldest)


def _records_of(unfinished: Unfinished) -> Iterable[Record]:
    if unfinished.admitted is not None:
        yield unfinished.admitted
    if unfinished.granted_tokens:
        yield Extended(request_id=unfinished.request_id, granted_tokens=unfinished.granted_tokens)
    if unfinished.progress is not None:
        yield Carried(request_id=unfinished.request_id, progress=unfinished.progress)
    if unfinished.settlement is not None:
        yield Ended(settlement=unfinished.settlement)
