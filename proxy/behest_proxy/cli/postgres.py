"""The embedded PostgreSQL: made once, started in a moment, reached only through 127.0.0.1, and never left behind.

    place/                 <data folder>/postgres, or /var/lib/behest/<hash> (see `choose_place`)
      lock                 held by the process that owns the server
      port                 the port of last time, kept when it is free
      data/                PGDATA, 0700, owned by the account that runs the server

The server runs under a `guard`; it is told to shut down when its owner ends in whatever way. A server that was
left behind all the same (somebody killed the guardian) is found by its `postmaster.pid` at the next start.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from behest_proxy.cli import binaries as programs
from behest_proxy.cli.binaries import Binaries
from behest_proxy.cli.folder import DataFolder, locked, write_whole
from behest_proxy.cli.guarded import Guarded, GuardedStartError, Stop
from behest_proxy.cli.place import Place, choose_place, make_shared, shared_place
from behest_proxy.cli.terminal import UserError

USER = "behest"
DATABASE = "behest"

_READY_S = 60.0  # recovery after a crash may take its time
_ATTEMPTS = 20
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # a socket's path may have 107 bytes; a port has no such limit
    "password_encryption": "scram-sha-256",
    "max_connections": "50",
    "shared_buffers": "64MB",
    "max_wal_size": "512MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "logging_collector": "off",  # the guardian keeps the log, and bounds it
    "log_destination": "stderr",
    "log_timezone": "UTC",
    "timezone": "UTC",
    "jit": "off",
}


def _nothing(_: str) -> None:
    pass


class Postgres:
    """A running server of ours. Leaving the `with` block stops it."""

    def __init__(
        self, *, dsn: str, version: str, place: Path, made: bool, process: Guarded, lock: contextlib.ExitStack
    ) -> None:
        self.dsn = dsn
        self.version = version
        """As the server tells it: "18.6"."""
        self.place = place
        self.made = made
        """Whether the database was made just now."""
        self.process = process
        self._lock = lock

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """A fast shutdown: connections are ended, everything committed is on disk. Returns when it is over."""
        if not self.process.asked_to_stop:
            self.process.stop()
        while not self.process.wait(timeout_s):
            self.process.stop()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()


def launch(
    folder: DataFolder,
    *,
    say: Callable[[str], None] = _nothing,
    environment: Mapping[str, str] | None = None,
    linger_s: float = 0.0,
    binaries: Binaries | None = None,
) -> Postgres:
    """Make the database of this data folder if it is missing, start it, and wait until it takes connections.

    `say` is told what a person should know (an unusual place, a server of an earlier life). `linger_s`: how long
    the server goes on when this process is killed. `binaries`: which programs to run, where it is not left to us.
    Raises `UserError`.
    """
    environment = dict(os.environ) if environment is None else dict(environment)
    place = choose_place(folder, say)
    with contextlib.ExitStack() as lock:
        holder = lock.enter_context(locked(place.path / "lock"))
        if holder is not None:
            raise UserError(f"the database in {place.path} is in use by process {holder}", "stop that process first")
        data_version = place.version
        binaries = binaries or programs.choose(data_version=data_version, environment=environment)
        if place.account is not None and not programs.usable_by(place.account, binaries):
            shared = shared_place(folder)
            if not (shared / f"binaries-{binaries.version}").is_dir():
                say(f"its programs are copied to {shared}: {binaries.folder} is closed to {place.account.name!r}")
            binaries = programs.copy_for(place.account, binaries, make_shared(shared))
        if data_version is None:
            password = folder.secret("postgres-password", secrets.token_hex(24))
            _make_database(place, binaries, password)
        else:
            stop_stale(place.data, say)
            password = _password_of_existing(folder, place, binaries)
        process, port = _start(place, binaries, folder.logs / "postgres.log", linger_s=linger_s)
        dsn = f"postgresql://{USER}:{password}@127.0.0.1:{port}/{DATABASE}"
        return Postgres(
            dsn=dsn,
            version=binaries.version,
            place=place.path,
            made=data_version is None,
            process=process,
            lock=lock.pop_all(),
        )


# Making


def _run(place: Place, command: list[str | Path], *, text: str = "") -> None:
    account = place.account
    result = subprocess.run(  # noqa: S603 -- the programs chosen above
        command,
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=place.path,
        env=_plain_environment(),
        user=None if account is None else account.uid,
        group=None if account is None else account.gid,
        extra_groups=None if account is None else [],
        start_new_session=True,  # Ctrl-C is for the supervisor; half a database is removed by it
    )
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        if any("could not look up effective user ID" in line for line in lines):
            raise UserError(
                f"initdb wants an account that has a name, and user id {os.geteuid()} has none",
                "add it to /etc/passwd, or name a server in DATABASE_URL",
            )
        raise UserError(
            f"{Path(command[0]).name} failed: {lines[-1]}",
            "see the message; DATABASE_URL can name another server",
        )


def _plain_environment() -> dict[str, str]:
    """PG* variables of the person would change what the server and its tools do."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C"}


def _make_database(place: Place, binaries: Binaries, password: str) -> None:
    fresh = place.path / "data.new"
    password_file = place.path / "password.new"
    try:
        shutil.rmtree(fresh, ignore_errors=True)  # what an interrupted first start left
        fresh.mkdir(mode=0o700)
        fresh.chmod(0o700)
        place.give(fresh)
        write_whole(password_file, password + "\n")
        place.give(password_file)
        command: list[str | Path] = [
            binaries.initdb,
            "-D",
            fresh,
            f"--username={USER}",
            f"--pwfile={password_file}",
        ]
        _run(place, [*command, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"])
        _single_user(place, binaries, fresh, f"CREATE DATABASE {DATABASE};")
        fresh.rename(place.data)
    except OSError as error:
        raise UserError(
            f"the database cannot be made in {place.path} ({error.strerror or error})",
            "choose another --data-dir, or name a server in DATABASE_URL",
        ) from None
    finally:
        password_file.unlink(missing_ok=True)


def _single_user(place: Place, binaries: Binaries, data: Path, statement: str) -> None:
    """Run one statement without a server, and so without a password."""
    _run(place, [binaries.postgres, "--single", "-j", "-D", data, "postgres"], text=statement + "\n\n")


def _password_of_existing(folder: DataFolder, place: Place, binaries: Binaries) -> str:
    path = folder.keys / "postgres-password"
    if path.exists():
        return folder.secret(path.name, "")
    password = secrets.token_hex(24)  # it was deleted; hexadecimal, so it needs no quoting
    _single_user(place, binaries, place.data, f"ALTER ROLE {USER} PASSWORD '{password}';")
    return folder.secret(path.name, password)


# Starting


def _free_port(last: int) -> int:
    for port in (last, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError, OverflowError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise UserError("no free port on 127.0.0.1", "check the loopback interface")


def _last_port(place: Place) -> int:
    try:
        return int((place.path / "port").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _start(place: Place, binaries: Binaries, log: Path, *, linger_s: float) -> tuple[Guarded, int]:
    last = _last_port(place)
    lines: list[str] = []
    for _ in range(_ATTEMPTS):
        port = _free_port(last)
        command: list[str | Path] = [binaries.postgres, "-D", place.data, "-c", f"port={port}"]
        for name, value in _SETTINGS.items():
            command += ["-c", f"{name}={value}"]
        try:
            process = Guarded.start(
                "PostgreSQL",
                command,
                log=log,
                environment=_plain_environment(),
                stop=Stop(signal.SIGINT, signal.SIGQUIT, linger_s=linger_s),  # fast shutdown, then immediate
                account=place.account,
                folder=place.path,
            )
        except GuardedStartError as error:
            raise UserError(str(error), "check that the file can be executed") from None
        try:
            if _wait_ready(place.data, process):
                if port != last:
                    write_whole(place.path / "port", f"{port}\n", mode=0o644)
                return process, port
        except BaseException:
            process.stop()
            process.wait(10)
            raise
        lines = process.last_lines()
        if any("could not bind" in line for line in lines):
            last = 0  # somebody took the port between our look and the server's
        elif any("pre-existing shared memory" in line for line in lines):
            time.sleep(0.5)  # the last processes of a killed server are still on their way out
        else:
            break
    reason = next((line for line in reversed(lines) if "FATAL" in line or "PANIC" in line), "it ended at once")
    raise UserError(f"PostgreSQL did not start: {reason.partition('] ')[2] or reason}", f"see {log}")


def _wait_ready(data: Path, process: Guarded) -> bool:
    """Whether the server takes connections; False when it ended. Its own status file tells, as for pg_ctl."""
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        lines = _postmaster_lines(data)
        if len(lines) >= 8 and lines[0] == str(process.pid) and lines[7] == "ready":
            return True
        if process.wait(0.01):
            return False
    raise UserError(f"PostgreSQL was not ready within {_READY_S:.0f} s", f"see {process.log}")


def _postmaster_lines(data: Path) -> list[str]:
    try:
        text = (data / "postmaster.pid").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines()]


# Servers of an earlier life


def _command_of(pid: int) -> str | None:
    """What a process runs, for a judgement whether it is ours; None where it is gone or hidden."""
    if sys.platform.startswith("linux"):
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            return None
    result = subprocess.run(  # noqa: S603
        ["/bin/ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None


def is_postmaster_of(pid: int, data: Path) -> bool:
    """Whether the process is a PostgreSQL server of this data directory, and not a stranger that got its number."""
    command = _command_of(pid)
    if command is None or "postgres" not in command:
        return False
    try:
        return Path(f"/proc/{pid}/cwd").resolve(strict=True) == data.resolve()  # a server works inside its data
    except OSError:
        return str(data) in command or str(data.resolve()) in command


def stop_stale(data: Path, say: Callable[[str], None] = _nothing) -> bool:
    """Stop a server that an earlier life left in this data directory; the caller holds the lock of the place.

    Returns whether there was one. A `postmaster.pid` that names no such process is removed: PostgreSQL refuses
    to start when its number belongs to an unrelated process now.
    """
    lines = _postmaster_lines(data)
    if not lines:
        return False
    pid = int(lines[0]) if lines[0].lstrip("-").isdigit() else 0
    if pid <= 1 or not is_postmaster_of(pid, data):
        (data / "postmaster.pid").unlink(missing_ok=True)
        return False
    say(f"a server of an earlier life (process {pid}) is stopped first")
    for number, patience_s in ((signal.SIGINT, 5.0), (signal.SIGQUIT, 3.0), (signal.SIGKILL, 3.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if not is_postmaster_of(pid, data):
                return True
            time.sleep(0.02)
    raise UserError(f"the PostgreSQL process {pid} of {data} cannot be stopped", f"stop it by hand: kill -9 {pid}")
