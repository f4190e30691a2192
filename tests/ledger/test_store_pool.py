import asyncio
from typing import Any

import pytest

from behest_ledger.store.errors import LedgerUnavailableError, mapped
from behest_ledger.store.pool import connect, open_pool


def test_a_pool_is_quiet_while_the_database_is_away(database: str, caplog: pytest.LogCaptureFixture) -> None:
    """asyncpg's own attempts to keep a number of connections open log a traceback each."""
    name = database.rpartition("/")[2]

    async def main() -> None:
        pool: Any = await open_pool(database, application_name="quiet")
        assert await pool.fetchval("SELECT 1") == 1
        outside = await connect(database.replace(f"/{name}", "/postgres"))
        try:
            await outside.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            await outside.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'quiet'"
            )
            for _ in range(20):
                with pytest.raises(LedgerUnavailableError), mapped():
                    await pool.fetchval("SELECT 1")
                await asyncio.sleep(0.1)
            await outside.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            assert await pool.fetchval("SELECT 1") == 1
        finally:
            await outside.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            await outside.close()
            pool.terminate()

    asyncio.run(main())
    assert caplog.records == []
