"""What a verification finds: the words in which the checks of the books speak."""

from collections.abc import Callable

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """One place where the books do not agree."""

    check: str
    place: str
    expected: str
    found: str


Progress = Callable[[str, float], None]
"""Told before each step of a verification: what is looked at, and how much of it is done, from 0 to 1."""


def plain(value: object) -> str:
    """A value of the database as a person reads it."""
    return value if isinstance(value, str) else f"{value:f}" if hasattr(value, "is_finite") else str(value)
