"""What the chart lets the operator do is what it does: nothing that it asks for is refused, and every rule is used."""

import base64
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from behest_operator.certificates import renewed
from cluster.control_plane import CommandFailed, ControlPlane
from cluster.operator_process import OperatorProcess, condition, eventually
from cluster.resources import install_crds
from cluster.sql import rows
from conftest import Server, own_database

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "behest"
KINDS = ["projects", "upstreams", "tiers", "budgets"]
CRDS, WEBHOOKS = "customresourcedefinitions", "mutatingwebhookconfigurations"
OTHER_AUTHORITY = base64.b64encode(renewed(None, names=["elsewhere"], now=datetime.now(UTC)).ca_bundle).decode()
ODD_WINDOW = {"period": "Day", "timeZone": "Mars/Olympus"}


@dataclass
class Install:
    """The chart's roles, and an operator that runs under them."""

    plane: ControlPlane
    namespace: str
    operator: OperatorProcess

    @property
    def roles(self) -> list[str]:
        return [f"b-{self.namespace}-operator", f"b-{self.namespace}-resources"]

    def asked(self) -> set[tuple[str, str, str, str]]:
        """(verb, group, resource, decision) of all that the operator has asked for."""
        found: set[tuple[str, str, str, str]] = set()
        for event in self.plane.audited("b-operator", self.namespace):
            target = event.get("objectRef")
            if target is None or "resource" not in target:
                continue  # which groups and kinds there are: everybody may ask
            resource = "/".join(filter(None, [target["resource"], target.get("subresource")]))
            decision = event["annotations"]["authorization.k8s.io/decision"]
            found.add((event["verb"], target.get("apiGroup", ""), resource, decision))
        return found

    def refused(self, verb: str, resources: list[str]) -> bool:
        """Whether the operator was refused one of these since the roles were changed."""
        return any((asked[0], asked[3]) == (verb, "forbid") and asked[2] in resources for asked in self.asked())

    def rules(self) -> set[tuple[str, str, str]]:
        """(verb, group, resource) of all rules."""
        return {
            (verb, group, resource)
            for role in self.roles
            for rule in self.plane.get("clusterrole", role)["rules"]
            for verb in rule["verbs"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
        }

    @contextmanager
    def without(self, verb: str, resources: list[str]) -> Generator[None]:
        """The roles with one verb of some resources left out."""
        before = {role: self.plane.get("clusterrole", role)["rules"] for role in self.roles}
        dropped = 0
        for role, rules in before.items():
            changed = json.loads(json.dumps(rules))
            for rule in changed:
                if rule["resources"] == resources and verb in rule["verbs"]:
                    rule["verbs"].remove(verb)
                    dropped += 1
            self._set_rules(role, [rule for rule in changed if rule["verbs"]])
        assert dropped == 1, f"one rule lets the operator {verb} {resources}"
        try:
            yield
        finally:
            for role, rules in before.items():
                self._set_rules(role, rules)

    def _set_rules(self, role: str, rules: list[dict[str, Any]]) -> None:
        patch = json.dumps([{"op": "replace", "path": "/rules", "value": rules}])
        self.plane.kubectl("patch", "clusterrole", role, "--type=json", "--patch", patch)

    def authority(self) -> str:
        """What the API server trusts for the webhook."""
        hooks = self.plane.get("mutatingwebhookconfiguration", f"b-{self.namespace}")["webhooks"]
        return str(hooks[0]["clientConfig"].get("caBundle", ""))

    def forget_authority(self) -> None:
        patch = json.dumps([{"op": "replace", "path": "/webhooks/0/clientConfig/caBundle", "value": OTHER_AUTHORITY}])
        self.plane.kubectl(
            "patch", "mutatingwebhookconfiguration", f"b-{self.namespace}", "--type=json", "--patch", patch
        )


@pytest.fixture(scope="module")
def install(
    control_plane: ControlPlane, template: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Install]:
    install_crds(control_plane)
    namespace = control_plane.namespace("rights")
    folder = tmp_path_factory.mktemp("rights")
    (folder / "master-key").write_text(base64.b64encode(bytes(32)).decode())
    with own_database(template, "rights") as dsn:
        control_plane.helm(
            "install", "b", str(CHART), "--namespace", namespace, "--set",
            "database.trial.enabled=false,database.external.secretName=ledger,crds.install=false",
        )  # fmt: skip
        operator = OperatorProcess(
            plane=control_plane,
            dsn=dsn,
            kubeconfig=control_plane.kubeconfig_of("b-operator", namespace),
            log=folder / "operator.log",
            environment={
                "BEHEST_MASTER_KEY_FILE": str(folder / "master-key"),
                "BEHEST_WEBHOOK_CONFIGURATION": f"b-{namespace}",
                "BEHEST_WEBHOOK_NAMESPACE": namespace,
                "BEHEST_WEBHOOK_SECRET": "b-webhook-tls",
                "BEHEST_WEBHOOK_SERVICE": "b-webhook",
            },
        )
        operator.start()
        yield Install(control_plane, namespace, operator)
        operator.stop()
        control_plane.helm("uninstall", "b", "--namespace", namespace)


def resource(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "behest.ai/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


BUDGET = {"scope": {"project": "shop"}, "limit": {"requests": 9}, "window": {"period": "Day"}}
RESOURCES = [
    resource("Project", "shop", defaultModel="m"),
    resource("Upstream", "openai", baseURL="https://api.openai.com/v1"),
    resource("Tier", "free", number=1, requestsPerMinute=5),
    resource("Budget", "all", **BUDGET),
    resource("Budget", "odd", **{**BUDGET, "window": ODD_WINDOW}),
]


def secret_of_sidecars(plane: ControlPlane, namespace: str) -> dict[str, Any] | None:
    try:
        return plane.get("secret", "behest-sidecar", namespace)
    except CommandFailed:
        return None


def is_in_the_ledger(install: Install, namespace: str) -> bool:
    return bool(rows(install.operator.dsn, "SELECT 1 FROM ledger.budget WHERE namespace = $1", namespace))


def has_status(install: Install, namespace: str) -> bool:
    return condition(install.plane, "budget", "all", namespace, "Programmed") is not None


def has_event(install: Install, namespace: str) -> bool:
    return "Invalid" in install.plane.kubectl("get", "events", "--namespace", namespace)


def has_secret(install: Install, namespace: str) -> bool:
    return secret_of_sidecars(install.plane, namespace) is not None


def has_new_login(install: Install, namespace: str) -> bool:
    found = secret_of_sidecars(install.plane, namespace)
    return found is not None and "behest.ai/rotated-at" in found["metadata"]["annotations"]


def is_gone(install: Install, namespace: str) -> bool:
    return "shop" not in install.plane.kubectl("get", "projects", "--namespace", namespace, "--output=name")


def is_trusted(install: Install, namespace: str) -> bool:
    return install.authority() not in ("", OTHER_AUTHORITY)


def notices_new_kinds(install: Install, namespace: str) -> bool:
    """It complains of it for as long as it is so: kinds that come later would not be noticed."""
    return f"APIForbiddenError('{CRDS}" not in install.operator.log.read_text()


def rotate(install: Install, namespace: str) -> None:
    plane = install.plane
    eventually(lambda: has_secret(install, namespace), what="the Secret")
    plane.kubectl("annotate", "secret", "behest-sidecar", "behest.ai/rotated-at-", "--namespace", namespace)
    plane.apply(resource("Project", "shop", defaultModel="n"), namespace=namespace)


def delete(install: Install, namespace: str) -> None:
    eventually(lambda: has_secret(install, namespace), what="the Secret")
    install.plane.kubectl("delete", "project", "shop", "--namespace", namespace, "--wait=false")


def test_the_operator_asks_for_exactly_what_the_chart_lets_it_do(install: Install) -> None:
    plane, namespace = install.plane, install.plane.namespace("uses")
    install.forget_authority()
    plane.apply(*RESOURCES, namespace=namespace)
    for kind, name in (("project", "shop"), ("upstream", "openai"), ("tier", "free"), ("budget", "all")):
        eventually(partial(condition, plane, kind, name, namespace, "Programmed"), what=f"the reading of {kind}")
    eventually(lambda: has_event(install, namespace), what="the Event")
    rotate(install, namespace)
    eventually(lambda: has_new_login(install, namespace), what="the rotation")
    delete(install, namespace)
    eventually(lambda: is_gone(install, namespace), what="the end of the project")
    assert not has_secret(install, namespace)
    install.operator.stop()
    install.operator.start()
    eventually(lambda: is_trusted(install, namespace), what="the webhook's authority")
    eventually(lambda: {asked[:3] for asked in install.asked()} >= install.rules(), what="the use of every rule")
    assert {asked[:3] for asked in install.asked()} == install.rules()
    assert {asked for asked in install.asked() if asked[3] != "allow"} == set()


Check = Callable[[Install, str], bool]
WHILE_IT_RUNS: list[tuple[str, list[str], Check, Callable[[Install, str], None] | None]] = [
    ("patch", KINDS, is_in_the_ledger, None),
    ("patch", [f"{kind}/status" for kind in KINDS], has_status, None),
    ("create", ["events"], has_event, None),
    ("get", ["namespaces"], is_in_the_ledger, None),
    ("get", ["secrets"], has_secret, None),
    ("create", ["secrets"], has_secret, None),
    ("update", ["secrets"], has_new_login, rotate),
    ("delete", ["secrets"], is_gone, delete),
]
AT_ITS_START: list[tuple[str, list[str], Check]] = [
    ("list", KINDS, is_in_the_ledger),
    ("watch", KINDS, is_in_the_ledger),
    ("list", [CRDS], notices_new_kinds),
    ("watch", [CRDS], notices_new_kinds),
    ("get", [WEBHOOKS], is_trusted),
    ("patch", [WEBHOOKS], is_trusted),
]


def test_every_rule_is_in_one_of_the_lists_below(install: Install) -> None:
    listed = {(case[0], name) for case in WHILE_IT_RUNS for name in case[1]}
    listed |= {(case[0], name) for case in AT_ITS_START for name in case[1]}
    assert listed == {(verb, name) for verb, _, name in install.rules()}


@pytest.mark.parametrize(
    ("verb", "resources", "works", "more"),
    WHILE_IT_RUNS,
    ids=[f"{verb} {names[0]}" for verb, names, *_ in WHILE_IT_RUNS],
)
def test_without_a_rule_something_stops_working_until_it_is_there_again(
    install: Install, verb: str, resources: list[str], works: Check, more: Callable[[Install, str], None] | None
) -> None:
    namespace = install.plane.namespace("less")
    (install.plane.folder / "audit.log").write_text("")
    with install.without(verb, resources):
        install.plane.apply(*RESOURCES, namespace=namespace)
        if more is not None:
            more(install, namespace)
        eventually(lambda: install.refused(verb, resources), what="the refusal")
        assert not works(install, namespace)
    eventually(lambda: works(install, namespace), timeout_s=90, what="its mending")


@pytest.mark.parametrize(
    ("verb", "resources", "works"), AT_ITS_START, ids=[f"{verb} {names[0]}" for verb, names, _ in AT_ITS_START]
)
def test_without_a_rule_it_does_not_start_to_work(
    install: Install, verb: str, resources: list[str], works: Check
) -> None:
    namespace = install.plane.namespace("less")
    install.operator.stop()
    install.forget_authority()
    (install.plane.folder / "audit.log").write_text("")
    install.operator.log.write_text("")
    with install.without(verb, resources):
        install.operator.start()
        install.plane.apply(*RESOURCES, namespace=namespace)
        eventually(lambda: install.refused(verb, resources), what="the refusal")
        if works is notices_new_kinds:
            eventually(lambda: not works(install, namespace), what="the complaint")
        assert not works(install, namespace)
    install.operator.stop()
    install.operator.log.write_text("")
    install.operator.start()
    eventually(lambda: works(install, namespace), what="its mending")
