"""An operator beside hundreds of resources: written together at its start, untouched by a restart, and all deleted.

`BEHEST_SCALE=5000` makes it thousands, to measure; what is asserted are numbers of calls, not times.
"""

import base64
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from behest_operator.crds import KINDS
from cluster.control_plane import ControlPlane
from cluster.counted import Ways, counted_ways
from cluster.operator_process import OperatorProcess, eventually
from cluster.release import resource
from cluster.resources import forget_resources, install_crds
from cluster.sql import rows

RESOURCES = int(os.environ.get("BEHEST_SCALE", "200"))
OF_A_NAMESPACE = 50
"""A project, an upstream, three tiers, and budgets."""
LEDGER = """
SELECT (SELECT count(*) FROM ledger.project) + (SELECT count(*) FROM ledger.upstream)
     + (SELECT count(*) FROM ledger.tier)
     + (SELECT count(*) FROM ledger.budget b WHERE b.name !~ '^tier:' AND b.deleted_at IS NULL) AS many
"""


def resources_of(namespace: str) -> list[dict[str, Any]]:
    budget = {"scope": {"project": "shop"}, "limit": {"requests": 9}, "window": {"period": "Day"}}
    found = [
        resource("Project", "shop", {"defaultModel": "m"}),
        resource("Upstream", "openai", {"baseURL": "https://api.openai.com/v1"}),
        *(resource("Tier", f"t{number}", {"number": number, "requestsPerMinute": 5}) for number in (1, 2, 3)),
    ]
    found += [resource("Budget", f"b{number}", budget) for number in range(OF_A_NAMESPACE - len(found))]
    for item in found:
        item["metadata"]["namespace"] = namespace
    return found


def create_all(plane: ControlPlane, namespaces: list[str]) -> None:
    """kubectl keeps to a few a second; this does not."""

    def create(item: dict[str, Any]) -> None:
        path = plane.path(item["kind"].lower(), item["metadata"]["namespace"])
        plane.client.post(path, json=item).raise_for_status()

    with ThreadPoolExecutor(8) as creators:
        for namespace in namespaces:
            list(creators.map(create, resources_of(namespace)))


def soon(is_so: Callable[[], Any], what: str) -> None:
    """Looking at all of them is work: once a second."""
    eventually(is_so, timeout_s=60 + RESOURCES * 0.5, what=what, interval_s=1.0)


def waiting(plane: ControlPlane, namespaces: set[str]) -> list[str]:
    """The resources whose status does not say yet that the ledger has them."""
    found = [item for kind in KINDS for item in plane.items(kind.lower())]
    ours = [item for item in found if item["metadata"]["namespace"] in namespaces]
    assert len(ours) == RESOURCES
    return [
        item["metadata"]["name"]
        for item in ours
        if not any(
            condition["type"] == "Programmed" and condition["status"] == "True"
            for condition in item.get("status", {}).get("conditions", [])
        )
    ]


def untold(plane: ControlPlane) -> list[str]:
    """The budgets of which it is not told yet how they stand: in a round of its own, after they are in the ledger."""
    return [
        item["metadata"]["name"]
        for item in plane.items("budget")
        if "phase" not in item["status"]
        or "Exhausted" not in {condition["type"] for condition in item["status"]["conditions"]}
    ]


def is_still(ways: Ways) -> bool:
    """Whether nothing was written for as long as two of the operator's rounds take."""
    before = seen(ways)["PATCH"]
    time.sleep(4)
    return seen(ways)["PATCH"] == before


def cpu_s(operator: OperatorProcess) -> float:
    assert operator.process is not None
    fields = Path(f"/proc/{operator.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def seen(ways: Ways) -> Counter[str]:
    """How many calls of which kind: methods of HTTP, and the statements that matter."""
    found: Counter[str] = Counter()
    for call in ways.calls.seen:
        found["batches" if "pg_advisory_xact_lock" in call else call.partition(" ")[0]] += 1
    return found


def test_it_starts_beside_many_resources_in_few_steps_and_a_restart_writes_nothing(
    control_plane: ControlPlane, database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_crds(control_plane)
    (tmp_path / "master-key").write_text(base64.b64encode(bytes(32)).decode())
    namespaces = [control_plane.namespace("scale") for _ in range(RESOURCES // OF_A_NAMESPACE)]
    create_all(control_plane, namespaces)
    with counted_ways(control_plane, control_plane.administrator(), database) as ways:
        operator = OperatorProcess(
            plane=control_plane,
            dsn=ways.dsn,
            kubeconfig=ways.kubeconfig,
            log=tmp_path / "operator.log",
            environment={
                "BEHEST_MASTER_KEY_FILE": str(tmp_path / "master-key"),
                "BEHEST_SIDECAR_DATABASE_URL": database,
            },
        )
        try:
            started_s = time.monotonic()
            operator.start()
            soon(lambda: rows(database, LEDGER)[0]["many"] == RESOURCES, "the ledger")
            enforced_s = time.monotonic() - started_s
            soon(lambda: not waiting(control_plane, set(namespaces)), "their status")
            told_s, first_cpu_s, first = time.monotonic() - started_s, cpu_s(operator), seen(ways)
            soon(lambda: not untold(control_plane), "the last statuses of budgets")
            soon(lambda: is_still(ways), "the last writes")
            operator.stop()
            ways.calls.begin()
            started_s = time.monotonic()
            operator.start()
            unchanged = len(namespaces) * 2
            soon(lambda: seen(ways)["GET"] >= unchanged, "the look at Secrets")
            time.sleep(3)
            again_s, again_cpu_s, again = time.monotonic() - started_s, cpu_s(operator), seen(ways)
            time.sleep(20)
            idle = (cpu_s(operator) - again_cpu_s) / 20
            started_s = time.monotonic()
            for namespace in namespaces:
                for kind in KINDS:
                    control_plane.client.delete(control_plane.path(kind.lower(), namespace)).raise_for_status()
            soon(lambda: not any(control_plane.items(kind.lower()) for kind in KINDS), "the end of all of them")
            gone_s = time.monotonic() - started_s
            assert rows(database, LEDGER)[0]["many"] == 0
        finally:
            operator.stop()
            forget_resources(control_plane)
    with capsys.disabled():
        print(
            f"\n{RESOURCES} resources: in the ledger after {enforced_s:.1f} s, in status after {told_s:.1f} s"
            f" ({first_cpu_s:.1f} s of CPU, {dict(first)}); restarted: {again_s:.1f} s ({again_cpu_s:.1f} s of CPU,"
            f" {dict(again)}); idle: {idle:.0%} of a CPU; all deleted after {gone_s:.1f} s"
        )
    assert "Traceback" not in operator.log.read_text()
    assert first["batches"] <= RESOURCES / 5, "they are written together"
    assert again["PATCH"] + again["PUT"] + again["POST"] == 0, "nothing changed"
