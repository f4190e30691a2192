import asyncio
from typing import Any

import pytest

from behest_ledger.store.errors import LedgerUnavailableError, mapped
from behest_ledger.store.pool import UrlError, connect, open_pool, use_dsn


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


@pytest.mark.parametrize("special", ["/", "?", "#", "[", "]"])
def test_a_url_with_a_password_that_is_not_encoded_is_refused_and_not_told(database: str, special: str) -> None:
    broken = f"postgresql://owner:pass{special}word@127.0.0.1:5432/behest"

    async def main() -> None:
        pool: Any = await open_pool(database)
        try:
            for refused in (connect(broken), open_pool(broken), use_dsn(pool, broken)):
                with pytest.raises(UrlError, match="the database's URL cannot be read") as caught:
                    await refused
                assert "pass" not in str(caught.value).replace("password", "")
            assert await pool.fetchval("SELECT 1") == 1, "the last login serves"
        finally:
            pool.terminate()

    asyncio.run(main())


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:p@[::1]:1/behest",
        "postgresql://u:p%2F%23@127.0.0.1:1/behest",
        "postgresql://u:p@127.0.0.1:1,127.0.0.1:1/behest",
        "postgresql:///behest?host=/nowhere",
        "postgresql://u@/behest?host=127.0.0.1&port=1",
    ],
)
def test_every_way_to_name_a_server_is_read(dsn: str) -> None:
    with pytest.raises(LedgerUnavailableError):
        asyncio.run(connect(dsn))
