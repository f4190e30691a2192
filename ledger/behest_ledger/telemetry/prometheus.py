"""Metrics as Prometheus reads them, with the names that OpenTelemetry's specification translates ours to.

So a query works whichever way they came: pulled from `/metrics`, or pushed by OTLP to a collector or to Prometheus.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from behest_ledger.telemetry.meter import Counter, Histogram, Meter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class _OfMeter(Collector):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def collect(self) -> Iterable[_Family]:
        for source in self._meter.instruments:
            instrument = source.instrument
            name, description = instrument.prometheus_name, instrument.description
            labels = [attribute.replace(".", "_") for attribute in instrument.attributes]
            if isinstance(source, Histogram):
                histogram = HistogramMetricFamily(name, description, labels=labels)
                for key, found in list(source.series.items()):
                    count, buckets = 0, []
                    for bound, number in zip((*instrument.bounds, "+Inf"), list(found.buckets), strict=True):
                        count += number
                        buckets.append((str(bound), count))
                    histogram.add_metric(key, buckets, sum_value=found.total)
                yield histogram
            elif isinstance(source, Counter):
                counter = CounterMetricFamily(name, description, labels=labels)
                for key, number in list(source.series.items()):
                    counter.add_metric(key, number / instrument.scale)
                yield counter
            else:
                gauge = GaugeMetricFamily(name, description, labels=labels)
                for key, value in source.series.items():
                    gauge.add_metric(key, value)
                yield gauge


def registry_of(meter: Meter) -> CollectorRegistry:
    """A registry with what the meter counts."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_OfMeter(meter))
    return registry


def page(meter: Meter) -> bytes:
    """What `/metrics` answers, of the type `CONTENT_TYPE`."""
    return bytes(generate_latest(registry_of(meter)))


def serve_metrics(meter: Meter, bind: str) -> Callable[[], None]:
    """Answer GET from a thread of its own, for processes that serve nothing else; what is returned ends it.

    Raises OSError where nobody can listen at `bind` (`host:port`).
    """
    host, _, port = bind.rpartition(":")
    server, thread = start_http_server(int(port), addr=host.strip("[]") or "0.0.0.0", registry=registry_of(meter))  # noqa: S104

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end
