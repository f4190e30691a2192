"""Two tenants in one ledger, each with the login of its sidecars: for tests of what keeps them apart."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import msgspec

from behest_ledger.api_key_hash import new_api_key
from behest_ledger.holds import Admission
from behest_ledger.store import holders, holds, identity
from behest_ledger.store.configuration import apply_text
from behest_ledger.store.verify import verify
from ledger.books import admission, granted, settlement
from ledger.tenant_roles import logged_in, tenant_role

TABLES = {
    "api_key", "budget", "budget_subject", "budget_window", "configuration_version", "correction", "generation",
    "generation_chunk", "hold", "hold_line", "idempotency_key", "posting", "price_book", "project", "provider_key",
    "request", "request_now", "schema_migration", "signing_key", "thread", "thread_message", "tier", "upstream",
    "usage_line",
}  # fmt: skip
FUNCTIONS = {
    "admit_batch_v1", "budgets_of_v1", "budgets_of_v2", "checkpoint_batch_v1", "claim_generation_v1", "claim_key_v1",
    "delete_thread_v1", "extend_batch_v1", "keep_turn_v1", "lease_batch_v1", "put_signing_key_v1", "rates_of_v1",
    "register_holder_v1", "release_key_v1", "renew_holder_v1", "session_tenants_v1", "settle_batch_v1",
    "unregister_holder_v1", "usage_bins_v1", "usage_totals_v1", "write_generations_v1",
}  # fmt: skip

ALL_TABLES = """
SELECT c.relname::text AS name, EXISTS (SELECT FROM pg_attribute t WHERE t.attrelid = c.oid AND t.attname = 'tenant_id')
       AS of_tenants, c.relispartition AS part, c.relkind::text AS kind,
       c.relrowsecurity OR c.relkind = 'v' AND c.reloptions @> '{security_invoker=true}' AS hidden
FROM pg_class c WHERE c.relnamespace = 'ledger'::regnamespace AND c.relkind IN ('r', 'p', 'v') ORDER BY 1
"""


class Houses(NamedTuple):
    """Two tenants in one ledger, each with a login, a holder and a request that runs."""

    owner: Any
    dsn: str
    acme: Any
    globex: Any
    acme_holder: UUID
    globex_holder: UUID
    acme_request: UUID
    globex_request: UUID


@asynccontextmanager
async def two_houses(dsn: str) -> AsyncGenerator[Houses]:
    """Both have everything: configuration, keys, an open request and a settled one."""
    async with (
        tenant_role(dsn, "acme") as acme_dsn,
        tenant_role(dsn, "globex") as globex_dsn,
        logged_in(dsn) as owner,
        logged_in(acme_dsn) as acme,
        logged_in(globex_dsn) as globex,
    ):
        await owner.execute("INSERT INTO ledger.price_book VALUES ('p', 'test', '{}', now(), now())")
        holders_of: list[UUID] = []
        requests_of: list[UUID] = []
        for tenant, role in (("acme", acme), ("globex", globex)):
            await furnish(owner, tenant)
            holder = uuid4()
            await holders.register(role, holder, "pod")
            await identity.put_signing_key(
                role, kid=f"kid-{tenant}", tenant_id=tenant, kind="own", algorithm="EdDSA", public_pem=tenant
            )
            ended = await admitted(role, tenant, holder)
            await holds.settle(role, [settlement(ended, input=1, output=1, tenant=tenant)])
            await said_something(owner, tenant, holder)
            holders_of.append(holder)
            requests_of.append(await admitted(role, tenant, holder))
        yield Houses(owner, dsn, acme, globex, *holders_of, *requests_of)
        assert (await verify(owner)).findings == []


async def furnish(owner: Any, tenant: str) -> None:
    """What a tenant has configured."""
    await apply_text(
        owner,
        f"""
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: shop, namespace: {tenant}}}
spec: {{tenant: {tenant}}}
---
apiVersion: behest.ai/v1alpha1
kind: Upstream
metadata: {{name: provider, namespace: {tenant}}}
spec: {{baseURL: "http://127.0.0.1:1/v1"}}
---
apiVersion: behest.ai/v1alpha1
kind: Tier
metadata: {{name: free, namespace: {tenant}}}
spec: {{number: 1, requestsPerMinute: 10}}
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: all, namespace: {tenant}}}
spec:
  scope: {{project: shop}}
  limit: {{tokens: 1000}}
  window: {{period: Day}}
""",
    )
    await owner.execute("INSERT INTO ledger.provider_key VALUES ($1, 'upstream:x', '\\x00', '0000')", tenant)
    await identity.register_api_key(
        owner, tenant_id=tenant, project_id=f"{tenant}/shop", key=new_api_key(), role="admin", name="test"
    )


async def said_something(owner: Any, tenant: str, holder: UUID) -> None:
    """A conversation of the tenant's, and a reply that a repeated call would get."""
    thread, generation = uuid4(), uuid4()
    for table, columns, values in (
        ("thread", "tenant_id, thread_key, project_id, user_id, thread_id", (tenant, thread, "p", "ann", "t")),
        (
            "generation",
            "tenant_id, generation_id, thread_key, state, holder_id",
            (tenant, generation, thread, "whole", holder),
        ),
        ("generation_chunk", "tenant_id, generation_id, first_event, events, data", (tenant, generation, 1, 1, b"x")),
        ("thread_message", "tenant_id, thread_key, number, role, content", (tenant, thread, 1, "user", b"x")),
        (
            "idempotency_key",
            "tenant_id, project_id, user_id, key_sha256, request_sha256, generation_id",
            (tenant, "p", "ann", b"k", b"r", generation),
        ),
    ):
        places = ", ".join(f"${place}" for place in range(1, len(values) + 1))
        await owner.execute(f"INSERT INTO ledger.{table} ({columns}) VALUES ({places})", *values)


async def admitted(role: Any, tenant: str, holder: UUID) -> UUID:
    """A request that the tenant's own sidecar was granted."""
    asked = of_tenant(tenant, holder)
    granted(await holds.admit(role, asked))
    return asked.request_id


def of_tenant(tenant: str, holder: UUID) -> Admission:
    """A request of this tenant, for its holder."""
    asked = admission(input=1, need=2, tenant=tenant, namespace=tenant, project=f"{tenant}/shop", tier="free")
    return msgspec.structs.replace(asked, holder_id=holder)


def in_two_houses(dsn: str, work: Callable[[Houses], Awaitable[None]]) -> None:
    """Run it."""

    async def main() -> None:
        async with two_houses(dsn) as houses:
            await work(houses)

    asyncio.run(main())
