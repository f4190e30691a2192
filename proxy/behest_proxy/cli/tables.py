"""Rows of text in columns, as people read them, and documents, as programs do."""

import json
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from behest_proxy.cli.terminal import Terminal

OutputForm: TypeAlias = Literal["table", "json", "yaml"]
OUTPUT_FORMS = ("table", "json", "yaml")


def print_table(terminal: Terminal, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A bold header and the rows below it, each column as wide as its widest cell."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for number, row in enumerate((header, *rows)):
        text = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        terminal.line(text if number else terminal.bold(text))


def print_document(terminal: Terminal, document: Any, form: Literal["json", "yaml"]) -> None:
    """A value of plain objects as JSON or YAML."""
    if form == "json":
        terminal.line(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        import yaml  # slow to import, and few ask for it

        terminal.line(yaml.safe_dump(document, sort_keys=False, allow_unicode=True).rstrip("\n"))
