"""Sealing until nothing is left: on a server that others use too, their transactions have to end first."""

import asyncio

from behest_ledger.store.seals import Sealer
from ledger.books import Books


async def seal_all(books: Books) -> None:
    """Seal everything that is written by now."""
    goal: int = await books.connection.fetchval("SELECT txid_current() + tx_added FROM ledger.seal_progress")
    sealer = Sealer()
    async with asyncio.timeout(30):
        while True:
            await sealer.seal(books.connection, calls_max=100)
            if await books.connection.fetchval("SELECT sealed_until FROM ledger.seal_progress") > goal:
                return
            await asyncio.sleep(0.02)
