"""What can go wrong with a journal, as types."""

from pathlib import Path


class JournalError(Exception):
    """The journal could not do it: a full disk, an I/O error, a folder that cannot be used."""


class JournalLockedError(JournalError):
    """Another process has this journal open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"the journal {folder} is in use by another process")
        self.folder = folder


class RecordRefusedError(JournalError):
    """A record that cannot be written, whatever the disk: too large, or with values that have no binary form."""
