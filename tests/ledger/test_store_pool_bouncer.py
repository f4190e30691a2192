"""The ledger through PgBouncer in transaction mode: two statements of a connection may meet two sessions."""

import asyncio
from collections.abc import Iterator

import pytest

from behest_ledger.holds import Granted
from behest_ledger.store import holders, holds
from behest_ledger.store.configuration import load_configuration
from behest_ledger.store.errors import LedgerUnavailableError
from behest_ledger.store.keeper import Keeper
from behest_ledger.store.migrate import migrate
from behest_ledger.store.pool import PoolerError, connect, open_pool
from bouncer import PROGRAM, WHY_NOT, bouncer
from ledger.books import Books, admission, granted, settlement
from ledger.sidecars import checkpoint
from ledger.tenant_roles import logged_in

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)


@pytest.fixture
def bounced(dsn: str) -> Iterator[str]:
    """The empty ledger, through two sessions of the server for everybody."""
    with bouncer(dsn, size=2) as through:
        yield through


def test_whatever_session_a_statement_meets_it_is_the_right_one(dsn: str, bounced: str) -> None:
    async def whole_life(books: Books) -> None:
        await asyncio.sleep(0)
        one, answer = await books.admit(input=1, need=2, want=4)
        granted(answer)
        granted(await books.extend(one, 1, need=1))
        await holders.checkpoint(books.connection, [checkpoint(one, input=1, output=2)])
        assert await books.settle(settlement(one, input=1, output=2)) == ["settled"]

    async def main() -> None:
        pools = [await open_pool(bounced, size=4, pooler="transaction") for _ in range(3)]
        try:
            books = [Books(dsn, pool) for pool in pools]
            await books[0].budget("money", 1_000_000)
            await asyncio.gather(*(whole_life(books[number % 3]) for number in range(60)))
            assert await books[0].balances("money") == (60 * 23, 0, 0, 0)
            async with pools[0].acquire() as connection:
                assert (await load_configuration(connection, None)).version >= 1
            assert await books[0].findings() == []
        finally:
            for pool in pools:
                await pool.close()

    asyncio.run(main())


def test_a_session_that_ends_in_the_middle_is_an_unknown_result_and_nothing_more(dsn: str, bounced: str) -> None:
    async def main() -> None:
        pool = await open_pool(bounced, size=4, pooler="transaction")
        books = Books(dsn, pool)
        await books.budget("money", 1_000_000)
        unknown = 0
        async with logged_in(dsn) as owner:
            for _ in range(10):
                asked = [admission(input=1, need=1) for _ in range(8)]
                work = [asyncio.ensure_future(holds.admit(pool, one)) for one in asked]
                await asyncio.sleep(0.002)
                await owner.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
                answers = await asyncio.gather(*work, return_exceptions=True)
                for answer in answers:
                    assert isinstance(answer, Granted | LedgerUnavailableError), repr(answer)
                    unknown += isinstance(answer, LedgerUnavailableError)
                ends = [settlement(one.request_id, sent=False) for one in asked]
                while True:  # as the writer does
                    try:
                        await holds.settle(pool, ends)
                        break
                    except LedgerUnavailableError:
                        await asyncio.sleep(0.05)
        assert unknown, "no session ended in the middle"
        assert (await books.balances("money"))[:2] == (0, 0)
        assert await books.findings() == []
        await pool.close()

    asyncio.run(main())


def test_a_pooler_that_nobody_told_of_is_found(bounced: str) -> None:
    async def main() -> None:
        with pytest.raises(PoolerError, match="BEHEST_DATABASE_POOLER=transaction"):
            await open_pool(bounced)

    asyncio.run(main())


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_a_pooler_that_swallows_our_settings_is_found_too(dsn: str, mode: str) -> None:
    async def main(through: str) -> None:
        with pytest.raises(PoolerError, match="address of a connection pooler: set BEHEST_DATABASE_POOLER"):
            await open_pool(through)
        with pytest.raises(PoolerError, match="commands need the server itself"):
            await connect(through)
        with pytest.raises(PoolerError, match="commands need the server itself"):
            await migrate(through)
        with pytest.raises(PoolerError, match="commands need the server itself"):
            await Keeper(through).run_once()
        pool = await open_pool(through, pooler="session" if mode == "session" else "transaction")
        assert await pool.fetchval("SELECT version FROM ledger.configuration_version") >= 1
        await pool.close()

    with bouncer(dsn, mode=mode, ignored="search_path") as through:
        asyncio.run(main(through))
