"""Operator and webhook tell no secret: marked ones go through both, and all that they tell and write is searched.

By what goes well and by what fails, at `debug`: log lines, the pages for Prometheus, what is pushed by OTLP, Events,
the status of resources, the Secrets that they write, the sidecars that they inject, and the ledger.
"""

import asyncio
import base64
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from behest_operator.crds import KINDS
from behest_proxy.cli.preflight import free_port
from cluster.control_plane import CommandFailed, ControlPlane
from cluster.operator_process import OperatorProcess, condition, eventually
from cluster.release import resource
from cluster.resources import forget_resources, install_crds
from cluster.sql import rows
from cluster.test_operator import ROLE
from cluster.webhook import Webhook, labelled_pod, running_webhook
from conftest import Server, execute, own_database
from ledger.houses import ALL_TABLES
from telemetry.receiver import Received, http_receiver
from telemetry.test_secrets import forms, mark, with_login

SHOP_LIMIT = {"scope": {"project": "shop"}, "limit": {"requests": 9}, "window": {"period": "Day"}}


@dataclass
class Told:
    """What went in, and everything that came out."""

    secrets: dict[str, str]
    logs: dict[str, str] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)
    pushed: list[Received] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    written: dict[str, dict[str, str]] = field(default_factory=dict)
    """The Secrets that the operator made: their values."""
    sidecar: str = ""
    tables: dict[str, str] = field(default_factory=dict)
    answers: list[int] = field(default_factory=list)

    def leaks(self, text: str, *, meant: tuple[str, ...] = ()) -> list[str]:
        found = {kind for kind, secret in self.secrets.items() if any(form in text for form in forms(secret))}
        return sorted(found - set(meant))


def secret_of(plane: ControlPlane, namespace: str, name: str, value: str) -> None:
    plane.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace},
            "stringData": {"api-key": value},
        }
    )


def upstream(namespace: str, name: str, **spec: Any) -> dict[str, Any]:
    made = resource("Upstream", name, {"baseURL": "https://api.openai.com/v1", **spec})
    made["metadata"]["namespace"] = namespace
    return made


def project(namespace: str, name: str, **spec: Any) -> dict[str, Any]:
    made = resource("Project", name, {"defaultModel": "m", **spec})
    made["metadata"]["namespace"] = namespace
    return made


def values_of(plane: ControlPlane, name: str, namespace: str) -> dict[str, str] | None:
    try:
        found = plane.get("secret", name, namespace)
    except CommandFailed:
        return None
    return {key: base64.b64decode(value).decode() for key, value in found["data"].items()}


def resources_go_through(plane: ControlPlane, told: Told) -> str:
    """What is taken and what is refused, with a secret in every place that could hold one; the namespace."""
    namespace, marked = plane.namespace("secrets"), told.secrets
    for name, kind in (("openai", "provider key"), ("odd", "odd key"), ("foreign", "foreign secret")):
        # A line break is in no key: this one cannot be used.
        secret_of(plane, namespace, name, f"{marked[kind]}\n{marked[kind]}" if name == "odd" else marked[kind])
    keys = {name: {"secretKeyRef": {"name": name, "key": "api-key"}} for name in ("openai", "odd")}
    plane.apply(
        project(namespace, "shop", systemPrompt=marked["system prompt"], apiKeySecretName="shop-key"),
        project(namespace, "taken", apiKeySecretName="foreign"),
        upstream(namespace, "openai", credentials=keys["openai"]),
        upstream(namespace, "odd", credentials=keys["odd"]),
        {**resource("Budget", "all", SHOP_LIMIT), "metadata": {"name": "all", "namespace": namespace}},
    )
    for name, url in (
        ("inside", f"https://user:{marked['URL password']}@api.openai.com/v1"),
        ("split", f"https://user:{marked['URL password']}/x@api.openai.com/v1"),
        ("query", f"https://api.openai.com/v1?key={marked['URL key']}"),
    ):
        # Whom the API server refuses it, has written it.
        try:
            plane.apply(upstream(namespace, name, baseURL=url))
        except CommandFailed:
            continue
        refused = eventually(partial(condition, plane, "upstream", name, namespace, "Accepted"), what=name)
        assert refused["status"] == "False"
        told.answers.append(400)
    for kind, name, type_, status in (
        ("project", "shop", "ApiKeyReady", "True"),
        ("project", "taken", "ApiKeyReady", "False"),
        ("upstream", "openai", "CredentialsReady", "True"),
        ("upstream", "odd", "CredentialsReady", "False"),
        ("budget", "all", "Programmed", "True"),
    ):
        found = eventually(partial(condition, plane, kind, name, namespace, type_), what=f"{type_} of {name}")
        assert found["status"] == status
    for name in ("behest-sidecar", "shop-key"):
        told.written[name] = eventually(partial(values_of, plane, name, namespace), what=name)
    marked["data key"] = told.written["behest-sidecar"]["data-key"]
    marked["signing key"] = "".join(told.written["behest-sidecar"]["signing-key.pem"].splitlines()[1:-1])[40:80]
    marked["sidecar's login"] = told.written["behest-sidecar"]["database-url"].split("@")[0].rpartition(":")[2]
    marked["API key"] = told.written["shop-key"]["api-key"]
    return namespace


def says(log: Path, words: str) -> bool:
    return words in log.read_text()


def the_ledger_goes_away(plane: ControlPlane, operator: OperatorProcess, template: Server, namespace: str) -> None:
    """Its login is refused, then the file with the login is broken in two ways; in the end it is as it was."""
    file = Path(operator.environment["BEHEST_DATABASE_URL_FILE"])
    whole = file.read_text()
    login, password = whole.split("//")[1].split("@")[0].split(":")
    ends = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{login}'"
    asyncio.run(execute(template.dsn, f"ALTER ROLE {login} NOLOGIN", ends))
    changed = {**SHOP_LIMIT, "limit": {"requests": 8}}
    plane.apply({**resource("Budget", "all", changed), "metadata": {"name": "all", "namespace": namespace}})

    def unknown() -> bool:
        found = condition(plane, "budget", "all", namespace, "Programmed")
        return found is not None and found["reason"] == "LedgerUnavailable"

    eventually(unknown, what="the word that the ledger is away")
    for text, words in (
        (whole.replace(password, f"{password[:-1]}/{password[-1]}"), "the ledger's login cannot be used"),
        (whole.replace("://", "//"), "the ledger's login cannot be read"),
    ):
        file.write_text(text)
        eventually(partial(says, operator.log, words), what=words)
    file.write_text(whole)
    asyncio.run(execute(template.dsn, f"ALTER ROLE {login} LOGIN"))

    def programmed() -> bool:
        found = condition(plane, "budget", "all", namespace, "Programmed")
        return found is not None and found["status"] == "True"

    eventually(programmed, what="the change")


def pods_go_through(plane: ControlPlane, webhook: Webhook, told: Told) -> None:
    """A pod that gets a sidecar, one that is refused, and calls that are none, each with secrets of its own."""
    namespace, marked = plane.namespace("pods"), told.secrets

    def pod(name: str, **spec: Any) -> dict[str, Any]:
        made = labelled_pod(name, namespace, **spec)
        made["spec"]["containers"][0] |= {
            "env": [{"name": "TOKEN", "value": marked["pod's variable"]}],
            "args": ["--key", marked["pod's argument"]],
        }
        made["metadata"]["annotations"]["example.com/note"] = marked["pod's annotation"]
        return made

    plane.apply(pod("web"))
    found = plane.get("pod", "web", namespace)
    told.sidecar = json.dumps(found["spec"]["initContainers"])
    with pytest.raises(CommandFailed, match="uses the host's network"):
        plane.apply(pod("host", hostNetwork=True))
    url = f"https://localhost:{webhook.port}/inject"
    for content in (
        marked["pod's variable"].encode(),
        json.dumps({"request": marked["pod's variable"]}).encode(),
        b'{"request": "' + marked["pod's variable"].encode() + b"\xff",
        json.dumps({"request": {"uid": "1", "object": pod("x"), "kind": {"kind": marked["pod's variable"]}}}).encode(),
    ):
        answer = httpx.post(url, content=content, verify=False)
        told.answers.append(answer.status_code)
        assert told.leaks(answer.text) == []
    (webhook.folder / "tls.key").write_text(marked["TLS key"])
    log = webhook.folder / "webhook.log"
    eventually(partial(says, log, "the certificate cannot be taken yet"), what="the broken key")


@pytest.fixture(scope="module")
def told(control_plane: ControlPlane, template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    install_crds(control_plane)
    kinds = ("password", "provider key", "foreign secret", "header", "system prompt", "URL password", "URL key")
    pods = ("pod's variable", "pod's argument", "pod's annotation", "TLS key")
    found = Told({kind: mark(kind).replace("'", "") for kind in (*kinds, *pods)})
    marked = found.secrets
    marked["odd key"] = mark("odd key")
    marked["master key"] = base64.b64encode(secrets.token_bytes(32)).decode()
    folder, login = tmp_path_factory.mktemp("secrets"), f"behest_secret_{os.getpid()}"
    asyncio.run(execute(template.dsn, f"CREATE ROLE {login} LOGIN SUPERUSER PASSWORD '{marked['password']}'"))
    with http_receiver() as received, own_database(template, "cluster_secrets") as dsn:
        found.pushed.append(received)
        pushing = {
            "OTEL_METRIC_EXPORT_INTERVAL": "200",
            "OTEL_EXPORTER_OTLP_ENDPOINT": received.endpoint,
            "OTEL_EXPORTER_OTLP_HEADERS": f"api-key={marked['header']}",
        }
        operator = operator_of(control_plane, with_login(dsn, login, marked["password"]), folder, marked, pushing)
        operator.start()
        try:
            namespace = resources_go_through(control_plane, found)
            the_ledger_goes_away(control_plane, operator, template, namespace)
            found.pages["operator"] = httpx.get(f"http://{operator.environment['BEHEST_METRICS_BIND']}/metrics").text
            with running_webhook(control_plane, tmp_path_factory.mktemp("webhook")) as webhook:
                webhook.stop()
                webhook.environment |= pushing
                webhook.start()
                pods_go_through(control_plane, webhook, found)
                found.pages["webhook"] = httpx.get(f"http://127.0.0.1:{webhook.probe_port}/metrics").text
            found.logs["webhook"] = (webhook.folder / "webhook.log").read_text()
            found.events = control_plane.items("event")
            found.resources = [item for kind in KINDS for item in control_plane.items(kind.lower())]
        finally:
            operator.stop()
            forget_resources(control_plane)
        found.logs["operator"] = operator.log.read_text()
        for row in rows(dsn, ALL_TABLES):
            if not row["part"]:
                text = rows(dsn, f"SELECT string_agg(to_jsonb(t)::text, ' ') AS text FROM ledger.{row['name']} t")
                found.tables[row["name"]] = text[0]["text"] or ""
        yield found
    asyncio.run(execute(template.dsn, f"DROP OWNED BY {login}", f"DROP ROLE {login}"))


def operator_of(
    plane: ControlPlane, dsn: str, folder: Path, marked: dict[str, str], more: dict[str, str]
) -> OperatorProcess:
    namespace = plane.namespace("operator")
    account = {"name": "operator", "namespace": namespace}
    plane.apply(
        ROLE,
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": namespace},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "behest-operator"},
            "subjects": [{"kind": "ServiceAccount", **account}],
        },
    )
    kubeconfig = plane.kubeconfig_of("operator", namespace)
    marked["service account's token"] = kubeconfig.read_text().partition("token:")[2].split()[0].strip("\"'}")
    (folder / "master-key").write_text(marked["master key"])
    (folder / "database-url").write_text(dsn)
    return OperatorProcess(
        plane=plane,
        dsn="",
        kubeconfig=kubeconfig,
        log=folder / "operator.log",
        environment={
            "BEHEST_DATABASE_URL_FILE": str(folder / "database-url"),
            "BEHEST_MASTER_KEY_FILE": str(folder / "master-key"),
            "BEHEST_METRICS_BIND": f"127.0.0.1:{free_port(0)}",
            "BEHEST_LOG_LEVEL": "debug",
            **more,
        },
    )


def test_no_line_of_their_logs_has_a_secret(told: Told) -> None:
    assert "wrote the Secret behest-sidecar" in told.logs["operator"]
    assert "keeping the ledger failed" in told.logs["operator"]
    assert "pod refused in namespace" in told.logs["webhook"]
    for who, text in told.logs.items():
        assert told.leaks(text) == [], who
        assert "Traceback" not in text, who
    assert told.answers[-4:] == [400] * 4


def test_neither_their_pages_for_prometheus_nor_what_they_push_has_a_secret(told: Told) -> None:
    assert "behest_operator_reconciles_total" in told.pages["operator"]
    assert "behest_webhook_" in told.pages["webhook"]
    for who, text in told.pages.items():
        assert told.leaks(text) == [], who
    names = {resource["service.name"] for received in told.pushed for resource in received.resources()}
    assert {name.rpartition("-")[2] for name in names} == {"operator", "webhook"}
    assert told.leaks("\n".join(raw.decode("latin-1") for received in told.pushed for raw in received.raw)) == []


def test_no_event_and_no_status_has_a_secret(told: Told) -> None:
    ours = [event for event in told.events if event.get("reportingComponent") == "behest-operator"]
    assert {event["type"] for event in ours} == {"Warning"}
    assert told.leaks(json.dumps(told.events)) == []
    assert len(told.resources) >= 5
    for item in told.resources:
        assert told.leaks(json.dumps(item["status"])) == [], item["metadata"]["name"]


def test_a_secret_is_written_only_where_it_belongs(told: Told) -> None:
    own = ("data key", "signing key", "sidecar's login")
    assert told.leaks(json.dumps(told.written["behest-sidecar"]), meant=own) == []
    assert told.leaks(json.dumps(told.written["shop-key"]), meant=("API key",)) == []
    assert '"name": "behest"' in told.sidecar
    assert told.leaks(told.sidecar) == []


def test_the_ledger_has_no_key_but_sealed_ones(told: Told) -> None:
    assert told.leaks(told.tables["project"]) == ["system prompt"], "else nothing would be found elsewhere either"
    assert told.tables["provider_key"]
    for table, text in told.tables.items():
        assert told.leaks(text, meant=("system prompt",) if table == "project" else ()) == [], table
