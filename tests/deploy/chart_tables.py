"""The tables that the chart's pages show, made from what they describe: `python -m deploy.chart_tables` writes them.

Run it as `PYTHONPATH=tests .venv/bin/python -m deploy.chart_tables` in the repository.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from behest_operator.annotations import PREFIX, TABLE
from behest_operator.sidecar import Template

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "behest"


@dataclass(frozen=True)
class Value:
    """One key of values.yaml."""

    path: str
    default: str | None
    """As it is written; None: it has keys of its own."""
    comment: str
    """What stands above it; empty: nothing."""


def values(text: str) -> Iterator[Value]:
    """The keys of a values.yaml in their order. `resources` counts as one: what is in it belongs to Kubernetes."""
    parents: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comment.append(stripped.lstrip("# "))
            continue
        if not stripped:
            comment = []
            continue
        name, _, default = stripped.partition(":")
        parents = [*parents[: (len(line) - len(line.lstrip())) // 2], name]
        if "resources" not in parents[:-1]:
            shown = default.strip() or ("see `values.yaml`" if name == "resources" else None)
            yield Value(".".join(parents), shown, " ".join(comment))
        comment = []


def table_of_values() -> str:
    """The README's table."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for value in values((CHART / "values.yaml").read_text()):
        if value.default is None:
            rows.append(f"| **{value.path}** | | {_cell(value.comment)} |")
        else:
            default = value.default if value.default.startswith("see ") else f"`{value.default}`"
            rows.append(f"| `{value.path}` | {default} | {_cell(value.comment)} |")
    return "\n".join(rows) + "\n"


def table_of_annotations() -> str:
    """The table of docs/kubernetes.md."""
    template = Template(image="the chart's")
    defaults = {
        "project": "`sidecar.defaultProject`",
        "pod_auth": "`workload`",
        "containers": "all",
        "cpu_limit": "none",
    }
    rows = ["| annotation | default | meaning |", "|---|---|---|"]
    for row in TABLE:
        default = defaults.get(row.field) or str(getattr(template, row.field))
        shown = default if default.startswith(("`", "the ", "all", "none")) else f"`{default}`"
        rows.append(f"| `{PREFIX}{row.name}` | {shown} | {_cell(row.meaning)} |")
    return "\n".join(rows) + "\n"


PAGES = {
    CHART / "README.md": ("values", table_of_values),
    ROOT / "docs" / "kubernetes.md": ("annotations", table_of_annotations),
}


def with_table(page: str, name: str, table: str) -> str:
    """The page with a new table between its marks."""
    begin, end = f"<!-- {name}: made by tests/deploy/chart_tables.py -->\n", f"<!-- end of {name} -->"
    return re.sub(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", lambda _: table, page, flags=re.DOTALL)


def schema_paths(schema: dict[str, object], path: str = "") -> Iterator[str]:
    """The keys that a schema names, as paths; what is in `resources` belongs to Kubernetes."""
    properties = schema.get("properties")
    if not isinstance(properties, dict) or path.endswith("resources"):
        return
    for name, inner in properties.items():
        where = f"{path}.{name}" if path else str(name)
        yield where
        yield from schema_paths(inner, where)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write the tables into their pages."""
    for page, (name, table) in PAGES.items():
        page.write_text(with_table(page.read_text(), name, table()))


def defaults() -> dict[str, object]:
    """values.yaml as Helm reads it."""
    read: dict[str, object] = yaml.safe_load((CHART / "values.yaml").read_text())
    return read


if __name__ == "__main__":
    main()
