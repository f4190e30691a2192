"""How budgets stand, carried from the ledger into the status of their resources, and into Events.

One loop for all of them: it reads the ledger, and writes only what differs from what the API server showed last.
"""

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from behest_ledger.configuration.records import BudgetRecord
from behest_ledger.configuration.status import BudgetStatus, shown_amount
from behest_ledger.store.configuration import read_budgets
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.pool import Connection
from behest_ledger.store.reports import Alert, alerts_since
from behest_operator.conditions import Finding, merged
from behest_operator.crds import GROUP, VERSION
from behest_operator.kubernetes import Kubernetes, KubernetesError

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0
_OURS = ("phase", "scope", "limit", "spent", "held", "remaining", "overrun", "subjects", "biggest", "windowEndsAt")


def wanted_status(status: BudgetStatus) -> dict[str, Any]:
    """The members of a Budget's status that the ledger knows; None takes a member away (merge patch)."""
    record = status.record
    wanted: dict[str, Any] = dict.fromkeys(_OURS)
    wanted |= {**status.wire(), "scope": scope_line(record), "limit": _with_unit(record)}
    return wanted


def exhausted_finding(status: BudgetStatus) -> Finding:
    """The condition `Exhausted`."""
    if status.phase == "Exhausted":
        message = "nobody that it binds can spend any more"
        if status.window_ends_at is not None:
            message += f" before {status.window_ends_at:%Y-%m-%dT%H:%M:%SZ}"
        return Finding(type="Exhausted", status="True", reason="NothingLeft", message=message)
    if status.exhausted:
        message = f"{status.exhausted} of {status.active} subjects cannot spend any more"
        return Finding(type="Exhausted", status="False", reason="SomeSubjects", message=message)
    return Finding(type="Exhausted", status="False", reason="MoneyLeft", message="")


def scope_line(record: BudgetRecord) -> str:
    """Whom a budget binds, in one line: `project=shop per session`."""
    own_namespace = record.namespace
    parts = [
        f"{name}={value.replace('%', '*').removeprefix(own_namespace + '/')}"
        for name, value in record.scope.items()
        if not (name == "namespace" and value == own_namespace)
    ]
    parts += [f"{key}={value}" for key, value in (record.workload_labels or {}).items()]
    line = ",".join(parts) or ("tenant" if "namespace" not in record.scope else "namespace")
    return f"{line} per {','.join(record.per)}" if record.per else line


def _with_unit(record: BudgetRecord) -> str:
    amount = shown_amount(record.limit_amount, record.unit)
    if record.unit == "usd":
        return f"{amount} USD"
    kind = f"{record.token_kind} " if record.unit == "tokens" and record.token_kind in ("input", "output") else ""
    return f"{amount} {kind}{record.unit}"


def difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What a merge patch has to change; empty: nothing."""
    return {name: value for name, value in wanted.items() if found.get(name) != value}


class BudgetBoard:
    """The Budgets of the cluster as last seen, and the loop that keeps their status true."""

    def __init__(self, pool: Connection, kubernetes: Kubernetes, *, interval_s: float = INTERVAL_S) -> None:
        self._pool = pool
        self._kubernetes = kubernetes
        self._interval_s = interval_s
        self._seen: dict[str, Any] = {}
        self._alerts_since = datetime.now(UTC)
        self._told: set[str] = set()

    def see(self, body: Mapping[str, Any]) -> None:
        """A Budget as the API server shows it now."""
        metadata = body["metadata"]
        self._seen[f"{metadata['namespace']}/{metadata['name']}"] = {
            "metadata": {name: metadata.get(name) for name in ("name", "namespace", "uid", "generation")},
            "status": {key: _plain(value) for key, value in body.get("status", {}).items()},
        }

    def forget(self, namespace: str, name: str) -> None:
        """A Budget is gone."""
        self._seen.pop(f"{namespace}/{name}", None)

    async def run(self) -> None:
        """Keep every status true until cancelled."""
        while True:
            try:
                await self.round()
            except (LedgerError, KubernetesError) as error:
                logger.warning("the status of budgets could not be written, trying again: %s", error)
            await asyncio.sleep(self._interval_s)

    async def round(self) -> None:
        """One look at the ledger. Raises `LedgerError` and `KubernetesError`."""
        statuses = await read_budgets(self._pool, None)
        for status in statuses:
            seen = self._seen.get(status.record.budget_id)
            if seen is not None:
                await self._write(status, seen)
        for tenant in sorted({status.record.tenant_id for status in statuses}):
            for alert in await alerts_since(self._pool, tenant, self._alerts_since):
                await self._tell(alert)

    async def _write(self, status: BudgetStatus, seen: dict[str, Any]) -> None:
        found = seen["status"]
        change = difference(wanted_status(status), found)
        conditions = found.get("conditions", [])
        finding = exhausted_finding(status)
        before: Mapping[str, Any] = next((item for item in conditions if item.get("type") == finding.type), {})
        if (before.get("status"), before.get("message", "")) != (finding.status, finding.message):
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            generation = seen["metadata"].get("generation") or 0
            change["conditions"] = merged(conditions, [finding], generation=generation, now=now)
        if not change:
            return
        metadata = seen["metadata"]
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{metadata['namespace']}/budgets/{metadata['name']}/status"
        try:
            answer = await self._kubernetes.merge(path, {"status": change})
        except KubernetesError as error:
            if error.status == 404:
                return
            raise
        if found.get("phase") not in (None, "Exhausted") and status.phase == "Exhausted":
            await self._event(metadata, "BudgetExhausted", finding.message, key=str(status.window_ends_at))
        self.see(answer)

    async def _tell(self, alert: Alert) -> None:
        seen = self._seen.get(alert.budget)
        if seen is None:
            return
        subject = " of " + ", ".join(alert.subject) if alert.subject else ""
        used, limit = shown_amount(int(alert.used), alert.unit), shown_amount(int(alert.limit), alert.unit)
        message = f"{alert.percent} % reached{subject}: {used} of {limit}"
        key = f"{alert.percent} {alert.subject} {alert.reached_at.isoformat()}"
        await self._event(seen["metadata"], "BudgetWarning", message, key=key)
        self._alerts_since = max(self._alerts_since, alert.reached_at)

    async def _event(self, metadata: Mapping[str, Any], reason: str, message: str, *, key: str) -> None:
        """An Event whose name says what it tells: telling it twice is refused by the API server."""
        digest = hashlib.sha256(f"{metadata['uid']} {reason} {key}".encode()).hexdigest()[:16]
        name = f"{metadata['name'][:200]}.{digest}"
        if name in self._told:
            return
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        namespace = metadata["namespace"]
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "type": "Warning",
            "reason": reason,
            "message": message[:1024],
            "source": {"component": "behest-operator"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "involvedObject": {
                "apiVersion": f"{GROUP}/{VERSION}",
                "kind": "Budget",
                "name": metadata["name"],
                "namespace": namespace,
                "uid": metadata["uid"],
            },
        }
        try:
            await self._kubernetes.create(f"/api/v1/namespaces/{namespace}/events", event)
        except KubernetesError as error:
            if error.status != 409:
                raise
        if len(self._told) > 10_000:
            self._told.clear()
        self._told.add(name)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
