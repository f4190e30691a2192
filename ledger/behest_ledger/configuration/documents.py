"""From text to plain objects: YAML with several documents, or JSON, bounded against hostile text.

YAML lets a mapping name a key twice (the last one silently wins) and lets an alias repeat a whole tree (a
text of 1 kB can stand for gigabytes). The first is refused, the second is bounded before anything is built.
"""

import json
from collections.abc import Iterator
from typing import Any

TEXT_BYTES_MAX = 1024 * 1024
DOCUMENTS_MAX = 500
DEPTH_MAX = 40
ALIASES_MAX = 100
NODES_MAX = 100_000


class DocumentError(ValueError):
    """Text that is no YAML or JSON, or more of it than a configuration can be."""

    def __init__(self, reason: str, *, document: int | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.document = document
        """From 1; None where the text as a whole is at fault."""


def read_documents(text: str) -> list[tuple[int, Any]]:
    """The documents of a text as plain objects with their numbers, from 1; empty documents are left out.

    A `List`, as `kubectl get -o yaml` prints it, stands for its items. Raises `DocumentError`.
    """
    if len(text) > TEXT_BYTES_MAX or len(text.encode(errors="surrogatepass")) > TEXT_BYTES_MAX:
        raise DocumentError(f"the text is longer than {TEXT_BYTES_MAX} bytes", document=None)
    documents: list[tuple[int, Any]] = []
    for number, value in enumerate(_json_or_yaml(text), start=1):
        if number > DOCUMENTS_MAX:
            raise DocumentError(f"there are more than {DOCUMENTS_MAX} documents", document=None)
        documents += [(number, item) for item in _items(value) if item is not None]
        if len(documents) > DOCUMENTS_MAX:
            raise DocumentError(f"there are more than {DOCUMENTS_MAX} resources", document=None)
    return documents


def _items(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and value.get("kind") == "List" and isinstance(value.get("items"), list):
        items: list[Any] = value["items"]
        return items
    return [value]


def _json_or_yaml(text: str) -> Iterator[Any]:
    # YAML is nearly a superset of JSON, but not of JSON that is indented with tabs.
    if text.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(text, object_pairs_hook=_object_of_pairs, parse_constant=_refuse_constant)
        except (json.JSONDecodeError, RecursionError):
            pass
        else:
            _check_depth(value)
            return iter([value])
    # Loaded only here: a sidecar reads no manifests.
    from behest_ledger.configuration.yaml_text import yaml_documents

    return yaml_documents(text)


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DocumentError(f"the key {twice!r} is there twice", document=1)
    return value


def _refuse_constant(text: str) -> None:
    raise DocumentError(f"{text} is no JSON number", document=1)


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(DEPTH_MAX + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise DocumentError(f"it is nested deeper than {DEPTH_MAX} levels", document=1)
