"""Leases: slices of busy windows that are one holder's own, brought to what it wants once a second."""

from collections.abc import Sequence
from uuid import UUID

from behest_ledger.leases import Want, WindowKey
from behest_ledger.store.pool import Connection, asking


async def lease(pool: Connection, holder_id: UUID, wants: Sequence[Want]) -> dict[WindowKey, int]:
    """Bring the holder's leases to these wants, as far as their windows allow, and give up all others it has in these
    tenants. What is free in each lease now; empty for a holder that is not believed to live.

    Raises `LedgerUnavailableError` (unknown result: the next call says it again) and `LedgerConflictError`.
    """
    async with asking(pool) as connection:
        rows = await connection.fetch(
            "SELECT tenant_id, window_id, free FROM ledger.lease_batch_v1($1, $2, $3, $4)",
            holder_id,
            [want.tenant_id for want in wants],
            [want.window_id for want in wants],
            [want.amount for want in wants],
        )
    return {(row["tenant_id"], row["window_id"]): int(row["free"]) for row in rows}
