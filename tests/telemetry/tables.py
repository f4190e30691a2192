"""The tables of docs/telemetry.md, made from the names: `PYTHONPATH=tests .venv/bin/python -m telemetry.tables`."""

from collections.abc import Iterator
from pathlib import Path

from behest_ledger.telemetry import names
from behest_ledger.telemetry.settings import VARIABLES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "telemetry.md"
_TELLERS = {
    "sidecar": "Each sidecar or gateway",
    "keeper": "The keeper that works: in the operator, or `behest ledger keep`",
    "operator": "The operator",
    "webhook": "Each webhook",
}


def metrics() -> str:
    """All metrics, by who tells them."""
    rows: list[str] = []
    for teller, title in _TELLERS.items():
        rows += [
            f"### {title}\n",
            "| metric | in Prometheus | kind, unit | attributes | meaning |",
            "|---|---|---|---|---|",
        ]
        for item in names.INSTRUMENTS:
            if item.teller == teller:
                attributes = ", ".join(f"`{name}`" for name in item.attributes) or "none"
                meaning = item.description
                if item.bounds:
                    meaning += f" Buckets: {', '.join(f'{bound:g}' for bound in item.bounds)}."
                unit = item.unit.strip("{}")
                rows.append(
                    f"| `{item.name}` | `{item.series_name}` | {item.kind}, {unit} | {attributes} | {meaning} |"
                )
        rows.append("")
    return "\n".join(rows)


def _table(head: str, of: dict[str, str]) -> str:
    return "\n".join([head, "|---|---|", *(f"| `{name}` | {meaning} |" for name, meaning in of.items())]) + "\n"


def tables() -> Iterator[tuple[str, str]]:
    """Each table's name and text."""
    yield "metrics", metrics()
    yield "attributes", _table("| attribute | meaning |", names.ATTRIBUTES)
    yield "span attributes", _table("| attribute | meaning |", names.SPAN_ATTRIBUTES)
    yield "variables", _table("| variable | meaning |", VARIABLES)


def with_tables(page: str) -> str:
    """The page with all tables made anew."""
    for name, table in tables():
        begin, end = f"<!-- {name}: made by tests/telemetry/tables.py -->\n", f"<!-- end of {name} -->"
        assert page.count(begin) == 1, f"the page has one place for {name}"
        page = page[: page.index(begin) + len(begin)] + table + page[page.index(end) :]
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
