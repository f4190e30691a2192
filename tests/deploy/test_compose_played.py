"""The Compose file, played: every service as a process, from what the file says, through one metered stream."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deploy.compose_player import Compose, played
from stack import wait_until

COMPOSE = Path(__file__).resolve().parents[2] / "deploy" / "compose"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: secrets.sh needs it")
def test_the_stack_comes_up_meters_a_stream_and_goes_down(tmp_path: Path) -> None:
    source = tmp_path / "compose"
    shutil.copytree(COMPOSE, source, ignore=shutil.ignore_patterns("secrets"))
    subprocess.run([str(source / "secrets.sh")], check=True, capture_output=True, timeout=60)
    folder = tmp_path / "run"
    folder.mkdir()
    with played(source / "compose.yaml", folder, "demo") as project:
        project.await_health("gateway")
        wait_until(lambda: project.returncode("configure") is not None, what="the end of configure")
        assert project.returncode("configure") == 0, project.log("configure")
        key = project.run("configure", "keys", "create", "--project", "default/demo").splitlines()[0]
        token = minted(project, key)
        with openai.OpenAI(base_url=project.url(8080) + "/v1", api_key=token, max_retries=0) as client:
            chunks = list(
                client.chat.completions.create(
                    model="gpt-4o-mini",
                    messages=[{"role": "user", "content": "hello"}],
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"sim": {"output_tokens": 200}},
                )
            )
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 200

        def charged() -> bool:
            # 200 tokens at 60 cents a million, and the question's.
            return "0.00012" in project.run("configure", "get", "budgets")

        wait_until(charged, what="the charge of the stream")
        for name in ("gateway", "keeper", "simulator"):
            assert project.returncode(name) is None, f"{name}: {project.log(name)}"
    for name in ("gateway", "keeper", "simulator"):
        assert project.returncode(name) == 0, f"{name}: {project.log(name)}"
        assert "Traceback" not in project.log(name)


def minted(project: Compose, key: str) -> str:
    def answer() -> str | None:
        found = httpx.post(
            f"{project.url(8080)}/v1/auth/mint",
            json={"user_id": "ada", "session_id": "s-1"},
            headers={"Authorization": f"Bearer {key}"},
        )
        return found.json()["jwt"] if found.status_code == 200 else None

    token: Any = wait_until(answer, what="a token")
    return str(token)
