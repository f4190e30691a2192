"""The snippets that users begin with, as they are written, in programs with top-level await."""

import ast
import asyncio
import contextlib
import inspect
import io
import os
import re
import subprocess
import sys
from collections.abc import Awaitable
from pathlib import Path
from types import CodeType
from typing import Any, cast

import openai
import pytest

from stack import Project, Stack

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project()


def run(snippet: str, **names: Any) -> tuple[str, dict[str, Any]]:
    """Run a program as `python -m asyncio` would: what it printed, and its names afterwards."""
    code: CodeType = compile(snippet, "snippet", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    printed = io.StringIO()

    async def main() -> None:
        found = eval(code, names)
        if code.co_flags & inspect.CO_COROUTINE:
            await cast("Awaitable[None]", found)
        for closing in ("behest", "client"):  # their connections belong to this loop
            if closing in names:
                await (names[closing].aclose() if closing == "behest" else names[closing].close())

    with contextlib.redirect_stdout(printed):
        asyncio.run(main())
    return printed.getvalue(), names


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def settings(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHEST_KEY", project.api_key)
    monkeypatch.setenv("BEHEST_BASE_URL", project.stack.base_url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.mark.usefixtures("settings")
def test_the_server_to_server_snippet_runs_as_it_is_written(project: Project, repository: Path) -> None:
    snippet = (repository / "tests" / "seed" / "server-to-server.py.txt").read_text()
    assert snippet.count("messages=...") == 1, "the one name that is left to the reader"
    printed, _ = run(snippet.replace("messages=...", "messages=messages"), messages=QUESTION, user_id="reader")
    assert printed.startswith("This is simulated text")
    assert [row["user_id"] for row in project.settled()] == ["reader"]


@pytest.mark.usefixtures("settings")
def test_the_snippets_of_the_clients_own_page_run(repository: Path) -> None:
    basic, thread, errors, rest = python_blocks(repository / "sdk" / "python" / "README.md")
    printed, _ = run(basic + thread + errors, messages=QUESTION)
    assert printed.startswith("This is simulated text")
    _, names = run("from behest import Behest\nbehest = Behest()\n" + rest)
    assert names["token"].session_id == "s-1"
    assert names["budgets"][0].window == "day"
    assert names["bill"].project_id


def test_the_snippets_for_the_unmodified_openai_package_run(project: Project, repository: Path) -> None:
    blocks = python_blocks(repository / "docs" / "openai-sdk.md")
    given = {
        "BEHEST_BASE_URL": project.stack.base_url,
        "token": project.mint(session="page"),
        "session_id": "page",
        "messages": QUESTION,
    }
    printed, _ = run("".join(blocks), **given)
    assert printed.startswith("This is simulated text")


def _openai(project: Project, session: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=project.stack.base_url + "/v1", api_key=project.mint(session=session), max_retries=0)


def test_told_difference_the_openai_package_requires_a_model(project: Project) -> None:
    with _openai(project, "model") as client:
        create: Any = client.chat.completions.create
        with pytest.raises(TypeError, match="model"):
            create(messages=QUESTION, stream=True)
        stream = client.chat.completions.create(model="default", messages=QUESTION, stream=True)
        assert {chunk.model for chunk in stream} == {"gpt-4o-mini"}


def test_told_difference_an_error_in_the_middle_has_a_code_and_no_status(stack: Stack) -> None:
    with _openai(stack.project(limit_usd="0.0005"), "middle") as client:
        stream = client.chat.completions.create(
            model="default", messages=QUESTION, stream=True, extra_body={"sim": {"output_tokens": 5000}}
        )
        with pytest.raises(openai.APIError) as cut:
            for _ in stream:
                pass
    assert cut.value.code == "quota_exceeded"
    assert not hasattr(cut.value, "status_code")
    body = cut.value.body
    assert isinstance(body, dict)
    assert cast("dict[str, Any]", body)["status"] == 402


def test_the_stream_helper_of_the_openai_package_works(project: Project) -> None:
    with (
        _openai(project, "helper") as client,
        client.chat.completions.stream(model="default", messages=QUESTION) as stream,
    ):
        types = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= types
    assert (whole.choices[0].message.content or "").startswith("This is simulated text")


def test_the_client_can_be_installed_alone(repository: Path, tmp_path: Path) -> None:
    """A wheel of it, and an interpreter that knows nothing of the gateway."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    source = str(repository / "sdk" / "python")
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), source],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("behest_client-*.whl")
    code = "import behest, sys; assert 'behest_proxy' not in sys.modules; print(behest.__file__)"
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(wheel)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert ran.stdout.startswith(str(wheel))
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert "behest/py.typed" in listed
    assert "LICENSE" in listed
