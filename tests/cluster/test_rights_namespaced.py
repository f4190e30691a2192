"""Kept to some namespaces, the operator asks for exactly what its roles allow there, and for nothing elsewhere."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from behest_operator.crds import KINDS
from cluster.control_plane import CommandFailed, ControlPlane
from cluster.operator_process import condition, eventually
from cluster.pods import BEHEST, Pod, pod_of
from cluster.release import CHART, IMAGE, resource
from cluster.resources import forget_resources
from conftest import Server, own_database

LOGIN = "n-gateway-login"
Asked = tuple[str, str, str, str]
"""Where (a namespace that is looked after, the release's own, the cluster), verb, group, resource."""


@dataclass
class Install:
    """A release that looks after two namespaces, its operator run from its own pod."""

    plane: ControlPlane
    namespace: str
    watched: tuple[str, str]
    operator: Pod

    def asked(self) -> dict[Asked, str]:
        """What the operator has asked for, and the last decision."""
        found: dict[Asked, str] = {}
        for event in self.plane.audited("n-operator", self.namespace):
            target = event.get("objectRef")
            if target is None or "resource" not in target:
                continue  # which groups and kinds there are: everybody may ask
            name = "/".join(filter(None, [target["resource"], target.get("subresource")]))
            # Of a namespace itself the API server says that it is in itself.
            namespace = None if name == "namespaces" else target.get("namespace")
            where = "watched" if namespace in self.watched else "own" if namespace == self.namespace else "cluster"
            if namespace is not None and where == "cluster":
                where = f"namespace {namespace}"
            key = (where, event["verb"], target.get("apiGroup", ""), name)
            found[key] = event["annotations"]["authorization.k8s.io/decision"]
        return found

    def rules(self) -> set[Asked]:
        """What the roles allow."""
        cluster = f"n-{self.namespace}"
        roles = {
            "cluster": self.plane.get("clusterrole", f"{cluster}-operator"),
            "watched": self.plane.get("clusterrole", f"{cluster}-resources"),
            "own": self.plane.get("role", "n-own-secrets", self.namespace),
        }
        for namespace in self.watched:
            bound = self.plane.get("rolebinding", cluster, namespace)
            assert bound["roleRef"]["name"] == f"{cluster}-resources"
        return {
            (where, verb, group, name)
            for where, role in roles.items()
            for rule in role["rules"]
            for verb in rule["verbs"]
            for group in rule["apiGroups"]
            for name in rule["resources"]
        }

    def login(self) -> str | None:
        """When the gateway's login was made last; None: there is none."""
        try:
            found = self.plane.get("secret", LOGIN, self.namespace)
        except CommandFailed:
            return None
        metadata, data = found["metadata"], found["data"]
        return f"{metadata['annotations'].get('behest.ai/rotated-at', '')} {data['database-url']}"

    def rotate(self) -> None:
        """Let the gateway's login be old."""
        self.plane.kubectl("annotate", "secret", LOGIN, "behest.ai/rotated-at-", "--namespace", self.namespace)


def started(plane: ControlPlane, namespace: str, folder: Path) -> Pod:
    pod = Pod(plane, pod_of(plane, "n-operator", namespace), namespace, folder, {IMAGE: BEHEST})
    pod.environment["KUBECONFIG"] = str(plane.kubeconfig_of("n-operator", namespace))
    pod.start()
    return pod


@pytest.fixture(scope="module")
def install(
    control_plane: ControlPlane, template: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Install]:
    namespace = control_plane.namespace("some")
    watched = (control_plane.namespace("watched"), control_plane.namespace("watched"))
    folder = tmp_path_factory.mktemp("namespaced")
    with own_database(template, "namespaced") as dsn:
        control_plane.kubectl(
            "create", "secret", "generic", "ledger", "--namespace", namespace, f"--from-literal=database-url={dsn}"
        )
        control_plane.helm(
            "install", "n", str(CHART), "--namespace", namespace, "--take-ownership",
            "--set", "database.trial.enabled=false,database.external.secretName=ledger,gateway.enabled=true",
            "--set", f"namespaces={{{','.join(watched)}}}",
        )  # fmt: skip
        made = Install(control_plane, namespace, watched, started(control_plane, namespace, folder))
        yield made
        made.operator.stop()
        control_plane.helm("uninstall", "n", "--namespace", namespace)
        forget_resources(control_plane)
        assert "Traceback" not in made.operator.containers["operator"].text()


def documents(namespace: str) -> list[dict[str, Any]]:
    budget = {"scope": {"project": "shop"}, "limit": {"requests": 9}, "window": {"period": "Day"}}
    found = [
        resource("Project", "shop", {"defaultModel": "m"}),
        resource("Upstream", "openai", {"baseURL": "https://api.openai.com/v1"}),
        resource("Tier", "free", {"number": 1, "requestsPerMinute": 5}),
        resource("Budget", "shop", budget),
        resource("Budget", "odd", {**budget, "window": {"period": "Day", "timeZone": "Mars/Olympus"}}),
    ]
    for item in found:
        item["metadata"]["namespace"] = namespace
    return found


def test_every_rule_is_used_where_it_is_given_and_nothing_is_asked_for_elsewhere(install: Install) -> None:
    plane, (one, other) = install.plane, install.watched
    elsewhere = plane.namespace("elsewhere")
    for namespace in (one, other, elsewhere):
        plane.apply(*documents(namespace))
    for namespace in install.watched:
        for kind, name in (("project", "shop"), ("upstream", "openai"), ("tier", "free"), ("budget", "shop")):
            eventually(partial(condition, plane, kind, name, namespace, "Programmed"), what=f"the reading of {kind}")
        eventually(partial(plane.items, "event", namespace), what="the Event")
        eventually(partial(is_there, plane, namespace), what="the Secret")
    plane.kubectl("annotate", "secret", "behest-sidecar", "behest.ai/rotated-at-", "--namespace", one)
    plane.apply(resource("Project", "shop", {"defaultModel": "n"}), namespace=one)
    plane.kubectl("delete", "project", "shop", "--namespace", other, "--wait=false")
    eventually(install.login, what="the gateway's login")
    install.rotate()
    eventually(lambda: install.rules() <= set(install.asked()), timeout_s=60, what="the use of every rule")
    eventually(lambda: not is_there(plane, other), what="the end of the Secret")
    asked = install.asked()
    assert set(asked) == install.rules()
    assert set(asked.values()) == {"allow"}
    assert not plane.items("event", elsewhere)
    assert all("status" not in item for kind in KINDS for item in plane.items(kind.lower(), elsewhere))


def is_there(plane: ControlPlane, namespace: str) -> bool:
    """Whether a namespace has what sidecars need."""
    return "behest-sidecar" in {item["metadata"]["name"] for item in plane.items("secret", namespace)}


@pytest.mark.parametrize("verb", ["get", "create", "update"])
def test_without_a_rule_of_the_release_s_own_namespace_the_gateway_gets_no_login(install: Install, verb: str) -> None:
    plane, namespace = install.plane, install.namespace
    eventually(install.login, what="the gateway's login")
    rules = plane.get("role", "n-own-secrets", namespace)["rules"]
    fewer = [{**rule, "verbs": [item for item in rule["verbs"] if item != verb]} for rule in rules]
    set_rules(plane, namespace, [rule for rule in fewer if rule["verbs"]])
    (plane.folder / "audit.log").write_text("")
    try:
        before = install.login()
        if verb == "create":
            plane.kubectl("delete", "secret", LOGIN, "--namespace", namespace)
        else:
            install.rotate()
        refused = ("own", verb, "", "secrets")
        eventually(lambda: install.asked().get(refused) == "forbid", what="the refusal")
        now = install.login()
        assert now is None or (before is not None and now.split()[-1] == before.split()[-1])
    finally:
        set_rules(plane, namespace, rules)
    eventually(lambda: (install.login() or "").startswith("2"), what="its mending")


def set_rules(plane: ControlPlane, namespace: str, rules: list[dict[str, Any]]) -> None:
    patch = json.dumps([{"op": "replace", "path": "/rules", "value": rules}])
    plane.kubectl("patch", "role", "n-own-secrets", "--namespace", namespace, "--type=json", "--patch", patch)


def test_a_namespace_that_is_taken_from_it_is_left_alone_and_the_others_go_on(install: Install) -> None:
    plane, (kept, lost) = install.plane, install.watched
    plane.kubectl("delete", "rolebinding", f"n-{install.namespace}", "--namespace", lost)
    (plane.folder / "audit.log").write_text("")
    for namespace in (kept, lost):
        late = resource(
            "Budget", "late", {"scope": {"project": "shop"}, "limit": {"requests": 1}, "window": {"period": "Day"}}
        )
        plane.apply(late, namespace=namespace)
    eventually(partial(condition, plane, "budget", "late", kept, "Programmed"), what="the reading in the other")
    eventually(lambda: "forbid" in install.asked().values(), what="a refusal")
    assert condition(plane, "budget", "late", lost, "Programmed") is None
