"""What is in the ledger, for the tests that look."""

import asyncio
from typing import Any

from behest_ledger.store.pool import connect


def rows(dsn: str, sql: str, *arguments: Any) -> list[dict[str, Any]]:
    """The rows that a statement finds, as this login."""

    async def fetch() -> list[dict[str, Any]]:
        connection = await connect(dsn)
        try:
            return [dict(row) for row in await connection.fetch(sql, *arguments)]
        finally:
            await connection.close()

    return asyncio.run(fetch())
