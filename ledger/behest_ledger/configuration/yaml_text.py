"""YAML with several documents, bounded against hostile text: what `documents` reads where a text is no JSON."""

from collections.abc import Hashable, Iterator
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode

from behest_ledger.configuration.documents import ALIASES_MAX, DEPTH_MAX, NODES_MAX, DocumentError


def yaml_documents(text: str) -> Iterator[Any]:
    """Its documents as plain objects. Raises `DocumentError`."""
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
