"""asyncpg's and the network's faults, mapped once: callers see only these."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg


class LedgerError(Exception):
    """Base of what the store raises."""


class LedgerUnavailableError(LedgerError):
    """The database cannot be reached, or did not answer in time: the result of what was asked is unknown."""


class LedgerConflictError(LedgerError):
    """The statement was rolled back by a conflict (deadlock, serialisation): nothing moved, asking again is safe."""


class LedgerRefusedError(LedgerError):
    """The database refused the statement itself: a fault of what was asked, not of when."""


class SchemaError(LedgerError):
    """The schema is missing or is not one that this version can use."""


_UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncio.TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.DiskFullError,
    asyncpg.OutOfMemoryError,
    asyncpg.ReadOnlySQLTransactionError,
)


@contextmanager
def mapped() -> Iterator[None]:
    """Turn what asyncpg raises inside into the errors of this module."""
    try:
        yield
    except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError) as error:
        raise LedgerConflictError(str(error)) from error
    except _UNAVAILABLE as error:
        raise LedgerUnavailableError(f"{type(error).__name__}: {error}") from error
    except (
        asyncpg.UndefinedTableError,
        asyncpg.UndefinedFunctionError,
        asyncpg.InvalidSchemaNameError,
    ) as error:
        raise SchemaError(f"{error}: run `behest ledger migrate`") from error
    except asyncpg.PostgresError as error:
        raise LedgerRefusedError(f"{type(error).__name__}: {error}") from error
