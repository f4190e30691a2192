"""The names: the table is current, no metric names anybody, and Prometheus's names are OpenTelemetry's."""

import re

import pytest

from behest_ledger.telemetry.names import ATTRIBUTES, ATTRIBUTION, COST, DURATION, INSTRUMENTS, JOURNAL_LAG
from behest_ledger.telemetry.settings import TelemetrySettings, TelemetrySettingsError, telemetry_settings
from behest_proxy.app.telemetry import Telemetry
from telemetry.tables import PAGE, with_tables

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


def test_the_tables_of_the_page_are_those_that_are_made() -> None:
    shown = PAGE.read_text()
    assert with_tables(shown) == shown, "run: PYTHONPATH=tests .venv/bin/python -m telemetry.tables"


def test_no_metric_has_an_attribute_that_somebody_could_be_found_by() -> None:
    assert {name for item in INSTRUMENTS for name in item.attributes} == set(ATTRIBUTES)
    assert not [name for name in ATTRIBUTES if re.search("user|session|thread|request_id|conversation|trace", name)]
    assert set(ATTRIBUTION) <= set(COST.attributes)


def test_a_name_is_there_once_and_buckets_ascend() -> None:
    assert (
        len({item.name for item in INSTRUMENTS}) == len({item.series_name for item in INSTRUMENTS}) == len(INSTRUMENTS)
    )
    for item in INSTRUMENTS:
        assert bool(item.bounds) == (item.kind == "histogram"), item.name
        assert list(item.bounds) == sorted(set(item.bounds)), item.name


def test_prometheus_names_have_their_unit_and_kind() -> None:
    assert COST.series_name == "behest_cost_USD_total"
    assert DURATION.series_name == "gen_ai_client_operation_duration_seconds"
    assert JOURNAL_LAG.series_name == "behest_ledger_journal_lag_seconds"


def test_nothing_is_pushed_without_an_endpoint_or_where_it_is_switched_off() -> None:
    assert telemetry_settings({}) == TelemetrySettings()
    assert telemetry_settings({**ENDPOINT, "OTEL_SDK_DISABLED": "True"}) == TelemetrySettings()
    found = telemetry_settings({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none", "OTEL_METRIC_EXPORT_INTERVAL": "500"})
    assert found == TelemetrySettings(traces=None, metrics="http/protobuf", interval_s=0.5)


def test_each_signal_may_go_elsewhere_by_a_protocol_of_its_own() -> None:
    found = telemetry_settings(
        {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        }
    )
    assert (found.traces, found.metrics) == ("grpc", None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "1 s"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
    ],
)
def test_what_cannot_be_followed_is_named(name: str, value: str) -> None:
    with pytest.raises(TelemetrySettingsError, match=name):
        telemetry_settings({**ENDPOINT, name: value})


def test_a_span_is_told_the_route_of_its_path_and_never_the_path() -> None:
    telemetry = Telemetry(TelemetrySettings(), name="test")
    telemetry.know_routes(["/v1/models", "/v1/threads/{rest:path}", "/v1/of/{one}"])
    routes = {
        "/v1/models": "/v1/models",
        "/v1/threads/t1": "/v1/threads/{rest:path}",
        "/v1/threads/t1/messages": "/v1/threads/{rest:path}",
        "/v1/of/x": "/v1/of/{one}",
        "/v1/of/x/y": "",
        "/v1/modelsx": "",
    }
    assert {path: telemetry.route_of(path) for path in routes} == routes
