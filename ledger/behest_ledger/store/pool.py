"""Connections to the ledger's database: a small, bounded pool, or one for a short task.

Between here and PostgreSQL there may be a pooler such as PgBouncer. In its transaction mode two statements of one
connection may meet two sessions of the server, so nothing may be left behind in one: no prepared statements and no
settings. What the ledger needs for its statements (time limits, search paths) is set on its functions.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

import asyncpg

from behest_ledger.store.errors import LedgerRefusedError, mapped

Connection = Any
"""An asyncpg connection or pool: asyncpg ships no type information."""

Pooler = Literal["none", "transaction", "session"]
"""What is between here and the server: PgBouncer's `pool_mode`."""

POOL_SIZE = 2
"""Connections for requests. What each process holds besides is in docs/database.md."""
CONNECT_TIMEOUT_S = 5
_STATEMENTS_KEPT = 100
COMMAND_TIMEOUT_S = 5.0
"""A statement that takes longer is given up: its result is unknown, and money fails closed."""


class PoolerError(LedgerRefusedError):
    """There is a pooler where the server itself is needed, or where none was told of."""


class UrlError(LedgerRefusedError):
    """The URL of a database cannot be read. The message holds nothing of it: a password is."""


async def open_pool(
    dsn: str, *, size: int = POOL_SIZE, application_name: str = "behest", pooler: Pooler = "none"
) -> Connection:
    """A pool of at most `size` connections, opened at the first need.

    Behind a pooler in transaction mode every statement is parsed anew: two round trips for one. Raises
    `LedgerUnavailableError`, `UrlError`, and `PoolerError` where a pooler is found that was not told of.
    """
    _refuse_unreadable(dsn)
    with mapped(), _pooler_found():
        pool = await asyncpg.create_pool(
            dsn,
            # None is kept open for its own sake: asyncpg would try to open it again while the database is away, and
            # log each attempt with its traceback.
            min_size=0,
            max_size=size,
            max_inactive_connection_lifetime=300.0,
            reset=_nothing_to_reset,
            **_connect_arguments(application_name, pooler),
        )
        if pooler == "none":
            try:
                async with pool.acquire() as connection:
                    await _refuse_pooler(
                        connection, "set BEHEST_DATABASE_POOLER=transaction, or name the server itself"
                    )
            except BaseException:
                pool.terminate()
                raise
    return pool


async def use_dsn(pool: Connection, dsn: str, *, application_name: str = "behest", pooler: Pooler = "none") -> None:
    """Connect as another login from now on: each connection is replaced when it is asked for next, or idle for long.

    Raises `UrlError`: then the last one serves.
    """
    _refuse_unreadable(dsn)
    pool.set_connect_args(dsn, **_connect_arguments(application_name, pooler))
    await pool.expire_connections()


def _connect_arguments(application_name: str, pooler: Pooler) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "timeout": CONNECT_TIMEOUT_S,
        "command_timeout": COMMAND_TIMEOUT_S,
        "server_settings": _settings(application_name, pooler),
    }
    return {**arguments, "statement_cache_size": 0 if pooler == "transaction" else _STATEMENTS_KEPT}


async def _nothing_to_reset(_connection: Connection) -> None:
    """Instead of asyncpg's own reset, a round trip after every use: no statement here leaves anything behind."""


@asynccontextmanager
async def asking(source: Connection) -> AsyncGenerator[Connection]:
    """A connection of a pool (or the connection itself) for one question, for `COMMAND_TIMEOUT_S` in all.

    A connection that did not answer in time is dropped: to cancel its statement would take as long again where the
    database stands still. Raises the errors of `store.errors`; `LedgerUnavailableError` means an unknown result.
    """
    with mapped():
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            if not isinstance(source, asyncpg.Pool):
                yield source
                return
            connection = await source.acquire()
            try:
                yield connection
            except (TimeoutError, asyncio.CancelledError):
                connection.terminate()
                raise
            finally:
                await source.release(connection)


async def connect(dsn: str, *, application_name: str = "behest") -> Connection:
    """One connection for a short task of a command. The caller closes it.

    Raises `LedgerUnavailableError`, `UrlError`, and `PoolerError` where the server is behind a pooler.
    """
    _refuse_unreadable(dsn)
    with mapped(), _pooler_found():
        connection = await asyncpg.connect(
            dsn, timeout=CONNECT_TIMEOUT_S, server_settings=_settings(application_name, "none")
        )
        try:
            await _refuse_pooler(connection, _NAME_THE_SERVER)
        except BaseException:
            connection.terminate()
            raise
    return connection


_NAME_THE_SERVER = "commands need the server itself: name its own host and port"


def _settings(application_name: str, pooler: Pooler) -> dict[str, str]:
    settings = {"application_name": application_name}
    # A pooler refuses what it cannot follow. Every name is qualified; this is in case one were forgotten.
    return settings if pooler != "none" else {**settings, "search_path": "pg_catalog"}


async def _refuse_pooler(connection: Connection, cure: str) -> None:
    """A pooler gives its clients cancel keys of its own: the process id in them is not that of a server's process."""
    if await connection.fetchval("SELECT pg_catalog.pg_backend_pid()") != connection.get_server_pid():
        raise PoolerError(f"this is the address of a connection pooler: {cure}")


def _refuse_unreadable(dsn: str) -> None:
    """Raise `UrlError` where the host of a URL has no number for a port.

    A password that is not percent-encoded ends the host at its `/`, `?` or `#`. asyncpg then says what it took for the
    port: a part of the password.
    """
    try:
        hosts = urlsplit(dsn).netloc.rpartition("@")[2].split(",")
    except ValueError:  # a bracket that is not of an IPv6 address
        hosts = [":none"]
    ports = [host.rpartition("]")[2].partition(":")[2] for host in hosts]
    if not all(port.isdecimal() for port in ports if port):
        raise UrlError("the database's URL cannot be read: write %2F for / in its password, %23 for #, %3F for ?")


@contextmanager
def _pooler_found() -> Generator[None]:
    try:
        yield
    except asyncpg.ProtocolViolationError as error:
        if "startup parameter" in str(error):
            raise PoolerError(
                f"this is the address of a connection pooler ({error}): set BEHEST_DATABASE_POOLER=transaction for a"
                f" sidecar; {_NAME_THE_SERVER}"
            ) from error
        raise
