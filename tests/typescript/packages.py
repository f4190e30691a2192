"""Packages of npm: installed as their lock files say, once for each version of them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def install(folder: Path) -> Path:
    """The folder with its packages; skips, in npm's own words, where they cannot be had."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("this machine has no node and npm")
    installed = folder / "node_modules" / ".installed"
    lock = (folder / "package-lock.json").read_text()
    if not installed.exists() or installed.read_text() != lock:
        done = subprocess.run(
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"npm cannot install the packages here: {done.stderr.strip()[-300:]}")
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
