"""How a model is recognised by its name: the clauses of the price data, and an index that need not try them all."""

import datetime as dt
import functools
import re
from collections.abc import Iterator
from typing import TypeAlias

import msgspec


class Equals(msgspec.Struct, frozen=True, tag_field="is", tag="equals"):
    """The whole name."""

    text: str


class StartsWith(msgspec.Struct, frozen=True, tag_field="is", tag="starts_with"):
    """How the name begins."""

    text: str


class EndsWith(msgspec.Struct, frozen=True, tag_field="is", tag="ends_with"):
    """How the name ends."""

    text: str


class Contains(msgspec.Struct, frozen=True, tag_field="is", tag="contains"):
    """A part of the name."""

    text: str


class Regex(msgspec.Struct, frozen=True, tag_field="is", tag="regex"):
    """A regular expression that is found somewhere in the name."""

    text: str


class AnyOf(msgspec.Struct, frozen=True, tag_field="is", tag="or"):
    """At least one of several."""

    clauses: list["Clause"]


class AllOf(msgspec.Struct, frozen=True, tag_field="is", tag="and"):
    """Each of several."""

    clauses: list["Clause"]


Clause: TypeAlias = Equals | StartsWith | EndsWith | Contains | Regex | AnyOf | AllOf
"""Texts are in lower case, except in regular expressions; names are compared in lower case."""


def clause_matches(clause: Clause, name: str) -> bool:
    """Whether a name in lower case is meant by a clause."""
    match clause:
        case Equals():
            return name == clause.text
        case StartsWith():
            return name.startswith(clause.text)
        case EndsWith():
            return name.endswith(clause.text)
        case Contains():
            return clause.text in name
        case Regex():
            return _expression(clause.text).search(name) is not None
        case AnyOf():
            return any(clause_matches(part, name) for part in clause.clauses)
        case AllOf():
            return all(clause_matches(part, name) for part in clause.clauses)


class ModelIndex:
    """Finds the first of many clauses that matches: whole names by a table, only the rest one by one."""

    def __init__(self, clauses: list[Clause]) -> None:
        self._by_name: dict[str, int] = {}
        self._others: list[tuple[int, Clause]] = []
        for position, clause in enumerate(clauses):
            for part in _alternatives(clause):
                if isinstance(part, Equals):
                    self._by_name.setdefault(part.text, position)
                else:
                    self._others.append((position, part))

    def find(self, name: str) -> int | None:
        """The position of the first clause that means the name (in lower case), None where none does."""
        found = self._by_name.get(name)
        for position, clause in self._others:
            if found is not None and position >= found:
                break
            if clause_matches(clause, name):
                return position
        return found


def dashed_dates(name: str) -> str:
    """A name with its date written as the price data does: `gpt-5.2-20251211` becomes `gpt-5.2-2025-12-11`."""
    return _COMPACT_DATE.sub(_dashed, name)


_COMPACT_DATE = re.compile(r"(-)(20\d{2})(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(?=-|:|$)")


def _dashed(match: re.Match[str]) -> str:
    try:
        date = dt.date(int(match[2]), int(match[3]), int(match[4]))
    except ValueError:
        return match[0]
    return f"-{date.isoformat()}"


def _alternatives(clause: Clause) -> Iterator[Clause]:
    if isinstance(clause, AnyOf):
        for part in clause.clauses:
            yield from _alternatives(part)
    else:
        yield clause


@functools.lru_cache(maxsize=1024)
def _expression(text: str) -> re.Pattern[str]:
    return re.compile(text)
