"""Connections to the ledger's database: a small, bounded pool."""

from typing import Any

import asyncpg

from behest_ledger.store.errors import mapped

Connection = Any
"""An asyncpg connection or pool: asyncpg ships no type information."""

POOL_SIZE = 2
"""Connections per sidecar. The documented ceiling of a cluster is sidecars x 2."""
CONNECT_TIMEOUT_S = 5
COMMAND_TIMEOUT_S = 5.0
"""A statement that takes longer is given up: its result is unknown, and money fails closed."""


async def open_pool(dsn: str, *, size: int = POOL_SIZE, application_name: str = "behest") -> Connection:
    """A pool of at most `size` connections, opened at the first need.

    Raises `LedgerUnavailableError`.
    """
    with mapped():
        return await asyncpg.create_pool(
            dsn,
            min_size=1,
            max_size=size,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=COMMAND_TIMEOUT_S,
            max_inactive_connection_lifetime=300.0,
            reset=_nothing_to_reset,
            server_settings={"application_name": application_name, "search_path": "pg_catalog"},
        )


async def _nothing_to_reset(_connection: Connection) -> None:
    """Instead of asyncpg's own reset, a round trip after every use: no statement here leaves anything behind."""


async def connect(dsn: str, *, application_name: str = "behest") -> Connection:
    """One connection for a short task of a command. The caller closes it.

    Raises `LedgerUnavailableError`.
    """
    with mapped():
        return await asyncpg.connect(
            dsn,
            timeout=CONNECT_TIMEOUT_S,
            server_settings={"application_name": application_name, "search_path": "pg_catalog"},
        )
