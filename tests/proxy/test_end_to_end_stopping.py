"""What happens to streams and books when the sidecar is told to stop, and when the ledger does not answer."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from behest_ledger.store.pool import connect
from behest_proxy.app.asgi import client_app
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.settings import Settings
from stack import Stack, running_stack, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]


def _in_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    return thread, found


def test_a_sidecar_that_is_told_to_stop_ends_its_streams_properly_and_settles_them(
    database: str, tmp_path: Path
) -> None:
    with running_stack(database, tmp_path, BEHEST_DRAIN_S="0.5") as stack:
        project = stack.project()
        headers = {"Authorization": f"Bearer {project.mint()}"}

        def read() -> str:
            return httpx.post(
                stack.base_url + "/v1/chat/completions",
                headers=headers,
                json={
                    "messages": QUESTION,
                    "stream": True,
                    "sim": {"output_tokens": 10_000, "chunk_interval_ms": 10},
                },
                timeout=30,
            ).text

        thread, texts = _in_background(read)
        wait_until(lambda: stack.sim_requests(), what="the stream's begin")
        stack.sidecar.send_signal(signal.SIGTERM)
        began_s = time.monotonic()
        thread.join(20)
        assert stack.sidecar.wait(60) == 0
        assert time.monotonic() - began_s < 5
        *_, terminal, done, rest = texts[0].split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert json.loads(terminal.removeprefix("data: "))["error"]["code"] == "draining"
        (row,) = project.settled()
        assert row["outcome"] == "draining"
        assert row["output_tokens"] > 0
        assert stack.verify().findings == []


@pytest.mark.parametrize("more", [[], [(b"idempotency-key", b"once")]], ids=["plain", "kept"])
def test_a_request_that_was_uploading_when_the_process_was_told_to_stop_is_not_admitted(
    stack: Stack, tmp_path: Path, more: list[tuple[bytes, bytes]]
) -> None:
    project = stack.project()
    headers = [(b"authorization", f"Bearer {project.mint()}".encode()), *more]
    key_file = tmp_path / "signing.pem"
    key_file.write_bytes(stack.signing_key.private_pem())
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def scenario() -> None:
        gateway = Gateway(Settings(database_url=stack.dsn, signing_key_file=key_file))
        await gateway.start()
        body = json.dumps({"messages": QUESTION, "sim": {"output_tokens": 3}}).encode()

        async def receive() -> Any:
            if gateway.draining:
                return {"type": "http.disconnect"}
            gateway.draining = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
            await client_app(gateway)(scope, receive, send)
        finally:
            await gateway.aclose()

    asyncio.run(scenario())
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error"]["code"] == "draining"
    assert stack.query("SELECT FROM ledger.hold WHERE tenant_id = $1", project.namespace) == []


def test_without_the_ledgers_answer_nothing_is_sent(stack: Stack) -> None:
    project = stack.project()
    headers = {"Authorization": f"Bearer {project.mint()}"}
    body = {"messages": QUESTION, "stream": True, "sim": {"output_tokens": 3}}
    url = stack.base_url + "/v1/chat/completions"
    assert httpx.post(url, headers=headers, json=body).status_code == 200
    project.settled()
    seen_before = len(stack.sim_requests())

    async def scenario() -> httpx.Response:
        connection = await connect(stack.dsn)
        try:
            async with connection.transaction():
                await connection.execute(
                    "SELECT 1 FROM ledger.budget_window WHERE tenant_id = $1 FOR UPDATE", project.namespace
                )
                async with httpx.AsyncClient() as client:
                    return await client.post(url, headers=headers, json=body, timeout=30)
        finally:
            await connection.close()

    answer = asyncio.run(scenario())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert answer.headers["retry-after"] == "1"
    assert len(stack.sim_requests()) == seen_before
    # Its void reached the books: nothing stays held, and the next request goes through.
    wait_until(lambda: project.budgets(project.mint())["sessions"]["held"] == "0", what="the release")
    assert httpx.post(url, headers=headers, json=body).status_code == 200


def test_a_wrong_environment_is_told_by_the_name_of_its_variable(tmp_path: Path) -> None:
    import subprocess
    import sys

    def told(**environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-I", "-m", "behest_proxy.cli.main", "proxy"],
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done.returncode, done.stderr

    status, text = told()
    assert (status, "BEHEST_DATABASE_URL is not set" in text) == (2, True)
    key = tmp_path / "missing.pem"
    status, text = told(BEHEST_DATABASE_URL="postgresql://127.0.0.1:1/x", BEHEST_SIGNING_KEY_FILE=str(key))
    assert (status, str(key) in text) == (2, True)
    status, text = told(
        BEHEST_DATABASE_URL="postgresql://127.0.0.1:1/x", BEHEST_SIGNING_KEY_FILE=str(key), BEHEST_DRAIN_S="soon"
    )
    assert (status, "BEHEST_DRAIN_S must be a number" in text) == (2, True)
