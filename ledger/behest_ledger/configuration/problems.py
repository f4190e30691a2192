"""What is wrong with a manifest, so that its author can put it right: which one, which field, what to write."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, get_args

import msgspec
import msgspec.inspect

Problem: TypeAlias = tuple[str, str]
"""The path of a field, and what is wrong with it."""

SHOWN_LENGTH_MAX = 60


class ManifestError(ValueError):
    """One thing that is wrong with one manifest."""

    def __init__(
        self, reason: str, *, path: str = "", subject: str = "", document: int | None = None, source: str = ""
    ) -> None:
        self.reason = reason
        self.path = path
        """Of the field, from the manifest's root; empty: the manifest as a whole."""
        self.subject = subject
        """`<kind> <namespace>/<name>`, as far as they are known."""
        self.document = document
        """Number of the document in its text, from 1."""
        self.source = source
        """The file, where there are several."""
        super().__init__(str(self))

    def __str__(self) -> str:
        told = ": ".join(part for part in (self.subject, self.path, self.reason) if part)
        where = place(self.source, self.document)
        return f"{told} ({where})" if where else told


class InvalidManifestsError(ValueError):
    """At least one manifest is wrong, so none is applied. `errors` holds everything that was found."""

    def __init__(self, errors: Iterable[ManifestError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in self.errors))


def place(source: str, document: int | None) -> str:
    """Where something was read, as far as it is known: `budgets.yaml, document 2`."""
    return ", ".join(part for part in (source, f"document {document}" if document else "") if part)


def shown(value: object) -> str:
    """A value as it may stand in a message: short, and told from a string by its quotes."""
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    return text if len(text) <= SHOWN_LENGTH_MAX else text[: SHOWN_LENGTH_MAX - 3] + "..."


def listed(values: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = values
    return f"{', '.join(most)} or {last}" if most else last


# msgspec tells a path and a type; the value found there and what was possible instead make it actionable.

_TYPED = re.compile(
    r"^Expected `(?P<expected>[^`]+)`, got `(?P<got>[^`]+)`(?: - at (?P<key>`key` in )?`(?P<path>[^`]*)`)?$"
)
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]+)`(?: - at `(?P<path>[^`]*)`)?$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.+?)`(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_ENUM = re.compile(r"^Invalid enum value (?P<value>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")

_TYPE_WORDS = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "object": "a mapping",
    "array": "a list",
    "null": "empty",
}

MONEY_PATHS = re.compile(r"^spec\.(limit\.amount|models\[\d+\]\.prices\.\w+)$")
MONEY_HINT = 'must be a decimal string such as "5.00"'


def explain_validation_error(
    error: msgspec.ValidationError, value: Mapping[str, Any], model: type[msgspec.Struct], *, root: str
) -> Problem:
    """The field and the reason in a `msgspec.ValidationError` of converting `value` to `model`."""
    text = str(error)
    if match := _TYPED.match(text):
        return _explain_type(match, value, root)
    if match := _MISSING.match(text):
        path = _path(root, match["path"])
        return f"{path}.{match['name']}", "is required"
    if match := _UNKNOWN.match(text):
        known = _members(model, match["path"])
        near = difflib.get_close_matches(match["name"], known, n=1)
        instead = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        hint = f"; {instead}" if known else ""
        return _path(root, match["path"]), f"has no member {shown(match['name'])}{hint}"
    if match := _ENUM.match(text):
        found = _value_at(value, match["path"])
        allowed = _choices(model, match["path"])
        must = f"must be {listed(allowed)}" if allowed else "is none of the allowed values"
        return _path(root, match["path"]), f"{must}, got {shown(found)}"
    return root, text


def _explain_type(match: re.Match[str], value: Mapping[str, Any], root: str) -> Problem:
    path = _path(root, match["path"])
    if match["key"]:
        return path, "its keys must be strings: write them in quotes"
    found = _value_at(value, match["path"])
    if MONEY_PATHS.match(path):
        return path, f"{MONEY_HINT}, got {shown(found)}"
    if match["got"] == "null":
        return path, "is empty: give it a value, or leave it out"
    words = [_TYPE_WORDS.get(name, name) for name in match["expected"].split(" | ") if name != "null"]
    hint = ": write it in quotes" if words == ["a string"] and not isinstance(found, (dict, list)) else ""
    return path, f"must be {listed(words)}, got {shown(found)}{hint}"


def _path(root: str, path: str | None) -> str:
    return root + (path or "$")[1:].replace("[...]", "")


def _steps(path: str | None) -> list[str]:
    return [name or index for name, index in _STEP.findall((path or "$")[1:])]


def _value_at(value: Any, path: str | None) -> Any:
    for step in _steps(path):
        if isinstance(value, Mapping):
            # "..." stands for any key of a mapping of strings: show the first value that is none.
            value = (
                next((item for item in value.values() if not isinstance(item, str)), None)
                if step == "..."
                else value.get(step)
            )
        elif isinstance(value, list) and step.isdigit():
            value = value[int(step)]
    return value


def _type_at(model: type[msgspec.Struct], path: str | None) -> list[msgspec.inspect.Type]:
    """The types that the model allows at a path."""
    types: list[msgspec.inspect.Type] = [msgspec.inspect.type_info(model)]
    for step in _steps(path):
        found: list[msgspec.inspect.Type] = []
        for kind in types:
            if isinstance(kind, msgspec.inspect.StructType):
                found += [field.type for field in kind.fields if field.encode_name == step]
            elif isinstance(kind, msgspec.inspect.ListType):
                found.append(kind.item_type)
            elif isinstance(kind, msgspec.inspect.DictType):
                found.append(kind.value_type)
        types = [
            part for kind in found for part in (kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,))
        ]
    return types


def _members(model: type[msgspec.Struct], path: str | None) -> list[str]:
    return [
        field.encode_name
        for kind in _type_at(model, path)
        if isinstance(kind, msgspec.inspect.StructType)
        for field in kind.fields
    ]


def _choices(model: type[msgspec.Struct], path: str | None) -> list[str]:
    return [
        str(value)
        for kind in _type_at(model, path)
        if isinstance(kind, msgspec.inspect.LiteralType)
        for value in kind.values
    ]


def literal_values(literal: object) -> tuple[str, ...]:
    """The strings of a `Literal` of strings, in order."""
    return tuple(str(value) for value in get_args(literal))
