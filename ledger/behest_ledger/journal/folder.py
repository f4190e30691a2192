"""The folder of a journal: its lock, its format, its files.

| file | what |
|---|---|
| `lock` | locked by the process that has the journal open (flock(2): the kernel drops it with the process) |
| `format` | one line: `behest-journal`, the version of all that is here, and the machine's byte order |
| `slots` | see `slots` |
| `<number>.records` | the segments, ascending; see `frames` and `records` |
| `aside-<version>` | another version's files, put here whole; nobody reads or removes them |
"""

import contextlib
import fcntl
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from behest_ledger.journal.errors import JournalError, JournalLockedError

FORMAT = f"behest-journal 1 {sys.byteorder}\n"

_FORMAT_LINE = re.compile(rb"behest-journal ([0-9a-z][0-9a-z. -]{0,30})\n?")
_SEGMENT_NAME = re.compile(r"([0-9]{12})\.records")

sync_data: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
"""fdatasync(2), or fsync where a system has none. Both write out what came by a memory map, too."""


class JournalFolder:
    """A folder that this process has locked."""

    def __init__(self, path: Path, lock: int) -> None:
        """Use `open`."""
        self.path = path
        self.moved_aside: Path | None = None
        """Where another version's files are now; None: there were none."""
        self.format_damaged = False
        self._lock = lock

    @classmethod
    def open(cls, path: Path) -> "JournalFolder":
        """Make it where it is missing, lock it, and see whose format is in it.

        Raises `JournalLockedError`, and `JournalError` for a folder that cannot be used.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(PermissionError):  # somebody else's folder that we may write to: a mounted volume
                path.chmod(0o700)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"the journal {path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = cls(path, lock)
            folder._check_format()
        except BlockingIOError:
            os.close(lock)
            raise JournalLockedError(path) from None
        except OSError as error:
            os.close(lock)
            raise JournalError(f"the journal {path} cannot be used: {error.strerror}") from error
        return folder

    def close(self) -> None:
        """Give up the lock."""
        os.close(self._lock)

    @property
    def slots(self) -> Path:
        """The file of slots."""
        return self.path / "slots"

    def segment(self, number: int) -> Path:
        """The file of a segment."""
        return self.path / f"{number:012d}.records"

    def segments(self) -> list[int]:
        """The numbers of the segments that are there, ascending."""
        matches = (_SEGMENT_NAME.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match is not None)

    def sync(self) -> None:
        """Make the names of the files durable."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _check_format(self) -> None:
        file = self.path / "format"
        try:
            line = file.read_bytes()
        except FileNotFoundError:
            line = None
        if line == FORMAT.encode():
            return
        match = None if line is None else _FORMAT_LINE.fullmatch(line)
        if match is not None:
            self._move_aside(match[1].decode())
        else:
            # Damaged. The files are read all the same: every frame says for itself whether it is one of ours.
            self.format_damaged = line is not None or bool(self.segments())
        temporary = self.path / "format.new"
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, FORMAT.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(file)
        self.sync()

    def _move_aside(self, version: str) -> None:
        """Put everything into a folder of its own, the format last: cut short, it goes on the next time.

        Inside of this folder, not beside it: this one may be a mounted volume.
        """
        name = f"aside-{version.strip().replace(' ', '-')}"
        target = self.path / name
        for again in range(2, 1000):
            if not target.exists():
                break
            target = self.path / f"{name}-{again}"
        target.mkdir(mode=0o700)
        ours = [entry for entry in self.path.iterdir() if entry.name not in ("lock", "format")]
        for entry in ours:
            if not entry.name.startswith("aside-"):
                entry.rename(target / entry.name)
        (self.path / "format").rename(target / "format")
        self.moved_aside = target
