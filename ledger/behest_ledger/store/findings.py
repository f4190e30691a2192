"""What a verification finds: the words in which the checks of the books speak."""

from collections.abc import Callable

import msgspec

from behest_ledger.store.pool import Connection

NAMED_MAX = 1000
"""Places that one check names. Whoever has more has to look at the first ones anyway, and memory has an end."""


class Finding(msgspec.Struct, frozen=True):
    """One place where the books do not agree."""

    check: str
    place: str
    expected: str
    found: str


Progress = Callable[[str, float], None]
"""Told before each step of a verification: what is looked at, and how much of it is done, from 0 to 1."""


async def named(connection: Connection, check: str, query: str, *arguments: object) -> list[Finding]:
    """What a query of (place, expected, found) returns: at most the first `NAMED_MAX`, and a word that there are more.

    The planner is not told of that end: it would take another way, on which books that are clean take longer.
    """
    places = f"WITH places (place, expected, found) AS MATERIALIZED ({query}) TABLE places LIMIT {NAMED_MAX + 1}"
    rows = await connection.fetch(places, *arguments)
    return first(check, [Finding(check, *(_plain(value) for value in row)) for row in rows])


def first(check: str, findings: list[Finding]) -> list[Finding]:
    """At most `NAMED_MAX` findings of one check, and a word that there are more."""
    if len(findings) <= NAMED_MAX:
        return findings
    return [*findings[:NAMED_MAX], Finding(check, f"more places than these {NAMED_MAX}", "none", "more")]


def _plain(value: object) -> str:
    """A value of the database as a person reads it."""
    return value if isinstance(value, str) else f"{value:f}" if hasattr(value, "is_finite") else str(value)
