"""`langchain-openai`, as it is on PyPI, in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

from own_python import python_with
from stack import Stack


def test_langchain_streams_and_sees_the_end_of_a_budget_unmodified(stack: Stack) -> None:
    python = python_with("langchain-openai", "langchain-openai>=1")
    given = {
        "base_url": stack.base_url,
        "token": stack.project().mint(session="langchain"),
        "poor_token": stack.project(limit_usd="0.0005").mint(session="langchain"),
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BEHEST_", "PYTHON"))}
    done = subprocess.run(
        [str(python), "-I", str(Path(__file__).with_name("langchain_stream.py"))],
        env={**environment, "GIVEN": json.dumps(given), "NO_PROXY": "127.0.0.1,localhost"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
