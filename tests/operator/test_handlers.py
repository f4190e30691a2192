"""kopf's part without kopf: what is written, what is tried again, and what is left alone."""

import asyncio
from typing import Any, cast

import kopf
import pytest

from behest_ledger.store.errors import LedgerRefusedError, LedgerUnavailableError
from behest_ledger.telemetry.meter import Meter
from behest_ledger.telemetry.names import RECONCILES
from behest_operator import handlers
from behest_operator.conditions import Finding
from behest_operator.handlers import Handlers
from behest_operator.kubernetes import KubernetesError
from behest_operator.reconciler import Applied, Reconciler, refused
from behest_operator.status import BudgetBoard
from behest_operator.watch import OperatorWatch
from fake_kubernetes import FakeKubernetes

NAMESPACE = "/api/v1/namespaces/demo"
FINE = Applied(
    findings=(
        Finding(type="Accepted", status="True", reason="Accepted"),
        Finding(type="Programmed", status="True", reason="Programmed", message="the ledger has it"),
    )
)


class Answers:
    """Stands in for the reconciler: what it says is what a test wants it to say."""

    def __init__(self) -> None:
        self.answer: Applied | Exception = FINE
        self.applied: list[tuple[int, str | None]] = []
        self.removed: list[tuple[str, str, str]] = []
        self.order: list[str] = []
        self.slow: dict[str, asyncio.Event] = {}
        """By what is called: it takes until the event is set."""

    async def _take_time(self, name: str) -> None:
        self.order.append(f"{name} begins")
        if name in self.slow:
            await self.slow[name].wait()
        self.order.append(f"{name} ends")

    async def apply(self, body: Any, labels: Any) -> Applied:
        await self._take_time("apply")
        self.applied.append((body["metadata"]["generation"], labels.get("behest.ai/tenant")))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def remove(self, kind: str, namespace: str, name: str, spec: Any) -> None:
        await self._take_time("remove")
        if isinstance(self.answer, Exception):
            raise self.answer
        self.removed.append((kind, namespace, name))


class Kopf:
    """What kopf would call, and with what."""

    def __init__(self, kind: str = "Budget") -> None:
        self.kubernetes = FakeKubernetes()
        self.kubernetes.objects[NAMESPACE] = {"metadata": {"name": "demo", "labels": {}}}
        self.answers = Answers()
        self.board = BudgetBoard(None, self.kubernetes)
        self.meter = Meter()
        watch = OperatorWatch(self.meter)
        self.handlers = Handlers(cast(Reconciler, self.answers), self.kubernetes, self.board, watch)
        self.raw: dict[str, Any] = {
            "kind": kind,
            "metadata": {"name": "b", "namespace": "demo", "uid": "u", "generation": 1},
            "spec": {},
        }

    async def call(self, name: str) -> dict[str, Any]:
        """The status that a handler wants written."""
        patch = kopf.Patch()
        body = kopf.Body(self.raw)  # type: ignore[arg-type]
        try:
            await getattr(self.handlers, name)(body=body, patch=patch, namespace="demo", name="b", type="MODIFIED")
        finally:
            status = {**patch.get("status", {})}
            self.raw.setdefault("status", {}).update(status)
        return status

    def reconciles(self) -> dict[tuple[str, ...], int]:
        """What is told, by kind and result."""
        return dict(self.meter.counter(RECONCILES).series)


def shown(status: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {item["type"]: (item["status"], item["reason"]) for item in status.get("conditions", [])}


def test_what_was_applied_is_written_with_its_generation() -> None:
    async def main() -> None:
        caller = Kopf()
        caller.raw["metadata"]["generation"] = 7
        status = await caller.call("_apply")
        assert status["observedGeneration"] == 7
        assert shown(status)["Programmed"] == ("True", "Programmed")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "reason", "says"),
    [
        (LedgerUnavailableError("no route to host"), "LedgerUnavailable", "the ledger cannot be reached: no route"),
        (LedgerRefusedError("no such function"), "LedgerRefused", "the ledger refused it: no such function"),
        (KubernetesError(403, "forbidden"), "KubernetesUnavailable", "the API server refused a call: 403: forbidden"),
        (KubernetesError(0, "no route"), "KubernetesUnavailable", "the API server cannot be reached: no route"),
    ],
)
def test_while_a_call_fails_the_status_says_so_once_and_it_is_tried_again(
    error: Exception, reason: str, says: str
) -> None:
    async def main() -> None:
        caller = Kopf("Project")
        await caller.call("_apply")
        caller.answers.answer = error
        for name in ("_apply", "_resync", "_apply"):
            with pytest.raises(kopf.TemporaryError, match=says):
                await caller.call(name)
            assert shown(caller.raw["status"]) == {"Accepted": ("True", "Accepted"), "Programmed": ("Unknown", reason)}
        caller.answers.answer = FINE
        await caller.call("_resync")
        assert shown(caller.raw["status"])["Programmed"] == ("True", "Programmed")
        caller.answers.answer = refused("Invalid", "no")
        await caller.call("_resync")
        told = {result: number for (_, result), number in caller.reconciles().items()}
        assert told == {"accepted": 2, "failed": 3, "refused": 1}

    asyncio.run(main())


def test_a_removal_that_fails_is_tried_again_so_that_the_finalizer_stays() -> None:
    async def main() -> None:
        caller = Kopf("Project")
        for error in (LedgerUnavailableError("away"), KubernetesError(0, "away")):
            caller.answers.answer = error
            with pytest.raises(kopf.TemporaryError):
                await caller.call("_remove")
        caller.answers.answer = FINE
        await caller.call("_remove")
        assert caller.answers.removed == [("Project", "demo", "b")]
        assert caller.reconciles() == {("Project", "failed"): 2, ("Project", "removed"): 1}

    asyncio.run(main())


@pytest.mark.parametrize("name", ["_resync", "_apply"])
def test_a_look_that_is_under_way_does_not_bring_back_what_is_removed_meanwhile(name: str) -> None:
    async def main() -> None:
        caller = Kopf("Project")
        gate = caller.answers.slow["apply"] = asyncio.Event()
        look = asyncio.create_task(caller.call(name))
        while "apply begins" not in caller.answers.order:
            await asyncio.sleep(0)
        removal = asyncio.create_task(caller.call("_remove"))
        for _ in range(10):
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(look, removal)
        assert caller.answers.order == ["apply begins", "apply ends", "remove begins", "remove ends"]

    asyncio.run(main())


@pytest.mark.parametrize("name", ["_resync", "_apply"])
def test_a_look_that_comes_while_a_resource_is_removed_finds_it_gone(name: str) -> None:
    async def main() -> None:
        caller = Kopf("Project")
        gate = caller.answers.slow["remove"] = asyncio.Event()
        removal = asyncio.create_task(caller.call("_remove"))
        while "remove begins" not in caller.answers.order:
            await asyncio.sleep(0)
        look = asyncio.create_task(caller.call(name))
        for _ in range(10):
            await asyncio.sleep(0)
        gate.set()
        await removal
        assert await look == {}
        assert await caller.call(name) == {}
        assert caller.answers.applied == []
        assert caller.reconciles() == {("Project", "removed"): 1}

    asyncio.run(main())


def test_a_look_after_a_removal_that_failed_is_a_look_like_any_other() -> None:
    async def main() -> None:
        caller = Kopf("Project")
        caller.answers.answer = LedgerUnavailableError("away")
        with pytest.raises(kopf.TemporaryError):
            await caller.call("_remove")
        caller.answers.answer = FINE
        assert await caller.call("_resync")
        await caller.call("_remove")
        assert await caller.call("_resync") == {}

    asyncio.run(main())


def test_only_the_latest_removals_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "REMOVED_KEPT", 2)

    async def main() -> None:
        caller = Kopf()
        for uid in ("a", "b", "c"):
            caller.raw["metadata"]["uid"] = uid
            await caller.call("_remove")
        for uid, looked_at in (("a", True), ("b", False), ("c", False)):
            caller.raw["metadata"]["uid"] = uid
            assert bool(await caller.call("_apply")) == looked_at

    asyncio.run(main())


def test_what_cannot_have_changed_is_not_applied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        caller = Kopf()
        await caller.call("_apply")
        for _ in range(3):
            assert await caller.call("_resync") == {}
        assert len(caller.answers.applied) == 1
        assert caller.reconciles() == {("Budget", "accepted"): 1}
        caller.raw["metadata"]["generation"] = 2
        await caller.call("_resync")
        monkeypatch.setattr(handlers, "RESYNC_S", 0.0)
        caller.kubernetes.objects[NAMESPACE]["metadata"]["labels"] = {"behest.ai/tenant": "acme"}
        await caller.call("_resync")
        assert caller.answers.applied == [(1, None), (2, None), (2, "acme")]
        monkeypatch.setattr(handlers, "MEND_S", 0.0)
        await caller.call("_resync")
        assert len(caller.answers.applied) == 4

    asyncio.run(main())


def test_what_reads_secrets_is_looked_at_each_time() -> None:
    async def main() -> None:
        for kind in ("Project", "Upstream"):
            caller = Kopf(kind)
            for name in ("_apply", "_resync", "_resync"):
                await caller.call(name)
            assert len(caller.answers.applied) == 3

    asyncio.run(main())


def test_an_older_state_that_comes_late_and_one_that_is_going_are_left_alone() -> None:
    async def main() -> None:
        caller = Kopf("Project")
        caller.raw["metadata"]["generation"] = 5
        await caller.call("_apply")
        caller.raw["metadata"]["generation"] = 4
        assert await caller.call("_resync") == {}
        caller.raw["metadata"] |= {"generation": 6, "deletionTimestamp": "2026-01-01T00:00:00Z"}
        assert await caller.call("_resync") == {}
        assert [generation for generation, _ in caller.answers.applied] == [5]

    asyncio.run(main())


def test_a_refusal_is_an_event_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []

    def warn(_body: kopf.Body, *, reason: str, message: str) -> None:
        told.append((reason, message))

    monkeypatch.setattr(kopf, "warn", warn)

    async def main() -> None:
        caller = Kopf()
        caller.answers.answer = refused("Invalid", "spec.limit: must be positive")
        status = await caller.call("_apply")
        assert shown(status) == {"Accepted": ("False", "Invalid"), "Programmed": ("False", "NotAccepted")}

    asyncio.run(main())
    assert told == [("Invalid", "spec.limit: must be positive")]


def test_events_of_handlers_are_posted_and_what_is_logged_is_not() -> None:
    settings = kopf.OperatorSettings()
    handlers.configure(settings, some_namespaces=False)
    assert settings.posting.enabled
    assert settings.posting.level <= 30
    assert not settings.posting.loggers
    assert settings.persistence.finalizer == "behest.ai/finalizer"
