"""Logins of sidecars, for tests: made for the server's time, gone when the block ends."""

import asyncio
import os
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from typing import Any

from behest_ledger.store.pool import connect
from behest_ledger.store.roles import create_role, drop_role
from behest_proxy.cli.roles import dsn_of_role

_PASSWORD = "a password of tests"
_numbers = count(1)


@asynccontextmanager
async def tenant_role(dsn: str, *tenants: str) -> AsyncGenerator[str]:
    """The DSN of a role for these tenants; for all where none is named."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    owner = await connect(dsn)
    try:
        await create_role(owner, name, tenants=tenants or None, password=_PASSWORD)
        try:
            yield dsn_of_role(dsn, name, _PASSWORD.replace(" ", "%20"))
        finally:
            await owner.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = $1", name)
            await drop_role(owner, name)
    finally:
        await owner.close()


@contextmanager
def login(dsn: str, *tenants: str) -> Generator[str]:
    """The same, for tests without a loop of their own."""
    with asyncio.Runner() as runner:
        role = tenant_role(dsn, *tenants)
        made = runner.run(role.__aenter__())
        try:
            yield made
        finally:
            runner.run(role.__aexit__(None, None, None))


@asynccontextmanager
async def logged_in(dsn: str) -> AsyncGenerator[Any]:
    """A connection."""
    connection = await connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()
