"""`behest get`: what is configured, and how the budgets stand."""

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from behest_ledger.configuration.kinds import API_VERSION
from behest_ledger.configuration.records import BudgetRecord, is_tier_budget, wire_budget_spec
from behest_ledger.configuration.state import ConfigurationState, StoredSpec
from behest_ledger.configuration.status import BudgetStatus, shown_amount
from behest_proxy.cli.database import add_database_arguments, dsn_from, ledger_errors_shown
from behest_proxy.cli.tables import OUTPUT_FORMS, print_document, print_table
from behest_proxy.cli.terminal import Terminal

_KINDS = {"budgets": "Budget", "projects": "Project", "upstreams": "Upstream", "tiers": "Tier"}

_DESCRIPTION = """\
Show budgets, projects, upstreams or tiers.

Of a budget with several subjects (per session, per user ...) SPENT and HELD are the sums of the current windows,
REMAINING is what the subject has that has least, and EXHAUSTED says how many of the subjects with a current window
cannot pay any more; -o json shows the biggest subjects one by one. Of a soft budget REMAINING may be below zero.
The rates of tiers are budgets too: --rates shows them beside the others.
"""


def add_parser(subparsers: Any) -> None:
    """Add `behest get`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "get",
        help="show what is configured and what is spent",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=sorted(_KINDS), metavar="KIND", help="budgets, projects, upstreams or tiers")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("-n", "--namespace", metavar="NAME", help="only of this namespace (default: all)")
    parser.add_argument("--tenant", metavar="NAME", help="only of this tenant (default: all)")
    parser.add_argument("--rates", action="store_true", help="with budgets: what is used of the tiers' rates as well")
    parser.add_argument("-o", "--output", choices=OUTPUT_FORMS, default="table", help="default: table")
    add_database_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it. Raises `UserError` for what the person can put right."""
    terminal = Terminal()
    with ledger_errors_shown():
        if arguments.kind == "budgets":
            budgets = asyncio.run(_budgets(dsn_from(arguments), arguments))
            # A tier's rate is no resource, so no document of one is made.
            items = [_budget_item(budget) for budget in budgets if not is_tier_budget(budget.record)]
            _show(arguments, terminal, items, budget_rows(budgets))
        else:
            found = asyncio.run(_specs(dsn_from(arguments), arguments))
            items = [_spec_item(_KINDS[arguments.kind], stored) for stored in found]
            _show(arguments, terminal, items, _ROWS[arguments.kind](found))
    return 0


async def _budgets(dsn: str, arguments: argparse.Namespace) -> list[BudgetStatus]:
    from behest_ledger.store.configuration import connected, read_budgets

    async with connected(dsn) as connection:
        budgets = await read_budgets(connection, arguments.tenant, arguments.namespace)
    return [
        budget
        for budget in budgets
        if (arguments.rates or not is_tier_budget(budget.record))
        and (not arguments.names or budget.record.name in arguments.names)
    ]


async def _specs(dsn: str, arguments: argparse.Namespace) -> list[StoredSpec]:
    from behest_ledger.store.configuration import connected, read_state

    async with connected(dsn) as connection:
        state: ConfigurationState = await read_state(connection, arguments.tenant)
    by_name: Mapping[str, StoredSpec] = getattr(state, arguments.kind)
    return [
        stored
        for _, stored in sorted(by_name.items())
        if arguments.namespace in (None, stored.namespace) and (not arguments.names or stored.name in arguments.names)
    ]


_Table = tuple[Sequence[str], list[Sequence[str]]]


def _show(arguments: argparse.Namespace, terminal: Terminal, items: list[dict[str, Any]], table: _Table) -> None:
    if arguments.output != "table":
        print_document(terminal, {"apiVersion": "v1", "kind": "List", "items": items}, arguments.output)
    elif not table[1]:
        where = f" in namespace {arguments.namespace}" if arguments.namespace else ""
        terminal.line(f"There are no {arguments.kind}{where}: behest apply -f FILE")
    else:
        print_table(terminal, *table)


def budget_rows(budgets: Sequence[BudgetStatus]) -> _Table:
    """The table of budgets."""
    header = ("NAMESPACE", "NAME", "SCOPE", "LIMIT", "SPENT", "HELD", "REMAINING", "EXHAUSTED", "WINDOW", "PHASE")
    rows: list[Sequence[str]] = [
        (
            budget.record.namespace,
            budget.record.name,
            shown_scope(budget.record),
            _with_unit(budget.record),
            shown_amount(budget.spent, budget.record.unit),
            shown_amount(budget.held, budget.record.unit),
            shown_amount(budget.remaining, budget.record.unit),
            f"{budget.exhausted} of {budget.active}",
            _window(budget.record),
            budget.phase,
        )
        for budget in budgets
    ]
    return header, rows


def shown_scope(record: BudgetRecord) -> str:
    """A scope in a few words: `project=shop per session`."""
    scope = wire_budget_spec(record)["scope"]
    selector = scope.pop("workloadSelector", {}).get("matchLabels", {})
    if len(scope) + len(selector) > 1 and scope.get("namespace") == record.namespace:
        del scope["namespace"]
    if "project" in scope:
        scope["project"] = scope["project"].removeprefix(f"{record.namespace}/")
    parts = [f"{name}={value}" for name, value in {**scope, **selector}.items()]
    per = f" per {','.join(record.per)}" if record.per else ""
    return ",".join(parts) + per


def _with_unit(record: BudgetRecord) -> str:
    amount = shown_amount(record.limit_amount, record.unit)
    if record.unit == "usd":
        return f"{amount} USD"
    if record.unit == "concurrency":
        return f"{amount} at once"
    kinds = {"input": "input ", "output": "output "} if record.unit == "tokens" else {}
    return f"{amount} {kinds.get(record.token_kind, '')}{record.unit}"


def _window(record: BudgetRecord) -> str:
    words = [record.period.capitalize()]
    if record.alignment == "rolling":
        words.append("rolling")
    elif record.time_zone != "UTC" and record.period != "lifetime":
        words.append(record.time_zone)
    if record.enforcement == "soft":
        words.append("(soft)")
    return " ".join(words)


def _project_rows(found: Sequence[StoredSpec]) -> _Table:
    header = ("NAMESPACE", "NAME", "TENANT", "DEFAULT MODEL", "ALLOWED MODELS", "TIER", "SUSPENDED")
    rows: list[Sequence[str]] = [
        (
            stored.namespace,
            stored.name,
            stored.tenant_id,
            stored.spec.get("defaultModel", "-"),
            ",".join(stored.spec.get("allowedModels", [])) or "*",
            stored.spec.get("defaultTier", "-"),
            "yes" if stored.spec.get("suspended") else "no",
        )
        for stored in found
    ]
    return header, rows


def _upstream_rows(found: Sequence[StoredSpec]) -> _Table:
    header = ("NAMESPACE", "NAME", "BASE URL", "PROTOCOL", "MODELS")
    rows: list[Sequence[str]] = [
        (
            stored.namespace,
            stored.name,
            stored.spec["baseURL"],
            stored.spec.get("protocol", "Auto"),
            ",".join(model["name"] for model in stored.spec.get("models", [])) or "*",
        )
        for stored in found
    ]
    return header, rows


def _tier_rows(found: Sequence[StoredSpec]) -> _Table:
    header = ("NAMESPACE", "NAME", "NUMBER", "REQUESTS/MIN", "REQUESTS/DAY", "TOKENS/DAY", "CONCURRENCY")
    rates = ("requestsPerMinute", "requestsPerDay", "tokensPerDay", "concurrency")
    rows: list[Sequence[str]] = [
        (
            stored.namespace,
            stored.name,
            str(stored.spec["number"]),
            *(str(stored.spec.get(rate, "-")) for rate in rates),
        )
        for stored in found
    ]
    return header, rows


_ROWS = {"projects": _project_rows, "upstreams": _upstream_rows, "tiers": _tier_rows}


def _spec_item(kind: str, stored: StoredSpec) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": {"name": stored.name, "namespace": stored.namespace},
        "spec": stored.spec,
    }


def _budget_item(budget: BudgetStatus) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": "Budget",
        "metadata": {"name": budget.record.name, "namespace": budget.record.namespace},
        "spec": wire_budget_spec(budget.record),
        "status": budget.wire(),
    }
