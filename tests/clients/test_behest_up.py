"""The snippets that users begin with against what they begin with: a real `behest up`."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import wait_until
from typescript.packages import install, run
from up import Up, behest_up


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with behest_up() as started:
        yield started


@pytest.fixture(scope="module")
def environment(up: Up) -> dict[str, str]:
    return {"BEHEST_BASE_URL": up.base_url, "BEHEST_KEY": up.api_key, "NO_PROXY": "127.0.0.1,localhost"}


def test_the_python_snippet_runs_in_the_interpreter_that_knows_await(
    up: Up, environment: dict[str, str], repository: Path
) -> None:
    snippet = (repository / "tests" / "seed" / "server-to-server.py.txt").read_text()
    program = "import asyncio, ast, os, sys\n" + _WITH_AWAIT
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        input=snippet.replace("messages=...", 'messages=[{"role": "user", "content": "Tell me a story."}]'),
        env={**environment, "PATH": ""},
        cwd=up.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("This is simulated text")
    # At once: later others, whose streams are stopped sooner or later, may have spent more.
    wait_until(lambda: "reader" in up.behest("ledger", "top", "--once"), what="the reader's row in the books")


# What `python -m asyncio` does with what is typed into it, without its prompts.
_WITH_AWAIT = """
code = compile(sys.stdin.read(), "snippet", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
names = {"user_id": "reader"}
async def main():
    await eval(code, names)
    await names["behest"].aclose()
asyncio.run(main())
"""


@pytest.mark.parametrize("client", ["behest", "openai"])
def test_the_typescript_snippets_run(up: Up, environment: dict[str, str], repository: Path, client: str) -> None:
    sdk = install(repository / "sdk" / "typescript")
    run(["npm", "run", "build"], sdk)
    run(["node", "test/live/compose.mjs", client], sdk)
    poor = up.project(f"poor-{client}", limit_usd="0.0001")
    arguments = ["npx", "vitest", "run", "--config", "vitest.live.config.ts", "test/live/guide.test.tsx"]
    run(arguments, sdk, {**environment, "POOR_KEY": poor, "CLIENT": client})


def test_the_books_are_right_afterwards(up: Up) -> None:
    up.behest("ledger", "verify")
