"""The chart's own pages and files agree with each other; no Helm is needed to see that."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.chart_tables import CHART, PAGES, defaults, schema_paths, values, with_table

VALUES = list(values((CHART / "values.yaml").read_text()))
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())


def schemas(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [schema, *(found for inner in schema.get("properties", {}).values() for found in schemas(inner))]


def test_every_key_of_the_values_has_a_comment() -> None:
    assert len(VALUES) > 50
    assert [value.path for value in VALUES if not value.comment] == []


def test_every_key_of_the_values_is_in_the_schema_and_the_other_way_round() -> None:
    # Helm hands `global` to every chart.
    assert {*schema_paths(SCHEMA)} - {"global"} == {value.path for value in VALUES}


def test_the_schema_refuses_keys_that_are_not_in_the_values() -> None:
    for schema in schemas(SCHEMA):
        if "properties" in schema:
            assert schema["additionalProperties"] is False


def test_every_text_of_the_schema_is_checked() -> None:
    for schema in schemas(SCHEMA):
        if schema.get("type") == "string":
            assert {"pattern", "enum"} & schema.keys(), schema


def test_the_reading_of_comments_reads_what_yaml_reads() -> None:
    for value in VALUES:
        found: Any = defaults()
        for name in value.path.split("."):
            found = found[name]
        if value.default is None:
            assert isinstance(found, dict)
        elif not value.path.endswith("resources"):
            assert yaml.safe_load(value.default) == found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_that_are_made(page: Path) -> None:
    name, table = PAGES[page]
    shown = page.read_text()
    assert f"<!-- {name}:" in shown
    assert with_table(shown, name, table()) == shown, "run: PYTHONPATH=tests .venv/bin/python -m deploy.chart_tables"


def test_the_chart_installs_the_version_that_it_is_packed_with(repository: Path) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert (chart["appVersion"], chart["version"]) == (project["version"], project["version"])
    assert chart["annotations"]["artifacthub.io/license"] == project["license"]
    assert chart["kubeVersion"] == ">=1.29.0-0", "native sidecars"
