"""A project's own key for a provider: sealed by the command, used by the sidecar, shown to nobody."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from conftest import Server, own_database
from stack import Project, Stack, running_stack, wait_until

MASTER_KEY = bytes(range(32))
SECRET = "sk-own-0123456789-WXYZ"
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "stream": True}


class _Echo(BaseHTTPRequestHandler):
    """A provider that answers with the credentials it was shown."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "delta": {"content": self.headers["authorization"]}, "finish_reason": "stop"}
        event = {"id": "1", "object": "chat.completion.chunk", "model": "echo", "choices": [choice]}
        body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *_: object) -> None: ...  # noqa: A002 - as the base class names it


@contextmanager
def _echo() -> Generator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def project(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("byok")
    (folder / "master-key").write_text(base64.b64encode(MASTER_KEY).decode() + "\n")
    with (
        own_database(template, "byok") as dsn,
        _echo() as url,
        running_stack(
            dsn,
            folder,
            BEHEST_MASTER_KEY_FILE=str(folder / "master-key"),
            BEHEST_PROVIDER_KEY_ENV=f"KEY_OF_THE_MANIFEST={url.removesuffix('/v1')}",
            KEY_OF_THE_MANIFEST="sk-of-the-manifest",
        ) as stack,
    ):
        yield stack.project(upstream_url=url, upstream="  byok: true")


def command(
    stack: Stack, *argv: str, given: str = "", master_key: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BEHEST_")}
    if master_key is not None:
        environment["BEHEST_MASTER_KEY_FILE"] = str(master_key)
    return subprocess.run(
        [sys.executable, "-I", "-m", "behest_proxy.cli.main", "provider-keys", *argv],
        env={**environment, "DATABASE_URL": stack.dsn},
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=stack.log.parent,
    )


def asked(project: Project) -> httpx.Response:
    return httpx.post(
        project.stack.base_url + "/v1/chat/completions",
        json=BODY,
        headers={"Authorization": f"Bearer {project.mint()}"},
    )


def test_a_projects_own_key_is_used_marked_and_shown_to_nobody(project: Project) -> None:
    stack, master_key = project.stack, project.stack.log.parent / "master-key"
    which = ["--project", project.project_id, "--provider", "provider"]
    assert "No project has keys" in command(stack, "list").stdout
    missing = asked(project)
    assert (missing.status_code, missing.json()["error"]["code"]) == (400, "no_provider_key")

    # Without the master key nothing is written.
    closed = command(stack, "set", *which, given=SECRET)
    assert closed.returncode == 2
    assert "there is no master key" in closed.stderr
    assert stack.query("SELECT FROM ledger.provider_key") == []

    done = command(stack, "set", *which, given=SECRET + "\n", master_key=master_key)
    assert (done.returncode, done.stderr) == (0, "")
    listed = command(stack, "list", "--project", project.project_id)
    assert listed.stdout.split()[-4:] == [project.namespace, project.project_id, "provider", "...WXYZ"]
    assert SECRET not in done.stdout + listed.stdout
    (row,) = stack.query("SELECT sealed FROM ledger.provider_key")
    assert SECRET.encode() not in row["sealed"]

    answer = wait_until(lambda: (found := asked(project)).status_code == 200 and found, what="the use of the key")
    assert f"Bearer {SECRET}" in answer.text
    project.settled()
    usage = httpx.get(
        stack.base_url + "/v1/billing/usage", headers={"Authorization": f"Bearer {project.mint(role='admin')}"}
    ).json()
    assert (usage["platform"]["requests"], usage["byok"]["requests"]) == (0, 1)
    assert usage["byok"]["by_model"][0]["model"] == "gpt-4o-mini"
    assert SECRET not in stack.log.read_text()

    assert command(stack, "delete", *which).returncode == 0
    wait_until(lambda: asked(project).status_code == 400, what="the end of the key")
    assert command(stack, "delete", *which).returncode == 2


@pytest.mark.parametrize(
    ("master_key", "given", "told"),
    [
        ("c2hvcnQ=", SECRET, "32 bytes"),
        ("", SECRET, "32 bytes"),
        (None, "", "the key is empty"),
        (None, "a\nb", "printable"),
    ],
)
def test_a_key_that_cannot_be_kept_is_refused(
    project: Project, tmp_path: Path, master_key: str | None, given: str, told: str
) -> None:
    path = tmp_path / "key"
    path.write_text(base64.b64encode(MASTER_KEY).decode() if master_key is None else master_key)
    arguments = ["--project", project.project_id, "--provider", "openai", "--master-key-file", str(path)]
    done = command(project.stack, "set", *arguments, given=given)
    assert done.returncode == 2
    assert told in done.stderr


def test_an_upstream_elsewhere_does_not_get_a_key_of_the_environment(project: Project) -> None:
    with _echo() as elsewhere:
        thief = project.stack.project(upstream_url=elsewhere, upstream="  credentials: {env: KEY_OF_THE_MANIFEST}")
        answer = asked(thief)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "server_error")
    assert "allows it in BEHEST_PROVIDER_KEY_ENV" in answer.json()["error"]["message"]


def test_without_a_key_of_its_own_a_project_calls_with_what_the_manifest_names(project: Project) -> None:
    stack, master_key = project.stack, project.stack.log.parent / "master-key"
    other = stack.project(
        upstream_url=stack.query(
            "SELECT spec ->> 'baseURL' AS url FROM ledger.upstream WHERE namespace = $1", project.namespace
        )[0]["url"],
        upstream="  byok: true\n  credentials: {env: KEY_OF_THE_MANIFEST}",
    )
    assert "Bearer sk-of-the-manifest" in asked(other).text
    which = ["--project", other.project_id, "--provider", "provider"]
    assert command(stack, "set", *which, given=SECRET, master_key=master_key).returncode == 0
    wait_until(lambda: f"Bearer {SECRET}" in asked(other).text, what="the use of its own key")
    assert command(stack, "delete", *which).returncode == 0
    wait_until(lambda: "Bearer sk-of-the-manifest" in asked(other).text, what="the manifest's key again")
    # Both are the tenant's own: neither is billed as the platform's.
    bill = httpx.get(
        stack.base_url + "/v1/billing/usage", headers={"Authorization": f"Bearer {other.mint(role='admin')}"}
    ).json()
    assert bill["platform"]["requests"] == 0
    assert bill["byok"]["requests"] > 0
