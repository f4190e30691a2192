"""What is stored now, as the plan reads it."""

from collections.abc import Mapping
from typing import Any

import msgspec

from behest_ledger.configuration.records import BudgetRecord


class StoredSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A stored Project, Upstream or Tier: whose it is, and its spec in wire form."""

    tenant_id: str
    namespace: str
    name: str
    spec: dict[str, Any]

    @property
    def qualified_name(self) -> str:
        """`<namespace>/<name>`."""
        return f"{self.namespace}/{self.name}"


class StoredBudget(msgspec.Struct, frozen=True, kw_only=True):
    """A stored budget. A deleted one keeps its history, so what is immutable stays so."""

    record: BudgetRecord
    deleted: bool = False


class ConfigurationState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is stored, by `<namespace>/<name>`; a namespace belongs to one tenant."""

    projects: Mapping[str, StoredSpec] = {}
    upstreams: Mapping[str, StoredSpec] = {}
    tiers: Mapping[str, StoredSpec] = {}
    budgets: Mapping[str, StoredBudget] = {}
    """Tiers' budgets among them."""

    def tenants(self) -> dict[str, str]:
        """The tenant of each namespace in which something is stored."""
        found = {
            budget.record.namespace: budget.record.tenant_id for budget in self.budgets.values() if not budget.deleted
        }
        for stored in (self.tiers, self.upstreams, self.projects):
            found |= {resource.namespace: resource.tenant_id for resource in stored.values()}
        return found
