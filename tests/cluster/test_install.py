"""The chart on a real API server, with its pods run as a kubelet would: from `helm install` to the first 402."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.control_plane import CommandFailed, ControlPlane
from cluster.operator_process import condition, eventually
from cluster.pods import BEHEST, Pod, pod_of
from cluster.webhook import labelled_pod
from conftest import Server, execute
from stack import process, wait_until

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "behest"
IMAGE = "ghcr.io/behest/behest:0.1.0"
APPLICATION = """
import openai, sys
client = openai.OpenAI(max_retries=0)
for number in range(200):
    try:
        for chunk in client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}], stream=True,
            extra_body={"sim": {"output_tokens": 3000}},
        ):
            pass
        print("streamed", number, flush=True)
    except openai.APIStatusError as error:
        print("refused", error.status_code, error.code, flush=True)
        sys.exit(0)
    except openai.APIError as error:
        print("cut", error.code, flush=True)
sys.exit(1)
"""
IMAGES = {IMAGE: BEHEST, "app": [sys.executable, "-c", APPLICATION]}


@dataclass
class Release:
    """An installed chart whose operator and webhook run here."""

    plane: ControlPlane
    namespace: str
    dsn: str
    sim_url: str
    folder: Path
    operator: Pod
    webhook: Pod


@pytest.fixture(scope="module")
def release(
    control_plane: ControlPlane, postgres: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Release]:
    folder = tmp_path_factory.mktemp("release")
    database = f"behest_release_{os.getpid()}"
    asyncio.run(execute(postgres.dsn, f"CREATE DATABASE {database}"))
    dsn = postgres.of(database)
    namespace = control_plane.namespace("behest", labels={"pod-security.kubernetes.io/enforce": "restricted"})
    control_plane.kubectl(
        "create", "secret", "generic", "ledger", "--namespace", namespace, f"--from-literal=database-url={dsn}"
    )
    control_plane.helm(
        # The definitions may be there from other tests.
        "install", "b", str(CHART), "--namespace", namespace, "--take-ownership",
        "--set", "database.trial.enabled=false,database.external.secretName=ledger",
    )  # fmt: skip
    port_file = folder / "sim.port"
    with process(
        [*BEHEST, "sim", "--port", "0", "--port-file", str(port_file)], environment={}, log=folder / "sim.log"
    ):
        port = wait_until(lambda: port_file.exists() and port_file.read_text().strip(), what="the simulator's start")
        operator = Pod(control_plane, pod_of(control_plane, "b-operator", namespace), namespace, folder, IMAGES)
        # The pod's service account, as its files say it, is given as a kubeconfig: the paths of a pod are not ours.
        operator.environment["KUBECONFIG"] = str(control_plane.kubeconfig_of("b-operator", namespace))
        operator.start()
        webhook = Pod(control_plane, pod_of(control_plane, "b-webhook", namespace), namespace, folder, IMAGES)
        webhook.start()
        control_plane.route("b-webhook", namespace, webhook.port(9443))
        yield Release(control_plane, namespace, dsn, f"http://127.0.0.1:{port}/v1", folder, operator, webhook)
        webhook.stop()
        operator.stop()
        assert "Traceback" not in operator.containers["operator"].text()
    control_plane.helm("uninstall", "b", "--namespace", namespace)
    asyncio.run(execute(postgres.dsn, f"DROP DATABASE {database} WITH (FORCE)"))


def resources(release: Release, *, limit: str) -> list[dict[str, Any]]:
    def resource(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        return {"apiVersion": "behest.ai/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}

    secret = {"name": "openai", "key": "api-key"}
    return [
        resource("Project", "shop", {"defaultModel": "gpt-4o-mini"}),
        resource("Upstream", "openai", {"baseURL": release.sim_url, "credentials": {"secretKeyRef": secret}}),
        resource("Tier", "free", {"number": 1, "requestsPerMinute": 1000}),
        resource(
            "Budget",
            "shop",
            {
                "scope": {"project": "shop"},
                "limit": {"amount": limit, "currency": "USD"},
                "window": {"period": "Day"},
                "alertThresholds": [50, 90],
            },
        ),
    ]


def test_from_helm_install_to_the_first_402(control_plane: ControlPlane, release: Release) -> None:
    namespace = control_plane.namespace("app", labels={"pod-security.kubernetes.io/enforce": "restricted"})
    control_plane.kubectl(
        "create", "secret", "generic", "openai", "--namespace", namespace, "--from-literal=api-key=sk-0123456789abcdef"
    )
    control_plane.apply(*resources(release, limit="0.02"), namespace=namespace)
    for kind, name in (("project", "shop"), ("upstream", "openai"), ("tier", "free"), ("budget", "shop")):
        programmed = partial(condition, control_plane, kind, name, namespace, "Programmed")
        found = eventually(programmed, what=f"the reading of {kind}")
        assert found["status"] == "True"
    pod = create_injected(release, namespace)
    try:
        pod.start()
        app = pod.containers["app"]
        assert app.process.wait(120) == 0, app.text() + pod.containers["behest"].text()
        assert "refused 402 quota_exceeded" in app.text()
        table = eventually(
            lambda: (
                (text := control_plane.kubectl("get", "budgets", "--namespace", namespace))
                and "Exhausted" in text
                and text
            ),
            what="the phase Exhausted",
        )
        assert "0.02 USD" in table
        reasons = eventually(
            lambda: (
                found if {"BudgetWarning", "BudgetExhausted"} <= (found := events(control_plane, namespace)) else None
            ),
            what="the Events",
        )
        assert reasons >= {"BudgetWarning", "BudgetExhausted"}
        assert condition(control_plane, "budget", "shop", namespace, "Exhausted")
    finally:
        pod.stop()
    assert pod.containers["behest"].process.returncode == 0


def create_injected(release: Release, namespace: str) -> Pod:
    """A labelled pod that came back with its sidecar: until the API server knows the webhook, Fail refuses it."""

    refusal = ""

    def created() -> bool:
        nonlocal refusal
        try:
            release.plane.apply(labelled_pod("web", namespace))
        except CommandFailed as error:
            refusal = str(error)
            if "failed calling webhook" not in refusal:
                raise
            return False
        return True

    try:
        eventually(created, what="the webhook")
    except AssertionError:
        raise AssertionError(refusal) from None
    return Pod(release.plane, "web", namespace, release.folder, IMAGES)


def events(plane: ControlPlane, namespace: str) -> set[str]:
    found = json.loads(plane.kubectl("get", "events", "--namespace", namespace, "--output", "json"))
    return {item["reason"] for item in found["items"]}


def test_a_change_of_a_budget_is_enforced_within_two_seconds(control_plane: ControlPlane, release: Release) -> None:
    namespace = control_plane.namespace("fast")
    control_plane.kubectl(
        "create", "secret", "generic", "openai", "--namespace", namespace, "--from-literal=api-key=sk-0123456789abcdef"
    )
    control_plane.apply(*resources(release, limit="100"), namespace=namespace)
    eventually(lambda: condition(control_plane, "budget", "shop", namespace, "Programmed"))
    pod = create_injected(release, namespace)
    pod.object["spec"]["containers"] = []
    try:
        pod.start()
        import openai

        client = openai.OpenAI(base_url=pod.url(8079) + "/v1", api_key="behest-pod", max_retries=0)
        eventually(lambda: client.models.list().data, what="the first answer")
        control_plane.kubectl(
            "patch",
            "budget",
            "shop",
            "--namespace",
            namespace,
            "--type=merge",
            "--patch",
            '{"spec":{"suspended":true}}',
        )
        started_s = time.monotonic()

        def is_suspended() -> bool:
            try:
                client.chat.completions.create(
                    model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}], max_tokens=2
                )
            except openai.PermissionDeniedError:
                return True
            return False

        eventually(is_suspended, timeout_s=10, what="the suspension")
        assert time.monotonic() - started_s < 5, "two seconds on a machine that does nothing else"
        client.close()
    finally:
        pod.stop()
