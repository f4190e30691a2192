"""A real sidecar pushes to a real OTLP receiver: the spans hang together, the metrics say what the ledger says."""

import asyncio
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from behest_ledger.telemetry.names import ATTRIBUTES
from conftest import Server, execute, own_database
from stack import BEHEST, Project, Stack, process, running_stack, wait_until
from telemetry.receiver import Received, grpc_receiver, http_receiver, points, values

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
QUESTION = [{"role": "user", "content": "Tell me a story."}]
ONE_BUDGET = (
    "INSERT INTO ledger.budget (tenant_id, budget_id, namespace, name, scope, per, unit, limit_amount, period,"
    " alignment, time_zone, enforcement) VALUES ('acme', 'demo/money', 'demo', 'money', '{}', '{}', 'usd',"
    " 2500000000000, 'month', 'calendar', 'UTC', 'hard')"
)
FAST = {"OTEL_METRIC_EXPORT_INTERVAL": "200", "OTEL_BSP_SCHEDULE_DELAY": "100", "BEHEST_LOG_FORMAT": "json"}


@contextmanager
def stack_of(template: Server, folder: Path, received: Received, name: str, **more: str) -> Generator[Stack]:
    settings: Any = {"OTEL_EXPORTER_OTLP_ENDPOINT": received.endpoint, **FAST, **more}
    with own_database(template, name) as dsn, running_stack(dsn, folder, **settings) as stack:
        yield stack


@pytest.fixture(scope="module")
def told(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Received]]:
    with (
        http_receiver() as received,
        stack_of(
            template,
            tmp_path_factory.mktemp("otlp"),
            received,
            "otlp",
            OTEL_SERVICE_NAME="our-gateway",
            OTEL_RESOURCE_ATTRIBUTES="deployment.environment=test",
            OTEL_EXPORTER_OTLP_HEADERS="api-key=k1",
        ) as stack,
    ):
        yield stack, received


def ask(project: Project, *, headers: dict[str, str] | None = None, session: str = "s1", **body: Any) -> httpx.Response:
    return httpx.post(
        project.stack.base_url + "/v1/chat/completions",
        headers={"Authorization": f"Bearer {project.mint(user='ann', session=session)}", **(headers or {})},
        json={"model": "gpt-4o-mini", "messages": QUESTION, "sim": {"output_tokens": 5}, **body},
        timeout=30,
    )


def spans_of(received: Received, trace: str, *, number: int = 2) -> dict[str, Any]:
    """The spans of a trace by name, once they are all there."""

    def found() -> dict[str, Any] | None:
        spans = {span.name: span for span in received.spans if span.trace_id.hex() == trace}
        return spans if len(spans) == number else None

    spans: dict[str, Any] = wait_until(found, what=f"{number} spans of the trace {trace}")
    return spans


def test_a_request_is_a_server_span_and_the_call_to_the_provider_a_client_span_below(
    told: tuple[Stack, Received],
) -> None:
    stack, received = told
    project = stack.project(project="  attribution: {team: search, costCenter: cc-7}")
    answer = ask(project, stream=True, headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=a:1"})
    assert answer.headers["x-trace-id"] == TRACE
    spans = spans_of(received, TRACE)
    server, client = spans["POST /v1/chat/completions"], spans["chat gpt-4o-mini"]
    assert (server.kind, client.kind) == (2, 3), "SERVER and CLIENT"
    assert (server.parent_span_id.hex(), client.parent_span_id) == (PARENT, server.span_id)
    assert server.trace_state == client.trace_state == "vendor=a:1"
    assert server.start_time_unix_nano <= client.start_time_unix_nano <= client.end_time_unix_nano
    assert client.end_time_unix_nano - server.start_time_unix_nano < 30e9
    (row,) = project.settled()
    found = values(client.attributes)
    assert found["gen_ai.usage.input_tokens"] == row["input_tokens"]
    assert found["gen_ai.usage.output_tokens"] == row["output_tokens"] == 5
    assert found["gen_ai.response.finish_reasons"] == ["stop"]
    assert found["gen_ai.response.model"] == found["gen_ai.request.model"] == "gpt-4o-mini"
    assert 0 < found["gen_ai.response.time_to_first_chunk"] < 30
    assert (found["gen_ai.conversation.id"], found["enduser.id"]) == ("s1", "ann")
    assert (found["behest.request_id"], found["behest.outcome"]) == (row["request_id"], "completed")
    assert (found["server.address"], found["gen_ai.request.stream"]) == ("127.0.0.1", True)
    shown = values(server.attributes)
    assert (shown["http.response.status_code"], shown["http.route"]) == (200, "/v1/chat/completions")
    assert row["facts"]["trace_id"] == TRACE


def test_the_provider_gets_the_trace_and_no_baggage(told: tuple[Stack, Received]) -> None:
    stack, received = told
    answer = ask(
        stack.project(),
        headers={"traceparent": f"00-{TRACE[::-1]}-{PARENT}-01", "baggage": "account=secret", "tracestate": "v=1"},
    )
    spans = spans_of(received, TRACE[::-1])
    seen = stack.sim_request(answer.headers["x-request-id"])
    assert seen is not None
    headers = {name.lower(): value for name, value in seen["headers"].items()}
    assert headers["traceparent"] == f"00-{TRACE[::-1]}-{spans['chat gpt-4o-mini'].span_id.hex()}-01"
    assert headers["tracestate"] == "v=1"
    assert "baggage" not in headers


def test_a_trace_that_the_caller_does_not_tell_of_is_not_told_of_here_either(told: tuple[Stack, Received]) -> None:
    stack, received = told
    project, silent = stack.project(), "ab" * 16
    answer = ask(project, headers={"traceparent": f"00-{silent}-{PARENT}-00"})
    loud = ask(project).headers["x-trace-id"]
    spans_of(received, loud)  # it came later, so the other would be here
    assert answer.headers["x-trace-id"] == silent
    assert not [span for span in received.spans if span.trace_id.hex() == silent]


def test_a_refused_request_and_one_with_a_false_token_have_their_span_too(told: tuple[Stack, Received]) -> None:
    stack, received = told
    refused = ask(stack.project(limit_usd="0.0000001"))
    assert refused.status_code == 402
    (span,) = spans_of(received, refused.headers["x-trace-id"], number=1).values()
    assert values(span.attributes)["http.response.status_code"] == 402
    false = httpx.get(stack.base_url + "/v1/models", headers={"Authorization": "Bearer a.b.c"})
    (span,) = spans_of(received, false.headers["x-trace-id"], number=1).values()
    assert (span.name, values(span.attributes)["http.response.status_code"]) == ("GET /v1/models", 401)


def test_metrics_say_what_the_ledger_says(told: tuple[Stack, Received]) -> None:
    stack, received = told
    project = stack.project(project="  attribution: {team: ads, costCenter: cc-9}")
    for number in range(6):
        assert ask(project, stream=number % 2 == 0, session=f"s{number}").status_code == 200
    rows = project.settled(number=6)

    def of_project(name: str) -> list[Any]:
        metric = received.metrics().get(name)
        found = [] if metric is None else points(metric)
        return [point for point in found if values(point.attributes).get("behest.project") == project.project_id]

    wait_until(
        lambda: sum(point.as_int or point.as_double for point in of_project("behest.stream.outcomes")) == 6,
        what="all requests in the metrics",
    )
    (cost,) = of_project("behest.cost")
    assert cost.as_double == pytest.approx(sum(row["amount_pico"] for row in rows) / 1e12, rel=1e-12)
    assert values(cost.attributes) == {
        "behest.project": project.project_id, "behest.namespace": project.namespace, "behest.team": "ads",
        "behest.cost_center": "cc-9", "gen_ai.provider.name": "provider", "gen_ai.request.model": "gpt-4o-mini",
        "behest.outcome": "completed",
    }  # fmt: skip
    (inputs,) = of_project("gen_ai.client.inference.usage.input_tokens")
    assert inputs.as_int == sum(row["input_tokens"] for row in rows)
    usage = {values(point.attributes)["gen_ai.token.type"]: point for point in of_project("gen_ai.client.token.usage")}
    assert (usage["output"].count, usage["output"].sum) == (6, sum(row["output_tokens"] for row in rows))
    (duration,), (first,) = (
        of_project("gen_ai.client.operation.duration"),
        of_project("gen_ai.client.operation.time_to_first_chunk"),
    )
    assert (duration.count, first.count) == (6, 3), "only streams have a first chunk"
    assert len(duration.bucket_counts) == len(duration.explicit_bounds) + 1 == 15
    (exemplar,) = duration.exemplars
    assert exemplar.trace_id.hex() in {row["facts"]["trace_id"] for row in rows}
    assert exemplar.span_id == spans_of(received, exemplar.trace_id.hex())["chat gpt-4o-mini"].span_id
    for metric in received.metrics().values():
        for point in points(metric):
            assert set(values(point.attributes)) <= set(ATTRIBUTES), metric.name


def test_the_receiver_is_told_who_speaks(told: tuple[Stack, Received]) -> None:
    stack, received = told
    spans_of(received, ask(stack.project()).headers["x-trace-id"])
    for resource in received.resources():
        assert (resource["service.name"], resource["deployment.environment"]) == ("our-gateway", "test")
        assert resource["service.version"]
    assert {headers.get("api-key") for headers in received.headers} == {"k1"}


def test_the_same_by_grpc(template: Server, tmp_path: Path) -> None:
    with (
        grpc_receiver() as received,
        stack_of(template, tmp_path, received, "grpc", OTEL_EXPORTER_OTLP_PROTOCOL="grpc") as stack,
    ):
        project = stack.project()
        spans_of(received, ask(project, stream=True).headers["x-trace-id"])
        metrics = wait_until(lambda: (found := received.metrics()) and "behest.cost" in found and found, what="metrics")
        (row,) = project.settled()
        (cost,) = points(metrics["behest.cost"])
        assert cost.as_double == pytest.approx(row["amount_pico"] / 1e12)


def test_a_collector_that_is_away_holds_nobody_up_and_the_sidecar_ends_in_time(
    template: Server, tmp_path: Path
) -> None:
    with stack_of(template, tmp_path, Received("http://127.0.0.1:9"), "away") as stack:
        assert ask(stack.project()).status_code == 200
        stack.sidecar.terminate()
        assert stack.sidecar.wait(25) == 0


def test_what_is_left_at_the_end_is_told(template: Server, tmp_path: Path) -> None:
    with (
        http_receiver() as received,
        stack_of(
            template, tmp_path, received, "last", OTEL_METRIC_EXPORT_INTERVAL="600000", OTEL_BSP_SCHEDULE_DELAY="600000"
        ) as stack,
    ):
        trace = ask(stack.project()).headers["x-trace-id"]
        stack.sidecar.terminate()
        assert stack.sidecar.wait(60) == 0
        spans_of(received, trace)
        assert "behest.cost" in received.metrics()


def test_a_keeper_pushes_how_the_books_stand_under_a_name_of_its_own(template: Server, tmp_path: Path) -> None:
    with http_receiver() as received, own_database(template, "kept") as dsn:
        asyncio.run(execute(dsn, ONE_BUDGET))
        arguments = [*BEHEST, "ledger", "keep", "--interval", "0.1", "--database-url", dsn]
        environment = {**FAST, "OTEL_EXPORTER_OTLP_ENDPOINT": received.endpoint}
        with process(arguments, environment=environment, log=tmp_path / "keeper.log") as keeper:
            found = wait_until(lambda: received.metrics().get("behest.budget.limit"), what="a budget")
            keeper.terminate()
            assert keeper.wait(60) == 0
    (point,) = points(found)
    assert (values(point.attributes), point.as_double) == (
        {"behest.tenant": "acme", "behest.budget": "demo/money", "behest.unit": "usd"},
        2.5,
    )
    assert {one["service.name"] for one in received.resources()} == {"behest-keeper"}
    assert received.spans == []
