"""What telemetry costs a request: everything that is told of one, over and over, in this process alone.

The same calls that the border and the owner of a request make, with nothing between them. The medians of slices, so
that a machine that does something else for a moment does not count.
"""

import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any
from unittest.mock import patch
from uuid import UUID

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from behest_ledger.charging import Outcome
from behest_ledger.holds import Admission, Settlement
from behest_ledger.telemetry import logs, otlp
from behest_ledger.telemetry.settings import TelemetrySettings
from behest_ledger.telemetry.span_encoding import SpanEncoder
from behest_ledger.token_counts import TokenCounts
from behest_proxy.app.context import RequestContext
from behest_proxy.app.telemetry import Telemetry

SLICES = 40
REQUESTS = 500
_COUNTS = TokenCounts(input=40, output=200, cache_read=10, reasoning=30)
_SCOPE = {"method": "POST", "path": "/v1/chat/completions", "scheme": "http"}
_ATTRIBUTES = {
    "namespace": "shop",
    "project": "shop/app",
    "user": "user-123456",
    "session": "session-123456",
    "model": "gpt-4o-mini",
    "team": "search",
    "cost_center": "cc-7",
    "workload": "shop/web",
}


class _Nowhere(SpanExporter):
    """Makes of spans what a collector would get, as the exporters do in a thread of theirs, and drops it."""

    def __init__(self) -> None:
        self.encode: Callable[[Any], Any] = encode_spans

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.encode(spans).SerializeToString()
        return SpanExportResult.SUCCESS


def measure() -> Iterator[str]:
    """The lines of the table."""
    lines = logging.getLogger("behest_proxy.app.report")
    lines.setLevel(logging.WARNING)
    nothing, _ = _us(lambda: _context(b"00"))
    metrics, _ = _us(_request(Telemetry(TelemetrySettings(), name="bench"), sampled=False))
    yield f"telemetry: metrics                          {metrics - nothing:6.1f} us a request"
    telemetry, flush = _with_spans()
    spans, pushing = _us(_request(telemetry, sampled=True), flush)
    yield f"telemetry: metrics and both spans           {spans - nothing:6.1f} us, pushing thread {pushing:.1f} us"
    logs.configure("info", "json", io.StringIO())
    everything, pushing = _us(_request(telemetry, sampled=True), flush)
    yield f"telemetry: metrics, both spans and one line {everything - nothing:6.1f} us, pushing thread {pushing:.1f} us"
    yield "telemetry: nothing is called for a chunk"


def _with_spans() -> tuple[Telemetry, Callable[[], object]]:
    """Telemetry whose spans go nowhere, and how to wait for them."""
    processors: list[BatchSpanProcessor] = []
    nowhere = _Nowhere()

    def processor(_exporter: SpanExporter) -> BatchSpanProcessor:
        processors.append(BatchSpanProcessor(nowhere))
        return processors[0]

    with patch.object(otlp, "BatchSpanProcessor", processor):
        telemetry = Telemetry(TelemetrySettings(traces="http/protobuf"), name="bench")
    described = otlp.resource({"service.version": "1", "service.instance.id": "bench"})
    nowhere.encode = SpanEncoder(described, InstrumentationScope("behest", "1"))
    return telemetry, processors[0].force_flush


def _context(flags: bytes) -> RequestContext:
    traceparent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-" + flags
    return RequestContext([(b"host", b"localhost"), (b"traceparent", traceparent)])


def _request(telemetry: Telemetry, *, sampled: bool) -> Callable[[], None]:
    facts: dict[str, Any] = {"chunks": 200, "finish_reasons": ["stop"], "held_output_tokens": 512}

    def one() -> None:
        context = _context(b"01" if sampled else b"00")
        telemetry.arrived(context)
        admission = Admission(
            tenant_id="shop", request_id=context.request_id, holder_id=UUID(int=1), attributes=_ATTRIBUTES,
            price_key="p", input_tokens=50, input_amount_pico=5, output_rate_pico=1, need_tokens=1, want_tokens=512,
            shares=1,
        )  # fmt: skip
        report = telemetry.begin(
            context, admission, provider="openai", base_url="https://api.openai.com/v1", streamed=True
        )
        telemetry.admission_latency.record((), 0.001)
        report.called()
        report.first_byte()
        report.handed_over()
        settlement = Settlement(
            tenant_id="shop", request_id=context.request_id, state="settled", outcome=Outcome.COMPLETED,
            source="provider", requests=1, input_tokens=50, output_tokens=230, amount_pico=123_456_789, lines=[],
            facts=facts,
        )  # fmt: skip
        report.ended(settlement, _COUNTS, "gpt-4o-mini-2024-07-18", 0.02)
        context.status = 200
        telemetry.answered(context, _SCOPE)
        telemetry.put_aside(context.request_id)

    return one


def _us(work: Callable[[], object], flush: Callable[[], object] | None = None) -> tuple[float, float]:
    """CPU microseconds of a request: in the thread that serves it, and in those that push."""
    here: list[float] = []
    elsewhere: list[float] = []
    for _ in range(SLICES):
        began_s, all_began_s = time.thread_time(), time.process_time()
        for _ in range(REQUESTS):
            work()
        mine_s = time.thread_time() - began_s
        if flush is not None:
            flush()  # else the queue would be full, and what is dropped costs nothing
        here.append(mine_s / REQUESTS * 1e6)
        elsewhere.append((time.process_time() - all_began_s - mine_s) / REQUESTS * 1e6)
    return median(here), median(elsewhere)
