"""The official FOCUS validator, in an environment of its own.

`focus-validator` 2.2.1 needs Python 3.12 and an older pyarrow than we do; it reads files beside it by paths that hold
only in the folder it is installed in; and its exit status is 0 whatever it finds. All that is kept here.
"""

import fcntl
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VERSION = "2.2.1"
RULES = "1.2.0.1"
"""The rules that it brings for FOCUS 1.2; it would download others."""

OURS = (
    "ACCOUNT_NAMING_SUPPORTED",
    "USAGE_MEASUREMENT_SUPPORTED",
    "PUBLIC_PRICE_LIST_SUPPORTED",
    "UNIT_PRICING_SUPPORTED",
    "SUB_ACCOUNT_SUPPORTED",
    "TAGGING_SUPPORTED",
    "NEGOTIATED_PRICING_SUPPORTED",
    "MULTIPLE_PRICING_CATEGORIES_SUPPORTED",
)
"""What we have, of that which makes further rules apply."""

_CACHE = Path.home() / ".cache" / "behest"


@dataclass(frozen=True)
class Verdict:
    """What it said."""

    passed: int
    failed: frozenset[str]
    """The rules that failed."""
    told: str


@cache
def python312() -> str | None:
    """A Python 3.12 that runs: the one on PATH, or one of pyenv's."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob("3.12*/bin/python"))
    for name in (shutil.which("python3.12"), *map(str, pyenv)):
        if (
            name
            and subprocess.run([name, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode == 0
        ):
            return name
    return None


@cache
def _environment() -> Path:
    """The folder of its environment, made once."""
    folder = _CACHE / f"focus-validator-{VERSION}"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making it just now
        if not (folder / ".complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            python = python312()
            assert python is not None
            subprocess.run([python, "-m", "venv", str(folder)], check=True)
            install = [str(folder / "bin" / "pip"), "install", "--quiet", "--retries", "10"]
            subprocess.run([*install, f"focus-validator=={VERSION}", "pyarrow<20"], check=True)
            (folder / ".complete").touch()
    return folder


def judged(path: Path, *, rules: str = RULES, criteria: tuple[str, ...] = OURS) -> Verdict:
    """Its verdict on a file of FOCUS 1.2."""
    folder = _environment()
    (packages,) = folder.glob("lib/python3.12/site-packages")
    ran = subprocess.run(
        [
            folder / "bin" / "focus-validator", "--data-file", path, "--validate-version", rules,
            "--focus-dataset", "CostAndUsage", "--block-download", "--applicability-criteria", ",".join(criteria),
        ],
        cwd=packages, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    told = ran.stdout + ran.stderr
    total = re.search(r"^Total: \d+ \| Pass: (\d+) \| Fail: (\d+) \|", told, re.MULTILINE)
    assert total is not None, f"it said no total: {told[-3000:]}"
    failed = frozenset(re.findall(r"^❌ ([\w-]+): FAIL", told, re.MULTILINE))
    assert len(failed) == int(total[2]), told[-3000:]
    return Verdict(int(total[1]), failed, told)
