"""The chart's dashboards and alert rules name what there is: a metric that is renamed is missed at once.

What they say is tried in tests/finops, which needs a Prometheus.
"""

import json
import re
from pathlib import Path

import pytest
import yaml

from behest_ledger.charging import Outcome
from behest_ledger.telemetry.names import INSTRUMENTS

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "behest"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((CHART / "dashboards").glob("*.json"))}
RULES: dict[str, str] = {
    rule.get("alert") or rule["record"]: rule["expr"]
    for group in yaml.safe_load((CHART / "alerts" / "behest.yaml").read_text())["groups"]
    for rule in group["rules"]
}


@pytest.mark.parametrize("board", BOARDS)
def test_a_dashboard_uses_only_metrics_that_there_are(board: str) -> None:
    known = {item.series_name + end for item in INSTRUMENTS for end in ("", "_bucket", "_sum", "_count")}
    labels = {attribute.replace(".", "_") for item in INSTRUMENTS for attribute in item.attributes}
    expressions = [
        target["expr"] for panel in BOARDS[board]["panels"] for target in panel["targets"] if "expr" in target
    ]
    words = {word for expression in expressions for word in re.findall(r"\b(?:behest|gen_ai)_\w+", expression)}
    assert words
    assert words <= known | labels


@pytest.mark.parametrize("board", BOARDS)
def test_a_dashboard_names_its_sources_by_variables_and_its_panels_do_not_overlap(board: str) -> None:
    content = BOARDS[board]
    names = {item["name"] for item in content["templating"]["list"]}
    places: set[tuple[int, int]] = set()
    for panel in content["panels"]:
        assert panel["description"], panel["title"]
        assert {target["datasource"]["uid"].strip("${}") for target in panel["targets"]} <= names
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & places, panel["title"]
        assert at["x"] + at["w"] <= 24
        places |= mine
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])


def test_the_rules_use_only_metrics_labels_and_outcomes_that_there_are() -> None:
    known = {item.series_name for item in INSTRUMENTS}
    attributes = {attribute.replace(".", "_") for item in INSTRUMENTS for attribute in item.attributes}
    for rule, expression in RULES.items():
        assert set(re.findall(r"\b(?:behest|gen_ai)_\w+", expression)) <= known | attributes, rule
        for values in re.findall(r'behest_outcome=~?"([^"]*)"', expression):
            assert set(values.split("|")) <= set(Outcome), rule
        assert set(re.findall(r"behest:[\w:]+", expression)) <= set(RULES), rule
