"""Pushing to a collector: metrics at intervals, spans in batches, both from threads that nobody waits for.

What is pushed is cumulative, whatever `OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE` says. A collector that is
away costs what would have been told, and nothing else: what waits is bounded.
"""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import cast

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.resources import SERVICE_NAME as SERVICE_NAME_KEY
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from behest_ledger.telemetry.meter import Counter, Histogram, Key, Meter
from behest_ledger.telemetry.names import SCOPE, SERVICE_NAME, Instrument
from behest_ledger.telemetry.settings import Protocol, TelemetrySettings
from behest_ledger.telemetry.span_encoding import EndedSpan, SpanEncoder

STOP_S = 3.0
"""The last push may take so long."""
_CUMULATIVE = AggregationTemporality.CUMULATIVE


class _OneResource(Resource):
    """A resource that knows its hash: the exporters ask for it with every span, and it is made of all attributes."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def resource(more: Mapping[str, str], service_name: str = SERVICE_NAME) -> Resource:
    """What describes this process: `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME` go before what is said here."""
    made = Resource.create()
    missing = {key: value for key, value in more.items() if value and key not in made.attributes}
    if str(made.attributes.get(SERVICE_NAME_KEY, "")).startswith("unknown_service"):
        missing[SERVICE_NAME_KEY] = service_name
    return _OneResource({**made.attributes, **missing}, made.schema_url)


def metrics_data(meter: Meter, described: Resource, scope: InstrumentationScope, *, now_ns: int) -> MetricsData:
    """Everything that the meter has counted since it began."""
    metrics: list[Metric] = []
    for source in meter.instruments:
        instrument = source.instrument
        data: Sum | Gauge | HistogramData
        if isinstance(source, Counter):
            points = _numbers(instrument, source.series, meter.started_ns, now_ns)
            data = Sum(data_points=points, aggregation_temporality=_CUMULATIVE, is_monotonic=True)
        elif isinstance(source, Histogram):
            data = HistogramData(
                data_points=_distributions(source, meter.started_ns, now_ns), aggregation_temporality=_CUMULATIVE
            )
        else:
            data = Gauge(data_points=_numbers(instrument, source.series, meter.started_ns, now_ns))
        if data.data_points:
            metrics.append(
                Metric(name=instrument.name, description=instrument.description, unit=instrument.unit, data=data)
            )
    scoped = ScopeMetrics(scope=scope, metrics=metrics, schema_url="")
    return MetricsData(resource_metrics=[ResourceMetrics(resource=described, scope_metrics=[scoped], schema_url="")])


def _attributes(instrument: Instrument, key: Key) -> dict[str, str | int]:
    return {
        name: int(value) if name == "server.port" and value.isdigit() else value
        for name, value in zip(instrument.attributes, key, strict=True)
        if value
    }


def _numbers(
    instrument: Instrument, series: Mapping[Key, float], started_ns: int, now_ns: int
) -> list[NumberDataPoint]:
    return [
        NumberDataPoint(
            attributes=_attributes(instrument, key),
            start_time_unix_nano=started_ns,
            time_unix_nano=now_ns,
            value=value if instrument.scale == 1 else value / instrument.scale,
        )
        for key, value in series.items()
    ]


def _distributions(histogram: Histogram, started_ns: int, now_ns: int) -> list[HistogramDataPoint]:
    points: list[HistogramDataPoint] = []
    for key, found in histogram.series.items():
        exemplars: list[Exemplar] = []
        if found.exemplar is not None:
            value, time_ns, trace_id, span_id = found.exemplar
            exemplars.append(
                Exemplar(
                    filtered_attributes={}, value=value, time_unix_nano=time_ns, span_id=span_id, trace_id=trace_id
                )
            )
        points.append(
            HistogramDataPoint(
                attributes=_attributes(histogram.instrument, key),
                start_time_unix_nano=started_ns,
                time_unix_nano=now_ns,
                count=sum(found.buckets),
                sum=found.total,
                bucket_counts=list(found.buckets),
                explicit_bounds=histogram.instrument.bounds,
                min=found.least,
                max=found.greatest,
                exemplars=exemplars,
            )
        )
    return points


class Push:
    """What this process tells a collector: `span` takes spans, `run` pushes metrics."""

    def __init__(self, settings: TelemetrySettings, meter: Meter, described: Resource, version: str) -> None:
        self.resource = described
        self.scope = InstrumentationScope(SCOPE, version)
        self._meter = meter
        self._interval_s = settings.interval_s
        self._metrics = _metric_exporter(settings.metrics) if settings.metrics is not None else None
        self._spans: BatchSpanProcessor | None = None
        if settings.traces is not None:
            self._spans = BatchSpanProcessor(_Spans(_span_exporter(settings.traces), described, self.scope))
        self._pushing: threading.Thread | None = None

    @property
    def takes_spans(self) -> bool:
        """Whether anybody wants spans."""
        return self._spans is not None

    def span(self, span: EndedSpan) -> None:
        """A span that ended. Returns at once; what is too much is dropped."""
        if self._spans is not None:
            # It looks at nothing but whether the span is sampled.
            self._spans.on_end(cast("ReadableSpan", span))

    async def run(self) -> None:
        """Push metrics at intervals, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            self._push_metrics()

    def _push_metrics(self) -> None:
        """Look at the meter here, in its own thread, and send what is seen from another one."""
        if self._metrics is None or (self._pushing is not None and self._pushing.is_alive()):
            return  # a collector that is slow gets the next one
        seen = metrics_data(self._meter, self.resource, self.scope, now_ns=time.time_ns())
        self._pushing = threading.Thread(target=self._metrics.export, args=(seen,), name="metrics", daemon=True)
        self._pushing.start()

    async def aclose(self) -> None:
        """Tell the last, as far as it can be told in `STOP_S`."""
        threads: list[threading.Thread] = []
        if self._spans is not None:
            threads.append(threading.Thread(target=self._spans.shutdown, name="last spans", daemon=True))
            threads[-1].start()
        self._push_metrics()
        if self._pushing is not None:
            threads.append(self._pushing)
        deadline_s = time.monotonic() + STOP_S
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline_s:  # noqa: ASYNC110 - of threads
            await asyncio.sleep(0.02)
        if self._metrics is not None:
            with contextlib.suppress(Exception):  # whatever an exporter says at its end changes nothing
                self._metrics.shutdown()


def _metric_exporter(protocol: Protocol) -> MetricExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter()


def _span_exporter(protocol: Protocol) -> SpanExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


class _Spans(SpanExporter):
    """Gives our spans to an exporter of OpenTelemetry's, encoded by us where it lets us."""

    def __init__(self, exporter: SpanExporter, described: Resource, scope: InstrumentationScope) -> None:
        self._exporter = exporter
        self._described = described
        self._scope = scope
        self.encodes = _encode_by(exporter, SpanEncoder(described, scope))
        """Whether it does. If not, spans go to it in its own form: slower, and else the same."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See `SpanExporter`."""
        if self.encodes:
            return self._exporter.export(spans)
        ours = cast("Sequence[EndedSpan]", spans)
        return self._exporter.export([span.readable(self._described, self._scope) for span in ours])

    def shutdown(self) -> None:
        """See `SpanExporter`."""
        self._exporter.shutdown()


def _encode_by(exporter: SpanExporter, encoder: SpanEncoder) -> bool:
    """Put our encoder where the exporters of both protocols look up theirs: a name in their modules."""
    names = vars(sys.modules[type(exporter).__module__])
    if names.get("encode_spans") is not encode_spans and not isinstance(names.get("encode_spans"), SpanEncoder):
        return False
    names["encode_spans"] = encoder
    return True
