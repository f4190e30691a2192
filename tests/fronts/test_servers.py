"""The same application under uvicorn and granian, through plain `send()`: slower, and the same to its callers."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from behest_proxy.cli.preflight import free_port
from stack import Project, Stack, process, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
PROMPT_TOKENS = 12
TIMEOUT = httpx.Timeout(30)
"""The first question of a model loads its vocabulary, on a machine that may be busy."""
_HERE = str(Path(__file__).parent)
_SERVERS = {
    "uvicorn": ["--app-dir", _HERE, "--host", "127.0.0.1", "--log-level", "warning"],
    "granian": ["--working-dir", _HERE, "--host", "127.0.0.1", "--interface", "asgi", "--log-level", "warning"],
}


@pytest.fixture(scope="module", params=_SERVERS)
def url(request: pytest.FixtureRequest, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A second sidecar on the stack's ledger, under another server."""
    name: str = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (make install-dev)")
    folder, port = tmp_path_factory.mktemp(name), free_port(0)
    key_file, log = folder / "signing.pem", folder / "server.log"
    key_file.write_bytes(stack.signing_key.private_pem())
    key_file.chmod(0o600)
    environment = {
        "BEHEST_DATABASE_URL": stack.dsn,
        "BEHEST_SIGNING_KEY_FILE": str(key_file),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    command = [sys.executable, "-m", name, *_SERVERS[name], "--port", str(port), "servers:app"]
    with process(command, environment=environment, log=log) as child:
        address = f"http://127.0.0.1:{port}"

        def is_up() -> bool:
            assert child.poll() is None, log.read_text()
            try:
                return httpx.get(address + "/.well-known/jwks.json").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_up, what=f"{name}'s start")
        yield address


@pytest.fixture
def project(stack: Stack, url: str) -> Project:
    made = stack.project(project='  allowedOrigins: ["https://shop.example"]')
    _until_it_knows(url, made)
    return made


def _until_it_knows(url: str, project: Project) -> None:
    headers = {"Authorization": f"Bearer {project.mint()}"}
    wait_until(
        lambda: httpx.get(url + "/v1/models", headers=headers).status_code != 403,
        what="the server's reading of the configuration",
    )


def _request(project: Project, **sim: Any) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {project.mint()}"}, "json": {"messages": QUESTION, "sim": sim}}


def _streamed(project: Project, **sim: Any) -> dict[str, Any]:
    asked = _request(project, **sim)
    asked["json"]["stream"] = True
    return asked


def test_a_streamed_chat(url: str, project: Project) -> None:
    asked = _streamed(project, output_tokens=50)
    asked["headers"]["Origin"] = "https://shop.example"
    answer = httpx.post(url + "/v1/chat/completions", timeout=TIMEOUT, **asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://shop.example"
    names = [name.lower() for name, _ in answer.headers.multi_items()]
    assert len(names) == len(set(names)), "two Access-Control-Allow-Origin, and no browser reads the answer"
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.text.endswith("data: [DONE]\n\n")
    assert len([line for line in answer.text.splitlines() if line.startswith("data: {")]) > 50
    (row,) = project.settled()
    assert (row["outcome"], row["source"], row["output_tokens"]) == ("completed", "provider", 50)


def test_chunks_are_sent_when_they_come(url: str, project: Project) -> None:
    asked = _streamed(project, output_tokens=10_000, chunk_interval_ms=10)
    with httpx.stream("POST", url + "/v1/chat/completions", timeout=TIMEOUT, **asked) as answer:
        pieces = answer.iter_raw()
        brought = [next(pieces).count(b"data: ") for _ in range(50)]
    assert sum(brought) / len(brought) < 3


def test_a_whole_answer(url: str, project: Project) -> None:
    answer = httpx.post(url + "/v1/chat/completions", timeout=TIMEOUT, **_request(project, output_tokens=20))
    assert answer.json()["usage"]["completion_tokens"] == 20
    (row,) = project.settled()
    assert (row["outcome"], row["output_tokens"]) == ("completed", 20)


def test_a_budget_that_ends_in_the_middle(url: str, stack: Stack) -> None:
    project = stack.project(limit_usd="0.00006")
    _until_it_knows(url, project)
    answer = httpx.post(
        url + "/v1/chat/completions", timeout=TIMEOUT, **_streamed(project, output_tokens=10_000, chunk_interval_ms=1)
    )
    assert answer.status_code == 200
    *_, terminal, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(terminal.removeprefix("data: "))["error"]["code"] == "quota_exceeded"
    refused = httpx.post(url + "/v1/chat/completions", timeout=TIMEOUT, **_streamed(project))
    assert refused.status_code == 402
    row = project.settled()[0]
    assert 0 < row["amount_pico"] <= 60_000_000


def test_a_client_that_leaves_stops_the_provider(url: str, project: Project) -> None:
    with httpx.stream(
        "POST",
        url + "/v1/chat/completions",
        timeout=TIMEOUT,
        **_streamed(project, output_tokens=10_000, chunk_interval_ms=5),
    ) as answer:
        lines = answer.iter_lines()
        for _ in range(20):
            next(lines)
        request_id = answer.headers["x-request-id"]
    wait_until(
        lambda: (found := project.stack.sim_request(request_id)) and found["outcome"] == "cancelled",
        what="the provider's seeing the cancel",
    )
    (row,) = project.settled()
    assert (row["outcome"], row["source"], row["input_tokens"]) == ("client_cancelled", "local", PROMPT_TOKENS)
    assert 0 < row["output_tokens"] < 1000
