"""The client for Python as somebody installs it who has nothing of this checkout: into an empty environment. (That for
TypeScript is packed and installed into an empty folder by `tests/typescript`.)"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stack import Stack
from typescript.packages import run

_UNREACHABLE = re.compile(
    r"No matching distribution found|(Connect|Read)Timeout|ConnectionError|NewConnection|ProtocolError|IncompleteRead"
    r"|HTTP error [45]\d\d"
)
"""In pip's words: an index that has nothing or cannot be asked, a download that broke off."""
CALL = """
import sys
from behest import BehestSync
assert not [name for name in sys.modules if name.startswith(("behest_proxy", "behest_ledger"))]
with BehestSync() as behest:
    stream = behest.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], stream=True, user_id="new")
    print("".join(chunk.choices[0].delta.content or "" for chunk in stream))
"""


def test_pip_installs_it_into_an_empty_environment_and_it_makes_a_call(
    stack: Stack, repository: Path, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BEHEST_", "PYTHON"))}
    environment |= {"BEHEST_KEY": stack.project().api_key, "BEHEST_BASE_URL": stack.base_url, "NO_PROXY": "127.0.0.1"}
    run([sys.executable, "-m", "venv", str(tmp_path / "venv")], tmp_path)
    python = str(tmp_path / "venv" / "bin" / "python")
    # A copy: what a build leaves behind belongs into nobody's checkout.
    source = shutil.copytree(repository / "sdk" / "python", tmp_path / "source")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries=10", "--timeout=30"]
    installed = subprocess.run([*pip, "install", "--quiet", str(source)], capture_output=True, text=True, check=False)
    if installed.returncode and _UNREACHABLE.search(installed.stderr):
        pytest.skip(f"its dependencies cannot be had here: {installed.stderr.strip()[-300:]}")
    assert installed.returncode == 0, installed.stderr
    names = {one["name"] for one in json.loads(run([*pip, "list", "--format=json"], tmp_path))}
    assert "behest-client" in names
    assert not {"behest", "asyncpg", "pytest"} & names
    called = subprocess.run(
        [python, "-I", "-c", CALL],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert called.returncode == 0, called.stderr
    assert called.stdout.startswith("This is simulated text")
