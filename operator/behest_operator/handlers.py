"""kopf's part: which changes are looked at, retried and finalised. What they mean is `reconciler`'s."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from weakref import WeakValueDictionary

import kopf
import msgspec

from behest_ledger.configuration.kinds import KindName, Project
from behest_ledger.store.errors import LedgerConflictError, LedgerError, LedgerUnavailableError
from behest_operator.annotations import TENANT_LABEL
from behest_operator.conditions import Finding, merged
from behest_operator.crds import GROUP, KINDS, VERSION
from behest_operator.kubernetes import Kubernetes, KubernetesError
from behest_operator.namespace_labels import NamespaceLabels
from behest_operator.reconciler import Applied, Reconciler
from behest_operator.status import BudgetBoard, plain
from behest_operator.watch import OperatorWatch

logger = logging.getLogger(__name__)

RETRY_S = 2.0
RESYNC_S = 15.0
"""How often it is looked whether Secrets came or changed, or a namespace has another tenant."""
MEND_S = 600.0
"""How often everything is applied again, whatever it was that lost it."""
REMOVED_KEPT = 10_000
"""A look that began before a resource was removed ends within seconds: no more than these are removed meanwhile."""
_READS_SECRETS = ("Project", "Upstream")
PREFIX = "behest.ai"


class Handlers:
    """Registers itself with kopf."""

    def __init__(
        self, reconciler: Reconciler, kubernetes: Kubernetes, board: BudgetBoard, watch: OperatorWatch
    ) -> None:
        self._watch = watch
        self._reconciler = reconciler
        self._board = board
        self._applied: dict[str, _Done] = {}
        # kopf runs timers beside the handlers of a deletion: a resource is looked at or removed, one after the other.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._removed: dict[str, None] = {}
        self._labels = NamespaceLabels(kubernetes)

    def register(self, registry: kopf.OperatorRegistry) -> None:
        """Tell kopf what to call."""
        for kind in KINDS:
            where: dict[str, Any] = {"registry": registry, "group": GROUP, "version": VERSION, "kind": kind}
            for event in (kopf.on.create, kopf.on.update, kopf.on.resume):
                event(**where, id="apply")(self._apply)
            kopf.on.delete(**where, id="remove")(self._remove)
            kopf.timer(**where, id="resync", interval=RESYNC_S, initial_delay=RESYNC_S)(self._resync)
        kopf.on.event(registry=registry, group=GROUP, version=VERSION, kind="Budget")(self._seen)

    async def _apply(self, *, body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
        applied = await self._reconcile(body, patch)
        if applied is None:
            return
        _write(applied, body, patch)
        accepted = applied.findings[0]
        if accepted.status == "False":
            kopf.warn(body, reason=accepted.reason, message=accepted.message)

    async def _resync(self, *, body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
        if body["metadata"].get("deletionTimestamp"):
            return
        applied = await self._reconcile(body, patch, again=True)
        if applied is not None and (applied.changed or _differs(applied.findings, body)):
            _write(applied, body, patch)

    async def _remove(self, *, body: kopf.Body, namespace: str | None, name: str | None, **_: Any) -> None:
        assert namespace is not None, "the kinds are namespaced"
        assert name is not None, "a resource has a name"
        kind: KindName = body["kind"]
        uid: str = body["metadata"]["uid"]
        async with self._lock(uid):
            begun_s = time.monotonic()
            try:
                await self._reconciler.remove(kind, namespace, name, body.get("spec", {}))
            except (LedgerError, KubernetesError) as error:
                self._watch.reconciled(kind, "failed", time.monotonic() - begun_s)
                raise kopf.TemporaryError(_unknown(error).message, delay=RETRY_S) from None
            self._watch.reconciled(kind, "removed", time.monotonic() - begun_s)
            self._applied.pop(uid, None)
            self._removed[uid] = None
            if len(self._removed) > REMOVED_KEPT:
                del self._removed[next(iter(self._removed))]
        if kind == "Budget":
            self._board.forget(namespace, name)

    async def _seen(self, *, body: kopf.Body, type: str | None, **_: Any) -> None:  # noqa: A002 - kopf's name
        if type == "DELETED":
            self._board.forget(body["metadata"]["namespace"], body["metadata"]["name"])
        else:
            self._board.see(body)

    def _lock(self, uid: str) -> asyncio.Lock:
        """A resource's own lock; it lives as long as somebody has it."""
        return self._locks.setdefault(uid, asyncio.Lock())

    async def _reconcile(self, body: kopf.Body, patch: kopf.Patch, *, again: bool = False) -> Applied | None:
        """What became of the resource; None: it was removed, or looked at `again`, and nothing can have changed."""
        uid: str = body["metadata"]["uid"]
        async with self._lock(uid):
            return None if uid in self._removed else await self._carry(body, patch, again=again)

    async def _carry(self, body: kopf.Body, patch: kopf.Patch, *, again: bool) -> Applied | None:
        metadata = body["metadata"]
        begun_s = time.monotonic()
        try:
            namespace = metadata["namespace"]
            labels = await (self._labels.lately(namespace, RESYNC_S) if again else self._labels.now(namespace))
            now_s = time.monotonic()
            done = _Done(generation=metadata.get("generation", 0), labels=labels, at_s=now_s)
            before = self._applied.get(metadata["uid"])
            if again and before is not None and not done.may_differ(before, by_itself=body["kind"] in _READS_SECRETS):
                return None
            applied = await self._reconciler.apply(body, labels)
        except (LedgerError, KubernetesError) as error:
            self._watch.reconciled(body["kind"], "failed", time.monotonic() - begun_s)
            finding = _unknown(error)
            if _differs([finding], body):
                generation = metadata.get("generation", 0)
                patch.status["conditions"] = merged(_conditions(body), [finding], generation=generation, now=_now())
            raise kopf.TemporaryError(finding.message, delay=RETRY_S) from None
        self._applied[metadata["uid"]] = done
        refused = applied.findings[0].status == "False"
        self._watch.reconciled(body["kind"], "refused" if refused else "accepted", time.monotonic() - begun_s)
        return applied


class _Done(msgspec.Struct, frozen=True, kw_only=True):
    """When a resource was last carried into the ledger, and from what."""

    generation: int
    labels: Mapping[str, str]
    at_s: float

    def may_differ(self, before: "_Done", *, by_itself: bool) -> bool:
        """Whether there is anything to do again. One whose older state comes late never goes before the newer."""
        if self.generation < before.generation:
            return False
        return (
            by_itself
            or self.generation != before.generation
            or self.labels.get(TENANT_LABEL) != before.labels.get(TENANT_LABEL)
            or self.at_s - before.at_s >= MEND_S
        )


def _unknown(error: LedgerError | KubernetesError) -> Finding:
    """What is known while a call fails: nothing of what the ledger has now. It is tried again."""
    if isinstance(error, KubernetesError):
        reason, message = "KubernetesUnavailable", f"the API server refused a call: {error}"
        if not error.status:
            message = f"the API server cannot be reached: {error}"
    elif isinstance(error, LedgerUnavailableError | LedgerConflictError):
        reason, message = "LedgerUnavailable", f"the ledger cannot be reached: {error}"
    else:
        reason, message = "LedgerRefused", f"the ledger refused it: {error}"
    return Finding(type="Programmed", status="Unknown", reason=reason, message=message)


def _write(applied: Applied, body: kopf.Body, patch: kopf.Patch) -> None:
    """Write what is not in the status yet: after a restart that is nothing, for thousands of resources."""
    generation = body["metadata"].get("generation", 0)
    wanted: dict[str, Any] = {
        "conditions": merged(_conditions(body), applied.findings, generation=generation, now=_now()),
        "observedGeneration": generation,
    }
    if isinstance(applied.manifest, Project):
        wanted["projectID"] = applied.manifest.qualified_name
        wanted["tenant"] = applied.tenant
        secret_name = applied.manifest.spec.api_key_secret_name
        wanted["apiKey"] = {"secretName": secret_name, "key": "api-key"} if secret_name else None
    found = plain(body.get("status", {}))
    for name, value in wanted.items():
        if found.get(name) != value:
            patch.status[name] = value


def _conditions(body: kopf.Body) -> list[dict[str, Any]]:
    return [dict(item) for item in body.get("status", {}).get("conditions", [])]


def _differs(findings: Sequence[Finding], body: kopf.Body) -> bool:
    found = {item["type"]: item for item in _conditions(body)}

    def told(finding: Finding) -> bool:
        before = found.get(finding.type, {})
        return (before.get("status"), before.get("message")) == (finding.status, finding.message)

    return not all(told(finding) for finding in findings)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def configure(settings: kopf.OperatorSettings, *, some_namespaces: bool) -> None:
    """Our names in the objects that we own; Events only where a handler says so, and none of what is logged."""
    # Kept to some namespaces, it may not list all: kopf would ask nine times, for most of a minute, before it begins.
    settings.scanning.disabled = some_namespaces
    settings.persistence.finalizer = f"{PREFIX}/finalizer"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=PREFIX)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=PREFIX)
    settings.posting.loggers = False
    settings.posting.level = logging.WARNING
    settings.posting.reporting_component = "behest-operator"
    settings.posting.event_name_prefix = "behest-"
    settings.watching.server_timeout = 300
    settings.networking.request_timeout = 15
