"""A real Prometheus reads a real sidecar: it says what the ledger says, and 5,000 sessions make no series."""

import http.client
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from behest_ledger.telemetry.names import ATTRIBUTES, INSTRUMENTS
from conftest import Server, own_database
from finops.prometheus import Prometheus, program, prometheus
from stack import Project, Stack, running_stack, wait_until

SESSIONS, CLIENTS = 5000, 4
SERIES_MAX = 400
"""Of one project and one model: mostly buckets of histograms."""


@dataclass
class Watched:
    stack: Stack
    project: Project
    prometheus: Prometheus


@pytest.fixture(scope="module")
def watched(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A sidecar that served 5,000 users with a session each, and a Prometheus that looked on."""
    folder = tmp_path_factory.mktemp("finops")
    with (
        own_database(template, "finops") as dsn,
        running_stack(dsn, folder, BEHEST_LOG_LEVEL="warning") as stack,
        prometheus(folder, {"behest": [urlsplit(stack.admin_url).netloc]}) as running,
    ):
        project = stack.project(project="  attribution: {team: search, costCenter: cc-7}")
        with ThreadPoolExecutor(CLIENTS) as pool:
            done = list(pool.map(partial(serve, project), range(CLIENTS)))
        assert sum(done) == SESSIONS
        project.settled(number=SESSIONS)
        yield Watched(stack, project, running)


def serve(project: Project, first: int) -> int:
    """Ask once for each session of this client's share, over one connection."""
    connection = http.client.HTTPConnection(urlsplit(project.stack.base_url).netloc, timeout=60)

    def post(path: str, key: str, body: object) -> dict[str, object]:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        found: dict[str, object] = json.loads(text)
        return found

    body = {"messages": [{"role": "user", "content": "Hi"}], "sim": {"output_tokens": 3}}
    numbers = range(first, SESSIONS, CLIENTS)
    for number in numbers:
        who = {"user_id": f"user-{number}", "session_id": f"session-{number}"}
        post("/v1/chat/completions", str(post("/v1/auth/mint", project.api_key, who)["jwt"]), body)
    connection.close()
    return len(numbers)


def page(stack: Stack) -> str:
    return httpx.get(stack.admin_url + "/metrics").text


def test_no_metric_has_more_series_for_more_sessions(watched: Watched) -> None:
    text = page(watched.stack)
    series = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(series) <= SERIES_MAX
    labels = {label.split("=")[0] for line in series if "{" in line for label in line.split("{")[1].split(",")}
    assert labels <= {name.replace(".", "_") for name in ATTRIBUTES} | {"le"}


def test_no_session_user_or_request_is_on_any_metric(watched: Watched) -> None:
    text = page(watched.stack)
    for number in (0, 1, SESSIONS // 2, SESSIONS - 1):
        assert f"session-{number}" not in text
        assert f"user-{number}" not in text
    rows = watched.stack.query("SELECT request_id::text AS id FROM ledger.request LIMIT 100")
    assert not [row for row in rows if row["id"] in text]


def test_what_prometheus_added_up_is_what_the_ledger_added_up(watched: Watched) -> None:
    (sums,) = watched.stack.query(
        "SELECT count(*)::int AS requests, sum(amount_pico)::text AS pico, sum(input_tokens)::int AS input,"
        " sum(output_tokens)::int AS output FROM ledger.request_now"
    )
    of = {"behest_project": watched.project.project_id, "behest_team": "search", "behest_cost_center": "cc-7"}
    chosen = ",".join(f'{name}="{value}"' for name, value in of.items())
    asked = watched.prometheus.number
    wait_until(
        lambda: asked(f"sum(behest_stream_outcomes_total{{{chosen}}})") == SESSIONS, what="Prometheus's last look"
    )
    assert sums["requests"] == SESSIONS
    assert asked(f"sum(behest_cost_USD_total{{{chosen}}})") == pytest.approx(int(sums["pico"]) / 1e12, rel=1e-12)
    assert asked("sum(gen_ai_client_inference_usage_input_tokens_total)") == sums["input"]
    assert asked("sum(gen_ai_client_inference_usage_output_tokens_total)") == sums["output"]
    assert asked('sum(gen_ai_client_token_usage_sum{gen_ai_token_type="output"})') == sums["output"]
    assert asked("sum(gen_ai_client_operation_duration_seconds_count)") == SESSIONS
    assert asked('sum(behest_overhead_seconds_bucket{le="+Inf"})') == SESSIONS


def test_prometheus_knows_every_metric_by_its_name_and_kind(watched: Watched) -> None:
    found = watched.prometheus.metadata()
    for item in INSTRUMENTS:
        if item.teller == "sidecar":
            assert found[item.series_name] == item.kind, item.name


def test_the_page_is_well_formed(watched: Watched) -> None:
    text = page(watched.stack)
    ran = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False, timeout=60
    )
    # Names are OpenTelemetry's, and `behest_cost_USD_total` has its unit as UCUM writes it; nothing else is found.
    found = [line for line in ran.stderr.splitlines() if "behest_cost_USD" not in line and "released_USD" not in line]
    assert (ran.returncode in (0, 3), found) == (True, []), ran.stderr
    assert {family.name for family in text_string_to_metric_families(text)} >= {
        "behest_cost_USD",
        "behest_overhead_seconds",
    }
