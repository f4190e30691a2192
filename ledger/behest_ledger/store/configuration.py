"""What is configured, in PostgreSQL: read it, apply a plan to it, and read how budgets stand.

Rows hold specs in wire form (`jsonb`), budgets in normalised form. Every change bumps the configuration version in
the same transaction; sidecars poll that number. Every function may also raise the errors of `store.errors`.
"""

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any, assert_never

import asyncpg
import msgspec

from behest_ledger.configuration.kinds import KindName, Manifest
from behest_ledger.configuration.manifests import parse
from behest_ledger.configuration.plan import (
    Change,
    DeleteBudget,
    DeleteSpec,
    Outcome,
    Plan,
    PutBudget,
    PutProject,
    PutTier,
    PutUpstream,
    TenantOfNamespace,
    plan,
    removal,
    tenants_of_namespaces,
)
from behest_ledger.configuration.problems import InvalidManifestsError, ManifestError, shown
from behest_ledger.configuration.records import BudgetRecord
from behest_ledger.configuration.snapshot import Configuration, configuration_of
from behest_ledger.configuration.state import ConfigurationState, StoredBudget, StoredSpec
from behest_ledger.configuration.status import BudgetStatus
from behest_ledger.store.errors import LedgerConflictError, mapped
from behest_ledger.store.pool import Connection, connect
from behest_ledger.store.reports import budget_statuses

_LOCK_KEY = 0x6265_6863  # "behc": one change of the configuration at a time per database
_ATTEMPTS_MAX = 5

_READ_PROJECTS = """
SELECT tenant_id, namespace, name, spec::text AS spec FROM ledger.project
WHERE $1::text IS NULL OR tenant_id = $1 ORDER BY tenant_id, namespace, name
"""
_READ_UPSTREAMS = """
SELECT tenant_id, namespace, name, spec::text AS spec FROM ledger.upstream
WHERE $1::text IS NULL OR tenant_id = $1 ORDER BY tenant_id, namespace, name
"""
_READ_TIERS = """
SELECT tenant_id, namespace, name, spec::text AS spec FROM ledger.tier
WHERE $1::text IS NULL OR tenant_id = $1 ORDER BY tenant_id, namespace, name
"""
# Live budgets come last, so that of two rows with one id the live one is kept.
_READ_BUDGETS = """
SELECT to_jsonb(b)::text AS budget FROM ledger.budget b
WHERE ($1::text IS NULL OR b.tenant_id = $1) AND ($2::text[] IS NULL OR b.namespace = ANY ($2))
ORDER BY b.deleted_at IS NULL, b.tenant_id, b.budget_id
"""
_PUT_PROJECT = """
INSERT INTO ledger.project (tenant_id, project_id, namespace, name, spec, suspended)
VALUES ($1, $2, $3, $4, $5::text::jsonb, $6)
ON CONFLICT (tenant_id, project_id) DO UPDATE SET spec = excluded.spec, suspended = excluded.suspended
"""
_PUT_UPSTREAM = """
INSERT INTO ledger.upstream (tenant_id, namespace, name, spec) VALUES ($1, $2, $3, $4::text::jsonb)
ON CONFLICT (tenant_id, namespace, name) DO UPDATE SET spec = excluded.spec
"""
_PUT_TIER = """
INSERT INTO ledger.tier (tenant_id, namespace, name, spec) VALUES ($1, $2, $3, $4::text::jsonb)
ON CONFLICT (tenant_id, namespace, name) DO UPDATE SET spec = excluded.spec
"""
_PUT_BUDGET = "SELECT ledger.put_budget_v1($1::text::jsonb)"
_DELETE_BUDGET = """
UPDATE ledger.budget SET deleted_at = clock_timestamp(), generation = generation + 1
WHERE tenant_id = $1 AND budget_id = $2 AND deleted_at IS NULL
"""
_DELETE_SPEC = {
    "Project": "DELETE FROM ledger.project WHERE tenant_id = $1 AND namespace = $2 AND name = $3",
    "Upstream": "DELETE FROM ledger.upstream WHERE tenant_id = $1 AND namespace = $2 AND name = $3",
    "Tier": "DELETE FROM ledger.tier WHERE tenant_id = $1 AND namespace = $2 AND name = $3",
}
_BUMP = "SELECT ledger.bump_configuration_v1($1)"


class ApplyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the manifests."""

    outcomes: tuple[Outcome, ...]
    warnings: tuple[str, ...]
    dry_run: bool = False

    def lines(self) -> list[str]:
        """One line for each manifest, as kubectl writes them: `budget/shop-sessions created`."""
        suffix = " (dry run)" if self.dry_run else ""
        return [f"{outcome}{suffix}" for outcome in self.outcomes]


async def apply_text(
    dsn_or_connection: str | Connection,
    text: str,
    *,
    default_namespace: str = "default",
    default_tenant: str | None = None,
    dry_run: bool = False,
) -> ApplyReport:
    """Apply the manifests of a text, all or none.

    Raises `InvalidManifestsError`.
    """
    return await apply_manifests(
        dsn_or_connection, parse(text, default_namespace), default_tenant=default_tenant, dry_run=dry_run
    )


async def apply_manifests(
    dsn_or_connection: str | Connection,
    manifests: Sequence[Manifest],
    *,
    default_tenant: str | None = None,
    tenants: TenantOfNamespace | None = None,
    dry_run: bool = False,
) -> ApplyReport:
    """Apply manifests, all or none; a dry run finds the same errors and writes nothing.

    `tenants` says whose namespaces are. Where nobody says so, the tenant of a namespace is that of its Project, else
    that of what is stored there, else `default_tenant`, else the namespace's own name. Raises `InvalidManifestsError`.
    """
    async with connected(dsn_or_connection) as connection:
        attempts_left = _ATTEMPTS_MAX
        while True:
            try:
                planned = await _plan_and_apply(
                    connection, manifests, default_tenant=default_tenant, tenants=tenants, dry_run=dry_run
                )
            except LedgerConflictError:
                # Several budgets are locked one after the other, and live requests lock them in their own order.
                attempts_left -= 1
                if not attempts_left:
                    raise
            else:
                return ApplyReport(outcomes=planned.outcomes, warnings=planned.warnings, dry_run=dry_run)


async def remove(dsn_or_connection: str | Connection, kind: KindName, namespace: str, name: str) -> Outcome:
    """Take one resource away. What was billed to it stays in the books; live requests of a Project end."""
    async with connected(dsn_or_connection) as connection:
        with mapped():
            async with connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK_KEY)
                planned = removal(await read_state(connection, None, [namespace]), kind, namespace, name)
                await apply_plan(connection, planned)
    return planned.outcomes[0]


async def _plan_and_apply(
    connection: Connection,
    manifests: Sequence[Manifest],
    *,
    default_tenant: str | None,
    tenants: TenantOfNamespace | None,
    dry_run: bool,
) -> Plan:
    with mapped():
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK_KEY)
            # Budgets are most of what is stored, and a plan looks at those of its own namespaces only.
            current = await read_state(connection, None, {manifest.namespace for manifest in manifests})
            if tenants is None:
                tenants = tenants_of_namespaces(current, manifests, default_tenant=default_tenant)
            planned = plan(current, manifests, tenant_of_namespace=tenants)
            if dry_run:
                await _check_time_zones(connection, planned)
            else:
                await apply_plan(connection, planned)
    return planned


async def read_state(
    connection: Connection, tenant_id: str | None, namespaces: Collection[str] | None = None
) -> ConfigurationState:
    """Everything that is stored for a tenant, or for all; of budgets only those of some namespaces, where given."""
    with mapped():
        projects = await connection.fetch(_READ_PROJECTS, tenant_id)
        upstreams = await connection.fetch(_READ_UPSTREAMS, tenant_id)
        tiers = await connection.fetch(_READ_TIERS, tenant_id)
        budgets = await connection.fetch(_READ_BUDGETS, tenant_id, None if namespaces is None else list(namespaces))
    return ConfigurationState(
        projects=_by_name(projects),
        upstreams=_by_name(upstreams),
        tiers=_by_name(tiers),
        budgets={budget.record.budget_id: budget for budget in map(_budget, budgets)},
    )


async def apply_plan(connection: Connection, planned: Plan) -> None:
    """Write what the plan changes, in one transaction; nothing changes, nothing is written.

    Raises `InvalidManifestsError` for a time zone that PostgreSQL does not know.
    """
    if not planned.pending:
        return
    with mapped():
        async with connection.transaction():
            await _check_time_zones(connection, planned)
            for change in planned.pending:
                await _write(connection, change)
            for tenant_id in planned.tenants:
                await connection.fetchval(_BUMP, tenant_id)


async def load_configuration(connection: Connection, tenant_id: str | None) -> Configuration:
    """The configuration of a tenant, or of all, as a proxy holds it in memory, at one version."""
    with mapped():
        async with _snapshot(connection) as reader:
            version = await reader.fetchval("SELECT version FROM ledger.configuration_version")
            projects = await reader.fetch(_READ_PROJECTS, tenant_id)
            upstreams = await reader.fetch(_READ_UPSTREAMS, tenant_id)
            tiers = await reader.fetch(_READ_TIERS, tenant_id)
    return configuration_of(
        version,
        projects=map(_stored, projects),
        upstreams=map(_stored, upstreams),
        tiers=map(_stored, tiers),
    )


async def configuration_version(connection: Connection) -> int:
    """The number that changes with every change of the configuration: what sidecars poll."""
    with mapped():
        version: int = await connection.fetchval("SELECT version FROM ledger.configuration_version")
    return version


async def read_budgets(
    connection: Connection, tenant_id: str | None, namespace: str | None = None
) -> list[BudgetStatus]:
    """The live budgets of a tenant and a namespace, or of all, with their current windows; ordered by id."""
    with mapped():
        async with _snapshot(connection) as reader:
            rows = await reader.fetch(_READ_BUDGETS, tenant_id, None if namespace is None else [namespace])
            budgets = [budget.record for budget in map(_budget, rows) if not budget.deleted]
            return await budget_statuses(reader, budgets)


async def namespace_has_projects(connection: Connection, namespace: str) -> bool:
    """Whether any Project of a namespace is left."""
    with mapped():
        found: bool = await connection.fetchval(
            "SELECT EXISTS (SELECT FROM ledger.project WHERE namespace = $1)", namespace
        )
    return found


@asynccontextmanager
async def connected(dsn_or_connection: str | Connection) -> AsyncGenerator[Connection]:
    """The connection that was given, or one to the given DSN for as long as the block runs."""
    if not isinstance(dsn_or_connection, str):
        if isinstance(dsn_or_connection, asyncpg.Pool):
            with mapped():
                connection = await dsn_or_connection.acquire()
            try:
                yield connection
            finally:
                with mapped():
                    await dsn_or_connection.release(connection)
        else:
            yield dsn_or_connection
        return
    connection = await connect(dsn_or_connection, application_name="behest configuration")
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def _snapshot(connection: Connection) -> AsyncGenerator[Connection]:
    """One moment of the database for several reads."""
    async with connected(connection) as reader:
        if reader.is_in_transaction():
            yield reader
        else:
            async with reader.transaction(isolation="repeatable_read", readonly=True):
                yield reader


async def _check_time_zones(connection: Connection, planned: Plan) -> None:
    """PostgreSQL has its own list of time zones; what it does not know would fail at the first request."""
    errors: list[ManifestError] = []
    for zone in planned.time_zones:
        try:
            async with connection.transaction():
                await connection.fetchval("SELECT now() AT TIME ZONE $1", zone)
        except asyncpg.InvalidParameterValueError:
            errors += [
                ManifestError(
                    f"PostgreSQL does not know the time zone {shown(zone)}",
                    path="spec.window.timeZone",
                    subject=f"Budget {change.record.budget_id}",
                )
                for change in planned.pending
                if isinstance(change, PutBudget) and change.record.time_zone == zone
            ]
    if errors:
        raise InvalidManifestsError(errors)


async def _write(connection: Connection, change: Change) -> None:
    match change:
        case PutProject():
            await connection.execute(
                _PUT_PROJECT,
                change.tenant_id,
                change.project_id,
                change.namespace,
                change.name,
                _json(change.spec),
                change.suspended,
            )
        case PutUpstream():
            await connection.execute(_PUT_UPSTREAM, change.tenant_id, change.namespace, change.name, _json(change.spec))
        case PutTier():
            await connection.execute(_PUT_TIER, change.tenant_id, change.namespace, change.name, _json(change.spec))
        case PutBudget():
            await connection.execute(_PUT_BUDGET, _json(change.record))
        case DeleteBudget():
            await connection.execute(_DELETE_BUDGET, change.tenant_id, change.budget_id)
        case DeleteSpec():
            await connection.execute(_DELETE_SPEC[change.kind], change.tenant_id, change.namespace, change.name)
        case _:
            assert_never(change)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _stored(row: Any) -> StoredSpec:
    return StoredSpec(
        tenant_id=row["tenant_id"],
        namespace=row["namespace"],
        name=row["name"],
        spec=msgspec.json.decode(row["spec"], type=dict[str, Any]),
    )


def _by_name(rows: Sequence[Any]) -> dict[str, StoredSpec]:
    return {stored.qualified_name: stored for stored in map(_stored, rows)}


class _BudgetRow(BudgetRecord, frozen=True, kw_only=True):
    deleted_at: str | None
    generation: int


def _budget(row: Any) -> StoredBudget:
    stored = msgspec.json.decode(row["budget"], type=_BudgetRow)
    record = BudgetRecord(**{name: getattr(stored, name) for name in BudgetRecord.__struct_fields__})
    return StoredBudget(record=record, deleted=stored.deleted_at is not None)
