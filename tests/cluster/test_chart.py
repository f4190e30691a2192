"""The chart with many values: on the API server, under the Pod Security Standard, for versions of Kubernetes."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
import pytest
import yaml

from behest_operator.sidecar import Template, patch
from cluster.binaries import ProgramMissing
from cluster.chart import CHART, MATRIX, WRONG, as_list, documents, flags, pod_templates, rendered
from cluster.control_plane import CommandFailed, ControlPlane
from cluster.kubernetes_schemas import VERSIONS, Schemas, schemas_of
from cluster.resources import install_crds

FOREIGN = {
    "certificates.cert-manager.io": ("v1", "Certificate"),
    "issuers.cert-manager.io": ("v1", "Issuer"),
    "podmonitors.monitoring.coreos.com": ("v1", "PodMonitor"),
    "prometheusrules.monitoring.coreos.com": ("v1", "PrometheusRule"),
}
"""Kinds of others that the chart makes objects of."""
POOLED = (
    "database.trial.enabled=false,database.external.secretName=ledger,"
    "database.external.sidecarURL=postgresql://pool/behest,database.external.sidecarPooler=transaction"
)
LONG = "a-release-whose-name-is-as-long-as-helm-can-bear-it"
EVERYTHING = {**MATRIX, "a long name": ("gateway.enabled=true",), "a name that is a boolean": ("gateway.enabled=true",)}


def objects_of(plane: ControlPlane, case: str) -> list[dict[str, Any]]:
    release, namespace = {
        "a long name": (LONG, "n" * 63),
        "a name that is a boolean": ("true", "1e3"),
    }.get(case, ("b", "behest"))
    return documents(_rendered_once(plane, EVERYTHING[case], release, namespace))


@cache
def _rendered_once(plane: ControlPlane, settings: tuple[str, ...], release: str, namespace: str) -> str:
    return rendered(plane, settings, release=release, namespace=namespace)


@pytest.fixture(scope="module")
def restricted(control_plane: ControlPlane) -> Iterator[str]:
    """A namespace under the strictest Pod Security Standard, on a server that knows the kinds of others."""
    standard = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
    for name, (version, kind) in FOREIGN.items():
        plural, _, group = name.partition(".")
        schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        control_plane.apply(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": name},
                "spec": {
                    "group": group,
                    "scope": "Namespaced",
                    "names": {"plural": plural, "singular": kind.lower(), "kind": kind},
                    "versions": [
                        {"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
                    ],
                },
            }
        )
    for name in FOREIGN:
        control_plane.kubectl("wait", "--for=condition=Established", f"crd/{name}", "--timeout=30s")
    yield control_plane.namespace("chart", labels=standard)
    for name in FOREIGN:
        control_plane.kubectl("delete", "crd", name)


CLUSTER_WIDE = {
    "CustomResourceDefinition",
    "ClusterRole",
    "ClusterRoleBinding",
    "MutatingWebhookConfiguration",
}


def try_out(plane: ControlPlane, objects: list[dict[str, Any]], namespace: str) -> str:
    """Let the API server look at objects and keep nothing. What it warns of is an error."""
    for item in objects:
        if item["kind"] not in CLUSTER_WIDE:
            item["metadata"].setdefault("namespace", namespace)
    return plane.kubectl(
        "apply",
        "--server-side",
        "--dry-run=server",
        "--force-conflicts",
        "--field-manager=chart-test",
        "--validate=strict",
        "--warnings-as-errors",
        "--filename",
        "-",
        stdin=as_list(objects),
    )


def test_the_linter_has_nothing_to_say(control_plane: ControlPlane) -> None:
    for settings in EVERYTHING.values():
        answer = control_plane.helm("lint", "--strict", str(CHART), *flags(settings))
        assert "0 chart(s) failed" in answer


@pytest.mark.parametrize("case", EVERYTHING)
def test_the_api_server_takes_what_is_rendered_without_a_warning(
    control_plane: ControlPlane, restricted: str, case: str
) -> None:
    objects = objects_of(control_plane, case)
    # They name the namespace of the release where they must: here they come into one that is there.
    for item in objects:
        for subject in item.get("subjects", []):
            subject["namespace"] = restricted
    answer = try_out(control_plane, objects, restricted)
    assert len(answer.splitlines()) == len(objects)


@pytest.mark.parametrize("case", EVERYTHING)
def test_every_pod_keeps_the_restricted_standard(control_plane: ControlPlane, restricted: str, case: str) -> None:
    pods = pod_templates(objects_of(control_plane, case))
    assert pods
    for number, pod in enumerate(pods.values()):
        pod |= {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"p{number}"}}
        # The account is only there once the release is.
        pod["spec"]["serviceAccountName"] = "default"
    try_out(control_plane, list(pods.values()), restricted)


def members(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield from members(item, f"{path}.{name}")


@pytest.mark.parametrize("case", EVERYTHING)
def test_nothing_is_rendered_empty_and_no_name_is_too_long(control_plane: ControlPlane, case: str) -> None:
    objects = objects_of(control_plane, case)
    text = yaml.safe_dump_all(objects)
    assert not re.search(r"<nil>|%!|<no value>|map\[", text)
    for item in objects:
        if item["kind"] == "CustomResourceDefinition":
            continue
        where = f"{item['kind']} {item['metadata']['name']}"
        assert len(item["metadata"]["name"]) <= 63, where
        assert [path for path, value in members(item) if value is None] == [], where
        assert all(isinstance(value, str) for value in item["metadata"]["labels"].values()), where
        for name, value in members(item.get("spec", {})):
            if name.endswith((".secretName", ".namespace", ".secretKeyRef.name", ".secretKeyRef.key")):
                assert isinstance(value, str), f"{where}{name}"
    names = [(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_newest_versions_of_kubernetes_know_every_member(control_plane: ControlPlane, version: str) -> None:
    try:
        schemas = schemas_of(version)
    except ProgramMissing as error:
        pytest.skip(str(error))
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for case in EVERYTHING:
        for item in objects_of(control_plane, case):
            if any(item["apiVersion"].startswith(name.partition(".")[2] + "/") for name in FOREIGN):
                continue
            seen.add(item["kind"])
            if problems := schemas.problems(item):
                found[f"{case}: {item['kind']} {item['metadata']['name']}"] = problems
    assert found == {}
    assert {"Deployment", "StatefulSet", "MutatingWebhookConfiguration", "HorizontalPodAutoscaler"} <= seen


def test_the_check_against_a_version_finds_what_is_wrong() -> None:
    try:
        schemas: Schemas = schemas_of(VERSIONS[-1])
    except ProgramMissing as error:
        pytest.skip(str(error))
    port: dict[str, Any] = {"name": "http", "port": "80", "colour": "red"}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"ports": [port, {}]}}
    assert schemas.problems(service) == [
        "Service.spec.ports[0].port: '80' is no integer",
        "Service.spec.ports[0].colour: is unknown",
        "Service.spec.ports[1].port: is missing",
    ]
    assert schemas.problems({**service, "apiVersion": "v9"}) == ["v9 has no kind Service"]
    policy = {"apiVersion": "policy/v1beta1", "kind": "PodDisruptionBudget", "metadata": {"name": "x"}}
    assert schemas.problems(policy) == ["policy/v1beta1 has no kind PodDisruptionBudget"]


@pytest.mark.parametrize(("settings", "message"), WRONG.items(), ids=[",".join(settings) for settings in WRONG])
def test_wrong_values_are_refused_with_a_word_on_what_to_do(
    control_plane: ControlPlane, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CommandFailed) as refusal:
        rendered(control_plane, settings)
    assert message in str(refusal.value)


def test_a_release_whose_name_cannot_begin_a_services_is_told(control_plane: ControlPlane) -> None:
    with pytest.raises(CommandFailed, match="set fullnameOverride"):
        rendered(control_plane, (), release="1st")
    assert rendered(control_plane, ("fullnameOverride=first",), release="1st")


def notes(plane: ControlPlane, namespace: str, *settings: str) -> str:
    release = json.loads(
        plane.helm(
            "install", "b", str(CHART), "--namespace", namespace, "--dry-run=client", "--output", "json",
            *flags(settings),
        )
    )  # fmt: skip
    text: str = release["info"]["notes"]
    return text


@pytest.mark.parametrize("settings", [(), ("gateway.enabled=true",), ("webhook.enabled=false", "gateway.enabled=true")])
def test_the_notes_are_commands_that_work(control_plane: ControlPlane, settings: tuple[str, ...]) -> None:
    namespace = control_plane.namespace("notes")
    install_crds(control_plane)
    text = notes(control_plane, namespace, *settings)
    (manifests,) = re.findall(r"<<'EOF'\n(.*?)\nEOF$", text, re.DOTALL | re.MULTILINE)
    answer = control_plane.apply(manifests, namespace=namespace)
    assert re.findall(r"^(\w+)\.behest\.ai/", answer, re.MULTILINE) == ["project", "upstream", "budget"]
    patches = re.findall(r"--patch '(.*?)'", text, re.DOTALL)
    assert bool(patches) == ("webhook.enabled=false" not in settings)
    for shown in patches:
        app = json.loads(shown)["spec"]["template"]["metadata"]
        assert app["labels"] == {"behest.ai/inject": "true"}
        assert app["annotations"] == {"behest.ai/project": "shop"}
    for secret in re.findall(r"Secret (shop-\S+)\:", text):
        assert control_plane.get("project", "shop", namespace)["spec"]["apiKeySecretName"] == secret
    assert ("v1/auth/mint" in text) == ("gateway.enabled=true" in settings)


def test_the_guides_resources_and_pod_are_taken_as_they_are_shown(control_plane: ControlPlane) -> None:
    namespace = control_plane.namespace("guide")
    install_crds(control_plane)
    guide = (CHART.parents[2] / "docs" / "kubernetes.md").read_text()
    (manifests,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    assert "budget.behest.ai/shop created" in control_plane.apply(manifests, namespace=namespace)
    (command,) = re.findall(r"kubectl (run .*?)\n(?=kubectl)", guide, re.DOTALL)
    arguments = shlex.split(command.replace("\\\n", " ").replace("-n shop ", f"-n {namespace} "))
    end = arguments.index("--")
    shown = control_plane.kubectl(*arguments[:end], "--dry-run=server", "--output=json", *arguments[end:])
    pod = json.loads(shown)
    assert pod["metadata"]["labels"]["behest.ai/inject"] == "true"
    added = {item["path"] for item in patch(pod, namespace=namespace, template=Template(image="behest"))}
    assert "/spec/initContainers" in added


def template_of(plane: ControlPlane, *settings: str) -> tuple[Template, str]:
    """The sidecars' template as the webhook reads it, and the mark on the webhook's pods."""
    objects = documents(rendered(plane, settings))
    (text,) = (item["data"]["template.json"] for item in objects if "template.json" in item.get("data", {}))
    (pod,) = (template for name, template in pod_templates(objects).items() if name == "deployment/b-webhook")
    return msgspec.json.decode(text, type=Template), pod["metadata"]["annotations"]["checksum/template"]


def test_a_changed_sidecar_is_seen_on_the_webhooks_pods_and_on_its_own(control_plane: ControlPlane) -> None:
    template, mark = template_of(control_plane)
    assert template_of(control_plane) == (template, mark)
    assert template == Template(image="ghcr.io/behest/behest:0.1.0"), (
        "the chart and the operator have the same defaults"
    )
    seen = {(template.hash, mark)}
    for change in (
        "image.tag=9.9.9", "image.pullPolicy=Always", "sidecar.port=9000", "sidecar.podPort=9001",
        "sidecar.adminPort=9002", "sidecar.logLevel=debug", "sidecar.drainSeconds=5", "sidecar.journalSize=1Gi",
        "sidecar.defaultProject=shop", "telemetry.logFormat=json",
        "telemetry.environment.OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318",
        "telemetry.headers.secretName=collector",
        "sidecar.resources.limits.cpu=2", "sidecar.resources.limits.memory=null", "sidecar.resources.requests.cpu=1",
        "sidecar.resources.requests.memory=1Gi", POOLED,
    ):  # fmt: skip
        other, its_mark = template_of(control_plane, change)
        assert (other.hash, its_mark) not in seen, change
        seen.add((other.hash, its_mark))
    assert len({mark for _, mark in seen}) == len({hash_ for hash_, _ in seen}) == len(seen)


def test_the_webhook_reads_the_certificate_of_whoever_makes_it(control_plane: ControlPlane) -> None:
    def volume(objects: list[dict[str, Any]]) -> str:
        volumes = pod_templates(objects)["deployment/b-webhook"]["spec"]["volumes"]
        (name,) = (item["secret"]["secretName"] for item in volumes if item["name"] == "tls")
        return str(name)

    certified = objects_of(control_plane, "cert-manager")
    (certificate,) = (item["spec"] for item in certified if item["kind"] == "Certificate")
    assert certificate["secretName"] == volume(certified)
    assert certificate["dnsNames"] == ["b-webhook.behest.svc"]
    ours = objects_of(control_plane, "trial database")
    operator = pod_templates(ours)["deployment/b-operator"]["spec"]["containers"][0]
    environment = {item["name"]: item.get("value") for item in operator["env"]}
    assert environment["BEHEST_WEBHOOK_SECRET"] == volume(ours) != volume(certified)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(item["key"]) in item["values"] for item in selector.get("matchExpressions", [])
    )


def lets_in(policies: list[dict[str, Any]], target: dict[str, str], peer: dict[str, str], *, elsewhere: bool) -> bool:
    """Whether a pod with the labels `peer`, of this namespace or of another, may connect to one with `target`."""
    about = [item["spec"] for item in policies if selects(item["spec"]["podSelector"], target)]
    assert about, f"no policy is about {target}"
    assert all(spec["policyTypes"] == ["Ingress"] for spec in about), "what pods connect to is not restricted"
    for rule in (rule for spec in about for rule in spec["ingress"]):
        for origin in rule.get("from", [{"namespaceSelector": {}, "podSelector": {}}]):
            if (not elsewhere or "namespaceSelector" in origin) and selects(origin["podSelector"], peer):
                return True
    return False


def test_the_policies_let_in_those_who_have_to_and_nobody_else(control_plane: ControlPlane) -> None:
    objects = objects_of(control_plane, "gateway")
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    pods = {
        template["metadata"]["labels"]["app.kubernetes.io/component"]: template["metadata"]["labels"]
        for template in pod_templates(objects).values()
    }
    injected, stranger = {"behest.ai/inject": "true", "app": "web"}, {"app": "web"}
    ledger = pods["postgres"]
    for component in ("operator", "gateway", "test"):
        assert lets_in(policies, ledger, pods[component], elsewhere=False)
        assert not lets_in(policies, ledger, pods[component], elsewhere=True), "another release of this name"
    for elsewhere in (False, True):
        assert lets_in(policies, ledger, injected, elsewhere=elsewhere)
        assert not lets_in(policies, ledger, stranger, elsewhere=elsewhere)
        assert lets_in(policies, pods["gateway"], stranger, elsewhere=elsewhere)
        assert lets_in(policies, pods["webhook"], stranger, elsewhere=elsewhere)
        assert not lets_in(policies, pods["operator"], injected, elsewhere=elsewhere)
    assert not lets_in(policies, ledger, pods["webhook"], elsewhere=False)


def test_every_monitor_finds_its_port_and_only_prometheus_may_ask_the_operator(control_plane: ControlPlane) -> None:
    objects = objects_of(control_plane, "monitors")
    pods = [template for template in pod_templates(objects).values() if "containers" in template["spec"]]
    monitors = {item["metadata"]["name"]: item["spec"] for item in objects if item["kind"] == "PodMonitor"}
    assert set(monitors) == {"b", "b-operator", "b-webhook", "b-gateway"}
    for name in set(monitors) - {"b"}:
        (found,) = [pod for pod in pods if selects(monitors[name]["selector"], pod["metadata"]["labels"])]
        ports = {port["name"] for container in found["spec"]["containers"] for port in container.get("ports", [])}
        assert {endpoint["port"] for endpoint in monitors[name]["podMetricsEndpoints"]} <= ports, name
    policies = {item["metadata"]["name"]: item["spec"] for item in objects if item["kind"] == "NetworkPolicy"}
    expression = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["monitoring"]}
    asking = [{"namespaceSelector": {"matchExpressions": [expression]}}]
    assert policies["b-operator"]["ingress"] == [{"ports": [{"port": "metrics"}], "from": asking}]
    assert {"ports": [{"port": "probes"}], "from": asking} in policies["b-webhook"]["ingress"]
