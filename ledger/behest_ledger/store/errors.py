"""asyncpg's and the network's faults, mapped once: callers see only these."""

import asyncio
from collections.abc import Generator
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


class LedgerForbiddenError(LedgerRefusedError):
    """The database role may not do this: it acts for another tenant, or it is a sidecar's and this is the owner's."""


class SchemaError(LedgerError):
    """The schema is missing or is not one that this version can use."""

    def __init__(self, fault: str, cure: str = "run `behest ledger migrate`") -> None:
        super().__init__(f"{fault}: {cure}")
        self.fault = fault
        self.cure = cure


_UNAVAILABLE = (OSError, TimeoutError, asyncio.TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)

# By SQLSTATE, or its first two characters, the class (PostgreSQL's documentation, appendix A). It matters: what is
# refused is put aside for somebody to look at, what is unavailable is tried again.
_CONFLICT = ("40",)
_SCHEMA = ("42", "3F")
_NOW_UNAVAILABLE = (
    "08",  # connection
    "28",  # authorisation of the login
    "3D",  # no such database
    "53",  # insufficient resources: disk, memory, connections
    "57",  # operator intervention: shutdown, cancelled statement
    "58",  # the system below PostgreSQL
    "25006",  # read only: a standby
    "55000",  # the database takes no connections
    "55P03",  # lock timeout
)


@contextmanager
def mapped() -> Generator[None, None, None]:
    """Turn what asyncpg raises inside into the errors of this module.

    Of what PostgreSQL says the message is kept alone. Its details may be the row that it refused, with somebody's words
    in it, and errors are logged; they are in the server's own log.
    """
    try:
        yield
    except asyncpg.PostgresError as error:
        raise _of_state(error) from None
    except _UNAVAILABLE as error:
        raise LedgerUnavailableError(f"{type(error).__name__}: {error}") from error


def _of_state(error: asyncpg.PostgresError) -> LedgerError:
    state: str = getattr(error, "sqlstate", None) or ""
    said = str(error.args[0]) if error.args else ""
    if state.startswith(_CONFLICT):
        return LedgerConflictError(said)
    if state.startswith(_NOW_UNAVAILABLE):
        return LedgerUnavailableError(f"{type(error).__name__}: {said}")
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return LedgerForbiddenError(f"{said}: see `behest ledger role`")
    if state.startswith(_SCHEMA):
        return SchemaError(said)
    return LedgerRefusedError(f"{type(error).__name__}: {said}")
