"""From text to plain objects: YAML with several documents, or JSON, bounded against hostile text.

YAML lets a mapping name a key twice (the last one silently wins) and lets an alias repeat a whole tree (a
text of 1 kB can stand for gigabytes). The first is refused, the second is bounded before anything is built.
"""

import json
from collections.abc import Hashable, Iterator
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode

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
    return _yaml_documents(text)


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


def _yaml_documents(text: str) -> Iterator[Any]:
    number = 1
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        while loader.check_data():  # type: ignore[no-untyped-call]  # not in the stubs
            loader.begin_document()
            yield loader.get_data()
            number += 1
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = error.problem or error.context or "unreadable"
        raise DocumentError(f"{place}{problem}", document=number) from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, DocumentError):
            raise
        # ValueError: a date such as 2026-02-31, or a number beyond what Python converts.
        raise DocumentError(" ".join(str(error).split()), document=number) from None
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds, and without silent repetition of keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._aliases = 0

    def begin_document(self) -> None:
        self._depth = 0
        self._aliases = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > ALIASES_MAX:
                self._refuse(f"there are more than {ALIASES_MAX} aliases")
        self._depth += 1
        if self._depth > DEPTH_MAX:
            self._refuse(f"it is nested deeper than {DEPTH_MAX} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, reason: str) -> None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # not in the stubs
        raise ComposerError(None, None, reason, event.start_mark)

    def construct_document(self, node: Node) -> Any:
        if _expanded_size(node, {}) > NODES_MAX:
            raise ConstructorError(None, None, f"its aliases stand for more than {NODES_MAX} values", node.start_mark)
        return super().construct_document(node)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise ConstructorError(None, None, "a key must be a plain string", key.start_mark)
            name: str = key.value
            if name in seen:
                raise ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def _expanded_size(node: Node, sizes: dict[int, int]) -> int:
    """How many values the node stands for with its aliases written out; a node inside itself is refused."""
    known = sizes.get(id(node))
    if known is not None:
        if known < 0:
            raise ConstructorError(None, None, "a value contains itself", node.start_mark)
        return known
    sizes[id(node)] = -1
    size = 1
    if isinstance(node, CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                size += _expanded_size(part, sizes)
    sizes[id(node)] = size
    return size
