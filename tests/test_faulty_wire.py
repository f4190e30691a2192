"""The faulty wire does what its names say: what tests of outages are built on."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import asyncpg
import pytest

from behest_ledger.store.pool import connect
from faulty_wire import FaultyWire, faulty_wire

_PUT = "UPDATE thing SET n = n + $1 RETURNING n"


def _run(database: str, scenario: Callable[[FaultyWire, str, Any], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        direct: Any = await connect(database)
        try:
            await direct.execute("SET search_path = public; CREATE TABLE thing (n int); INSERT INTO thing VALUES (0)")
            async with faulty_wire(database) as (wire, dsn):
                await scenario(wire, dsn, direct)
        finally:
            await direct.close()

    asyncio.run(main())


async def _client(dsn: str) -> Any:
    client: Any = await asyncpg.connect(dsn, timeout=5)
    return client


async def _n(direct: Any) -> int:
    found: int = await direct.fetchval("SELECT n FROM thing")
    return found


def test_a_lost_answer_was_committed(database: str) -> None:
    async def scenario(wire: FaultyWire, dsn: str, direct: Any) -> None:
        client = await _client(dsn)
        assert await client.fetchval(_PUT, 1) == 1
        wire.spoil("UPDATE thing", "lost")
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await client.fetchval(_PUT, 1)
        assert (await _n(direct), wire.hits) == (2, 1)
        again = await _client(dsn)
        assert await again.fetchval(_PUT, 1) == 3
        again.terminate()

    _run(database, scenario)


def test_a_silent_statement_was_committed_and_is_never_answered(database: str) -> None:
    async def scenario(wire: FaultyWire, dsn: str, direct: Any) -> None:
        client = await _client(dsn)
        wire.spoil("UPDATE thing", "silent")
        asked = asyncio.create_task(client.fetchval(_PUT, 1))
        while not await _n(direct):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not asked.done()
        client.terminate()
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await asked

    _run(database, scenario)


def test_a_late_statement_arrives_when_nobody_waits_for_it_any_more(database: str) -> None:
    async def scenario(wire: FaultyWire, dsn: str, direct: Any) -> None:
        client = await _client(dsn)
        wire.spoil("UPDATE thing", "late")
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await client.fetchval(_PUT, 1)
        await asyncio.sleep(0.1)
        assert await _n(direct) == 0
        wire.let_late_ones_through()
        async with asyncio.timeout(10):
            while not await _n(direct):
                await asyncio.sleep(0.01)

    _run(database, scenario)


def test_what_stands_still_goes_on_and_what_is_away_comes_back(database: str) -> None:
    async def scenario(wire: FaultyWire, dsn: str, direct: Any) -> None:
        client = await _client(dsn)
        wire.stall()
        asked = asyncio.create_task(client.fetchval(_PUT, 1))
        await asyncio.sleep(0.1)
        assert not asked.done()
        wire.back()
        assert await asked == 1
        wire.away()
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await client.fetchval(_PUT, 1)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await _client(dsn)
        wire.back()
        again = await _client(dsn)
        assert await again.fetchval(_PUT, 1) == 2
        again.terminate()

    _run(database, scenario)
