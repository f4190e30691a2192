"""What to write so that the ledger holds what manifests say: a pure comparison of stored and wanted.

The plan is all or nothing: if one manifest contradicts what is stored, none is applied. It never deletes what
manifests do not mention, except budgets that a Tier no longer has.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, assert_never

import msgspec

from behest_ledger.configuration.globs import is_pattern, matches
from behest_ledger.configuration.kinds import Budget, KindName, Manifest, Project, Tier, Upstream, wire_spec
from behest_ledger.configuration.problems import InvalidManifestsError, ManifestError, place, shown
from behest_ledger.configuration.records import (
    BudgetRecord,
    budget_record,
    tier_budget_prefix,
    tier_budget_records,
)
from behest_ledger.configuration.state import ConfigurationState, StoredSpec

Action: TypeAlias = Literal["created", "configured", "unchanged", "deleted"]


class _PutSpec(msgspec.Struct, frozen=True, kw_only=True):
    action: Action
    tenant_id: str
    namespace: str
    name: str
    spec: dict[str, Any]


class PutProject(_PutSpec, frozen=True, kw_only=True):
    """Write a row of `ledger.project`."""

    suspended: bool

    @property
    def project_id(self) -> str:
        """`<namespace>/<name>`."""
        return f"{self.namespace}/{self.name}"


class PutUpstream(_PutSpec, frozen=True, kw_only=True):
    """Write a row of `ledger.upstream`."""


class PutTier(_PutSpec, frozen=True, kw_only=True):
    """Write a row of `ledger.tier`. Its budgets are changes of their own."""


class PutBudget(msgspec.Struct, frozen=True, kw_only=True):
    """Write a row of `ledger.budget`; its live windows take the new limit."""

    action: Action
    record: BudgetRecord
    tier: str | None = None
    """The Tier that it belongs to, None: a Budget resource."""


class DeleteBudget(msgspec.Struct, frozen=True, kw_only=True):
    """End a budget; its history stays, and if it comes back, its current windows go on."""

    tenant_id: str
    budget_id: str
    tier: str | None = None
    """The Tier that it belonged to, None: a Budget resource."""
    action: Literal["deleted"] = "deleted"


class DeleteSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Delete the row of a Project, Upstream or Tier."""

    kind: Literal["Project", "Upstream", "Tier"]
    tenant_id: str
    namespace: str
    name: str
    action: Literal["deleted"] = "deleted"


Change: TypeAlias = PutProject | PutUpstream | PutTier | PutBudget | DeleteBudget | DeleteSpec


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one manifest."""

    kind: str
    namespace: str
    name: str
    action: Action

    def __str__(self) -> str:
        return f"{self.kind.lower()}/{self.name} {self.action}"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The changes in the order in which they are to be written, and what to tell people about them."""

    changes: tuple[Change, ...]
    """One for each row that the manifests speak about, the unchanged ones among them."""
    outcomes: tuple[Outcome, ...]
    """One for each manifest, ordered by kind, namespace and name."""
    warnings: tuple[str, ...]

    @property
    def tenants(self) -> tuple[str, ...]:
        """The tenants for which something changes."""
        return tuple(sorted({_tenant(change) for change in self.pending}))

    @property
    def pending(self) -> tuple[Change, ...]:
        """The changes that write something."""
        return tuple(change for change in self.changes if change.action != "unchanged")

    @property
    def time_zones(self) -> tuple[str, ...]:
        """The time zones that are to be written: the database must know them as well."""
        zones = {change.record.time_zone for change in self.pending if isinstance(change, PutBudget)}
        return tuple(sorted(zones))


def removal(current: ConfigurationState, kind: KindName, namespace: str, name: str) -> Plan:
    """The plan that takes one resource away, and with a Tier its budgets; empty where nothing of it is stored."""
    qualified_name = f"{namespace}/{name}"
    changes: list[Change] = []
    if kind == "Budget":
        stored_budget = current.budgets.get(qualified_name)
        if stored_budget is not None and not stored_budget.deleted:
            changes.append(DeleteBudget(tenant_id=stored_budget.record.tenant_id, budget_id=qualified_name))
    else:
        rows = {"Project": current.projects, "Upstream": current.upstreams, "Tier": current.tiers}[kind]
        stored = rows.get(qualified_name)
        if stored is not None:
            changes.append(DeleteSpec(kind=kind, tenant_id=stored.tenant_id, namespace=namespace, name=name))
    if kind == "Tier":
        prefix = f"{namespace}/{tier_budget_prefix(name)}"
        changes += [
            DeleteBudget(tenant_id=budget.record.tenant_id, budget_id=budget_id, tier=name)
            for budget_id, budget in sorted(current.budgets.items())
            if budget_id.startswith(prefix) and not budget.deleted
        ]
    action: Action = "deleted" if changes else "unchanged"
    outcome = Outcome(kind=kind, namespace=namespace, name=name, action=action)
    return Plan(changes=tuple(changes), outcomes=(outcome,), warnings=())


TenantOfNamespace: TypeAlias = Mapping[str, str] | Callable[[str], str]


def plan(current: ConfigurationState, desired: Iterable[Manifest], *, tenant_of_namespace: TenantOfNamespace) -> Plan:
    """The plan that makes the stored configuration say what the manifests say.

    `tenant_of_namespace` says whose a namespace is and wins over nothing: a Project or Budget that names another
    tenant is refused. The order of the manifests does not matter. Raises `InvalidManifestsError`.
    """
    manifests = sorted(desired, key=lambda manifest: (_KIND_ORDER[manifest.kind], *_place(manifest)))
    planner = _Planner(current, tenant_of_namespace)
    for manifest in manifests:
        planner.add(manifest)
    if planner.errors:
        raise InvalidManifestsError(planner.errors)
    return Plan(
        changes=tuple(planner.changes),
        outcomes=tuple(planner.outcomes),
        warnings=tuple(_warnings(current, manifests)),
    )


def tenants_of_namespaces(
    current: ConfigurationState, desired: Iterable[Manifest], *, default_tenant: str | None
) -> dict[str, str]:
    """Whose each namespace of the manifests is, where nothing but the manifests says so (outside a cluster).

    A Project's own `tenant`, else that of what is stored in the namespace, else the default, else the
    namespace's own name.
    """
    manifests = list(desired)
    stored = current.tenants()
    tenants = {
        manifest.namespace: manifest.spec.tenant
        for manifest in sorted(manifests, key=_place, reverse=True)
        if isinstance(manifest, Project) and manifest.spec.tenant is not None
    }
    for manifest in manifests:
        if manifest.namespace not in tenants:
            tenants[manifest.namespace] = stored.get(manifest.namespace) or default_tenant or manifest.namespace
    return tenants


_KIND_ORDER = {"Project": 0, "Upstream": 1, "Tier": 2, "Budget": 3}


def _place(manifest: Manifest) -> tuple[str, str]:
    return manifest.namespace, manifest.name


class _Planner:
    """Collects changes and errors manifest by manifest."""

    def __init__(self, current: ConfigurationState, tenant_of_namespace: TenantOfNamespace) -> None:
        self._current = current
        self._stored_tenants = current.tenants()
        self._tenants = tenant_of_namespace
        self._seen: dict[tuple[str, str], Manifest] = {}
        self.changes: list[Change] = []
        self.outcomes: list[Outcome] = []
        self.errors: list[ManifestError] = []

    def add(self, manifest: Manifest) -> None:
        key = (manifest.kind, manifest.qualified_name)
        first = self._seen.setdefault(key, manifest)
        if first is not manifest:
            where = place(first.source, first.document)
            self._refuse(manifest, "", f"is there twice, first in {where}" if where else "is there twice")
            return
        tenant_id = self._tenant_of(manifest.namespace)
        stored_tenant = self._stored_tenants.get(manifest.namespace)
        if stored_tenant is not None and stored_tenant != tenant_id:
            path = "spec.tenant" if isinstance(manifest, Project) else "metadata.namespace"
            whose = f"namespace {manifest.namespace} belongs to {stored_tenant}"
            self._refuse(manifest, path, f"is immutable: {whose}, got {shown(tenant_id)}")
        match manifest:
            case Project():
                action = self._project(manifest, tenant_id)
            case Upstream():
                action = self._upstream(manifest, tenant_id)
            case Tier():
                action = self._tier(manifest, tenant_id)
            case Budget():
                action = self._budget(manifest, tenant_id)
            case _:
                assert_never(manifest)
        self.outcomes.append(
            Outcome(kind=manifest.kind, namespace=manifest.namespace, name=manifest.name, action=action)
        )

    def _project(self, project: Project, tenant_id: str) -> Action:
        stored = self._current.projects.get(project.qualified_name)
        if project.spec.tenant is not None and project.spec.tenant != tenant_id:
            reason = f"namespace {project.namespace} belongs to {tenant_id}, got {shown(project.spec.tenant)}"
            self._refuse(project, "spec.tenant", reason)
        spec = wire_spec(project)
        change = PutProject(
            action=_spec_action(stored, tenant_id, spec),
            tenant_id=tenant_id,
            namespace=project.namespace,
            name=project.name,
            spec=spec,
            suspended=project.spec.suspended,
        )
        self.changes.append(change)
        return change.action

    def _upstream(self, upstream: Upstream, tenant_id: str) -> Action:
        spec = wire_spec(upstream)
        change = PutUpstream(
            action=_spec_action(self._current.upstreams.get(upstream.qualified_name), tenant_id, spec),
            tenant_id=tenant_id,
            namespace=upstream.namespace,
            name=upstream.name,
            spec=spec,
        )
        self.changes.append(change)
        return change.action

    def _tier(self, tier: Tier, tenant_id: str) -> Action:
        spec = wire_spec(tier)
        own = PutTier(
            action=_spec_action(self._current.tiers.get(tier.qualified_name), tenant_id, spec),
            tenant_id=tenant_id,
            namespace=tier.namespace,
            name=tier.name,
            spec=spec,
        )
        records = tier_budget_records(tier, tenant_id=tenant_id)
        wanted = {record.budget_id for record in records}
        prefix = f"{tier.namespace}/{tier_budget_prefix(tier.name)}"
        budgets: list[PutBudget | DeleteBudget] = [
            PutBudget(action=self._budget_action(record), record=record, tier=tier.name) for record in records
        ]
        budgets += [
            DeleteBudget(tenant_id=stored.record.tenant_id, budget_id=budget_id, tier=tier.name)
            for budget_id, stored in sorted(self._current.budgets.items())
            if budget_id.startswith(prefix) and budget_id not in wanted and not stored.deleted
        ]
        self.changes += [own, *budgets]
        if own.action == "unchanged" and any(change.action != "unchanged" for change in budgets):
            return "configured"
        return own.action

    def _budget(self, budget: Budget, tenant_id: str) -> Action:
        scope_tenant = budget.spec.scope.tenant
        if scope_tenant is not None and scope_tenant != tenant_id:
            reason = f"namespace {budget.namespace} belongs to {tenant_id}, got {shown(scope_tenant)}"
            self._refuse(budget, "spec.scope.tenant", reason)
        record = budget_record(budget, tenant_id=tenant_id)
        stored = self._current.budgets.get(record.budget_id)
        if stored is not None:
            for path, was, wanted in _immutable(stored.record, record):
                reason = f"is immutable: it is {was}, got {wanted}; make a new Budget of another name"
                self._refuse(budget, path, reason)
        change = PutBudget(action=self._budget_action(record), record=record)
        self.changes.append(change)
        return change.action

    def _budget_action(self, record: BudgetRecord) -> Action:
        stored = self._current.budgets.get(record.budget_id)
        if stored is None or stored.deleted:
            return "created"
        return "unchanged" if stored.record == record else "configured"

    def _tenant_of(self, namespace: str) -> str:
        if callable(self._tenants):
            return self._tenants(namespace)
        return self._tenants[namespace]

    def _refuse(self, manifest: Manifest, path: str, reason: str) -> None:
        subject = f"{manifest.kind} {manifest.qualified_name}"
        self.errors.append(
            ManifestError(reason, path=path, subject=subject, document=manifest.document, source=manifest.source)
        )


def _spec_action(stored: StoredSpec | None, tenant_id: str, spec: dict[str, Any]) -> Action:
    if stored is None or stored.tenant_id != tenant_id:
        return "created"
    return "unchanged" if stored.spec == spec else "configured"


def _immutable(stored: BudgetRecord, wanted: BudgetRecord) -> list[tuple[str, str, str]]:
    """(path, stored, wanted) of what differs and must not: running windows could not be carried over."""
    pairs = [
        ("spec.limit", _unit(stored), _unit(wanted)),
        ("spec.window.period", stored.period.capitalize(), wanted.period.capitalize()),
        ("spec.window.alignment", stored.alignment.capitalize(), wanted.alignment.capitalize()),
        ("spec.window.timeZone", stored.time_zone, wanted.time_zone),
        ("spec.scope.tenant", stored.tenant_id, wanted.tenant_id),
    ]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _unit(record: BudgetRecord) -> str:
    if record.unit == "tokens":
        return "in tokens" if record.token_kind == "both" else f"in {record.token_kind} tokens"  # noqa: S105 - no secret
    return "in USD" if record.unit == "usd" else "in requests"


def _tenant(change: Change) -> str:
    return change.record.tenant_id if isinstance(change, PutBudget) else change.tenant_id


def _warnings(current: ConfigurationState, manifests: list[Manifest]) -> list[str]:
    """References to what does not exist, and budgets that bind nobody: no errors, since it may be applied later."""
    projects = {manifest.qualified_name for manifest in manifests if isinstance(manifest, Project)}
    tiers = {manifest.qualified_name for manifest in manifests if isinstance(manifest, Tier)}
    projects |= current.projects.keys()
    tiers |= current.tiers.keys()
    found: list[str] = []
    for manifest in manifests:
        match manifest:
            case Project() if manifest.spec.default_tier is not None:
                references = [("spec.defaultTier", "Tier", manifest.spec.default_tier, tiers)]
            case Budget():
                scope = manifest.spec.scope
                references = [
                    (path, kind, name, known)
                    for path, kind, name, known in (
                        ("spec.scope.project", "Project", scope.project, projects),
                        ("spec.scope.tier", "Tier", scope.tier, tiers),
                    )
                    if name is not None and not is_pattern(name)
                ]
            case _:
                continue
        missing = [
            f"{path}: there is no {kind} {target}"
            for path, kind, name, known in references
            if (target := name if "/" in name else f"{manifest.namespace}/{name}") not in known
        ]
        if isinstance(manifest, Budget) and not missing and not _binds_a_project(manifest, projects):
            missing.append("spec.scope: matches no project")
        found += [f"{manifest.kind} {manifest.qualified_name}: {reason}" for reason in missing]
    return found


def _binds_a_project(budget: Budget, projects: Iterable[str]) -> bool:
    """Whether any of these projects is in the budget's scope, as far as namespaces and names go."""
    scope = budget.spec.scope
    namespace = scope.namespace or ("*" if scope.tenant is not None else budget.namespace)
    name = scope.project or "*"
    if "/" not in name:
        name = f"{scope.namespace or budget.namespace}/{name}" if scope.project else f"{namespace}/*"
    return any(matches(name, project) and matches(namespace, project.split("/")[0]) for project in projects)
