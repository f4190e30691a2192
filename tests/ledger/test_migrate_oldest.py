"""The oldest PostgreSQL that we promise, beside the one that all other tests run on.

`make test ARGS=--postgres=15` runs everything on it.
"""

import asyncio
import os
from collections.abc import Iterator

import asyncpg
import pytest

from behest_ledger.store import holders, holds
from behest_ledger.store.keeper import Keeper
from behest_ledger.store.migrate import migrate
from behest_ledger.store.verify import verify
from behest_proxy.cli.binaries import OLDEST_MAJOR, side_by_side
from conftest import Server, execute, own_server
from ledger.books import Books, granted, keep_books, refused, settlement
from ledger.houses import Houses, in_two_houses, of_tenant
from ledger.sealing import seal_all
from ledger.sidecars import Sidecar, charge, checkpoint, reap, state
from ledger.tenant_roles import logged_in

PROGRAMS = side_by_side(OLDEST_MAJOR)
pytestmark = pytest.mark.skipif(
    PROGRAMS is None,
    reason=f"PostgreSQL {OLDEST_MAJOR} is not installed (Debian: apt install postgresql-{OLDEST_MAJOR})",
)


@pytest.fixture(scope="module")
def oldest() -> Iterator[Server]:
    with own_server(PROGRAMS) as server:
        yield server


@pytest.fixture
def old(oldest: Server) -> Iterator[str]:
    """A database of the oldest server, with the ledger's schema."""
    name = f"behest_old_{os.getpid()}"
    asyncio.run(execute(oldest.dsn, f"CREATE DATABASE {name}"))
    asyncio.run(migrate(oldest.of(name)))
    yield oldest.of(name)
    asyncio.run(execute(oldest.dsn, f"DROP DATABASE {name} WITH (FORCE)"))


def test_it_is_the_oldest_that_we_promise(old: str) -> None:
    async def main() -> None:
        async with logged_in(old) as owner:
            assert str(await owner.fetchval("SHOW server_version")).startswith(f"{OLDEST_MAJOR}.")
        assert (await migrate(old)).applied == []

    asyncio.run(main())


def test_holds_settlements_and_what_a_dead_sidecar_leaves(old: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1_000)
        await books.budget("calls", 50, unit="requests", period="day")
        sidecar = await Sidecar.start(books)
        one = await sidecar.admitted(input=2, need=4)
        granted(await books.extend(one, 1, need=3))
        await sidecar.checkpoint(one, input=2, output=5)
        assert await books.settle(settlement(one, input=2, output=6)) == ["settled"]
        refused((await sidecar.admit(input=2, need=1_000))[1])
        two, three = [await sidecar.admitted(input=1, need=2) for _ in range(2)]
        await sidecar.checkpoint(two, input=1, output=1)
        await sidecar.die()
        assert await reap(books) == 2
        assert (await charge(books, "checkpoint"))[two] == 13
        assert await books.settle(settlement(three, input=1, output=1)) == ["corrected"]
        assert await state(books, two) == "charged_by_policy"
        await seal_all(books)

    keep_books(old, work)


def test_the_keeper_works(old: str) -> None:
    async def main() -> None:
        keeper = Keeper(old)
        report = await keeper.run_once()
        await keeper.aclose()
        assert report.working

    asyncio.run(main())


def test_tenants_are_kept_apart(old: str) -> None:
    async def work(houses: Houses) -> None:
        assert await houses.acme.fetchval("SELECT count(DISTINCT tenant_id) FROM ledger.request") == 1
        for statement in ("DELETE FROM ledger.posting", "SELECT * FROM ledger.holder", "SELECT ledger.reap_v1(1)"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await houses.acme.execute(statement)
        asked = of_tenant("acme", houses.acme_holder)
        granted(await holds.admit(houses.acme, asked))
        assert await holders.renew(houses.acme, houses.acme_holder)
        assert (await verify(houses.owner)).findings == []
        assert checkpoint(asked.request_id, output=1)

    in_two_houses(old, work)
