"""A webhook process and the object that tells the API server of it."""

import base64
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec

from behest_operator.certificates import Certificates, renewed
from behest_operator.sidecar import Template
from behest_proxy.cli.preflight import free_port
from cluster.control_plane import ControlPlane
from cluster.operator_process import eventually

TEMPLATE = Template(image="registry.example.com/behest:test")


@dataclass
class Webhook:
    """A running webhook, or one that was stopped."""

    plane: ControlPlane
    folder: Path
    port: int
    probe_port: int
    certificates: Certificates
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Start it and wait until it answers."""
        log = (self.folder / "webhook.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-m", "behest_proxy.cli.main", "webhook"],
            env={**os.environ, **self.environment},
            stdout=log,
            stderr=log,
        )
        log.close()

        def is_ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "webhook.log").read_text()
            try:
                return httpx.get(f"http://127.0.0.1:{self.probe_port}/readyz").status_code == 200
            except httpx.HTTPError:
                return False

        eventually(is_ready, what="the webhook's start")

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(90)
            self.process = None

    def use(self, certificates: Certificates) -> None:
        """Write a certificate as a mounted Secret would appear: one file after the other."""
        self.certificates = certificates
        (self.folder / "tls.crt").write_bytes(certificates.leaf)
        (self.folder / "tls.key").write_bytes(certificates.leaf_key)

    def register(self, *, failure_policy: str = "Fail") -> None:
        """Tell the API server where it is, as the chart does."""
        self.plane.apply(
            {
                "apiVersion": "admissionregistration.k8s.io/v1",
                "kind": "MutatingWebhookConfiguration",
                "metadata": {"name": "behest"},
                "webhooks": [
                    {
                        "name": "inject.behest.ai",
                        "admissionReviewVersions": ["v1"],
                        "sideEffects": "None",
                        "failurePolicy": failure_policy,
                        "reinvocationPolicy": "IfNeeded",
                        "timeoutSeconds": 30,
                        "clientConfig": {
                            "url": f"https://localhost:{self.port}/inject",
                            "caBundle": base64.b64encode(self.certificates.ca_bundle).decode(),
                        },
                        "objectSelector": {"matchLabels": {"behest.ai/inject": "true"}},
                        "rules": [
                            {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
                        ],
                    }
                ],
            }
        )
        # The API server learns of webhooks by watching: until it has, a labelled pod passes unseen.
        probe: dict[str, Any] = labelled_pod("probe", "default")
        eventually(lambda: "initContainers" in self._dry_run(probe), what="a call of the webhook")

    def _dry_run(self, pod: dict[str, Any]) -> dict[str, Any]:
        text = self.plane.kubectl(
            "create", "--dry-run=server", "--output", "json", "--filename", "-", stdin=msgspec.json.encode(pod).decode()
        )
        found: dict[str, Any] = msgspec.json.decode(text)
        return dict(found["spec"])

    def unregister(self) -> None:
        """Take the object away."""
        self.plane.kubectl("delete", "mutatingwebhookconfiguration", "behest", "--ignore-not-found")


def labelled_pod(name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    """A pod that asks for a sidecar and keeps the `restricted` Pod Security Standard itself."""
    annotations = spec.pop("annotations", {"behest.ai/project": "shop"})
    security = {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    containers = [{"name": "app", "image": "app", "securityContext": security}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"behest.ai/inject": "true"},
            "annotations": annotations,
        },
        "spec": {"containers": containers, **spec},
    }


@contextmanager
def running_webhook(plane: ControlPlane, folder: Path) -> Generator[Webhook]:
    """A webhook that the API server calls."""
    template = folder / "template.json"
    template.write_bytes(msgspec.json.encode(TEMPLATE))
    port, probe_port = free_port(0), free_port(0)
    webhook = Webhook(
        plane=plane,
        folder=folder,
        port=port,
        probe_port=probe_port,
        certificates=renewed(None, names=["localhost"], now=datetime.now(UTC)),
        environment={
            "BEHEST_INJECTION_TEMPLATE": str(template),
            "BEHEST_WEBHOOK_TLS_DIR": str(folder),
            "BEHEST_WEBHOOK_BIND": f"127.0.0.1:{port}",
            "BEHEST_WEBHOOK_PROBE_BIND": f"127.0.0.1:{probe_port}",
        },
    )
    webhook.use(webhook.certificates)
    webhook.start()
    try:
        webhook.register()
        yield webhook
    finally:
        webhook.unregister()
        webhook.stop()
