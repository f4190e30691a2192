"""What a kubelet would do for the tests, from nothing but the pod as the API server returned it.

Each container becomes a process: its command and arguments, with environment and files resolved from the pod, its
Secrets and ConfigMaps. Nothing of the test's own environment goes in. An image is a name here: `Images` says which
program stands for it. A mounted path becomes a folder of this run, and is replaced wherever the container names it; a
fixed port becomes a free one of this machine in the same way, because all pods share its loopback.
"""

import base64
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from behest_proxy.cli.preflight import free_port
from cluster.control_plane import CommandFailed, ControlPlane
from cluster.operator_process import eventually

BEHEST = [sys.executable, "-I", "-m", "behest_proxy.cli.main"]


class ContainerFailed(AssertionError):
    """A container ended with an error; the message is its log."""


@dataclass
class Container:
    """A container that runs as a process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    ports: dict[int, int]
    probes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """What it has written."""
        return self.log.read_text()


class Pod:
    """A pod whose containers run here."""

    def __init__(
        self, plane: ControlPlane, name: str, namespace: str, folder: Path, images: dict[str, list[str]]
    ) -> None:
        self._plane = plane
        self._namespace = namespace
        self._folder = folder / f"{namespace}-{name}"
        self._folder.mkdir()
        self._images = images
        self.object: dict[str, Any] = plane.get("pod", name, namespace)
        self._ports = self._free_ports()
        self.containers: dict[str, Container] = {}
        self.environment: dict[str, str] = {}
        """What stands in for the service account's files, which have one path in every pod."""
        self.services: dict[str, str] = {}
        """Where Services are on this machine: `name.namespace.svc:port` to `host:port`, as DNS and routes would say."""

    def start(self) -> None:
        """Start as a kubelet would: init containers in their order, native sidecars stay, then the containers.

        Raises `ContainerFailed`.
        """
        for spec in self.object["spec"].get("initContainers", []):
            container = self._run(spec)
            if spec.get("restartPolicy") == "Always":
                self._await_startup(container, spec)
            elif container.process.wait(180) != 0:
                raise ContainerFailed(f"{container.name}: {container.text()}")
        for spec in self.object["spec"]["containers"]:
            self._await_startup(self._run(spec), spec)

    def stop(self) -> None:
        """Stop as a kubelet would: the containers first, native sidecars after them in reverse."""
        sidecars = [item["name"] for item in self.object["spec"].get("initContainers", [])]
        order = [name for name in self.containers if name not in sidecars] + sidecars[::-1]
        for name in order:
            container = self.containers.get(name)
            if container is not None and container.process.poll() is None:
                container.process.terminate()
                try:
                    container.process.wait(40)
                except subprocess.TimeoutExpired:
                    container.process.kill()
                    container.process.wait()

    def url(self, port: int) -> str:
        """Where a port of the pod is on this machine."""
        return f"http://127.0.0.1:{self._ports[port]}"

    def port(self, port: int) -> int:
        """The same as a number."""
        return self._ports[port]

    def variables(self, container: str) -> dict[str, str]:
        """The environment of a container, as the pod says it."""
        (spec,) = (item for item in self.object["spec"]["containers"] if item["name"] == container)
        return self._environment(spec)

    def _free_ports(self) -> dict[int, int]:
        text = str(self.object["spec"])
        named = [
            item["containerPort"]
            for spec in [*self.object["spec"].get("initContainers", []), *self.object["spec"]["containers"]]
            for item in spec.get("ports", [])
        ]
        loopback = [int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", text)]
        return {port: free_port(0) for port in dict.fromkeys([*named, *loopback])}

    def _run(self, spec: dict[str, Any]) -> Container:
        mounts = {item["mountPath"]: self._mount(item["name"]) for item in spec.get("volumeMounts", [])}
        environment = {name: self._local(value, mounts) for name, value in self._environment(spec).items()}
        program = self._images[spec["image"]]
        command = spec.get("command") or program
        arguments = [self._local(item, mounts) for item in [*command, *spec.get("args", [])]]
        log = self._folder / f"{spec['name']}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                arguments,
                env={"PATH": os.environ["PATH"], **environment, **self.environment},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                cwd=self._folder,
            )
        container = Container(spec["name"], process, log, self._ports)
        self.containers[spec["name"]] = container
        return container

    def _await_startup(self, container: Container, spec: dict[str, Any]) -> None:
        probe = (spec.get("startupProbe") or spec.get("readinessProbe") or spec.get("livenessProbe") or {}).get(
            "httpGet"
        )
        if probe is None:
            return
        port = probe["port"]
        if isinstance(port, str):
            port = next(item["containerPort"] for item in spec["ports"] if item["name"] == port)

        def answers() -> bool:
            if container.process.poll() is not None:
                raise ContainerFailed(f"{container.name}: {container.text()[-4000:]}")
            try:
                return httpx.get(self.url(port) + probe["path"]).status_code == 200
            except httpx.HTTPError:
                return False

        eventually(answers, timeout_s=90, what=f"the start of container {container.name}")

    def _local(self, text: str, mounts: dict[str, Path]) -> str:
        """A value of the container as it is on this machine."""
        for path in sorted(mounts, key=len, reverse=True):
            text = text.replace(path, str(mounts[path]))
        for port, mine in self._ports.items():
            text = re.sub(rf"(127\.0\.0\.1|0\.0\.0\.0):{port}\b", f"127.0.0.1:{mine}", text)
        return self._resolved(text)

    def _resolved(self, text: str) -> str:
        """A text with the addresses of Services as they are on this machine."""
        for service, address in self.services.items():
            text = text.replace(service, address)
        return text

    def _environment(self, spec: dict[str, Any]) -> dict[str, str]:
        values: dict[str, str] = {}
        for source in spec.get("envFrom", []):
            if "secretRef" in source:
                values |= self._secret(source["secretRef"]["name"])
            else:
                values |= self._plane.get("configmap", source["configMapRef"]["name"], self._namespace)["data"]
        for item in spec.get("env", []):
            values[item["name"]] = self._value(item)
        return values

    def _value(self, item: dict[str, Any]) -> str:
        if "value" in item or "valueFrom" not in item:
            return str(item.get("value", ""))
        source = item["valueFrom"]
        if "secretKeyRef" in source:
            return self._secret(source["secretKeyRef"]["name"])[source["secretKeyRef"]["key"]]
        if "configMapKeyRef" in source:
            found = self._plane.get("configmap", source["configMapKeyRef"]["name"], self._namespace)
            return str(found["data"][source["configMapKeyRef"]["key"]])
        value: Any = self.object
        for part in source["fieldRef"]["fieldPath"].split("."):
            value = value[part]
        return str(value)

    def _secret(self, name: str) -> dict[str, str]:
        # As a kubelet does: a pod waits for the Secrets that it names.
        def there() -> dict[str, Any] | None:
            try:
                return self._plane.get("secret", name, self._namespace)
            except CommandFailed:
                return None

        found = eventually(there, timeout_s=60, what=f"Secret {name}")
        return {key: base64.b64decode(value).decode() for key, value in (found.get("data") or {}).items()}

    def _mount(self, volume_name: str) -> Path:
        """The folder that stands for a volume; made once, so that containers share it."""
        folder = self._folder / "volumes" / volume_name
        if folder.exists():
            return folder
        folder.mkdir(parents=True)
        volume = next(item for item in self.object["spec"]["volumes"] if item["name"] == volume_name)
        if "secret" in volume:
            self._write(folder, self._secret(volume["secret"]["secretName"]), volume["secret"].get("items"))
        elif "configMap" in volume:
            found = self._plane.get("configmap", volume["configMap"]["name"], self._namespace)
            self._write(folder, found["data"], volume["configMap"].get("items"))
        elif "projected" in volume:
            self._project(folder, volume["projected"]["sources"])
        return folder

    def _project(self, folder: Path, sources: list[dict[str, Any]]) -> None:
        for source in sources:
            if "serviceAccountToken" in source:
                account = self.object["spec"]["serviceAccountName"]
                token = self._plane.kubectl("create", "token", account, "--namespace", self._namespace)
                (folder / source["serviceAccountToken"]["path"]).write_text(token.strip())
            elif "configMap" in source:
                # Written by a controller manager in a real cluster: the authority of the API server.
                (folder / "ca.crt").write_bytes(self._plane.certificate_authority.read_bytes())

    def _write(self, folder: Path, data: dict[str, str], items: list[dict[str, str]] | None) -> None:
        wanted = {item["key"]: item["path"] for item in items} if items else {key: key for key in data}
        for key, path in wanted.items():
            (folder / path).write_text(self._resolved(data[key]))


def pod_of(plane: ControlPlane, owner: str, namespace: str, kind: str = "deployment") -> str:
    """Create a pod from the template of a Deployment or StatefulSet, as its controllers would, and return its name."""
    found = plane.get(kind, owner, namespace)
    template = found["spec"]["template"]
    name = f"{owner}-{int(time.time() * 1000) % 1_000_000}"
    for claim in found["spec"].get("volumeClaimTemplates", []):
        volume = claim["metadata"]["name"]
        template["spec"]["volumes"].append({"name": volume, "persistentVolumeClaim": {"claimName": f"{volume}-{name}"}})
    template["metadata"] = {
        "name": name,
        "namespace": namespace,
        "labels": template["metadata"].get("labels", {}),
        "annotations": template["metadata"].get("annotations") or {},
    }
    plane.apply({"apiVersion": "v1", "kind": "Pod", **template})
    return name
