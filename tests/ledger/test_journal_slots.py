import copy
import sys
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.journal import NoSlot, Progress, Slot
from behest_ledger.journal.slots import SLOT_BYTES, SlotTable, read_slots

FIRST = UUID("01998000-0000-7000-8000-000000000001")
SECOND = UUID("01998000-0000-7000-8000-000000000002")


def table_at(folder: Path, slots_max: int = 4) -> SlotTable:
    return SlotTable.create(folder / "slots", slots_max)


def taken(table: SlotTable, request_id: UUID) -> Slot:
    slot = table.take(request_id)
    assert isinstance(slot, Slot)
    return slot


def on_disk(folder: Path) -> tuple[dict[UUID, Progress], int]:
    found, bad = read_slots((folder / "slots").read_bytes())
    return dict(found), bad


def test_a_store_is_in_the_file_at_once(tmp_path: Path) -> None:
    table = table_at(tmp_path)
    slot = taken(table, FIRST)
    assert on_disk(tmp_path) == ({FIRST: Progress()}, 0)
    slot.mark_sent()
    slot.store(7, 3, 2)
    assert on_disk(tmp_path) == ({FIRST: Progress(output=7, reasoning=3, chunks=2, sent=True)}, 0)
    slot.mark_first_byte()
    slot.store(2**33, 4, 3)
    assert on_disk(tmp_path)[0] == {FIRST: Progress(output=2**33, reasoning=4, chunks=3, sent=True, first_byte=True)}
    table.close()


def test_a_freed_slot_is_empty_and_its_last_owner_writes_nowhere(tmp_path: Path) -> None:
    table = table_at(tmp_path, slots_max=1)
    old = taken(table, FIRST)
    old.store(100, 0, 9)
    old.free()
    assert on_disk(tmp_path) == ({}, 0)
    new = taken(table, SECOND)
    old.store(200, 0, 10)
    old.mark_sent()
    old.free()
    assert on_disk(tmp_path) == ({SECOND: Progress()}, 0)
    assert table.taken(SECOND) is new
    table.close()


def test_where_all_slots_are_taken_the_answer_is_no_slot(tmp_path: Path) -> None:
    table = table_at(tmp_path, slots_max=1)
    slot = taken(table, FIRST)
    refusal = table.take(SECOND)
    assert refusal == NoSlot(1)
    assert not refusal
    slot.free()
    assert table.take(SECOND)
    table.close()


@pytest.mark.parametrize("request_id", [FIRST, UUID(int=0), UUID(int=1), UUID(int=1 << 64)])
def test_an_id_has_one_slot_and_no_id_looks_like_a_free_slot(tmp_path: Path, request_id: UUID) -> None:
    table = table_at(tmp_path)
    taken(table, FIRST)
    with pytest.raises(ValueError, match="cannot have a slot"):
        table.take(request_id)
    table.close()


def test_a_slot_that_outlives_its_table_does_no_harm(tmp_path: Path) -> None:
    table = table_at(tmp_path)
    slot = taken(table, FIRST)
    table.close()
    slot.store(1, 2, 3)


def test_the_file_is_for_its_owner_alone_and_has_no_holes(tmp_path: Path) -> None:
    table = table_at(tmp_path, slots_max=100)
    status = (tmp_path / "slots").stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_blocks * 512 >= status.st_size == 100 * SLOT_BYTES
    table.close()


class Killed(BaseException):
    pass


class Tape(list[int]):
    """Words of a slot that stop to take stores after some: every store is one word, and a kill is between two."""

    def __init__(self, stores: int) -> None:
        super().__init__([0] * (SLOT_BYTES // 8))
        self.stores = stores

    def __setitem__(self, at: Any, value: Any) -> None:
        if self.stores == 0:
            raise Killed
        self.stores -= 1
        super().__setitem__(at, value)

    def image(self) -> bytes:
        return b"".join(word.to_bytes(8, sys.byteorder) for word in self)


def lives_of_two_requests(tape: Tape, seen: list[tuple[UUID | None, Progress]]) -> None:
    """Two requests, one after the other, in one slot. `seen` gets what a client has and the reader must know."""

    class Table:
        def freed(self, number: int, request_id: UUID) -> None: ...

    for request_id, base in ((FIRST, 255), (SECOND, 1)):
        seen.append((None, Progress()))
        slot = Slot(cast(Any, Table()), 0, cast(Any, tape), request_id)
        seen.append((request_id, Progress()))
        slot.mark_sent()
        seen.append((request_id, Progress(sent=True)))
        slot.mark_first_byte()
        for chunk in (1, 2):
            progress = Progress(output=base * chunk, reasoning=chunk * 3, chunks=chunk, sent=True, first_byte=True)
            slot.store(progress.output, progress.reasoning, progress.chunks)
            seen.append((request_id, progress))
        slot.free()
    seen.append((None, Progress()))


def test_a_kill_between_any_two_stores_leaves_nothing_false() -> None:
    whole: list[tuple[UUID | None, Progress]] = []
    tape = Tape(10_000)
    lives_of_two_requests(tape, whole)
    stores = 10_000 - tape.stores
    assert stores > 30
    for kill_after in range(stores):
        tape, seen = Tape(kill_after), list[tuple[UUID | None, Progress]]()
        with pytest.raises(Killed):
            lives_of_two_requests(tape, seen)
        found, bad = read_slots(tape.image())
        assert bad == 0
        now, following = seen[-1], whole[len(seen)]
        for request_id, progress in found:
            # Between what was last told and what was about to be told, in every number.
            assert request_id in (now[0], following[0])
            before = now[1] if now[0] == request_id else Progress()
            after = following[1] if following[0] == request_id else before
            assert progress == progress.joined(before)
            assert after == after.joined(progress)
        if not found:
            assert now[0] is None or following[0] is None


def test_a_file_cut_at_any_byte_loses_the_slots_behind_the_cut(tmp_path: Path) -> None:
    table = table_at(tmp_path)
    for number, request_id in enumerate((FIRST, SECOND)):
        taken(table, request_id).store(number + 1, 0, 1)
    table.close()
    data = (tmp_path / "slots").read_bytes()
    whole, _ = read_slots(data)
    for cut in range(len(data)):
        found, bad = read_slots(data[:cut])
        assert found == whole[: cut // SLOT_BYTES]
        assert bad == bool(cut % SLOT_BYTES)


@given(st.binary(max_size=SLOT_BYTES * 4))
def test_rubbish_is_counted_and_never_believed(data: bytes) -> None:
    found, bad = read_slots(data)
    assert found == []
    places = [data[at : at + SLOT_BYTES] for at in range(0, len(data), SLOT_BYTES)]
    assert bad == sum(len(place) < SLOT_BYTES or (any(place[:8]) and any(place[8:16])) for place in places)


def test_impossible_counts_are_not_believed() -> None:
    tape = Tape(10_000)
    Slot(cast(Any, None), 0, cast(Any, tape), FIRST)
    assert read_slots(tape.image())[1] == 0
    for word in (2, 3, 4, 5, 6, 7):
        wrong = copy.copy(tape)
        wrong[word] ^= 1 << 50
        assert read_slots(wrong.image()) == ([], 1)
