"""JSON objects whose meaning no two parsers can disagree about."""

import json
from typing import Any, NoReturn, cast

__all__ = ["json_object"]


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes.

    Raises `ValueError` for anything else: bad UTF-8, NaN and Infinity, nesting too deep for the parser, a
    value that is no object, and a member named twice on any level (RFC 8259 section 4: parsers differ in
    which one they take).
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - a wrong document, not a wrong argument
    return cast("dict[str, Any]", value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is named twice")
    return members


def _no_constant(_name: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")
