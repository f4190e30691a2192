"""Every query of the dashboards is asked of a real Prometheus and a real ledger, and says what the ledger says."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from behest_ledger.store.pool import connect
from conftest import Server
from finops.traffic import GRANTS, LOGIN, MODELS, RECONCILED, REVIEWED, TEAMS, Seen, traffic

PAGE = Path(__file__).resolve().parents[2] / "docs" / "telemetry.md"
FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "behest" / "dashboards"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
TARGETS = {
    f"{board}: {panel['title']} {target['refId']}": target
    for board, content in BOARDS.items()
    for panel in content["panels"]
    for target in panel["targets"]
}
Rows = list[dict[str, Any]]
SINCE = " FROM ledger.request_now WHERE ended_at > {since}"
ALL = " FROM ledger.request_now"


@pytest.fixture(scope="module")
def seen(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    with traffic(template, tmp_path_factory.mktemp("dashboards")) as found:
        yield found


def asked(seen: Seen, name: str) -> Rows:
    """What Grafana would show: the rows of a query of either kind. Of Prometheus: labels, and `value`."""
    target = TARGETS[name]
    if "expr" in target:
        window = seen.window()
        expression = target["expr"].replace("$__rate_interval", window).replace("$__range", window)
        expression = expression.replace("$project", ".*")
        assert "$" not in expression, f"a variable that is not filled in: {expression}"
        return [{**labels, "value": value} for labels, value in seen.prometheus.query(expression)]
    begin, end = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(minutes=1)
    sql = re.sub(
        r"\$__timeFilter\((\w+)\)", rf"\1 BETWEEN '{begin.isoformat()}' AND '{end.isoformat()}'", target["rawSql"]
    )
    sql = re.sub(r"\$__timeGroup\((\w+), '1h'\)", r"floor(extract(epoch FROM \1) / 3600) * 3600", sql)
    sql = sql.replace("${project:pipe}", ".*")
    assert not re.search(r"\$[_{a-z]", sql), f"a variable that is not filled in: {sql}"

    async def fetch() -> Rows:
        connection = await connect(seen.reader_dsn)
        try:
            return [dict(row) for row in await connection.fetch(sql)]
        finally:
            await connection.close()

    return asyncio.run(fetch())


def by(rows: Rows, label: str, value: str = "value") -> dict[str, float]:
    return {row.get(label, ""): row[value] for row in rows}


def grouped(seen: Seen, key: str, value: str, where: str = SINCE) -> dict[str, float]:
    sql = f"SELECT json_object_agg(k, v)::text FROM (SELECT {key} AS k, {value} AS v{where} GROUP BY 1) AS g"
    return {name: float(number) for name, number in json.loads(seen.ledger(sql)).items()}


def is_increase(seen: Seen, found: dict[str, float], expected: dict[str, float], scale: float = 1.0) -> None:
    """The same keys, and each value what came; never less, and no more than Prometheus adds at the window's ends."""
    expected = {name: number for name, number in expected.items() if number}
    assert {name for name, number in found.items() if number} == set(expected)
    for name, number in expected.items():
        assert number * (1 - 1e-9) <= found[name] * scale <= number * seen.told_too_much(), name


def seconds(seen: Seen) -> float:
    return float(seen.window().removesuffix("ms")) / 1000


USD = "sum(amount_pico) / 1e12"
PROVIDER_FAILED = "outcome IN ('upstream_error', 'upstream_timeout')"


def number_is(sql: str, value: str) -> Callable[[Seen, Rows], None]:
    def check(seen: Seen, rows: Rows) -> None:
        assert [row[value] for row in rows] == [pytest.approx(float(seen.ledger(sql)), rel=1e-12)]

    return check


def rate_is(label: str, key: str, value: str, *, per_s: float = 1.0) -> Callable[[Seen, Rows], None]:
    def check(seen: Seen, rows: Rows) -> None:
        is_increase(seen, by(rows, label), grouped(seen, key, value), seconds(seen) / per_s)

    return check


def sums_are(label: str, key: str, column: str, value: str) -> Callable[[Seen, Rows], None]:
    def check(seen: Seen, rows: Rows) -> None:
        assert by(rows, label, column) == pytest.approx(grouped(seen, key, value, ALL), rel=1e-12)

    return check


def within(low: float, high: float, *keys: str, label: str = "") -> Callable[[Seen, Rows], None]:
    """Times: there is one for each key, and it can be true."""

    def check(_: Seen, rows: Rows) -> None:
        found = by(rows, label)
        assert set(keys or ("",)) <= set(found), found
        assert all(low < number <= high for number in found.values()), found

    return check


def saved(seen: Seen, rows: Rows) -> None:
    ((value,),) = [[row["value"] for row in rows]]
    assert 0 < value < 1, "what a stream of 500 tokens and their margin would have cost more, five times"


def budgets(seen: Seen, rows: Rows) -> None:
    usd = [row for row in rows if row["unit"] == "usd"]
    assert sum(row["spent"] for row in usd) == pytest.approx(float(seen.ledger(f"SELECT {USD}{ALL}")), rel=1e-12)
    (long,) = [row for row in usd if "long" in row["subject"]]
    assert 0 < long["held"] <= 0.9, "for the request that runs"
    for row in usd:
        assert row["remaining"] == pytest.approx(row["limit"] - row["spent"] - row["held"])
        limit = 0.0000001 if row["budget"].endswith("/poor") else 0.9
        assert (row["limit"], row["forecast"] >= row["spent"]) == (limit, True)


def by_project(seen: Seen, rows: Rows) -> None:
    of = {project.project_id: (team, TEAMS[team]) for team, project in seen.projects.items()}
    assert {row["project"]: (row["team"], row["cost_center"]) for row in rows} == of
    assert by(rows, "project", "usd") == pytest.approx(grouped(seen, "project_id", USD, ALL), rel=1e-12)


def sessions(seen: Seen, rows: Rows) -> None:
    assert sum(row["usd"] for row in rows) == pytest.approx(float(seen.ledger(f"SELECT {USD}{ALL}")), rel=1e-12)
    assert [row["usd"] for row in rows] == sorted((row["usd"] for row in rows), reverse=True)
    assert {row["session"] for row in rows} == {"first", "session-ads", "session-search"}


def hours(seen: Seen, rows: Rows) -> None:
    for model, usd in grouped(seen, "model", USD, ALL).items():
        assert sum(row["usd"] for row in rows if row["metric"] == model) == pytest.approx(usd, rel=1e-12)


def models(seen: Seen, rows: Rows) -> None:
    sums_are("model", "model", "usd", USD)(seen, rows)
    sums_are("model", "model", "input_tokens", "sum(input_tokens)")(seen, rows)
    sums_are("model", "model", "output_tokens", "sum(output_tokens)")(seen, rows)
    for row in rows:
        assert row["usd_of_1000_tokens"] == pytest.approx(
            1000 * row["usd"] / (row["input_tokens"] + row["output_tokens"])
        )


def failing(seen: Seen, rows: Rows) -> None:
    share = seen.ledger(f"SELECT (count(*) FILTER (WHERE {PROVIDER_FAILED}))::float8 / count(*){SINCE}")
    ((name, found),) = by(rows, "gen_ai_provider_name").items()
    assert name == "provider"
    # Either count is carried on to the window's ends by itself.
    assert share / seen.told_too_much() <= found <= share * seen.told_too_much()


def refused(seen: Seen, rows: Rows) -> None:
    is_increase(seen, by(rows, "behest_reason"), {"quota": 2 + 3}, seconds(seen))


def value_is(number: float) -> Callable[[Seen, Rows], None]:
    def check(_: Seen, rows: Rows) -> None:
        assert [row["value"] for row in rows] == [number]

    return check


def of_windows(seen: Seen, value: str) -> dict[str, float]:
    """A value of each Budget's current windows, by its name; amounts are in whatever it counts."""
    of = "FROM ledger.budget_window WHERE ends_at > now() AND starts_at <= now()"
    sql = f"SELECT json_object_agg(k, v)::text FROM (SELECT budget_id AS k, {value} AS v {of} GROUP BY 1) AS g"
    return {name: float(number) for name, number in json.loads(seen.ledger(sql)).items()}


def budgets_are(value: str, tolerance: float = 1e-9) -> Callable[[Seen, Rows], None]:
    def check(seen: Seen, rows: Rows) -> None:
        found = by(rows, "behest_budget")
        expected = of_windows(seen, value)
        assert {name.partition("/")[2] for name in expected} == {"sessions", "poor", "hourly"}
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=tolerance)

    return check


def burning(seen: Seen, rows: Rows) -> None:
    """Of windows of an hour the last hour is all: what is spent of the limit. Of a day's, 24 times that at most."""
    found = by(rows, "behest_budget")
    expected = of_windows(seen, "sum(spent) / sum(limit_amount)")
    for name, share in expected.items():
        if name.endswith("/hourly"):
            assert found[name] == pytest.approx(share, rel=1e-9)


def one_round_a_time(_: Seen, rows: Rows) -> None:
    ((result, number),) = by(rows, "behest_result").items()
    assert (result, 0.1 < number < 6) == ("worked", True), "every 0.2 s, if the machine has the time"


def came(label: str, value: str, number: int) -> Callable[[Seen, Rows], None]:
    def check(seen: Seen, rows: Rows) -> None:
        is_increase(seen, by(rows, label), {value: number}, seconds(seen))

    return check


MODEL = {"label": "gen_ai_request_model"}
CHECKS: dict[str, Callable[[Seen, Rows], None]] = {
    "finops: Spent A": number_is(f"SELECT {USD}{ALL}", "usd"),
    "finops: Tokens A": number_is(f"SELECT sum(input_tokens + output_tokens){ALL}", "tokens"),
    "finops: Cost of 1,000 tokens A": number_is(
        f"SELECT sum(amount_pico) / 1e9 / sum(input_tokens + output_tokens){ALL}", "usd"
    ),
    "finops: Saved by leaving A": saved,
    "finops: Spend an hour, by project A": rate_is("behest_project", "project_id", USD, per_s=3600),
    "finops: Spend an hour, by team A": rate_is("behest_team", "attributes ->> 'team'", USD, per_s=3600),
    "finops: Spend of each hour, by model A": hours,
    "finops: Projects, teams, cost centres A": by_project,
    "finops: Models A": models,
    "finops: Top sessions A": sessions,
    "finops: Budgets A": budgets,
    "finops: Used of each Budget A": budgets_are("sum(spent) / sum(limit_amount)"),
    "finops: Used of each Budget B": budgets_are("sum(spent + held) / sum(limit_amount)"),
    "finops: Forecast for the end of their windows A": budgets_are(
        "sum(spent) / sum(limit_amount) / greatest(0.01, 1 - extract(epoch FROM max(ends_at) - now())"
        " / extract(epoch FROM max(ends_at - starts_at)))",
        tolerance=0.01,
    ),
    "finops: Burn rate of Budgets A": burning,
    "finops: Subjects that can spend no more A": budgets_are(
        "count(*) FILTER (WHERE limit_amount - spent - held < limit_amount / 1000)"
    ),
    "operations: Running now A": value_is(1),
    "operations: Wait for the ledger A": value_is(0),
    "operations: Oldest of them A": value_is(0),
    "operations: Overruns A": value_is(0),
    "operations: Requests a second, by outcome A": rate_is("behest_outcome", "outcome", "count(*)"),
    "operations: Refused a second, by reason A": refused,
    "operations: Failing of a provider A": failing,
    "operations: Time added to the first byte A": within(0, 5),
    "operations: Time added to the first byte B": within(0, 5),
    "operations: To the first chunk, by model A": within(0, 10, *MODELS, **MODEL),
    "operations: To the end, by model A": within(0, 81.92, *MODELS, **MODEL),
    "operations: Tokens a second, by model A": rate_is("gen_ai_request_model", "model", "sum(output_tokens)"),
    "operations: From a client's leaving to the provider's cancel A": within(0, 1),
    "operations: Admission A": within(0, 5),
    "operations: Admission B": within(0, 5),
    "operations: Calls to the ledger A": within(0, 5, "admit", "settle", label="behest_ledger_operation"),
    "operations: Items in a call to the ledger A": within(
        0.999, 200, "admit", "settle", label="behest_ledger_operation"
    ),
    "operations: Rounds of the keeper a second A": one_round_a_time,
    "operations: Lag of the books A": within(-1, 90),
    "operations: Lag of the books B": value_is(0),
    "operations: Sidecars and what they left A": value_is(1),
    "operations: Sidecars and what they left B": value_is(0),
    "operations: Resources into the ledger a second A": came("behest_kind", "Budget", RECONCILED),
    "operations: Pods looked at a second A": came("behest_result", "injected", REVIEWED),
    "operations: Answer of the webhook A": within(0, 5),
    "operations: Left of the webhook's certificate A": within(80 * 86400, 90 * 86400),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_query_says_what_the_ledger_says(seen: Seen, name: str) -> None:
    rows = asked(seen, name)
    assert rows, "there is nothing to see"
    CHECKS[name](seen, rows)


def test_the_page_says_what_grafanas_login_needs() -> None:
    shown = re.sub(r"\s+", " ", PAGE.read_text())
    for statement in GRANTS:
        assert statement.replace(LOGIN, "grafana").replace("of-grafana", "...") in shown


def test_every_query_is_checked() -> None:
    assert set(CHECKS) == set(TARGETS)
