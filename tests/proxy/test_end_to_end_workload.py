"""A sidecar in a pod: the workload needs no token on the pod's own loopback, and rotated files are taken."""

import asyncio
import base64
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest

from behest_ledger.sealing import tenant_key
from behest_ledger.store.configuration import apply_text
from behest_ledger.store.pool import connect
from behest_ledger.store.provider_keys import put_key, upstream_place
from behest_ledger.store.roles import create_role, drop_role, list_roles
from behest_proxy.cli.preflight import free_port
from behest_proxy.identity.keys import SigningKey
from conftest import Server, execute
from stack import Stack, running_stack, wait_until

MASTER_KEY = bytes(range(32))
MANIFESTS = """
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {name: shop, namespace: pod}
spec: {tenant: acme, defaultModel: gpt-4o-mini}
---
apiVersion: behest.ai/v1alpha1
kind: Upstream
metadata: {name: provider, namespace: pod}
spec: {baseURL: SIM, credentials: {secretKeyRef: {name: provider, key: api-key}}}
---
apiVersion: behest.ai/v1alpha1
kind: Upstream
metadata: {name: echo, namespace: pod}
spec:
  baseURL: ECHO
  credentials: {secretKeyRef: {name: echo, key: api-key}}
  models: [{name: echo, free: true}]
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: web, namespace: pod}
spec:
  scope: {workloadSelector: {matchLabels: {app: web}}}
  limit: {tokens: 2000}
  window: {period: Day}
"""


@dataclass
class Pod:
    stack: Stack
    url: str
    folder: Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="behest-pod", max_retries=0)


class _Echo(BaseHTTPRequestHandler):
    """A provider that answers with the credentials it was shown."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        shown = self.headers["authorization"]
        choice = {"index": 0, "delta": {"content": shown}, "finish_reason": "stop"}
        event = {"id": "1", "object": "chat.completion.chunk", "model": "echo", "choices": [choice]}
        body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 - the base class names it so


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


async def _role(dsn: str, name: str) -> str:
    connection = await connect(dsn)
    password = secrets.token_urlsafe(16)
    try:
        await create_role(connection, name, tenants=["acme"], password=password)
    finally:
        await connection.close()
    return dsn.replace(dsn.split("//")[1].split("@", maxsplit=1)[0], f"{name}:{password}", 1)


async def _drop(dsn: str, *names: str) -> None:
    connection = await connect(dsn)
    try:
        known = {role.name for role in await list_roles(connection)}
        for name in known & set(names):
            await drop_role(connection, name)
    finally:
        await connection.close()


@pytest.fixture(scope="module")
def pod(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    folder = tmp_path_factory.mktemp("pod")
    name = f"behest_pod_{os.getpid()}"
    asyncio.run(execute(template.dsn, f"CREATE DATABASE {name} TEMPLATE behest_template"))
    dsn = template.of(name)
    roles = [f"pod-{os.getpid()}-a", f"pod-{os.getpid()}-b"]
    (folder / "database-url").write_text(asyncio.run(_role(dsn, roles[0])))
    (folder / "data-key").write_text(base64.b64encode(tenant_key(MASTER_KEY, "acme")).decode())
    port = free_port(0)
    with (
        _echo() as echo_url,
        running_stack(
            dsn,
            folder,
            BEHEST_DATABASE_URL="",
            BEHEST_DATABASE_URL_FILE=str(folder / "database-url"),
            BEHEST_DATA_KEY_FILE=str(folder / "data-key"),
            BEHEST_POD_BIND=f"127.0.0.1:{port}",
            BEHEST_WORKLOAD_NAMESPACE="pod",
            BEHEST_WORKLOAD_NAME="web",
            BEHEST_WORKLOAD_PROJECT="shop",
            BEHEST_WORKLOAD_LABELS='{"app":"web"}',
        ) as stack,
    ):

        async def seal() -> None:
            connection = await connect(dsn)
            try:
                for upstream in ("provider", "echo"):
                    await put_key(
                        connection,
                        tenant_id="acme",
                        place=upstream_place(f"pod/{upstream}"),
                        secret=f"sk-{upstream}-0123456789",
                        key=tenant_key(MASTER_KEY, "acme"),
                    )
            finally:
                await connection.close()

        stack.run(seal())
        stack.run(apply_text(dsn, MANIFESTS.replace("SIM", stack.sim_url).replace("ECHO", echo_url)))
        found = Pod(stack, f"http://127.0.0.1:{port}", folder)

        def is_known() -> bool:
            answer = httpx.get(found.url + "/v1/models", headers={"Authorization": "Bearer behest-pod"})
            return answer.status_code == 200

        wait_until(is_known, what="the sidecar's reading of the configuration")
        try:
            yield found
        finally:
            asyncio.run(_drop(dsn, *roles))
    asyncio.run(execute(template.dsn, f"DROP DATABASE {name} WITH (FORCE)"))


def test_the_provider_is_called_with_the_key_that_was_sealed_in_the_ledger(pod: Pod) -> None:
    answer = httpx.post(
        pod.url + "/v1/chat/completions",
        json={"model": "echo", "messages": [{"role": "user", "content": "hello"}]},
        headers={"Authorization": "Bearer behest-pod"},
    )
    assert answer.json()["choices"][0]["message"]["content"] == "Bearer sk-echo-0123456789"


def test_an_unmodified_client_without_a_token_is_the_workload_until_its_budget_is_gone(pod: Pod) -> None:
    with pod.client() as client:
        answer = client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}], max_tokens=20
        )
    assert answer.choices[0].message.content
    rows = wait_until(
        lambda: pod.stack.query(
            "SELECT user_id, attributes ->> 'workload' AS workload FROM ledger.request WHERE model = 'gpt-4o-mini'"
        ),
        what="the settlement",
    )
    assert rows[0] == {"user_id": "workload:pod/web", "workload": "pod/web"}

    def spend_on() -> None:
        with pod.client() as client:
            for _ in range(100):
                stream = client.chat.completions.create(
                    model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}], stream=True
                )
                for _chunk in stream:
                    pass

    with pytest.raises(openai.APIError) as caught:
        spend_on()
    assert caught.value.code == "quota_exceeded"


def test_where_services_connect_only_tokens_count(pod: Pod) -> None:
    answer = httpx.get(pod.stack.base_url + "/v1/models", headers={"Authorization": "Bearer behest-pod"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_token")


def test_what_looks_like_a_token_must_be_a_good_one_also_on_the_pods_loopback(pod: Pod) -> None:
    answer = httpx.get(pod.url + "/v1/models", headers={"Authorization": "Bearer a.b.c"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_token")


def test_a_rotated_login_and_signing_key_are_taken_without_a_restart(pod: Pod) -> None:
    dsn = asyncio.run(_role(pod.stack.dsn, f"pod-{os.getpid()}-b"))
    (pod.folder / "database-url").write_text(dsn)
    key = SigningKey.generate()
    (pod.folder / "signing.pem").write_bytes(key.private_pem())

    def logins() -> set[str]:
        rows = pod.stack.query(
            "SELECT usename FROM pg_stat_activity WHERE application_name = 'behest' AND datname = current_database()"
        )
        return {row["usename"] for row in rows}

    wait_until(lambda: f"pod-{os.getpid()}-b" in logins(), what="the new login")

    def kids() -> set[str]:
        keys = httpx.get(pod.stack.base_url + "/.well-known/jwks.json").json()["keys"]
        return {item["kid"].partition(".")[0] for item in keys}

    wait_until(lambda: key.kid in kids(), what="the new signing key")
    # The holder was registered under the former login, and lives on under the new one.
    renewed = "SELECT renewed_at FROM ledger.holder WHERE fenced_at IS NULL"
    before = pod.stack.query(renewed)
    wait_until(
        lambda: pod.stack.query(renewed)[0]["renewed_at"] > before[0]["renewed_at"],
        what="a renewal under the new login",
    )


def test_drain_makes_the_sidecar_unready_and_returns_when_nothing_runs(pod: Pod) -> None:
    port = pod.stack.admin_url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-I", "-m", "behest_proxy.cli.main", "drain", "--least", "0.1"],
        env={"BEHEST_ADMIN_BIND": f"0.0.0.0:{port}", "BEHEST_DRAIN_S": "5"},
        timeout=20,
    )
    assert done.returncode == 0
    assert httpx.get(pod.stack.admin_url + "/readyz").status_code == 503


def test_beside_an_application_there_is_no_page_that_shows_it_what_others_spend(pod: Pod) -> None:
    for path in ("/", "/page/now.json", "/page/sessions.json?q=s"):
        assert httpx.get(pod.stack.admin_url + path).status_code == 404
    assert httpx.get(pod.stack.admin_url + "/healthz").status_code == 200
