"""What is written to the ledger for each resource: rows as values, normalised so that equal meanings are equal.

A budget row is matched by SQL against a request's attributes, so globs become LIKE patterns, a project's name
becomes its id, and money becomes whole pico-USD. A Tier's rates are budgets too: one mechanism enforces both.
"""

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import msgspec

from behest_ledger.configuration.globs import like_pattern, pattern_of_like
from behest_ledger.configuration.kinds import Budget, BudgetSpec, PerName, Tier
from behest_ledger.money import pico_from_usd, usd_from_pico

PER_ORDER: tuple[PerName, ...] = ("namespace", "project", "user", "session", "model", "tier", "workload")
"""The order of a subject's values; a budget's `per` is always written in it."""

Unit: TypeAlias = Literal["usd", "tokens", "requests", "concurrency"]
"""`concurrency` counts requests at once: held while they are open, charged nothing. Only tiers have it."""


class BudgetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `ledger.budget`, without what the database keeps for itself (`generation`, `deleted_at`)."""

    tenant_id: str
    budget_id: str
    """`<namespace>/<name>`."""
    namespace: str
    name: str
    scope: dict[str, str]
    """Attribute -> LIKE pattern; an absent attribute matches everything."""
    workload_labels: dict[str, str] | None
    per: list[str]
    """Attributes whose values name a subject, in `PER_ORDER`; empty: one subject, the budget itself."""
    unit: Unit
    token_kind: Literal["both", "input", "output"]
    limit_amount: int
    """Pico-USD, tokens, requests, or requests at once, by `unit`."""
    period: str
    alignment: str
    time_zone: str
    enforcement: Literal["hard", "soft"]
    alert_thresholds: list[int]
    suspended: bool
    refusal: Literal["quota", "rate"]
    """`quota` is answered with 402, `rate` with 429."""


def budget_record(budget: Budget, *, tenant_id: str) -> BudgetRecord:
    """The row of a Budget resource."""
    spec = budget.spec
    unit, limit_amount = _limit(spec)
    selector = spec.scope.workload_selector
    return BudgetRecord(
        tenant_id=tenant_id,
        budget_id=budget.qualified_name,
        namespace=budget.namespace,
        name=budget.name,
        scope=_scope(budget),
        workload_labels=dict(sorted(selector.match_labels.items())) if selector else None,
        per=in_order(spec.per),
        unit=unit,
        token_kind=_TOKEN_KINDS[spec.limit.token_kind],
        limit_amount=limit_amount,
        period=spec.window.period.lower(),
        alignment=spec.window.alignment.lower(),
        time_zone=spec.window.time_zone,
        enforcement="hard" if spec.enforcement == "Hard" else "soft",
        alert_thresholds=list(spec.alert_thresholds),
        suspended=spec.suspended,
        refusal="quota",
    )


def tier_budget_records(tier: Tier, *, tenant_id: str) -> list[BudgetRecord]:
    """The rows of a Tier's rates, each per (project, user).

    Concurrency is one of them: its window never ends, and what a request holds in it comes back whole.
    """
    spec = tier.spec
    rates: list[tuple[str, int | None, Unit, str, Literal["quota", "rate"]]] = [
        ("requests-per-minute", spec.requests_per_minute, "requests", "minute", "rate"),
        ("requests-per-day", spec.requests_per_day, "requests", "day", "rate"),
        ("tokens-per-day", spec.tokens_per_day, "tokens", "day", "quota"),
        ("concurrency", spec.concurrency, "concurrency", "lifetime", "rate"),
    ]
    return [
        BudgetRecord(
            tenant_id=tenant_id,
            budget_id=f"{tier.namespace}/{tier_budget_prefix(tier.name)}{suffix}",
            namespace=tier.namespace,
            name=f"{tier_budget_prefix(tier.name)}{suffix}",
            scope={"namespace": like_pattern(tier.namespace), "tier": like_pattern(tier.name)},
            workload_labels=None,
            per=["project", "user"],
            unit=unit,
            token_kind="both",  # noqa: S106 - no secret
            limit_amount=limit_amount,
            period=period,
            alignment="calendar",
            time_zone="UTC",
            enforcement="hard",
            alert_thresholds=[],
            suspended=False,
            refusal=refusal,
        )
        for suffix, limit_amount, unit, period, refusal in rates
        if limit_amount is not None
    ]


def tier_budget_prefix(tier_name: str) -> str:
    """How the names of a Tier's budgets begin. No Budget resource can be named so: a colon is no DNS name."""
    return f"tier:{tier_name}:"


def is_tier_budget(record: BudgetRecord) -> bool:
    """Whether the row belongs to a Tier, and is no Budget resource."""
    return record.name.startswith("tier:")


def in_order(names: Iterable[str]) -> list[str]:
    """The attributes of a `per` in the one order in which they are written; `none` names nothing."""
    given = set(names)
    return [name for name in PER_ORDER if name in given]


def wire_budget_spec(record: BudgetRecord) -> dict[str, Any]:
    """A budget row as the spec of a Budget resource, to be shown; a project keeps its `<namespace>/<name>` form."""
    scope: dict[str, Any] = {name: pattern_of_like(pattern) for name, pattern in record.scope.items()}
    if "namespace" not in scope:
        scope["tenant"] = record.tenant_id
    if record.workload_labels is not None:
        scope["workloadSelector"] = {"matchLabels": record.workload_labels}
    limit: dict[str, Any] = {record.unit: record.limit_amount}
    if record.unit == "usd":
        limit = {"amount": usd_from_pico(record.limit_amount), "currency": "USD"}
    elif record.unit == "tokens":
        limit["tokenKind"] = record.token_kind.capitalize()
    spec: dict[str, Any] = {
        "scope": scope,
        "limit": limit,
        "window": {
            "period": record.period.capitalize(),
            "alignment": record.alignment.capitalize(),
            "timeZone": record.time_zone,
        },
        "enforcement": record.enforcement.capitalize(),
    }
    if record.per:
        spec["per"] = record.per
    if record.alert_thresholds:
        spec["alertThresholds"] = record.alert_thresholds
    if record.suspended:
        spec["suspended"] = True
    return spec


_TOKEN_KINDS: dict[str | None, Literal["both", "input", "output"]] = {
    None: "both",
    "Both": "both",
    "Input": "input",
    "Output": "output",
}


def _limit(spec: BudgetSpec) -> tuple[Unit, int]:
    if spec.limit.amount is not None:
        return "usd", pico_from_usd(spec.limit.amount)
    if spec.limit.tokens is not None:
        return "tokens", spec.limit.tokens
    assert spec.limit.requests is not None, "validation lets no limit without a unit pass"
    return "requests", spec.limit.requests


def _scope(budget: Budget) -> dict[str, str]:
    """The scope by attribute. It always binds the budget's own namespace, unless a tenant was named."""
    scope = budget.spec.scope
    patterns: dict[str, str] = {}
    if scope.namespace is not None:
        patterns["namespace"] = scope.namespace
    elif scope.tenant is None:
        patterns["namespace"] = budget.namespace
    if scope.project is not None:
        home = patterns.get("namespace", budget.namespace)
        patterns["project"] = scope.project if "/" in scope.project else f"{home}/{scope.project}"
    for name in ("user", "session", "model", "tier"):
        value: str | None = getattr(scope, name)
        if value is not None:
            patterns[name] = value
    return {name: like_pattern(pattern) for name, pattern in patterns.items()}
