"""`behest down`: stops the `behest up` of a data folder, makes sure of it, and says what stays."""

import argparse
import contextlib
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

from behest_proxy.cli.folder import DataFolder, locked
from behest_proxy.cli.place import place_of
from behest_proxy.cli.postgres import stop_stale
from behest_proxy.cli.terminal import Terminal, UserError
from behest_proxy.cli.up import add_data_folder

_PATIENCE_S = (12.0, 6.0)
"""How long to wait after the first and after the second signal; `behest up` needs at most half."""


def add_parser(subparsers: Any) -> None:
    """Add `down` to the commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "down",
        help="stop what `behest up` started",
        description="Stop the `behest up` of a data folder. The data stay.",
    )
    add_data_folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 when nothing runs any more, 1 when it could not be stopped."""
    terminal = Terminal()
    folder = DataFolder(arguments.data_dir)
    if not (folder.path / "layout").exists():
        raise UserError(f"{arguments.data_dir} is no Behest data folder", "name it with --data-dir")
    holder = folder.holder()
    if holder is None:
        terminal.line(f"Nothing runs in {arguments.data_dir}.")
    elif not _stop(folder, holder, terminal):
        raise UserError(f"process {holder} does not stop", f"kill -9 {holder} ends it, and nothing is lost")
    _stop_left_behind(folder, terminal)
    _say_what_stays(folder, terminal)
    return 0


def _stop(folder: DataFolder, holder: int, terminal: Terminal) -> bool:
    if holder == 0:
        raise UserError("the running process cannot be told", "stop its `behest up` with Ctrl-C")
    with terminal.step(f"stopping `behest up` (process {holder})"):
        for patience_s in _PATIENCE_S:
            try:
                os.kill(holder, signal.SIGTERM)
            except ProcessLookupError:
                pass
            except PermissionError:
                raise UserError(
                    f"process {holder} belongs to another account", "run `behest down` as that one"
                ) from None
            deadline = time.monotonic() + patience_s
            while time.monotonic() < deadline:
                # The lock, not the process number, tells that it ended: numbers are used again.
                if folder.holder() != holder:
                    return True
                time.sleep(0.02)
    return False


def _stop_left_behind(folder: DataFolder, terminal: Terminal) -> None:
    """A server whose `behest up` and guardian were both killed."""
    place = place_of(folder)
    with contextlib.suppress(OSError), locked(place / "lock", make=False) as holder:
        if holder is None:
            stop_stale(place / "data", terminal.line)


def _size_bytes(path: Path) -> int:
    total = 0
    for root, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(root) / name).lstat().st_size
    return total


def _say_what_stays(folder: DataFolder, terminal: Terminal) -> None:
    paths = [folder.path]
    if folder.path not in place_of(folder).parents:
        paths.append(place_of(folder))
    size_mb = sum(_size_bytes(path) for path in paths) / 1e6
    terminal.line(f"The data stay ({size_mb:.0f} MB). To remove them:")
    terminal.line("rm -rf " + " ".join(shlex.quote(str(path)) for path in paths))
