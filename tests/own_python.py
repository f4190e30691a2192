"""Virtual environments of other packages, kept between runs: what a test needs and ours must not have."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest


def python_with(name: str, *packages: str) -> Path:
    """The Python of an environment with these packages. Skips where PyPI cannot be reached."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "behest"
    folder = base / f"{name}-{sys.version_info.major}.{sys.version_info.minor}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    base.mkdir(parents=True, exist_ok=True)
    with (base / f"{folder.name}.lock").open("w") as lock:  # runs beside each other install it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (stamp.exists() and stamp.read_text() == " ".join(packages)):
            for arguments in (
                [sys.executable, "-m", "venv", "--clear", str(folder)],
                [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
            ):
                done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False)
                if done.returncode:
                    pytest.skip(f"{packages[0]} could not be installed: {done.stderr.strip()[-500:]}")
            stamp.write_text(" ".join(packages))
    return python
