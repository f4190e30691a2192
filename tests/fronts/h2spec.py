"""h2spec, built once where Go is."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

VERSION = "v2.2.1+incompatible"
"""The newest that every module proxy has."""
_MODULE = f"github.com/summerwind/h2spec/cmd/h2spec@{VERSION}"


def h2spec() -> Path:
    """The program, in `$XDG_CACHE_HOME/behest` or `~/.cache/behest`. Skips where it cannot be had."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "behest"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"h2spec-{VERSION}"
    with (folder / "h2spec.lock").open("w") as lock:  # several processes may ask at once: one makes, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _build(made)
    return made


def _build(made: Path) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("h2spec is not here and cannot be built without Go (Debian: apt install golang-go)")
    with tempfile.TemporaryDirectory() as name:
        built = subprocess.run(
            [go, "install", _MODULE],
            env={**os.environ, "GOBIN": name, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        if built.returncode != 0:
            pytest.skip(f"h2spec could not be built: {built.stderr[-1000:]}")
        unfinished = made.with_suffix(".unfinished")
        shutil.copy(Path(name) / "h2spec", unfinished)
        unfinished.rename(made)
