"""Gateway mode: the chart's gateway pod serves two tenants, with the keys that their Projects' Secrets hold."""

import asyncio
import base64
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import openai
import pytest

from cluster.chart import CHART
from cluster.control_plane import CommandFailed, ControlPlane
from cluster.operator_process import condition, eventually
from cluster.pods import BEHEST, Pod, pod_of
from cluster.sql import rows
from conftest import Server, execute

IMAGES = {"ghcr.io/behest/behest:0.1.0": BEHEST}
WORDS = 400
"""Of one answer: at a dollar a thousand tokens, forty cents."""


@dataclass
class Provider:
    """A provider that remembers which key paid for which answer."""

    url: str
    keys: list[str] = field(default_factory=list)


class _Answers(BaseHTTPRequestHandler):
    provider: Provider

    def do_POST(self) -> None:
        """One streamed answer of `WORDS` tokens."""
        self.rfile.read(int(self.headers["content-length"]))
        self.provider.keys.append(self.headers["authorization"])
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for number in range(WORDS):
            delta: dict[str, Any] = {"index": 0, "delta": {"content": " word"}, "finish_reason": None}
            if number == WORDS - 1:
                delta["finish_reason"] = "stop"
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [delta]}
            try:
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            except OSError:
                return
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as it is called
        """Say nothing."""


@pytest.fixture
def provider() -> Iterator[Provider]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    _Answers.provider = Provider(f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, daemon=True, name="provider").start()
    yield _Answers.provider
    server.shutdown()
    server.server_close()


@dataclass
class Release:
    """An installed chart whose operator and gateway run here."""

    namespace: str
    gateway: Pod


@pytest.fixture
def release(control_plane: ControlPlane, postgres: Server, tmp_path: Path) -> Iterator[Release]:
    database = f"behest_gateway_{os.getpid()}"
    asyncio.run(execute(postgres.dsn, f"CREATE DATABASE {database}"))
    namespace = control_plane.namespace("behest", labels={"pod-security.kubernetes.io/enforce": "restricted"})
    control_plane.kubectl(
        "create", "secret", "generic", "ledger", "--namespace", namespace,
        f"--from-literal=database-url={postgres.of(database)}",
    )  # fmt: skip
    control_plane.helm(
        "install", "g", str(CHART), "--namespace", namespace, "--take-ownership", "--set",
        "gateway.enabled=true,webhook.enabled=false,database.trial.enabled=false,database.external.secretName=ledger",
    )  # fmt: skip
    operator = Pod(control_plane, pod_of(control_plane, "g-operator", namespace), namespace, tmp_path, IMAGES)
    operator.environment["KUBECONFIG"] = str(control_plane.kubeconfig_of("g-operator", namespace))
    gateway = Pod(control_plane, pod_of(control_plane, "g-gateway", namespace), namespace, tmp_path, IMAGES)
    try:
        operator.start()
        gateway.start()
        yield Release(namespace, gateway)
    finally:
        gateway.stop()
        operator.stop()
        control_plane.helm("uninstall", "g", "--namespace", namespace)
        asyncio.run(execute(postgres.dsn, f"DROP DATABASE {database} WITH (FORCE)"))
    for pod, name in ((gateway, "gateway"), (operator, "operator")):
        assert "Traceback" not in pod.containers[name].text()


def tenant(plane: ControlPlane, provider: Provider, *, key: str, limit: str) -> str:
    """A namespace with a project, its provider and a budget, in force."""
    namespace = plane.namespace("tenant")
    plane.kubectl("create", "secret", "generic", "openai", "--namespace", namespace, f"--from-literal=api-key={key}")
    prices = {"input": "0", "output": "1000"}
    specs: dict[str, dict[str, Any]] = {
        "Project": {"defaultModel": "m", "apiKeySecretName": "shop-behest-key"},
        "Upstream": {
            "baseURL": provider.url,
            "credentials": {"secretKeyRef": {"name": "openai", "key": "api-key"}},
            "models": [{"name": "m", "prices": prices, "contextLimit": 8000}],
        },
        "Budget": {
            "scope": {"project": "shop"},
            "limit": {"amount": limit, "currency": "USD"},
            "window": {"period": "Lifetime"},
        },
    }
    plane.apply(
        *(
            {"apiVersion": "behest.ai/v1alpha1", "kind": kind, "metadata": {"name": "shop"}, "spec": spec}
            for kind, spec in specs.items()
        ),
        namespace=namespace,
    )
    for kind in specs:
        programmed = partial(condition, plane, kind.lower(), "shop", namespace, "Programmed", "True")
        eventually(programmed, what=f"the {kind}")
    return namespace


def api_key(plane: ControlPlane, namespace: str) -> str:
    def there() -> str | None:
        try:
            found = plane.get("secret", "shop-behest-key", namespace)
        except CommandFailed:
            return None
        return base64.b64decode(found["data"]["api-key"]).decode()

    found: str = eventually(there, what="the project's API key")
    return found


def minted(url: str, key: str, user: str) -> str:
    def answer() -> str | None:
        found = httpx.post(
            f"{url}/v1/auth/mint",
            json={"user_id": user, "session_id": "s-1"},
            headers={"Authorization": f"Bearer {key}"},
        )
        return found.json()["jwt"] if found.status_code == 200 else None

    token: str = eventually(answer, what="a token")
    return token


def has_models(client: openai.OpenAI) -> bool:
    try:
        return bool(client.models.list().data)
    except openai.APIStatusError:
        return False  # it has not read of the project yet


def spend(client: openai.OpenAI, *, answers: int) -> tuple[int, str | None]:
    """Stream one answer after the other: how many words came, and with which code it ended."""
    words = 0
    for _ in range(answers):
        try:
            for chunk in client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hello"}], stream=True
            ):
                words += sum(len((choice.delta.content or "").split()) for choice in chunk.choices)
        except openai.APIStatusError as error:
            return words, f"{error.status_code} {error.code}"
        except openai.APIError as error:
            if error.code != "quota_exceeded":
                raise
    return words, None


def test_one_gateway_serves_two_tenants_and_stops_only_the_one_whose_budget_is_spent(
    control_plane: ControlPlane, release: Release, provider: Provider
) -> None:
    poor = tenant(control_plane, provider, key="sk-of-the-poor-one", limit="1")
    rich = tenant(control_plane, provider, key="sk-of-the-rich-one", limit="1000")
    url = release.gateway.url(8080)
    clients = {
        name: openai.OpenAI(
            base_url=f"{url}/v1", api_key=minted(url, api_key(control_plane, name), "ada"), max_retries=0
        )
        for name in (poor, rich)
    }
    for client in clients.values():
        eventually(partial(has_models, client), what="the tenants' models")
    words, end = spend(clients[poor], answers=10)
    assert end == "402 quota_exceeded"
    assert 900 <= words <= 1000, "a dollar pays for a thousand words, and the last of them are not always held"
    words, end = spend(clients[rich], answers=4)
    assert (words, end) == (4 * WORDS, None)
    assert set(provider.keys) == {"Bearer sk-of-the-poor-one", "Bearer sk-of-the-rich-one"}
    assert provider.keys[-4:] == ["Bearer sk-of-the-rich-one"] * 4
    ended = eventually(
        lambda: (text := control_plane.kubectl("get", "budgets", "--namespace", poor)) and "Exhausted" in text and text,
        what="the phase Exhausted",
    )
    assert "1 USD" in ended
    assert "Exhausted" not in control_plane.kubectl("get", "budgets", "--namespace", rich)


def test_what_the_gateway_signs_outlives_its_pod(
    control_plane: ControlPlane, release: Release, provider: Provider, tmp_path: Path
) -> None:
    name = tenant(control_plane, provider, key="sk-of-the-only-one", limit="1000")
    url = release.gateway.url(8080)
    token = minted(url, api_key(control_plane, name), "ada")
    release.gateway.stop()
    assert release.gateway.containers["gateway"].process.returncode == 0
    again = Pod(
        control_plane, pod_of(control_plane, "g-gateway", release.namespace), release.namespace, tmp_path, IMAGES
    )
    try:
        again.start()
        client = openai.OpenAI(base_url=f"{again.url(8080)}/v1", api_key=token, max_retries=0)
        assert spend(client, answers=1) == (WORDS, None)
    finally:
        again.stop()


def test_the_gateways_login_serves_every_tenant_and_owns_nothing(control_plane: ControlPlane, release: Release) -> None:
    found = control_plane.get("secret", "g-gateway-login", release.namespace)
    login = base64.b64decode(found["data"]["database-url"]).decode()
    assert release.gateway.object["spec"]["volumes"][0]["secret"]["secretName"] == "g-gateway-login"
    assert rows(login, "SELECT ledger.session_tenants_v1() AS tenants") == [{"tenants": None}]
    for statement in (
        "UPDATE ledger.budget SET limit_amount = 0",
        "INSERT INTO ledger.posting DEFAULT VALUES",
        "SELECT ledger.correct_one_v1(NULL, NULL, NULL, NULL, NULL, NULL)",
        "CREATE ROLE more",
        "DROP SCHEMA ledger",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            rows(login, statement)


def test_helm_test_looks_at_the_books(control_plane: ControlPlane, release: Release, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as beside:
        answer = beside.submit(
            control_plane.helm, "test", "g", "--namespace", release.namespace, "--timeout", "170s", "--debug"
        )

        def there() -> Pod | None:
            try:
                return Pod(control_plane, "g-test-ledger", release.namespace, tmp_path, IMAGES)
            except CommandFailed:
                (tmp_path / f"{release.namespace}-g-test-ledger").rmdir()
                return None

        pod: Pod = eventually(there, what="the pod of the test")
        pod.start()
        container = pod.containers["verify"]
        assert container.process.wait(120) == 0, container.text()
        # What a kubelet would say.
        control_plane.kubectl(
            "patch", "pod", "g-test-ledger", "--namespace", release.namespace, "--subresource=status", "--type=merge",
            "--patch", '{"status": {"phase": "Succeeded"}}',
        )  # fmt: skip
        assert "Phase:          Succeeded" in answer.result(180)
