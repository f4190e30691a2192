"""Where a database lives and who runs its server: the data folder, or a place that root's account can reach."""

import hashlib
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from behest_proxy.cli import binaries as programs
from behest_proxy.cli.folder import DataFolder, write_whole
from behest_proxy.cli.guarded import Account
from behest_proxy.cli.terminal import UserError

SHARED_PLACES = Path("/var/lib/behest")
"""Where root's servers live when the data folder is closed to other accounts."""


@dataclass(frozen=True)
class Place:
    """Where one server lives and who runs it."""

    path: Path
    account: Account | None

    @property
    def data(self) -> Path:
        """The PGDATA folder."""
        return self.path / "data"

    @property
    def version(self) -> str | None:
        """The PG_VERSION of an existing data directory, else None."""
        try:
            return (self.data / "PG_VERSION").read_text(encoding="ascii", errors="replace").strip()
        except FileNotFoundError:
            return None
        except PermissionError:
            owner = _name_of(self.data.stat().st_uid)
            raise UserError(
                f"the database in {self.data} belongs to the account {owner!r}",
                "run as root (which made it), or choose another --data-dir",
            ) from None

    def give(self, path: Path) -> None:
        """Hand a file over to the account."""
        if self.account is not None:
            os.chown(path, self.account.uid, self.account.gid)


def place_of(folder: DataFolder) -> Path:
    """Where the database of this data folder is, or would be if nothing speaks against it."""
    try:
        return Path((folder.path / "postgres.path").read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return folder.path / "postgres"


def shared_place(folder: DataFolder) -> Path:
    """The place of this data folder below `SHARED_PLACES`."""
    digest = hashlib.sha256(os.fsencode(folder.path.resolve())).hexdigest()[:16]
    return SHARED_PLACES / digest


def make_shared(path: Path) -> Path:
    """Make a place that every account can pass. Raises `UserError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        for part in (path.parent, path):
            part.chmod(0o755)
    except OSError as error:
        raise UserError(
            f"{path} cannot be made ({error.strerror})",
            "choose a --data-dir that other accounts can reach: PostgreSQL never runs as root",
        ) from None
    return path


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _account_for(data: Path) -> Account | None:
    """Whom root runs the server as: the owner of the data directory, else `nobody`. None: as ourselves.

    PostgreSQL refuses to run as root, and initdb wants an account that has a name; none is made for it.
    """
    if os.geteuid() != 0:
        return None
    try:
        status = data.stat()
    except FileNotFoundError:
        status = None
    if status is not None and status.st_uid != 0:
        return Account(status.st_uid, status.st_gid, _name_of(status.st_uid))
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise UserError(
            "PostgreSQL refuses to run as root and there is no account `nobody` to run it as",
            "run as an ordinary user, or name a server in DATABASE_URL",
        ) from None
    return Account(entry.pw_uid, entry.pw_gid, entry.pw_name)


def choose_place(folder: DataFolder, say: Callable[[str], None]) -> Place:
    """Inside the data folder; where root's account cannot get there, in a folder of /var/lib/behest.

    The choice is written down (`postgres.path`), so that it outlives a move of the data folder.
    """
    path = place_of(folder)
    pointed = (folder.path / "postgres.path").exists()
    if pointed and not (path / "data").exists():
        say(f"the database that was in {path} is gone: a new, empty one is made")
    account = _account_for(path / "data")
    if account is not None and not programs.can_pass(account, path / "data"):
        if (path / "data").exists():
            raise UserError(
                f"the account {account.name!r} cannot reach the database in {path}",
                f"open the folders above it (chmod o+x), or move {folder.path}",
            )
        path = make_shared(shared_place(folder))
        write_whole(folder.path / "postgres.path", f"{path}\n")
        pointed = True
        account = _account_for(path / "data")
    if pointed:
        say(f"its data are in {path}: the data folder is closed to the account {account.name if account else ''!r}")
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o755 if account else 0o700)
    return Place(path, account)
