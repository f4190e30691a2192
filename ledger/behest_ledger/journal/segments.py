"""The record files: written by one thread, synced by another.

`write` hands a frame to the kernel at once, where it survives `kill -9`; `sync` makes durable what was written before
it was called, and only then removes the segments that nothing needs any more: what was carried over from them is safe.
"""

import contextlib
import os
import threading

from behest_ledger.journal.errors import JournalError
from behest_ledger.journal.folder import JournalFolder, sync_data

_CLOSED = -1


class Segments:
    """The segment that is written to, and those that wait to be synced or removed."""

    def __init__(self, folder: JournalFolder) -> None:
        self._folder = folder
        self._descriptor = _CLOSED
        self.size_bytes = 0
        """Of the segment that is written to."""
        self.write_failed = False
        self.sync_failed = False
        """What was written since the last good sync may be lost, though the kernel took it. Begin a new segment."""
        self._lock = threading.Lock()
        """For the three lists below and the descriptor: they are what both threads touch."""
        self._retired: list[int] = []
        self._dropped: list[int] = []
        self._names_changed = False
        self._one_sync = threading.Lock()

    @property
    def is_open(self) -> bool:
        """There is a segment to write to."""
        return self._descriptor != _CLOSED

    @property
    def dropped(self) -> int:
        """How many segments wait for a sync to be removed."""
        return len(self._dropped)

    def begin(self, number: int) -> None:
        """Write to a new segment from now on. Raises `JournalError`; then the old one stays."""
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            descriptor = os.open(self._folder.segment(number), flags, 0o600)
        except OSError as error:
            self.write_failed = True
            raise JournalError(f"no new segment in {self._folder.path}: {error.strerror}") from error
        with self._lock:
            if self.is_open:
                self._retired.append(self._descriptor)
            self._descriptor = descriptor
            self._names_changed = True
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        """Hand data to the kernel, all or nothing. Raises `JournalError`; `write_failed` until a write works again."""
        try:
            written = os.write(self._descriptor, data)
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError as error:
            self.write_failed = True
            # Where even this fails a part of the frame stays, and readers skip it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.size_bytes)
            raise JournalError(f"cannot write to {self._folder.path}: {error.strerror}") from error
        self.size_bytes += len(data)
        self.write_failed = False

    def drop(self, number: int) -> None:
        """Nothing in this segment is needed once all that was written up to now is durable."""
        with self._lock:
            self._dropped.append(number)

    def sync(self, *, also: int | None = None) -> None:
        """Make durable what was written so far, and `also` another file. May be called from any thread.

        Raises `JournalError`. After a failed sync the kernel may have forgotten what it could not write, so the
        caller must write everything again: `sync_failed`.
        """
        with self._one_sync:
            if self.sync_failed:
                # A later sync may work and prove nothing: the kernel reports a loss once. No segment goes on its word.
                raise JournalError(f"what was written to {self._folder.path} may be lost and must be written again")
            with self._lock:
                descriptors, self._retired = self._retired, []
                dropped = tuple(self._dropped)
                names_changed, self._names_changed = self._names_changed, False
                current = os.dup(self._descriptor) if self.is_open else _CLOSED
            if current != _CLOSED:
                descriptors.append(current)
            try:
                if also is not None:
                    descriptors.append(os.dup(also))
                for descriptor in descriptors:
                    sync_data(descriptor)
                if names_changed:
                    self._folder.sync()
            except OSError as error:
                self.sync_failed = True
                raise JournalError(f"cannot sync {self._folder.path}: {error.strerror}") from error
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            self._remove(dropped)

    def _remove(self, dropped: tuple[int, ...]) -> None:
        """Oldest first: an acknowledgement never goes before what it acknowledges."""
        for number in sorted(dropped):
            try:
                self._folder.segment(number).unlink(missing_ok=True)
            except OSError as error:
                raise JournalError(f"cannot remove a segment of {self._folder.path}: {error.strerror}") from error
            with self._lock:
                self._dropped.remove(number)

    def abandon(self, number: int) -> None:
        """Take back a segment that was just begun and could not be filled."""
        self.close()
        with contextlib.suppress(OSError):
            self._folder.segment(number).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of all files, as they are."""
        with self._lock:
            for descriptor in self._retired:
                os.close(descriptor)
            self._retired.clear()
            if self.is_open:
                os.close(self._descriptor)
            self._descriptor = _CLOSED
            self.size_bytes = 0
