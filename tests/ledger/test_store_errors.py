import asyncio
import json
import traceback
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from behest_ledger.holds import Gone, Granted
from behest_ledger.store import holds
from behest_ledger.store.errors import (
    LedgerConflictError,
    LedgerError,
    LedgerForbiddenError,
    LedgerRefusedError,
    LedgerUnavailableError,
    SchemaError,
    mapped,
)
from ledger.books import Books, admission, keep_books

RAISED = [
    ("40P01", LedgerConflictError),  # deadlock
    ("40001", LedgerConflictError),
    ("22P05", LedgerRefusedError),  # untranslatable character
    ("23505", LedgerRefusedError),
    ("P0001", LedgerRefusedError),
    ("XX000", LedgerRefusedError),
    ("42P01", SchemaError),  # no such table
    ("42703", SchemaError),  # no such column
    ("42501", LedgerForbiddenError),  # another tenant, or a grant is missing
    ("3F000", SchemaError),
    ("53100", LedgerUnavailableError),  # disk full
    ("53200", LedgerUnavailableError),
    ("53300", LedgerUnavailableError),
    ("57P01", LedgerUnavailableError),
    ("57014", LedgerUnavailableError),
    ("58030", LedgerUnavailableError),  # the disk cannot be read
    ("55P03", LedgerUnavailableError),
    ("25006", LedgerUnavailableError),
    ("28P01", LedgerUnavailableError),
]


@pytest.mark.parametrize(("state", "error"), RAISED)
def test_what_postgresql_raises_is_ours_by_its_sqlstate(state: str, error: type[LedgerError]) -> None:
    with pytest.raises(error), mapped():
        raise asyncpg.PostgresError.new({"C": state, "M": "so it is"})


@pytest.mark.parametrize("state", [state for state, _ in RAISED])
def test_of_what_postgresql_raises_nothing_is_told_but_its_message(state: str) -> None:
    """Its details may be a row, and whoever logs an error logs what it was raised from."""
    row = "Failing row contains (acme, my prompt)."
    with pytest.raises(LedgerError, match="a row is refused") as caught, mapped():
        raise asyncpg.PostgresError.new({"C": state, "M": "a row is refused", "D": row, "H": "read my prompt"})
    assert "my prompt" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "fault", [OSError("gone"), TimeoutError(), asyncpg.InterfaceError("closed"), asyncpg.InternalClientError("lost")]
)
def test_what_the_network_or_the_client_raises_is_no_answer(fault: Exception) -> None:
    with pytest.raises(LedgerUnavailableError), mapped():
        raise fault


def test_other_faults_stay_what_they_are() -> None:
    with pytest.raises(KeyError), mapped():
        raise KeyError("ours")


class Conflicts:
    """A pool whose first answers are conflicts."""

    def __init__(self, conflicts: int) -> None:
        self.conflicts = conflicts
        self.calls = 0

    async def fetch(self, _query: str, _holder: UUID, items: str, *_: object) -> list[dict[str, Any]]:
        self.calls += 1
        if self.calls <= self.conflicts:
            raise asyncpg.DeadlockDetectedError("deadlock")
        ids = [UUID(item["request_id"]) for item in json.loads(items)]
        return [{"request_id": request_id, "answer": '{"verdict": "void"}', "rates": "[]"} for request_id in ids]


def test_an_admission_in_conflict_is_asked_again_but_not_for_ever() -> None:
    pool = Conflicts(holds.ADMIT_ATTEMPTS_MAX - 1)
    assert asyncio.run(holds.admit(pool, admission())) == Gone()
    pool = Conflicts(100)
    with pytest.raises(LedgerConflictError):
        asyncio.run(holds.admit(pool, admission()))
    assert pool.calls == holds.ADMIT_ATTEMPTS_MAX


def test_a_window_that_somebody_holds_too_long_is_no_answer(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        assert isinstance((await books.admit())[1], Granted)
        async with books.connection.acquire() as other, other.transaction():
            await other.execute("SELECT FROM ledger.budget_window FOR UPDATE")
            with pytest.raises(LedgerUnavailableError, match="lock timeout"):
                await books.admit()

    keep_books(dsn, work, connections=2)
