"""The operator is killed at any call that it makes, and the API server goes away: the end is the same.

`BEHEST_OPERATOR_KILLS=all` kills it at every call of a life, one after the other; without it, at some of them.
"""

import base64
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from behest_operator.crds import KINDS
from cluster.control_plane import CommandFailed, ControlPlane
from cluster.counted import Ways, counted_ways
from cluster.operator_process import OperatorProcess, condition, eventually
from cluster.release import resource
from cluster.resources import forget_resources, install_crds
from cluster.sql import rows

SOME_CALLS = (9, 17, 24, 31, 38, 47, 56, 68)
"""Numbers of calls of one life, both odd (killed before it is done) and even (after)."""
ALL_CALLS = tuple(range(1, 90))


@dataclass
class World:
    """An operator that says everything through proxies."""

    plane: ControlPlane
    ways: Ways
    operator: OperatorProcess
    dsn: str
    namespaces: list[str] = field(default_factory=list)
    _lives: int = 0

    def live(self, *, until_call: int | None) -> None:
        """One life: the operator is killed at this call, or goes on."""
        self.operator.stop(kill=True)
        self._lives += 1
        self.ways.calls.begin(until_call, partial(self._kill, self._lives))
        self.operator.spawn()
        if until_call is not None:
            assert self.operator.process is not None
            assert self.operator.process.wait(180) == -signal.SIGKILL, self.operator.log.read_text()[-3000:]

    def _kill(self, life: int) -> None:
        # Two connections may have come to the last call: the second must not end the life after this one.
        if life == self._lives:
            assert self.operator.process is not None
            os.kill(self.operator.process.pid, signal.SIGKILL)


@pytest.fixture
def world(control_plane: ControlPlane, database: str, tmp_path: Path) -> Iterator[World]:
    install_crds(control_plane)
    (tmp_path / "master-key").write_text(base64.b64encode(bytes(range(32))).decode())
    # Rights are another file's matter: here it is the administrator.
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
        made = World(control_plane, ways, operator, database)
        yield made
        operator.stop()
        assert "Traceback" not in operator.log.read_text(), operator.log.read_text()
        forget_resources(control_plane)


def resources() -> list[dict[str, Any]]:
    return [
        resource("Project", "shop", {"defaultModel": "m", "apiKeySecretName": "shop-key"}),
        resource(
            "Upstream",
            "openai",
            {"baseURL": "https://api.openai.com/v1", "credentials": {"secretKeyRef": {"name": "openai", "key": "k"}}},
        ),
        resource("Tier", "free", {"number": 1, "requestsPerMinute": 5}),
        resource(
            "Budget", "shop", {"scope": {"project": "shop"}, "limit": {"requests": 9}, "window": {"period": "Day"}}
        ),
    ]


def applied(world: World) -> str:
    namespace = world.plane.namespace("kill")
    world.namespaces.append(namespace)
    world.plane.kubectl(
        "create", "secret", "generic", "openai", "--namespace", namespace, "--from-literal=k=sk-0123456789abcdef"
    )
    world.plane.apply(*resources(), namespace=namespace)
    return namespace


def secret(world: World, name: str, namespace: str) -> dict[str, str] | None:
    try:
        found = world.plane.get("secret", name, namespace)
    except CommandFailed:
        return None
    return {key: base64.b64decode(value).decode() for key, value in found["data"].items()}


LEFT = """
SELECT (SELECT count(*) FROM ledger.project WHERE namespace = $1) AS projects,
       (SELECT count(*) FROM ledger.upstream WHERE namespace = $1) AS upstreams,
       (SELECT count(*) FROM ledger.tier WHERE namespace = $1) AS tiers,
       (SELECT count(*) FROM ledger.budget WHERE namespace = $1 AND deleted_at IS NULL) AS budgets,
       (SELECT count(*) FROM ledger.budget WHERE namespace = $1) AS budgets_ever,
       (SELECT count(*) FROM ledger.provider_key WHERE tenant_id = $1) AS provider_keys,
       (SELECT count(*) FROM ledger.api_key WHERE tenant_id = $1 AND revoked_at IS NULL) AS api_keys,
       (SELECT count(*) FROM ledger.tenant_role WHERE tenant_id = $1) AS logins
"""
# Of the tier a row of its own, and its budget of requests per minute.
WHOLE = {
    "projects": 1, "upstreams": 1, "tiers": 1, "budgets": 2, "budgets_ever": 2, "provider_keys": 1, "api_keys": 1,
    "logins": 1,
}  # fmt: skip
NOTHING = {**dict.fromkeys(WHOLE, 0), "budgets_ever": 2}


def is_whole(world: World, namespace: str) -> bool:
    for kind, name in (("project", "shop"), ("upstream", "openai"), ("tier", "free"), ("budget", "shop")):
        found = condition(world.plane, kind, name, namespace, "Programmed")
        if found is None or found["status"] != "True":
            return False
        assert world.plane.get(kind, name, namespace)["metadata"]["finalizers"] == ["behest.ai/finalizer"]
    ours = secret(world, "behest-sidecar", namespace)
    key = secret(world, "shop-key", namespace)
    if ours is None or key is None or rows(world.dsn, LEFT, namespace) != [WHOLE]:
        return False
    tenants = rows(ours["database-url"], "SELECT ledger.session_tenants_v1() AS tenants")
    return tenants == [{"tenants": [namespace]}]


def is_gone(world: World, namespace: str) -> bool:
    left = [item for kind in KINDS for item in world.plane.items(kind.lower(), namespace)]
    if left or rows(world.dsn, LEFT, namespace) != [NOTHING]:
        return False
    return secret(world, "behest-sidecar", namespace) is None and secret(world, "shop-key", namespace) is None


def test_killed_at_any_call_and_started_again_it_comes_to_the_same_end(world: World) -> None:
    everything = os.environ.get("BEHEST_OPERATOR_KILLS") == "all"
    for call in ALL_CALLS if everything else SOME_CALLS:
        applied(world)
        world.live(until_call=call)
    world.live(until_call=None)
    for namespace in world.namespaces:
        eventually(partial(is_whole, world, namespace), timeout_s=90, what=f"the end of {namespace}")
    for number, namespace in enumerate(world.namespaces):
        world.plane.kubectl("delete", "behest", "--all", "--namespace", namespace, "--wait=false")
        world.live(until_call=(ALL_CALLS if everything else SOME_CALLS)[number])
    world.live(until_call=None)
    for namespace in world.namespaces:
        eventually(partial(is_gone, world, namespace), timeout_s=90, what=f"the end of {namespace}")


def test_while_the_api_server_is_away_nothing_is_lost_and_then_it_goes_on(world: World) -> None:
    world.live(until_call=None)
    first = applied(world)
    eventually(lambda: is_whole(world, first), what="the first")
    world.ways.kubernetes.go_away()
    second = applied(world)
    world.plane.kubectl("delete", "budget", "shop", "--namespace", first, "--wait=false")
    world.plane.apply(resource("Tier", "free", {"number": 1, "requestsPerMinute": 7}), namespace=first)
    assert world.operator.process is not None
    with pytest.raises(AssertionError):
        eventually(lambda: world.operator.process and world.operator.process.poll(), timeout_s=5)
    assert rows(world.dsn, "SELECT 1 FROM ledger.project WHERE namespace = $1", second) == []
    world.ways.kubernetes.come_back()
    eventually(lambda: is_whole(world, second), timeout_s=90, what="what was applied meanwhile")

    def caught_up() -> bool:
        budgets = world.plane.items("budget", first)
        limit = "SELECT limit_amount::int AS amount FROM ledger.budget WHERE namespace = $1 AND deleted_at IS NULL"
        return not budgets and rows(world.dsn, limit, first) == [{"amount": 7}]

    eventually(caught_up, timeout_s=60, what="what was changed meanwhile")
