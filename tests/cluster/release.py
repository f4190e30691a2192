"""The chart, installed on the control plane, with its operator and its webhook run as a kubelet would run them."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.control_plane import CommandFailed, ControlPlane
from cluster.operator_process import eventually
from cluster.pods import BEHEST, Pod, pod_of
from cluster.resources import forget_resources
from cluster.webhook import labelled_pod
from conftest import own_server, set_password
from stack import process, wait_until

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "behest"
IMAGE = "ghcr.io/behest/behest:0.1.0"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


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
    services: dict[str, str]
    """Where its Services are on this machine."""

    def application(self, prefix: str) -> str:
        """A new namespace for an application, with its provider's key."""
        namespace = self.plane.namespace(prefix, labels=RESTRICTED)
        self.plane.kubectl(
            "create", "secret", "generic", "openai", "--namespace", namespace,
            "--from-literal=api-key=sk-0123456789abcdef",
        )  # fmt: skip
        return namespace

    def resources(self, *, limit: str, **budget: Any) -> list[dict[str, Any]]:
        """One of each kind: a project, the simulator, a tier, and a budget of so many dollars: no midnight fills it."""
        secret = {"name": "openai", "key": "api-key"}
        spec: dict[str, Any] = {
            "scope": {"project": "shop"},
            "limit": {"amount": limit, "currency": "USD"},
            "window": {"period": "Lifetime"},
            **budget,
        }
        return [
            resource("Project", "shop", {"defaultModel": "gpt-4o-mini"}),
            resource("Upstream", "openai", {"baseURL": self.sim_url, "credentials": {"secretKeyRef": secret}}),
            resource("Tier", "free", {"number": 1, "requestsPerMinute": 1000}),
            resource("Budget", "shop", spec),
        ]

    def injected(self, namespace: str, images: dict[str, list[str]] | None = None) -> Pod:
        """A labelled pod that came back with its sidecar: until the API server knows the webhook, Fail refuses it."""
        refusal = ""

        def created() -> bool:
            nonlocal refusal
            try:
                self.plane.apply(labelled_pod("web", namespace))
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
        pod = Pod(self.plane, "web", namespace, self.folder, {IMAGE: BEHEST, **(images or {})})
        pod.services = self.services
        return pod

    def events(self, namespace: str) -> list[dict[str, Any]]:
        """The Events of a namespace."""
        return self.plane.items("event", namespace)


def resource(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """A resource of ours, in no namespace yet."""
    return {"apiVersion": "behest.ai/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


@contextmanager
def running_release(plane: ControlPlane, folder: Path, name: str) -> Generator[Release]:
    """Install the chart with default values, start its pods as a kubelet would, and a simulated provider."""
    namespace = plane.namespace("behest", labels=RESTRICTED)
    # The definitions may be there from other tests.
    plane.helm("install", name, str(CHART), "--namespace", namespace, "--take-ownership")
    with trial_database(plane, name, namespace, folder) as dsn, simulator(folder) as sim_url:
        services = {f"{name}-postgres.{namespace}.svc:5432": urlsplit(dsn).netloc.rpartition("@")[2]}
        operator = Pod(plane, pod_of(plane, f"{name}-operator", namespace), namespace, folder, {IMAGE: BEHEST})
        operator.services = services
        # The pod's service account, as its files say it, is given as a kubeconfig: the paths of a pod are not ours.
        operator.environment["KUBECONFIG"] = str(plane.kubeconfig_of(f"{name}-operator", namespace))
        webhook = Pod(plane, pod_of(plane, f"{name}-webhook", namespace), namespace, folder, {IMAGE: BEHEST})
        try:
            operator.start()
            webhook.start()
            plane.route(f"{name}-webhook", namespace, webhook.port(9443))
            yield Release(plane, namespace, dsn, sim_url, folder, operator, webhook, services)
        finally:
            webhook.stop()
            operator.stop()
        assert "Traceback" not in operator.containers["operator"].text()
    plane.helm("uninstall", name, "--namespace", namespace)
    forget_resources(plane)


@contextmanager
def trial_database(plane: ControlPlane, name: str, namespace: str, folder: Path) -> Generator[str]:
    """What the image of the trial database makes of its pod's environment: a server of its own, and its DSN."""
    pod = Pod(plane, pod_of(plane, f"{name}-postgres", namespace, "statefulset"), namespace, folder, {})
    variables = pod.variables("postgres")
    user, password, database = (variables[f"POSTGRES_{part}"] for part in ("USER", "PASSWORD", "DB"))
    with own_server(None) as server:
        yield set_password(server, user, database, password)


@contextmanager
def simulator(folder: Path) -> Generator[str]:
    """A simulated provider: its base URL."""
    port_file = folder / "sim.port"
    with process(
        [*BEHEST, "sim", "--port", "0", "--port-file", str(port_file)], environment={}, log=folder / "sim.log"
    ):
        port = wait_until(lambda: port_file.exists() and port_file.read_text().strip(), what="the simulator's start")
        yield f"http://127.0.0.1:{port}/v1"
