"""The bill and the overview as a sidecar reads them: by its own login, for its tenant alone, through a pooler too."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from behest_ledger.billing import BillingRow
from behest_ledger.store.billing import billing_rows
from behest_ledger.store.overview import read_overview
from behest_ledger.store.pool import Pooler, asking, open_pool
from bouncer import PROGRAM, WHY_NOT, bouncer
from ledger.books import Books, granted, keep_books, settlement
from ledger.tenant_roles import login

HOUR = timedelta(hours=1)


async def _two_tenants(books: Books) -> None:
    for tenant in ("acme", "other"):
        await books.budget("money", 1000, tenant=tenant)
        for session in range(3):
            one, answer = await books.admit(need=3, tenant=tenant, session=f"{tenant}-{session}")
            granted(answer)
            await books.settle(settlement(one, input=1, output=3, tenant=tenant))


@asynccontextmanager
async def _pool(dsn: str, pooler: Pooler) -> AsyncGenerator[Any]:
    pool = await open_pool(dsn, size=1, pooler=pooler)
    try:
        yield pool
    finally:
        pool.terminate()


async def _read(dsn: str, pooler: Pooler) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    async with _pool(dsn, pooler) as pool:
        for _ in range(3):  # each time it may meet another session of the server
            rows: list[BillingRow] = []
            async with pool.acquire() as connection:
                async for _, some in billing_rows(connection, hour - HOUR, hour + HOUR, by_session=True):
                    rows += some
            assert {(row.tenant_id, row.session_id) for row in rows} == {("acme", f"acme-{n}") for n in range(3)}
            assert sum(row.amount_pico for row in rows) == 3 * 33
            async with asking(pool) as connection:
                found = await read_overview(connection, since=hour - HOUR, piece=HOUR)
            assert {row.tenant_id for row in found.sessions} == {"acme"}
            assert sum(one.amount_pico for one in found.bins) == 3 * 33
            assert {one.record.tenant_id for one in found.budgets} == {"acme"}


def test_a_login_of_a_tenant_reads_its_own(dsn: str) -> None:
    keep_books(dsn, _two_tenants)
    with login(dsn, "acme") as role:
        asyncio.run(_read(role, "none"))


@pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)
def test_and_through_a_pooler_whose_sessions_change_between_transactions(dsn: str) -> None:
    keep_books(dsn, _two_tenants)
    with login(dsn, "acme") as role, bouncer(role, size=2) as through:
        asyncio.run(_read(through, "transaction"))
