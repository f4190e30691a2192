"""An OTLP receiver, by HTTP and by gRPC, that keeps what it is sent."""

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

Attributes = dict[str, Any]


@dataclass
class Received:
    """What came, as plain values."""

    endpoint: str
    raw: list[bytes] = field(default_factory=list)
    """Everything, as it was on the wire."""
    headers: list[dict[str, str]] = field(default_factory=list)
    requests: list[ExportTraceServiceRequest | ExportMetricsServiceRequest] = field(default_factory=list)

    def take(self, request: ExportTraceServiceRequest | ExportMetricsServiceRequest, headers: dict[str, str]) -> None:
        self.raw.append(request.SerializeToString())
        self.headers.append(headers)
        self.requests.append(request)

    @property
    def spans(self) -> list[Any]:
        """All spans, in the order of their coming."""
        return [
            span
            for request in list(self.requests)
            if isinstance(request, ExportTraceServiceRequest)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def resources(self) -> list[Attributes]:
        """What the senders say of themselves."""
        return [
            values(resource.resource.attributes)
            for request in list(self.requests)
            for resource in (
                request.resource_spans if isinstance(request, ExportTraceServiceRequest) else request.resource_metrics
            )
        ]

    def metrics(self) -> dict[str, Any]:
        """The last state of each metric, by name."""
        return {
            metric.name: metric
            for request in list(self.requests)
            if isinstance(request, ExportMetricsServiceRequest)
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def values(attributes: Any) -> Attributes:
    """Attributes as a dictionary."""
    found: Attributes = {}
    for attribute in attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        found[attribute.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


def points(metric: Any) -> list[Any]:
    """The data points of a metric of whatever kind."""
    return list(getattr(metric, metric.WhichOneof("data")).data_points)


@contextmanager
def http_receiver() -> Generator[Received]:
    """A receiver by HTTP with protobuf bodies, on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path in ("/v1/traces", "/v1/metrics"), self.path
            request = ExportTraceServiceRequest() if self.path == "/v1/traces" else ExportMetricsServiceRequest()
            request.ParseFromString(body)
            received.take(request, {name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is its base's
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    received = Received(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextmanager
def grpc_receiver() -> Generator[Received]:
    """A receiver by gRPC, on a port of its own."""

    class Traces(TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            received.take(request, {item.key: str(item.value) for item in context.invocation_metadata()})
            return ExportTraceServiceResponse()

    class Metrics(MetricsServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            received.take(request, {item.key: str(item.value) for item in context.invocation_metadata()})
            return ExportMetricsServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    add_to_server: list[Any] = [add_TraceServiceServicer_to_server, add_MetricsServiceServicer_to_server]
    for add, servicer in zip(add_to_server, (Traces(), Metrics()), strict=True):
        add(servicer, server)
    received = Received(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    try:
        yield received
    finally:
        server.stop(0).wait(5)
