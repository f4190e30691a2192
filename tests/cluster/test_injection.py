"""Labelled pods, read back from a real API server that called a real webhook."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from behest_operator.certificates import renewed
from behest_operator.sidecar import patch
from cluster.control_plane import CommandFailed, ControlPlane
from cluster.operator_process import eventually
from cluster.webhook import TEMPLATE, Webhook, labelled_pod, running_webhook


@pytest.fixture(scope="module")
def webhook(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webhook]:
    folder: Path = tmp_path_factory.mktemp("webhook")
    with running_webhook(control_plane, folder) as running:
        yield running


@pytest.fixture
def namespace(control_plane: ControlPlane) -> str:
    return control_plane.namespace("inject", labels={"pod-security.kubernetes.io/enforce": "restricted"})


def test_a_labelled_pod_comes_back_with_a_native_sidecar_under_the_restricted_standard(
    control_plane: ControlPlane, webhook: Webhook, namespace: str
) -> None:
    control_plane.apply(labelled_pod("web", namespace))
    found = control_plane.get("pod", "web", namespace)
    sidecar = found["spec"]["initContainers"][0]
    assert (sidecar["name"], sidecar["restartPolicy"], sidecar["image"]) == ("behest", "Always", TEMPLATE.image)
    app = {item["name"]: item.get("value") for item in found["spec"]["containers"][0]["env"]}
    assert app["OPENAI_BASE_URL"] == "http://127.0.0.1:8079/v1"
    assert found["metadata"]["annotations"]["behest.ai/template-hash"] == TEMPLATE.hash


def test_what_came_back_needs_no_further_patch(control_plane: ControlPlane, webhook: Webhook, namespace: str) -> None:
    control_plane.apply(labelled_pod("web", namespace))
    found = control_plane.get("pod", "web", namespace)
    assert patch(found, namespace=namespace, template=TEMPLATE) == []


def test_a_pod_without_the_label_never_reaches_the_webhook(
    control_plane: ControlPlane, webhook: Webhook, namespace: str
) -> None:
    pod = labelled_pod("plain", namespace)
    pod["metadata"]["labels"] = {}
    control_plane.apply(pod)
    assert "initContainers" not in control_plane.get("pod", "plain", namespace)["spec"]


def test_a_pod_that_cannot_have_one_is_refused_and_its_author_reads_why(
    control_plane: ControlPlane, webhook: Webhook
) -> None:
    namespace = control_plane.namespace("host")
    with pytest.raises(CommandFailed, match="behest: the pod uses the host's network"):
        control_plane.apply(labelled_pod("host", namespace, hostNetwork=True))
    with pytest.raises(CommandFailed, match=r"there is no annotation behest\.ai/projet"):
        control_plane.apply(labelled_pod("typo", namespace, annotations={"behest.ai/projet": "shop"}))


def test_a_rotated_certificate_refuses_no_pod(control_plane: ControlPlane, webhook: Webhook, namespace: str) -> None:
    new = renewed(webhook.certificates, names=["localhost", "another.svc"], now=datetime.now(UTC))
    assert new.leaf != webhook.certificates.leaf

    def create(number: int) -> None:
        control_plane.apply(labelled_pod(f"pod-{number}", namespace))

    with ThreadPoolExecutor(2) as creators:
        first = [creators.submit(create, number) for number in range(6)]
        webhook.use(new)
        second = [creators.submit(create, number) for number in range(6, 16)]
        for done in first + second:
            done.result()
    log = webhook.folder / "webhook.log"
    eventually(lambda: "serving a new certificate" in log.read_text(), what="the new certificate")
    create(99)


def test_while_the_webhook_is_down_fail_refuses_and_ignore_lets_pass(
    control_plane: ControlPlane, webhook: Webhook, namespace: str
) -> None:
    webhook.stop()
    try:
        with pytest.raises(CommandFailed, match="failed calling webhook"):
            control_plane.apply(labelled_pod("closed", namespace))
        control_plane.kubectl(
            "patch",
            "mutatingwebhookconfiguration",
            "behest",
            "--type=json",
            "--patch",
            '[{"op":"replace","path":"/webhooks/0/failurePolicy","value":"Ignore"}]',
        )

        def lets_pass() -> bool:
            try:
                control_plane.apply(labelled_pod("open", namespace))
            except CommandFailed:
                return False
            return True

        eventually(lets_pass, what="a pod without a sidecar")
        assert "initContainers" not in control_plane.get("pod", "open", namespace)["spec"]
    finally:
        webhook.start()
        webhook.register()
