"""The bill as a client downloads it: equal to the books, with the labels of each admission, and for admins only."""

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet
import pytest

from behest_proxy.cli.main import main
from stack import Project, Stack, wait_until, within_one

BODY = {"messages": [{"role": "user", "content": "hi"}], "sim": {"output_tokens": 9}}
TEAM = "  attribution: {{team: {team}, costCenter: CC-7}}"


def period() -> str:
    running = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    begin, end = running - timedelta(hours=1), running + timedelta(hours=1)
    return f"from={begin:%Y-%m-%dT%H:%M:%SZ}&to={end:%Y-%m-%dT%H:%M:%SZ}"


def ask(project: Project, query: str, *, role: str = "admin") -> httpx.Response:
    token = project.mint(user="boss", session=None, role=role)
    return httpx.get(
        f"{project.stack.base_url}/v1/billing/export?{query}", headers={"Authorization": f"Bearer {token}"}, timeout=30
    )


def bill(project: Project, more: str = "") -> list[dict[str, str]]:
    answer = ask(project, period() + more)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    return list(csv.DictReader(io.StringIO(answer.text, newline="")))


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(), newline="")))


def spend(project: Project, session: str) -> None:
    headers = {"Authorization": f"Bearer {project.mint(session=session)}"}
    httpx.post(project.stack.base_url + "/v1/chat/completions", json=BODY, headers=headers).raise_for_status()


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    """A project whose team changed between two requests."""
    made = stack.project(project=TEAM.format(team="search"))
    spend(made, "s1")
    made.settled(number=1)
    stack.project(project=TEAM.format(team="ads"), namespace=made.namespace, served=False)

    def has_changed() -> bool:
        spend(made, "s2")
        made.all_settled()
        return any('"ads"' in row["Tags"] for row in bill(made, "&per_session=true"))

    wait_until(has_changed, what="the new team")
    return made


def books(project: Project) -> Decimal:
    rows = project.settled()
    return Decimal(sum(row["amount_pico"] for row in rows)).scaleb(-12)


@pytest.mark.parametrize("version", ["1.2", "1.4"])
def test_the_sum_is_the_ledgers_by_session_or_not(project: Project, version: str) -> None:
    for more in ("", "&per_session=true"):
        rows = bill(project, f"{more}&focus_version={version}")
        assert sum(Decimal(row["BilledCost"]) for row in rows) == books(project)
        assert {row["SubAccountId"] for row in rows} == {project.project_id}
        assert {row["SkuMeter"] for row in rows} == {"Input Tokens", "Output Tokens"}


def test_without_an_end_it_ends_with_the_last_hour_that_is_over(stack: Stack) -> None:
    within_one(3600, takes_s=10)
    project = stack.project()
    spend(project, "s1")
    project.settled()
    answer = ask(project, f"from={datetime.now(UTC) - timedelta(hours=9):%Y-%m-%dT%H:00:00Z}")
    assert answer.status_code == 200, answer.text
    assert len(answer.text.splitlines()) == 1, "what was spent just now is of an hour that runs"


def test_a_project_that_changes_its_team_rewrites_no_history(project: Project) -> None:
    teams: dict[str, set[str]] = {}
    for row in bill(project, "&per_session=true"):
        tags: dict[str, Any] = json.loads(row["Tags"])
        assert tags["cost_center"] == "CC-7"
        teams.setdefault(tags["session"], set()).add(tags["team"])
    assert teams["s1"] == {"search"}
    assert "ads" in teams["s2"]


def test_parquet_says_the_same(project: Project) -> None:
    answer = ask(project, period() + "&format=focus-parquet")
    assert answer.status_code == 200, answer.text
    table = pyarrow.parquet.read_table(io.BytesIO(answer.content))
    assert sum(table.column("BilledCost").to_pylist()) == books(project)
    assert answer.headers["content-disposition"].endswith('.parquet"')


def test_only_an_admin_may_export(project: Project) -> None:
    for role in ("user", "dashboard-service"):
        refused = ask(project, period(), role=role)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=2026-04-01T00:30:00Z&to=2026-04-02", "from"),
        ("from=2026-04-02&to=2026-04-01", "from"),
        ("from=2020-04-02&to=2026-04-01", "from"),
        ("from=yesterday", "from"),
        ("format=csv", "format"),
        ("focus_version=2", "focus_version"),
        ("per_session=1", "per_session"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(project: Project, query: str, param: str) -> None:
    refused = ask(project, query)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_another_project_of_the_ledger_is_not_in_it(project: Project, stack: Stack) -> None:
    other = stack.project()
    assert bill(other) == []
    spend(other, "s1")
    other.settled()
    assert {row["SubAccountId"] for row in bill(other)} == {other.project_id}


def test_the_command_exports_every_project_and_leaves_no_half_a_file(
    project: Project, stack: Stack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    begin, end = running - timedelta(hours=1), running + timedelta(hours=1)
    times = ["--from", f"{begin:%Y-%m-%dT%H:00Z}", "--to", f"{end:%Y-%m-%dT%H:00Z}"]
    command = ["ledger", "export", "--database-url", stack.dsn, *times]
    for name in ("bill.csv", "bill.parquet"):
        assert main([*command, "--output", str(tmp_path / name)]) == 0
    told = capsys.readouterr()
    assert "is not over: more may come into it" in told.err
    assert "\x1b" not in told.err  # a bar is for somebody who looks on
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bill.csv", "bill.parquet"]
    rows = read(tmp_path / "bill.csv")
    total = stack.query("SELECT sum(amount_pico)::text AS amount FROM ledger.usage_line")[0]["amount"]
    assert sum(Decimal(row["BilledCost"]) for row in rows) == Decimal(total).scaleb(-12)
    table = pyarrow.parquet.read_table(tmp_path / "bill.parquet")
    assert sum(table.column("BilledCost").to_pylist()) == Decimal(total).scaleb(-12)
    own = [*command, "--project", f"{project.namespace}:{project.project_id}", "--output", str(tmp_path / "own.csv")]
    assert main(own) == 0
    rows = read(tmp_path / "own.csv")
    assert sum(Decimal(row["BilledCost"]) for row in rows) == books(project)
    capsys.readouterr()
    for wrong in (["--output", str(tmp_path / "bill.txt")], ["--project", "x"], ["--from", "2026-01-01T00:30Z"]):
        assert main([*command, *wrong]) == 2
        assert "behest: " in capsys.readouterr().err
    nobody = ["ledger", "export", "--database-url", "postgresql://behest@127.0.0.1:1/behest?sslmode=disable", *times]
    assert main([*nobody, "--output", str(tmp_path / "lost.csv")]) == 2
    assert not [path for path in tmp_path.iterdir() if "lost" in path.name]
