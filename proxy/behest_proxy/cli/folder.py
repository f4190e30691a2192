"""The data folder of a laptop's Behest: its layout, its lock, and files that are written whole."""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Generator
from pathlib import Path

from behest_proxy.cli.terminal import UserError, own_command

LAYOUT = "1"
"""The version of the layout below; kept in the file `layout`."""

_FIRST_NAMES = ("layout", "lock")


def write_whole(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 -- a descriptor, not a path
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class DataFolder:
    """What `behest up` keeps: `keys/` (0600 files), `logs/`, `journal/`, `postgres/`, `lock`, `ready.json`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 -- links are kept as the person wrote them
        self.keys = self.path / "keys"
        self.logs = self.path / "logs"
        self.journal = self.path / "journal"
        self.ready_file = self.path / "ready.json"

    def create(self) -> None:
        """Make the folder and its parts, or check what is there. Raises `UserError` for an unusable one.

        The folder itself is 0711 for root (PostgreSQL runs as another account and must pass through), else
        0700; its parts are 0700 always.
        """
        cure = "choose another with --data-dir"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_layout()
            self.path.chmod(0o711 if os.geteuid() == 0 else 0o700)
            for part in (self.keys, self.logs, self.journal):
                part.mkdir(mode=0o700, exist_ok=True)
                part.chmod(0o700)
            probe = self.path / f".probe.{secrets.token_hex(4)}"
            probe.write_bytes(b"")
            probe.unlink()
        except FileExistsError:
            raise UserError(f"the data folder {self.path} is a file", cure) from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"the data folder {self.path} is not writable ({reason})", cure) from None

    def _check_layout(self) -> None:
        layout_file = self.path / "layout"
        try:
            layout = layout_file.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            # A first start may have been cut before it wrote the layout; anything else here is not ours.
            foreign = sorted(
                entry.name for entry in self.path.iterdir() if entry.name.lstrip(".").split(".")[0] not in _FIRST_NAMES
            )
            if foreign:
                raise UserError(
                    f"{self.path} holds other things ({foreign[0]}) and is no Behest data folder",
                    "choose an empty or new folder with --data-dir",
                ) from None
            write_whole(layout_file, LAYOUT + "\n", mode=0o644)
            return
        if layout != LAYOUT:
            raise UserError(
                f"the data folder {self.path} has layout {layout[:20]!r} and this version knows {LAYOUT!r}",
                f"use the version that made it, or start afresh: mv {self.path} {self.path}.old",
            )

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Hold the folder for this process. Raises `UserError` that names the holder when it is taken."""
        with locked(self.path / "lock") as holder:
            if holder is not None:
                raise UserError(
                    f"already running in {self.path} (process {holder or 'unknown'})",
                    f"stop it with `{own_command()} down`, or choose another --data-dir",
                )
            yield

    def holder(self) -> int | None:
        """The process that holds the folder now, 0 if it cannot be told, None if nobody does."""
        try:
            with locked(self.path / "lock", make=False) as holder:
                return holder
        except FileNotFoundError:
            return None

    def secret(self, name: str, make: str) -> str:
        """The content of `keys/<name>`; `make` is written there first when it is missing (mode 0600)."""
        path = self.keys / name
        with contextlib.suppress(FileNotFoundError):
            text = path.read_text(encoding="utf-8").strip()
            if text:
                return text
        write_whole(path, make + "\n")
        return make


@contextlib.contextmanager
def locked(path: Path, *, make: bool = True) -> Generator[int | None]:
    """Try the lock file (flock(2): the kernel drops it when its holder ends, in whatever way).

    Yields None when this process holds it now (and its number is in the file, where `make`), else the number
    of the holder, 0 if it has not written it yet.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            yield int(text) if text.isdigit() else 0
            return
        if make:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        try:
            yield None
        finally:
            if make:
                os.ftruncate(descriptor, 0)  # no old number for the next one to misread
    finally:
        os.close(descriptor)
