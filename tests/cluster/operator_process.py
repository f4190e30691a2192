"""An operator process against the control plane, under a service account of its own, with a ledger."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from behest_proxy.cli.preflight import free_port
from cluster.control_plane import ControlPlane


@dataclass
class OperatorProcess:
    """`behest operator`, running or not."""

    plane: ControlPlane
    dsn: str
    kubeconfig: Path
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> int:
        """Start it: the port of its probes."""
        port = free_port(0)
        output = self.log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-m", "behest_proxy.cli.main", "operator"],
            env={
                "PATH": os.environ.get("PATH", ""),
                "KUBECONFIG": str(self.kubeconfig),
                "BEHEST_DATABASE_URL": self.dsn,
                "BEHEST_LIVENESS_BIND": f"127.0.0.1:{port}",
                **self.environment,
            },
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
        output.close()
        return port

    def start(self) -> None:
        """Start it and wait until it lives."""
        port = self.spawn()

        def lives() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
            except httpx.HTTPError:
                return False

        eventually(lives, what="the operator's start")

    def stop(self, *, kill: bool = False) -> None:
        """End it: politely, or as a node that fails."""
        if self.process is not None:
            self.process.kill() if kill else self.process.terminate()
            try:
                self.process.wait(90)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise AssertionError(f"the operator does not end: {self.log.read_text()[-3000:]}") from None
            finally:
                self.process = None


def eventually(is_so: Callable[[], Any], *, timeout_s: float = 90.0, what: str = "it", interval_s: float = 0.05) -> Any:
    """Poll until something is true, and return it. How soon it should be so is for those tests that say it."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if found := is_so():
            return found
        time.sleep(interval_s)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")


def condition(
    plane: ControlPlane, kind: str, name: str, namespace: str, type_: str, status: str = ""
) -> dict[str, Any] | None:
    """One condition of a resource, for its newest generation; None where there is none yet, or none of this status."""
    found = plane.get(kind, name, namespace)
    for item in found.get("status", {}).get("conditions", []):
        if item["type"] == type_ and item.get("observedGeneration") == found["metadata"]["generation"]:
            result: dict[str, Any] = item
            return result if status in ("", item["status"]) else None
    return None
