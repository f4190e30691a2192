"""kopf's part: which changes are looked at, retried and finalised. What they mean is `reconciler`'s."""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import kopf

from behest_ledger.configuration.kinds import KindName, Project
from behest_ledger.store.errors import LedgerError
from behest_operator.conditions import Finding, merged
from behest_operator.crds import GROUP, KINDS, VERSION
from behest_operator.kubernetes import Kubernetes, KubernetesError
from behest_operator.reconciler import Applied, Reconciler
from behest_operator.status import BudgetBoard

logger = logging.getLogger(__name__)

RETRY_S = 2.0
RESYNC_S = 15.0
"""How often everything is applied again: Secrets that came or changed are taken, whatever was lost is mended."""
PREFIX = "behest.ai"


class Handlers:
    """Registers itself with kopf."""

    def __init__(self, reconciler: Reconciler, kubernetes: Kubernetes, board: BudgetBoard) -> None:
        self._reconciler = reconciler
        self._kubernetes = kubernetes
        self._board = board

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
        applied = await self._reconcile(body)
        _write(applied, body, patch)
        accepted = applied.findings[0]
        if accepted.status == "False":
            kopf.warn(body, reason=accepted.reason, message=accepted.message)

    async def _resync(self, *, body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
        applied = await self._reconcile(body)
        if applied.changed or _differs(applied, body):
            _write(applied, body, patch)

    async def _remove(self, *, body: kopf.Body, namespace: str | None, name: str | None, **_: Any) -> None:
        assert namespace is not None, "the kinds are namespaced"
        assert name is not None, "a resource has a name"
        kind: KindName = body["kind"]
        try:
            await self._reconciler.remove(kind, namespace, name)
        except LedgerError as error:
            raise kopf.TemporaryError(f"the ledger could not be reached: {error}", delay=RETRY_S) from None
        if kind == "Budget":
            self._board.forget(namespace, name)

    async def _seen(self, *, body: kopf.Body, type: str | None, **_: Any) -> None:  # noqa: A002 - kopf's name
        if type == "DELETED":
            self._board.forget(body["metadata"]["namespace"], body["metadata"]["name"])
        else:
            self._board.see(body)

    async def _reconcile(self, body: kopf.Body) -> Applied:
        namespace = body["metadata"]["namespace"]
        try:
            found = await self._kubernetes.get(f"/api/v1/namespaces/{namespace}")
            labels: Mapping[str, str] = (found or {}).get("metadata", {}).get("labels") or {}
            return await self._reconciler.apply(body, labels)
        except KubernetesError as error:
            raise kopf.TemporaryError(f"the API server refused a call: {error}", delay=RETRY_S) from None
        except LedgerError as error:
            raise kopf.TemporaryError(f"the ledger could not be reached: {error}", delay=RETRY_S) from None


def _write(applied: Applied, body: kopf.Body, patch: kopf.Patch) -> None:
    generation = body["metadata"].get("generation", 0)
    found = [dict(item) for item in body.get("status", {}).get("conditions", [])]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    patch.status["conditions"] = merged(found, applied.findings, generation=generation, now=now)
    patch.status["observedGeneration"] = generation
    if isinstance(applied.manifest, Project):
        patch.status["projectID"] = applied.manifest.qualified_name
        patch.status["tenant"] = applied.tenant
        secret_name = applied.manifest.spec.api_key_secret_name
        patch.status["apiKey"] = {"secretName": secret_name, "key": "api-key"} if secret_name else None


def _differs(applied: Applied, body: kopf.Body) -> bool:
    found = {item["type"]: item for item in body.get("status", {}).get("conditions", [])}

    def told(finding: Finding) -> bool:
        before = found.get(finding.type, {})
        return (before.get("status"), before.get("message")) == (finding.status, finding.message)

    return not all(told(finding) for finding in applied.findings)


def configure(settings: kopf.OperatorSettings) -> None:
    """Our names in the objects that we own, and no Events but our own."""
    settings.persistence.finalizer = f"{PREFIX}/finalizer"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=PREFIX)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=PREFIX)
    settings.posting.level = logging.CRITICAL
    settings.watching.server_timeout = 300
    settings.networking.request_timeout = 15
