"""OpenTelemetry's own variables: which of them mean something here, and whether anything is pushed at all.

Nothing is pushed unless an endpoint is set: a sidecar beside every pod does not knock at `localhost:4318` because
nobody told it otherwise. The exporters read the rest of `OTEL_EXPORTER_OTLP_*` themselves.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

Protocol = Literal["http/protobuf", "grpc"]

VARIABLES: dict[str, str] = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "the collector, such as `http://collector:4318`; not set: nothing is pushed",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "for spans alone, with its path",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "for metrics alone, with its path",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "`http/protobuf` (default) or `grpc`, which needs the extra `otlp-grpc`",
    "OTEL_EXPORTER_OTLP_HEADERS": "sent along, such as `api-key=...`; as are `_TIMEOUT`, `_COMPRESSION`, `_CERTIFICATE`"
    " and the rest of `OTEL_EXPORTER_OTLP_*`, each also for `TRACES` and `METRICS` alone",
    "OTEL_TRACES_EXPORTER": "`otlp` (default) or `none`",
    "OTEL_METRICS_EXPORTER": "`otlp` (default), or `none`; `/metrics` is there in any case",
    "OTEL_METRIC_EXPORT_INTERVAL": "milliseconds between two pushes of metrics (default: 60000)",
    "OTEL_TRACES_SAMPLER": "which traces that begin here are told of (default: `parentbased_always_on`)",
    "OTEL_TRACES_SAMPLER_ARG": "its argument, such as `0.01` for `parentbased_traceidratio`",
    "OTEL_BSP_SCHEDULE_DELAY": "milliseconds between two pushes of spans (default: 5000); as the rest of `OTEL_BSP_*`",
    "OTEL_SERVICE_NAME": "`service.name` (default: `behest`, or `behest-operator`, `behest-webhook`, `behest-keeper`)",
    "OTEL_RESOURCE_ATTRIBUTES": "what else describes this process, such as `k8s.pod.name=...`, with commas between",
    "OTEL_SDK_DISABLED": "`true`: nothing is pushed",
}

INTERVAL_MS = 60_000
_GRPC = "the extra `otlp-grpc` is not installed: pip install 'behest-sidecar[otlp-grpc]', or use http/protobuf"


class TelemetrySettingsError(ValueError):
    """A variable that cannot be followed; the message names it."""


class TelemetrySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is pushed, and how."""

    traces: Protocol | None = None
    """None: no spans."""
    metrics: Protocol | None = None
    """None: metrics are not pushed."""
    interval_s: float = INTERVAL_MS / 1000


def telemetry_settings(environment: Mapping[str, str]) -> TelemetrySettings:
    """What the variables ask for. Raises `TelemetrySettingsError`."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return TelemetrySettings()
    interval = environment.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip() or str(INTERVAL_MS)
    if not interval.isdigit() or int(interval) < 100:
        raise TelemetrySettingsError(
            f"OTEL_METRIC_EXPORT_INTERVAL must be a number of milliseconds from 100, not {interval!r}"
        )
    return TelemetrySettings(
        traces=_protocol(environment, "TRACES"),
        metrics=_protocol(environment, "METRICS"),
        interval_s=int(interval) / 1000,
    )


def _protocol(environment: Mapping[str, str], signal: str) -> Protocol | None:
    exporter = environment.get(f"OTEL_{signal}_EXPORTER", "").strip() or "otlp"
    if exporter not in ("otlp", "none", "prometheus"):
        raise TelemetrySettingsError(f"OTEL_{signal}_EXPORTER must be otlp or none, not {exporter!r}")
    endpoints = (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if exporter != "otlp" or not any(environment.get(name, "").strip() for name in endpoints):
        return None
    name = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"
    if not environment.get(name, "").strip():
        name = "OTEL_EXPORTER_OTLP_PROTOCOL"
    asked = environment.get(name, "").strip() or "http/protobuf"
    if asked == "http/protobuf":
        return "http/protobuf"
    if asked != "grpc":
        raise TelemetrySettingsError(f"{name} must be http/protobuf or grpc, not {asked!r}")
    from importlib.util import find_spec

    if find_spec("grpc") is None:
        raise TelemetrySettingsError(f"{name}: {_GRPC}")
    return "grpc"
