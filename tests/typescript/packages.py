"""Packages of npm: installed as their lock files say, once for each version of them."""

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

_UNREACHABLE = re.compile(
    r"ENOTFOUND|EAI_AGAIN|ECONN|ETIMEDOUT|ERR_SOCKET_TIMEOUT|ENETUNREACH|EHOSTUNREACH|E40[37]|E429|E5\d\d\b|CERT|SELF_SIGNED"
)
"""In npm's words: no such host, no way there, a proxy that refuses, a registry that is ill, a certificate that this
machine does not know."""
_CI = ["ci", "--prefer-offline", "--fetch-retries=5", "--ignore-scripts", "--no-audit", "--no-fund"]


def install(folder: Path) -> Path:
    """The folder with its packages; skips, in npm's own words, where they cannot be had."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("this machine has no node and npm")
    installed = folder / "node_modules" / ".installed"
    with (folder / "package-lock.json").open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)  # of runs that stand beside each other one installs, the others wait
        lock = locked.read()
        if not installed.exists() or installed.read_text() != lock:
            done = subprocess.run([npm, *_CI], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip()[-300:]
                if _UNREACHABLE.search(done.stderr):
                    pytest.skip(f"npm's registry cannot be reached from here: {said}")
                pytest.fail(f"npm cannot install the packages: {said}")
            installed.write_text(lock)
    return folder


def run(arguments: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    """What a command prints. Fails with all that it said."""
    done = subprocess.run(
        arguments,
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "CI": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
