"""A release over its life on the API server: upgraded, rolled back, uninstalled, and installed again."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.chart import CHART
from cluster.control_plane import CommandFailed, ControlPlane
from cluster.resources import install_crds

GATEWAY = ("--set", "gateway.enabled=true")
CONFIGURATION = "mutatingwebhookconfiguration"
BUDGET = {
    "apiVersion": "behest.ai/v1alpha1",
    "kind": "Budget",
    "metadata": {"name": "day"},
    "spec": {"scope": {"project": "shop"}, "limit": {"amount": "5", "currency": "USD"}, "window": {"period": "Day"}},
}


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A namespace of a release `b`; what is left of that goes with it, and its definitions stay for everybody."""
    name = control_plane.namespace("life")
    yield name
    control_plane.helm("uninstall", "b", "--namespace", name, "--ignore-not-found")
    install_crds(control_plane)


def install(plane: ControlPlane, namespace: str, *more: str) -> str:
    # The definitions may be there from other tests; a first release of a cluster finds none.
    return plane.helm("install", "b", str(CHART), "--namespace", namespace, "--take-ownership", *GATEWAY, *more)


def upgrade(plane: ControlPlane, namespace: str, *more: str) -> None:
    plane.helm("upgrade", "b", str(CHART), "--namespace", namespace, *GATEWAY, *more)


def secrets(plane: ControlPlane, namespace: str) -> dict[str, dict[str, str]]:
    """The values that must survive, by Secret."""
    return {name: plane.get("secret", name, namespace)["data"] for name in ("b-master-key", "b-postgres", "b-gateway")}


def trust(plane: ControlPlane, namespace: str, authority: str) -> None:
    """Write the webhook's authority as the operator does: the list of webhooks, merged into the object."""
    name = f"b-{namespace}"
    hooks = plane.get(CONFIGURATION, name)["webhooks"]
    for hook in hooks:
        hook["clientConfig"]["caBundle"] = authority
    plane.kubectl(
        "patch", CONFIGURATION, name, "--type=merge", "--field-manager=operator", "--patch",
        json.dumps({"webhooks": hooks}),
    )  # fmt: skip


def trusted(plane: ControlPlane, namespace: str) -> str | None:
    (hook,) = plane.get(CONFIGURATION, f"b-{namespace}")["webhooks"]
    found: str | None = hook["clientConfig"].get("caBundle")
    return found


def authority_of(plane: ControlPlane, salt: str) -> str:
    # The API server takes a bundle of certificates only; comments between them are allowed.
    return base64.b64encode(f"# {salt}\n".encode() + plane.certificate_authority.read_bytes()).decode()


def test_an_upgrade_and_a_rollback_keep_what_was_made_once(control_plane: ControlPlane, namespace: str) -> None:
    install(control_plane, namespace)
    made = secrets(control_plane, namespace)
    assert len(base64.b64decode(base64.b64decode(made["b-master-key"]["master-key"]))) == 32
    assert base64.b64decode(made["b-gateway"]["signing-key.pem"]).startswith(b"-----BEGIN EC PRIVATE KEY-----")
    password = base64.b64decode(made["b-postgres"]["password"]).decode()
    assert f":{password}@b-postgres.{namespace}.svc:" in base64.b64decode(made["b-postgres"]["database-url"]).decode()
    authority = ""
    for number in range(3):
        authority = authority_of(control_plane, str(number))
        trust(control_plane, namespace, authority)
        upgrade(
            control_plane, namespace, "--set", f"operator.graceHours={number + 1},webhook.timeoutSeconds={number + 2}"
        )
        assert secrets(control_plane, namespace) == made
        assert trusted(control_plane, namespace) == authority
        (hook,) = control_plane.get(CONFIGURATION, f"b-{namespace}")["webhooks"]
        assert hook["timeoutSeconds"] == number + 2
    control_plane.helm("rollback", "b", "1", "--namespace", namespace)
    assert secrets(control_plane, namespace) == made
    assert trusted(control_plane, namespace) == authority, "the newest, not the one of the first release"


def test_a_fresh_webhook_trusts_nobody_until_the_operator_has_told_it(
    control_plane: ControlPlane, namespace: str
) -> None:
    install(control_plane, namespace)
    assert trusted(control_plane, namespace) is None


def test_what_was_uninstalled_leaves_keys_definitions_and_budgets_and_is_found_again(
    control_plane: ControlPlane, namespace: str
) -> None:
    install(control_plane, namespace)
    made = secrets(control_plane, namespace)
    control_plane.kubectl("wait", "--for=condition=Established", "crd/budgets.behest.ai", "--timeout=30s")
    control_plane.apply(BUDGET, namespace=namespace)
    uid = control_plane.get("budget", "day", namespace)["metadata"]["uid"]
    answer = control_plane.helm("uninstall", "b", "--namespace", namespace)
    assert "kept due to the resource policy" in answer
    left = control_plane.kubectl(
        "get", "all,serviceaccount,configmap,role,rolebinding,pdb,networkpolicy", "--namespace", namespace,
        "--selector=app.kubernetes.io/name=behest", "--output=name",
    )  # fmt: skip
    assert left == ""
    cluster_wide = control_plane.kubectl("get", f"clusterrole,clusterrolebinding,{CONFIGURATION}", "--output=name")
    assert f"b-{namespace}" not in cluster_wide
    assert secrets(control_plane, namespace) == made
    assert control_plane.get("budget", "day", namespace)["metadata"]["uid"] == uid
    # Of the same name in the same namespace: what is left belongs to it, nothing has to be said.
    control_plane.helm("install", "b", str(CHART), "--namespace", namespace, *GATEWAY)
    assert secrets(control_plane, namespace) == made
    assert control_plane.get("budget", "day", namespace)["metadata"]["uid"] == uid


def test_a_release_of_another_name_is_told_whose_the_definitions_are_and_takes_them_over(
    control_plane: ControlPlane, namespace: str
) -> None:
    install(control_plane, namespace)
    control_plane.helm("uninstall", "b", "--namespace", namespace)
    other = control_plane.namespace("other")
    with pytest.raises(CommandFailed, match=r"budgets\.behest\.ai|invalid ownership metadata"):
        control_plane.helm("install", "c", str(CHART), "--namespace", other)
    control_plane.helm("uninstall", "c", "--namespace", other, "--ignore-not-found")
    control_plane.helm("install", "c", str(CHART), "--namespace", other, "--set", "crds.install=false")
    control_plane.helm("uninstall", "c", "--namespace", other)
    control_plane.helm("install", "c", str(CHART), "--namespace", other, "--take-ownership")
    owner = control_plane.get("crd", "budgets.behest.ai")["metadata"]["annotations"]["meta.helm.sh/release-name"]
    control_plane.helm("uninstall", "c", "--namespace", other)
    assert owner == "c"


def test_definitions_are_removed_with_their_budgets_only_when_that_is_asked_for(
    control_plane: ControlPlane, namespace: str
) -> None:
    install(control_plane, namespace, "--set", "crds.keep=false")
    assert "helm.sh/resource-policy" not in annotations_of(control_plane, "crd", "tiers.behest.ai")
    upgrade(control_plane, namespace)
    assert annotations_of(control_plane, "crd", "tiers.behest.ai")["helm.sh/resource-policy"] == "keep"


def test_a_changed_setting_rolls_the_pods_that_read_it_and_no_others(
    control_plane: ControlPlane, namespace: str
) -> None:
    install(control_plane, namespace)
    for setting, rolled in {
        "sidecar.logLevel=debug": {"b-webhook"},
        "operator.graceHours=1": {"b-operator"},
        "namespaces={default}": {"b-operator"},
        "gateway.drainSeconds=5": {"b-gateway"},
        "webhook.failurePolicy=Ignore": set[str](),
        "image.tag=v9": {"b-operator", "b-webhook", "b-gateway"},
        "networkPolicies.enabled=false": set[str](),
    }.items():
        before = generations(control_plane, namespace)
        upgrade(control_plane, namespace, "--reuse-values", "--set", setting)
        after = generations(control_plane, namespace)
        assert {name for name in after if after[name] != before[name]} == rolled, setting


def generations(plane: ControlPlane, namespace: str) -> dict[str, Any]:
    found = json.loads(plane.kubectl("get", "deployments,statefulsets", "--namespace", namespace, "--output=json"))
    return {item["metadata"]["name"]: item["spec"]["template"] for item in found["items"]}


def annotations_of(plane: ControlPlane, kind: str, name: str) -> dict[str, str]:
    found: dict[str, str] = plane.get(kind, name)["metadata"].get("annotations", {})
    return found
