"""The chat of examples/chat: its types, its build, and its backend."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from stack import Stack, process, wait_until
from typescript.packages import install, run

ORIGIN = "http://localhost:5173"


@pytest.fixture(scope="module")
def chat(repository: Path) -> Path:
    """Its folder, with its packages installed and the client built."""
    sdk = install(repository / "sdk" / "typescript")
    run(["npm", "run", "build"], sdk)
    return install(repository / "examples" / "chat")


def test_its_types_are_right_and_it_builds(chat: Path, tmp_path: Path) -> None:
    run(["npm", "run", "check"], chat)
    run(["npx", "vite", "build", "--outDir", str(tmp_path)], chat)
    (script,) = (tmp_path / "assets").glob("*.js")
    assert len(script.read_bytes()) < 500_000, "the whole page, with React"


def test_its_backend_gives_each_browser_tokens_of_one_user(chat: Path, stack: Stack, tmp_path: Path) -> None:
    project = stack.project(project=f"  allowedOrigins: [{ORIGIN}]")
    node = shutil.which("node")
    assert node is not None
    log = tmp_path / "chat.log"
    environment = {"BEHEST_BASE_URL": stack.base_url, "BEHEST_KEY": project.api_key, "PORT": "0"}
    with process([node, str(chat / "server.mjs")], environment=environment, log=log):
        found = wait_until(
            lambda: re.search(r"http://localhost:(\d+)", log.read_text()), timeout_s=120, what="the chat's start"
        )
        with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=60) as browser:
            assert '<div id="root">' in browser.get("/").text
            assert browser.get("/api/behest/token").status_code == 405
            assert browser.post("/api/behest/token", content="x").status_code == 405, "a form of another site"
            first = browser.post("/api/behest/token", headers={"Content-Type": "application/json"})
            assert "HttpOnly; SameSite=Strict" in first.headers["set-cookie"]
            again = browser.post("/api/behest/token", headers={"Content-Type": "application/json"})
            assert first.json()["sessionId"] == again.json()["sessionId"]
            assert project.api_key not in json.dumps(first.json())
    token = first.json()["token"]
    headers = {"Authorization": f"Bearer {token}", "Origin": ORIGIN}
    answer = httpx.get(stack.base_url + "/v1/budgets", headers=headers)
    assert answer.headers["access-control-allow-origin"] == ORIGIN


def test_without_a_gateway_it_says_what_to_do(chat: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BEHEST_")}
    done = subprocess.run(
        ["node", "server.mjs"],
        cwd=chat,
        env={**environment, "BEHEST_READY_FILE": str(tmp_path / "none.json")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "make up" in done.stderr
