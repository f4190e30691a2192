"""The dashboards are what Grafana's own schema knows: each member is read into its types and comes out of them again.

By Grafana's Foundation SDK, which is made from the schemas of the version that it is installed for. The dashboards'
`schemaVersion` is older: Grafana migrates upwards. A member that is misspelt or of another panel is lost on the way.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from finops.test_dashboards import BOARDS


@pytest.fixture(scope="module", autouse=True)
def panels_and_queries_of_all_kinds() -> None:
    plugins.register_default_plugins()


def lost(given: Any, read: Any, path: str = "") -> Iterator[str]:
    """The members of a document that are not in what was read of it, or otherwise."""
    if isinstance(given, dict) and isinstance(read, dict):
        for name, value in given.items():
            yield from lost(value, read[name], f"{path}/{name}") if name in read else (f"{path}/{name}",)
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for number, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from lost(one, other, f"{path}/{number}")
    elif given != read:
        yield path


def read_by_grafana(board: dict[str, Any]) -> Any:
    return json.loads(JSONEncoder().encode(Dashboard.from_json(board)))


@pytest.mark.parametrize("name", BOARDS)
def test_grafana_knows_every_member_of_a_dashboard(name: str) -> None:
    assert list(lost(BOARDS[name], read_by_grafana(copy.deepcopy(BOARDS[name])))) == []


def test_what_it_does_not_know_is_found() -> None:
    board = copy.deepcopy(BOARDS["finops"])
    plot = next(panel for panel in board["panels"] if panel["type"] == "timeseries")
    plot["fieldConfig"]["defaults"]["custom"]["filOpacity"] = 1
    plot["options"]["legend"]["place"] = "right"
    plot["targets"][0]["expression"] = "up"
    number = board["panels"].index(plot)
    assert list(lost(board, read_by_grafana(copy.deepcopy(board)))) == [
        f"/panels/{number}/fieldConfig/defaults/custom/filOpacity",
        f"/panels/{number}/options/legend/place",
        f"/panels/{number}/targets/0/expression",
    ]
