"""How budgets stand, carried from the ledger into the status of their resources, and into Events.

One loop for all of them: it reads the ledger, and writes only what differs from what the API server showed last.
"""

import asyncio
import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from behest_ledger.configuration.records import BudgetRecord
from behest_ledger.configuration.status import BudgetStatus, shown_amount
from behest_ledger.store.configuration import read_budgets
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.pool import Connection
from behest_ledger.store.reports import ALERTS_SETTLE, Alert, alerts_since
from behest_operator.conditions import Finding, merged
from behest_operator.crds import GROUP, VERSION
from behest_operator.kubernetes import Kubernetes, KubernetesError

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0
"""One status is written at most so often."""
WRITES_AT_ONCE = 8
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
    """The Budgets of the cluster as last seen, and the loop that keeps their status true.

    Up to when thresholds were told as Events is in the status (`alertedAt`), so that none is lost to a restart. One
    Event tells of all windows that reached the same: of a budget per session there may be thousands in a minute.
    """

    def __init__(
        self,
        pool: Connection,
        kubernetes: Kubernetes,
        *,
        interval_s: float = INTERVAL_S,
        settle: timedelta = ALERTS_SETTLE,
    ) -> None:
        self._settle = settle
        self._pool = pool
        self._kubernetes = kubernetes
        self._interval_s = interval_s
        self._seen: dict[str, Any] = {}
        self._told: set[str] = set()

    def see(self, body: Mapping[str, Any]) -> None:
        """A Budget as the API server shows it now."""
        metadata = body["metadata"]
        members = ("name", "namespace", "uid", "generation", "creationTimestamp", "resourceVersion")
        self._seen[f"{metadata['namespace']}/{metadata['name']}"] = {
            "metadata": {name: metadata.get(name) for name in members},
            "status": {key: plain(value) for key, value in body.get("status", {}).items()},
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
        statuses = [item for item in await read_budgets(self._pool, None) if item.record.budget_id in self._seen]
        since = {
            (status.record.tenant_id, status.record.budget_id): _told_until(self._seen[status.record.budget_id])
            for status in statuses
        }
        alerts: defaultdict[str, list[Alert]] = defaultdict(list)
        for alert in await alerts_since(self._pool, since, settle=self._settle):
            alerts[alert.budget].append(alert)
        limit = asyncio.Semaphore(WRITES_AT_ONCE)

        async def bring(status: BudgetStatus) -> None:
            async with limit:
                await self._bring(status, alerts[status.record.budget_id])

        faults = await asyncio.gather(*map(bring, statuses), return_exceptions=True)
        for fault in faults:
            if fault is not None:
                raise fault

    async def _bring(self, status: BudgetStatus, alerts: Sequence[Alert]) -> None:
        """Bring one resource up to date. What the API server refuses for one is no reason to leave out the others."""
        seen = self._seen.get(status.record.budget_id)
        if seen is None:
            return
        try:
            await self._write(status, seen, alerts)
        except KubernetesError as error:
            if not error.status:
                raise
            # 404: it is gone. 409: somebody else wrote a condition; the next round sees it.
            if error.status not in (404, 409):
                logger.warning("the status of budget %s could not be written: %s", status.record.budget_id, error)

    async def _write(self, status: BudgetStatus, seen: dict[str, Any], alerts: Sequence[Alert]) -> None:
        found, metadata = seen["status"], seen["metadata"]
        change = difference(wanted_status(status), found)
        conditions = found.get("conditions", [])
        finding = exhausted_finding(status)
        before: Mapping[str, Any] = next((item for item in conditions if item.get("type") == finding.type), {})
        if (before.get("status"), before.get("message", "")) != (finding.status, finding.message):
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            change["conditions"] = merged(conditions, [finding], generation=metadata.get("generation") or 0, now=now)
        # Events first: whoever is killed between them and the status tells them again, under the same name.
        for alert in alerts:
            await self._tell(alert, metadata)
        told_until = max((alert.reached_at for alert in alerts), default=None)
        if told_until is not None and told_until > _time(found.get("alertedAt")):
            change["alertedAt"] = told_until.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if found.get("phase") != "Exhausted" and status.phase == "Exhausted":
            key = f"{status.window_ends_at} {status.record.limit_amount}"
            await self._event(metadata, "BudgetExhausted", finding.message, key=key)
        if change:
            path = f"/apis/{GROUP}/{VERSION}/namespaces/{metadata['namespace']}/budgets/{metadata['name']}/status"
            document: dict[str, Any] = {"status": change}
            if "conditions" in change:
                # The list is written as a whole: not over what the handlers have written since it was seen.
                document["metadata"] = {"resourceVersion": metadata["resourceVersion"]}
            self.see(await self._kubernetes.merge(path, document))

    async def _tell(self, alert: Alert, metadata: Mapping[str, Any]) -> None:
        subject = " of " + ", ".join(alert.subject) if alert.subject else ""
        used, limit = shown_amount(int(alert.used), alert.unit), shown_amount(int(alert.limit), alert.unit)
        message = f"{alert.percent} % reached{subject}: {used} of {limit}"
        if alert.windows > 1:
            message += f", and {alert.windows - 1} more since {alert.first_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        key = f"{alert.percent} {alert.subject} {alert.reached_at.isoformat()}"
        await self._event(metadata, "BudgetWarning", message, key=key)

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


def _told_until(seen: Mapping[str, Any]) -> datetime:
    """From when on thresholds of a budget were not told."""
    return max(_time(seen["metadata"].get("creationTimestamp")), _time(seen["status"].get("alertedAt")))


def _time(text: str | None) -> datetime:
    """A time of the API server's; long ago where there is none, or somebody wrote one that cannot be read."""
    try:
        return datetime.fromisoformat(text or "").astimezone(UTC)
    except (ValueError, OverflowError):
        return _LONG_AGO


_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def plain(value: Any) -> Any:
    """What kopf gives as views, as dictionaries and lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
