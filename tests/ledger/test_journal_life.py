"""The journal against a model of it, with kills at any moment: a kill is a copy of the folder as it is."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from behest_ledger.charging import Outcome
from behest_ledger.holds import void
from behest_ledger.journal import (
    Acknowledged,
    Admitted,
    Damage,
    Ended,
    Extended,
    Journal,
    JournalError,
    Progress,
    Record,
    Slot,
    Unfinished,
)
from behest_ledger.journal.frames import payloads
from behest_ledger.journal.history import History
from behest_ledger.journal.records import decode, encode
from behest_ledger.journal.slots import read_slots
from behest_ledger.token_counts import TOKEN_CLASSES, TokenCounts

SLOTS_MAX = 5


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost with the power is not the matter here."""

    def nothing(descriptor: int) -> None: ...

    monkeypatch.setattr("behest_ledger.journal.segments.sync_data", nothing)
    monkeypatch.setattr(os, "fsync", nothing)


def an_id(number: int) -> UUID:
    return UUID(int=(0x01998000_0000_7000 << 64) + (1 << 63) + number)


def admitted(request_id: UUID) -> Admitted:
    return Admitted(
        tenant_id="shop",
        request_id=request_id,
        holder_id=UUID(int=7),
        input_counts=TokenCounts(input=12),
        rates=dict.fromkeys(TOKEN_CLASSES, 5),
        request_fee_pico=0,
        price_key="book-1/openai/gpt-4o",
        attributes={"project": "shop/cart"},
    )


def ended(request_id: UUID) -> Ended:
    return Ended(settlement=void("shop", request_id, Outcome.COMPLETED))


def copied(folder: Path) -> Path:
    """The folder as a kill at this moment leaves it. Stores in memory maps are in it: the kernel has them."""
    copy = Path(tempfile.mkdtemp(dir=folder.parent))
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    return copy


def remains(folder: Path) -> tuple[list[Unfinished], Damage]:
    """What the files say, read without touching them."""
    history, damage = History(), Damage()
    for file in sorted(folder.glob("*.records")):
        for payload in payloads(file.read_bytes(), damage):
            record = decode(payload)
            assert record is not None
            history.add(record)
    if (folder / "slots").exists():
        found, damage.slots = read_slots((folder / "slots").read_bytes())
        for request_id, progress in found:
            history.add_slot(request_id, progress)
    return history.unfinished(), damage


class Life(RuleBasedStateMachine):
    live: Bundle[UUID] = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="behest-journal-"))
        self.folder = self.root / "journal"
        self.model: dict[UUID, Unfinished] = {}
        self.slots: dict[UUID, Slot] = {}
        self.numbers = 0
        self.journal = self.opened()

    def opened(self) -> Journal:
        return Journal.open(self.folder, slots_max=SLOTS_MAX, segment_bytes_max=3000, segments_max=40)

    def change(self, request_id: UUID, **changes: Any) -> None:
        self.model[request_id] = msgspec.structs.replace(self.model[request_id], **changes)

    def went(self, request_id: UUID, **changes: Any) -> None:
        progress = self.model[request_id].progress or Progress()
        self.change(request_id, progress=msgspec.structs.replace(progress, **changes))

    @rule(target=live)
    def admit(self) -> Any:
        self.numbers += 1
        request_id = an_id(self.numbers)
        slot = self.journal.slot(request_id)
        assert bool(slot) == (len(self.slots) < SLOTS_MAX)
        if isinstance(slot, Slot):
            self.slots[request_id] = slot
            self.model[request_id] = Unfinished(request_id=request_id, progress=Progress())
        else:
            self.model[request_id] = Unfinished(request_id=request_id)  # no caller does that; the journal can
        record = admitted(request_id)
        self.journal.append(record)
        self.change(request_id, admitted=record)
        return request_id

    @rule(request_id=live, tokens=st.integers(1, 1000))
    def extend(self, request_id: UUID, tokens: int) -> None:
        total = self.model[request_id].granted_tokens + tokens
        self.journal.append(Extended(request_id=request_id, granted_tokens=total))
        self.change(request_id, granted_tokens=total)

    @rule(request_id=live, output=st.integers(0, 1000), reasoning=st.integers(0, 1000))
    def store(self, request_id: UUID, output: int, reasoning: int) -> None:
        slot = self.slots.get(request_id)
        if slot is not None:
            before = self.model[request_id].progress or Progress()
            slot.store(before.output + output, before.reasoning + reasoning, before.chunks + 1)
            self.went(
                request_id,
                output=before.output + output,
                reasoning=before.reasoning + reasoning,
                chunks=before.chunks + 1,
            )

    @rule(request_id=live)
    def mark(self, request_id: UUID) -> None:
        slot = self.slots.get(request_id)
        if slot is not None:
            slot.mark_sent()
            slot.mark_first_byte()
            self.went(request_id, sent=True, first_byte=True)

    @rule(request_id=live)
    def end(self, request_id: UUID) -> None:
        self.journal.append(ended(request_id))
        self.change(request_id, settlement=ended(request_id).settlement)

    @rule(request_id=consumes(live), again=st.booleans())
    def acknowledge(self, request_id: UUID, again: bool) -> None:
        for _ in range(1 + again):
            self.journal.append(Acknowledged(request_id=request_id))
        del self.model[request_id]
        self.slots.pop(request_id, None)

    @rule()
    def sync(self) -> None:
        self.journal.sync()

    @rule()
    def probe(self) -> None:
        assert self.journal.probe()

    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.reborn()

    @rule()
    def kill(self) -> None:
        copy = copied(self.folder)
        self.journal.close()
        self.folder = copy
        self.reborn()

    def reborn(self) -> None:
        self.journal = self.opened()
        self.slots.clear()
        assert not self.journal.damage
        assert self.journal.unfinished() == self.expected()

    def expected(self) -> list[Unfinished]:
        return sorted(self.model.values(), key=lambda one: one.request_id)

    @invariant()
    def a_kill_now_would_lose_nothing(self) -> None:
        assert remains(self.folder) == (self.expected(), Damage())

    @invariant()
    def all_is_well(self) -> None:
        assert self.journal.writable
        assert len(list(self.folder.glob("*.records"))) <= 40

    def teardown(self) -> None:
        self.journal.close()
        shutil.rmtree(self.root)


def test_any_life_of_a_journal_is_like_its_model() -> None:
    run_state_machine_as_test(Life, settings=settings(max_examples=30, stateful_step_count=60, deadline=None))


class Killed(BaseException):
    """From here on nothing this process does has any effect."""


CALLS = ("write", "open", "ftruncate", "replace", "rename", "unlink", "fsync", "mkdir", "dup")


class Kill:
    """Ends the calls of the system from the given one on, and keeps the folder as it was then.

    As it was then, because unlike a kill an exception lets `finally` run.
    """

    def __init__(self, folder: Path, call: int) -> None:
        self.folder = folder
        self.call = call
        self.left: dict[str, bytes] | None = None
        self._calls = 0
        self._opened: list[int] = []

    def look(self) -> None:
        if self.left is None:
            self.left = {file.name: file.read_bytes() for file in self.folder.iterdir()} if self.folder.exists() else {}

    def remains_at(self, folder: Path) -> Path:
        self.look()
        folder.mkdir()
        for name, data in (self.left or {}).items():
            (folder / name).write_bytes(data)
        return folder

    @contextlib.contextmanager
    def armed(self, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name in CALLS:
                patch.setattr(os, name, self._cut(name, getattr(os, name)))
            yield
        for descriptor in self._opened:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _cut(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            self._calls += 1
            if self._calls >= self.call:
                if name == "write" and self._calls == self.call:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])  # the most that a kill can tear
                self.look()
                raise Killed
            result = real(*arguments, **options)
            if name in ("open", "dup"):
                self._opened.append(result)
            return result

        return called


def test_a_kill_at_any_system_call_of_opening_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tmp_path / "first"
    with Journal.open(first, slots_max=4, segment_bytes_max=700) as journal:
        for number in range(6):
            slot = journal.slot(an_id(number))
            journal.append(admitted(an_id(number)))
            if isinstance(slot, Slot):
                slot.store(number, 1, 1)
        journal.append(ended(an_id(2)))
        journal.append(Acknowledged(request_id=an_id(3)))
    expected, _ = remains(first)
    assert [one.request_id for one in expected] == [an_id(number) for number in (0, 1, 2, 4, 5)]
    for call in range(1, 100):
        folder = tmp_path / f"killed-{call}"
        shutil.copytree(first, folder)
        kill = Kill(folder, call)
        with kill.armed(monkeypatch):
            Journal.open(folder)
        died = kill.left is not None
        with Journal.open(kill.remains_at(tmp_path / f"left-{call}")) as journal:
            assert journal.unfinished() == expected
        if not died:
            assert call > 10
            break
    else:
        pytest.fail("it never came to an end")


def test_a_kill_at_any_system_call_of_a_life_loses_at_most_what_it_was_about_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def life(journal: Journal) -> Iterator[dict[UUID, Unfinished]]:
        """Yields what has to be known before and after every step."""
        known: dict[UUID, Unfinished] = {}
        for number in range(12):
            request_id = an_id(number)
            slot = journal.slot(request_id)
            assert isinstance(slot, Slot)
            journal.append(admitted(request_id))
            known[request_id] = Unfinished(request_id=request_id, admitted=admitted(request_id), progress=Progress())
            yield dict(known)
            slot.store(number, 0, 1)
            progress = Progress(output=number, chunks=1)
            known[request_id] = msgspec.structs.replace(known[request_id], progress=progress)
            yield dict(known)
            journal.append(ended(request_id))
            settlement = ended(request_id).settlement
            known[request_id] = msgspec.structs.replace(known[request_id], settlement=settlement)
            yield dict(known)
            if number % 3:
                del known[request_id]
                journal.append(Acknowledged(request_id=request_id))
                yield dict(known)
            if number % 4 == 3:
                journal.sync()
                yield dict(known)

    def values(known: dict[UUID, Unfinished]) -> list[Unfinished]:
        return sorted(known.values(), key=lambda one: one.request_id)

    with Journal.open(tmp_path / "whole", segment_bytes_max=1200) as journal:
        states = [values({}), *(values(known) for known in life(journal))]
    for call in range(1, 400):
        folder = tmp_path / f"killed-{call}"
        journal = Journal.open(folder, slots_max=16, segment_bytes_max=1200)
        steps = 0
        kill = Kill(folder, call)
        with kill.armed(monkeypatch):
            for _ in life(journal):
                steps += 1
        found, damage = remains(kill.remains_at(tmp_path / f"left-{call}"))
        assert found in states[steps : steps + 2]
        assert damage.regions <= 1
        with contextlib.suppress(OSError):
            journal.close()
        if steps == len(states) - 1:
            assert call > 40
            break
    else:
        pytest.fail("it never came to an end")


def size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.records"))


def test_a_request_that_lives_long_does_not_keep_the_segments_of_others(tmp_path: Path) -> None:
    segment_bytes = 8000
    with Journal.open(tmp_path, segment_bytes_max=segment_bytes, segments_max=8) as journal:
        long = [an_id(number) for number in range(10)]
        for request_id in long:
            journal.append(admitted(request_id))
            journal.append(Extended(request_id=request_id, granted_tokens=9))
        largest = 0
        for number in range(1000, 6000):
            journal.append(admitted(an_id(number)))
            journal.append(ended(an_id(number)))
            journal.append(Acknowledged(request_id=an_id(number)))
            if number % 10 == 0:
                journal.sync()
                largest = max(largest, size_bytes(tmp_path))
        assert largest <= 5 * segment_bytes
        found, damage = remains(tmp_path)
    assert [one.request_id for one in found] == long
    assert all(one.granted_tokens == 9 for one in found)
    assert not damage


def test_without_a_sync_the_number_of_files_is_bounded_all_the_same(tmp_path: Path) -> None:
    with Journal.open(tmp_path, segment_bytes_max=2000, segments_max=6) as journal:
        for number in range(500):
            journal.append(admitted(an_id(number)))
            journal.append(Acknowledged(request_id=an_id(number)))
            assert len(list(tmp_path.glob("*.records"))) <= 6
        assert journal.writable


def test_more_unfinished_requests_than_the_segments_hold_are_refused_until_some_finish(tmp_path: Path) -> None:
    with Journal.open(tmp_path, segment_bytes_max=2000, segments_max=6) as journal:
        taken, told = 0, ""
        while not told:
            try:
                journal.append(admitted(an_id(taken)))
                taken += 1
            except JournalError as error:
                told = str(error)
        assert told.endswith("is full: 6 segments are in use")
        assert not journal.writable
        assert not journal.probe()
        assert [one.request_id for one in remains(tmp_path)[0]] == [an_id(number) for number in range(taken)]
        assert size_bytes(tmp_path) <= 6 * 2000 + 1000
        for number in range(taken):
            with contextlib.suppress(JournalError):
                journal.append(Acknowledged(request_id=an_id(number)))
        assert journal.probe()
        journal.append(admitted(an_id(5000)))
    with Journal.open(tmp_path) as journal:
        assert an_id(5000) in [one.request_id for one in journal.unfinished()]


def test_records_in_any_order_and_more_than_once_say_the_same(tmp_path: Path) -> None:
    one, two, three = an_id(1), an_id(2), an_id(3)
    records: list[Record] = [
        Acknowledged(request_id=one),
        ended(one),
        admitted(one),
        Extended(request_id=two, granted_tokens=20),
        Extended(request_id=two, granted_tokens=10),
        admitted(two),
        admitted(two),
        ended(three),
    ]
    expected = [
        Unfinished(request_id=two, admitted=admitted(two), granted_tokens=20),
        Unfinished(request_id=three, settlement=ended(three).settlement),
    ]
    for turn, order in enumerate((records, records[::-1], records * 3)):
        folder = tmp_path / str(turn)
        folder.mkdir()
        (folder / "000000000004.records").write_bytes(b"".join(encode(record) for record in order))
        with Journal.open(folder) as journal:
            assert journal.unfinished() == expected
            assert journal.damage == Damage(regions=1)  # the missing format file


def test_slots_without_a_record_and_records_without_a_slot_are_told(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        journal.slot(an_id(1))
        journal.append(admitted(an_id(2)))
        journal.append(Extended(request_id=an_id(3), granted_tokens=4))
    with Journal.open(tmp_path) as journal:
        assert journal.damage == Damage(orphans=1)
        assert journal.unfinished() == [Unfinished(request_id=an_id(2), admitted=admitted(an_id(2)))]
        journal.append(Acknowledged(request_id=an_id(2)))
        assert journal.unfinished() == []
    with Journal.open(tmp_path) as journal:
        assert journal.damage == Damage()
        assert journal.unfinished() == []


def test_a_damaged_record_costs_only_itself(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        for number in range(3):
            journal.append(admitted(an_id(number)))
    (file,) = tmp_path.glob("*.records")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)
    with Journal.open(tmp_path) as journal:
        assert [one.request_id for one in journal.unfinished()] == [an_id(0), an_id(2)]
        assert (journal.damage.regions, journal.damage.bytes) == (1, len(data) // 3)


def test_slots_full_of_rubbish_cost_only_themselves(tmp_path: Path) -> None:
    with Journal.open(tmp_path, slots_max=2) as journal:
        for number in range(2):
            journal.slot(an_id(number))
            journal.append(admitted(an_id(number)))
    file = tmp_path / "slots"
    file.write_bytes(file.read_bytes()[:64] + b"\xff" * 70)
    with Journal.open(tmp_path) as journal:
        assert journal.damage.slots == 2
        assert [one.progress for one in journal.unfinished()] == [Progress(), None]


def test_what_the_books_refuse_frees_its_slot_and_is_found_again(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal", slots_max=1)
    refused, later = an_id(1), an_id(2)
    assert isinstance(journal.slot(refused), Slot)
    journal.append(admitted(refused))
    journal.append(ended(refused))
    journal.put_aside(refused)
    assert isinstance(journal.slot(later), Slot)
    journal.put_aside(an_id(3))  # nobody knows it: nothing happens
    journal.close()
    with Journal.open(tmp_path / "journal", slots_max=1) as again:
        assert [one.request_id for one in again.unfinished()] == [refused]
        assert again.unfinished()[0].settlement == ended(refused).settlement
