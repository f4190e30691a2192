"""The journal and the system below it: locks, modes, full disks, failing disks, other versions, and a real kill."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from behest_ledger.charging import Outcome
from behest_ledger.holds import void
from behest_ledger.journal import (
    Acknowledged,
    Admitted,
    Damage,
    Ended,
    Journal,
    JournalError,
    JournalLockedError,
    NoSlot,
    Progress,
    RecordRefusedError,
    Slot,
)
from behest_ledger.journal.folder import FORMAT
from behest_ledger.token_counts import TOKEN_CLASSES, TokenCounts


def an_id(number: int) -> UUID:
    return UUID(int=(0x01998000_0000_7000 << 64) + (1 << 63) + number)


def admitted(number: int) -> Admitted:
    return Admitted(
        tenant_id="shop",
        request_id=an_id(number),
        holder_id=UUID(int=7),
        input_counts=TokenCounts(input=12),
        rates=dict.fromkeys(TOKEN_CLASSES, 5),
        request_fee_pico=0,
        price_key="book-1/openai/gpt-4o",
        attributes={"project": "shop/cart"},
    )


def left(folder: Path) -> list[int]:
    """The numbers of the requests that are found unfinished."""
    with Journal.open(folder) as journal:
        return [one.request_id.int & 0xFFFF for one in journal.unfinished()]


def failing(real: Callable[..., Any], code: int, *, after_bytes: int | None = None) -> Callable[..., Any]:
    """A call of the system that fails, a write perhaps after a part of its data."""

    def call(*arguments: Any) -> Any:
        if after_bytes and len(arguments[1]) > after_bytes:
            return real(arguments[0], arguments[1][:after_bytes])
        raise OSError(code, os.strerror(code))

    return call


# --- locks, modes, formats -----------------------------------------------------------------------------------------


def test_a_second_process_is_told_which_folder_is_in_use(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from behest_ledger.journal import Journal, JournalLockedError\n"
        "try:\n    Journal.open(Path(sys.argv[1]))\n"
        "except JournalLockedError as error:\n    print(error.folder)\n    print(error)\n"
    )
    folder = tmp_path / "journal"
    with Journal.open(folder):
        ran = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
        assert ran.stdout.splitlines() == [str(folder), f"the journal {folder} is in use by another process"]
        with pytest.raises(JournalLockedError):
            Journal.open(folder)
    Journal.open(folder).close()


def test_everything_is_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "journal"
    with Journal.open(folder) as journal:
        journal.append(admitted(1))
    assert folder.stat().st_mode & 0o777 == 0o700
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["000000000001.records", "format", "lock", "slots"]
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("line", ["behest-journal 2 little\n", "behest-journal 1 big\n", "behest-journal 10"])
def test_another_versions_files_are_put_aside_whole_and_unread(tmp_path: Path, line: str) -> None:
    assert line != FORMAT
    with Journal.open(tmp_path) as journal:
        journal.append(admitted(1))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name not in ("format", "lock")}
    for turn in ("", "-2"):
        (tmp_path / "format").write_text(line)
        with Journal.open(tmp_path) as journal:
            assert journal.unfinished() == []
            assert not journal.damage
            aside = journal.moved_aside
            assert aside is not None
            assert aside == tmp_path / ("aside-" + line.split(maxsplit=1)[1].strip().replace(" ", "-") + turn)
        assert (aside / "format").read_text() == line
        if not turn:
            assert {name: (aside / name).read_bytes() for name in before} == before
    with Journal.open(tmp_path) as journal:
        assert journal.moved_aside is None


@pytest.mark.parametrize("line", [b"", b"\xff\0rubbish", b"behest-"])
def test_a_damaged_format_file_costs_no_records(tmp_path: Path, line: bytes) -> None:
    with Journal.open(tmp_path) as journal:
        journal.append(admitted(1))
    (tmp_path / "format").write_bytes(line)
    with Journal.open(tmp_path) as journal:
        assert journal.damage == Damage(regions=1)
        assert len(journal.unfinished()) == 1
    assert (tmp_path / "format").read_text() == FORMAT


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(JournalError, match=str(folder)):
            Journal.open(folder)


# --- full and failing disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_bytes", [None, 1, 100])
def test_a_full_disk_refuses_the_record_and_spoils_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_bytes: int | None
) -> None:
    with Journal.open(tmp_path) as journal:
        journal.append(admitted(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", failing(os.write, errno.ENOSPC, after_bytes=after_bytes))
            for _ in range(3):
                with pytest.raises(JournalError, match="No space left"):
                    journal.append(admitted(2))
                assert not journal.writable
                assert not journal.probe()
            slot = journal.slot(an_id(2))
            assert isinstance(slot, Slot)
            slot.store(1, 1, 1)
            slot.free()
        assert journal.probe()
        assert journal.writable
        journal.append(admitted(3))
    with Journal.open(tmp_path) as journal:
        assert not journal.damage
        assert [one.request_id for one in journal.unfinished()] == [an_id(1), an_id(3)]


def test_a_file_that_may_not_grow_is_like_a_full_disk(tmp_path: Path) -> None:
    with Journal.open(tmp_path, slots_max=1) as journal:
        journal.append(admitted(0))
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
        accepted, told = 1, ""
        try:
            while not told:
                try:
                    journal.append(admitted(accepted))
                    accepted += 1
                except JournalError as error:
                    told = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert "File too large" in told
        assert accepted > 2
    assert left(tmp_path) == list(range(accepted))


def test_what_is_acknowledged_on_a_full_disk_is_finished_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.open(tmp_path, slots_max=1) as journal:
        assert journal.slot(an_id(1))
        journal.append(admitted(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", failing(os.write, errno.ENOSPC))
            with pytest.raises(JournalError):
                journal.append(Acknowledged(request_id=an_id(1)))
        assert journal.slot(an_id(2))
    # At worst it is found once more, and sent to books that know it already.
    assert left(tmp_path) == [1]


def test_a_sidecar_that_starts_on_a_full_disk_still_knows_what_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.open(tmp_path) as journal:
        slot = journal.slot(an_id(1))
        assert isinstance(slot, Slot)
        journal.append(admitted(1))
        journal.append(admitted(2))
        slot.store(5, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing(os.write, errno.ENOSPC))
        journal = Journal.open(tmp_path)
        assert [one.request_id for one in journal.unfinished()] == [an_id(1), an_id(2)]
        assert not journal.writable
        assert journal.slot(an_id(3)) == NoSlot(0)
        with pytest.raises(JournalError):
            journal.append(admitted(3))
        with pytest.raises(JournalError):
            journal.append(Acknowledged(request_id=an_id(2)))
        journal.sync()
    assert journal.probe()
    assert journal.slot(an_id(3))
    journal.append(admitted(3))
    journal.close()
    with Journal.open(tmp_path) as journal:
        assert [(one.request_id, one.progress) for one in journal.unfinished()] == [
            (an_id(1), Progress(output=5, chunks=1)),
            (an_id(3), Progress()),
        ]


def test_what_a_failed_sync_may_have_lost_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal.open(tmp_path) as journal:
        journal.append(admitted(1))
        with monkeypatch.context() as patch:
            patch.setattr("behest_ledger.journal.segments.sync_data", failing(os.fsync, errno.EIO))
            with pytest.raises(JournalError, match="cannot sync"):
                journal.sync()
            assert not journal.writable
        # The next one would work, and nothing would be safe by that.
        with pytest.raises(JournalError, match="must be written again"):
            journal.sync()
        with monkeypatch.context() as patch:
            patch.setattr("behest_ledger.journal.segments.sync_data", failing(os.fsync, errno.EIO))
            assert not journal.probe()
        (lost,) = tmp_path.glob("*.records")
        lost.write_bytes(bytes(lost.stat().st_size))  # what the kernel may make of it
        assert journal.probe()
        assert [file.name for file in tmp_path.glob("*.records")] != [lost.name]
    assert left(tmp_path) == [1]


def test_a_segment_goes_only_once_what_was_carried_over_from_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.open(tmp_path, segment_bytes_max=2000) as journal:
        journal.append(admitted(0))
        journal.sync()
        first = tmp_path / "000000000001.records"
        for number in range(1, 60):
            journal.append(admitted(number))
            journal.append(Acknowledged(request_id=an_id(number)))
        assert first.exists()
        done: list[str] = []
        unlink = os.unlink

        def sync_data(descriptor: int) -> None:
            assert first.exists()
            done.append("synced")

        def removed(path: Any, **options: Any) -> None:
            done.append(Path(path).name)
            unlink(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr("behest_ledger.journal.segments.sync_data", sync_data)
            patch.setattr(os, "unlink", removed)
            journal.sync()
        removals = [name for name in done if name != "synced"]
        assert removals[0] == first.name
        assert done == ["synced"] * (len(done) - len(removals)) + sorted(removals)
    assert left(tmp_path) == [0]


def test_after_a_failed_sync_no_segment_goes_before_all_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.open(tmp_path, segment_bytes_max=2000) as journal:
        journal.append(admitted(0))
        journal.sync()
        for number in range(1, 60):
            journal.append(admitted(number))
            journal.append(Acknowledged(request_id=an_id(number)))
        before = sorted(tmp_path.glob("*.records"))
        with monkeypatch.context() as patch:
            patch.setattr("behest_ledger.journal.segments.sync_data", failing(os.fsync, errno.EIO))
            with pytest.raises(JournalError):
                journal.sync()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", failing(os.write, errno.ENOSPC))
            assert not journal.probe()
            with pytest.raises(JournalError, match="must be written again"):
                journal.sync()
        assert sorted(tmp_path.glob("*.records")) == before
        assert journal.probe()
        assert not any(file.exists() for file in before)
    assert left(tmp_path) == [0]


def test_a_record_without_a_form_is_refused_and_the_journal_goes_on(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        settlement = void("shop", an_id(1), Outcome.CRASHED)
        settlement.facts["large"] = 2**80
        with pytest.raises(RecordRefusedError):
            journal.append(Ended(settlement=settlement))
        assert journal.writable
        journal.append(admitted(2))
    assert left(tmp_path) == [2]


def test_after_its_end_a_journal_takes_nothing(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    journal.close()
    journal.close()
    journal.sync()
    with pytest.raises(JournalError, match="closed"):
        journal.append(admitted(1))
    assert journal.slot(an_id(1)) == NoSlot(0)
    assert not journal.probe()


def test_a_thread_may_sync_while_records_are_written(tmp_path: Path) -> None:
    failures: list[Exception] = []
    stop = threading.Event()

    with Journal.open(tmp_path, segment_bytes_max=4000, segments_max=6) as journal:

        def sync() -> None:
            while not stop.is_set():
                try:
                    journal.sync()
                except Exception as error:  # noqa: BLE001 -- whatever it is, it is seen below
                    failures.append(error)
                    return

        threads = [threading.Thread(target=sync) for _ in range(2)]
        for thread in threads:
            thread.start()
        journal.append(admitted(0))
        for number in range(1, 1500):
            journal.append(admitted(number))
            journal.append(Acknowledged(request_id=an_id(number)))
        stop.set()
        for thread in threads:
            thread.join()
        journal.sync()
        assert failures == []
        assert len(list(tmp_path.glob("*.records"))) <= 4
    assert left(tmp_path) == [0]


# --- a real kill ---------------------------------------------------------------------------------------------------

CHILD = """
import os, sys
from pathlib import Path
from uuid import UUID
from behest_ledger.journal import Admitted, Journal
from behest_ledger.token_counts import TOKEN_CLASSES, TokenCounts

journal = Journal.open(Path(sys.argv[1]))
request_id = UUID(sys.argv[2])
slot = journal.slot(request_id)
journal.append(Admitted(tenant_id="shop", request_id=request_id, holder_id=UUID(int=7),
    input_counts=TokenCounts(input=12), rates=dict.fromkeys(TOKEN_CLASSES, 5), request_fee_pico=0,
    price_key="p", attributes={}))
slot.mark_sent()
slot.mark_first_byte()
write = os.write
number = 0
while True:
    number += 1
    slot.store(number * 255, number * 3, number)
    write(1, number.to_bytes(8, "big"))
"""


@contextmanager
def streaming(folder: Path, request_id: UUID) -> Generator["subprocess.Popen[bytes]"]:
    """A process that stores and then hands a chunk to its client, as fast as it can."""
    with subprocess.Popen([sys.executable, "-c", CHILD, folder, str(request_id)], stdout=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("chunks", [1, 77, 1000, 9999, 12_345, 54_321])
def test_after_a_kill_the_slot_knows_what_the_client_got_and_at_most_one_read_more(tmp_path: Path, chunks: int) -> None:
    with streaming(tmp_path, an_id(1)) as child:
        assert child.stdout is not None
        received = child.stdout.read(8 * chunks)
        os.kill(child.pid, signal.SIGKILL)
        received += child.stdout.read()
        child.wait()
    got = int.from_bytes(received[len(received) - len(received) % 8 - 8 :][:8], "big")
    assert got == len(received) // 8 >= chunks
    with Journal.open(tmp_path) as journal:
        (one,) = journal.unfinished()
        progress = one.progress
        assert progress is not None
        assert progress.sent
        assert progress.first_byte
        assert got <= progress.chunks <= got + 1
        assert got * 255 <= progress.output <= (got + 1) * 255
        assert got * 3 <= progress.reasoning <= (got + 1) * 3
        assert not journal.damage
