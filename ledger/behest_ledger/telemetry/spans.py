"""Spans, made at the end of what they tell of, with times that were taken on the way: nothing happens while it runs.

The ids come from the request's own context, because they are in its answer and in the call to the provider long before.
Whether a trace is told of is decided once, when the request comes: by OpenTelemetry's sampler, as `OTEL_TRACES_SAMPLER`
says.
"""

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context

from behest_ledger.telemetry.otlp import Push
from behest_ledger.telemetry.span_encoding import EndedSpan


class Spans:
    """Tells of the spans of one process."""

    Ended = EndedSpan
    """What `ended` takes: here for those who are loaded without OpenTelemetry."""

    def __init__(self, push: Push) -> None:
        self._push = push
        # Only asked for its sampler, which it makes as the environment says.
        self._sampler = TracerProvider(resource=push.resource, shutdown_on_exit=False).sampler

    def is_sampled(self, trace_id: int, name: str, parent: tuple[int, bool] | None) -> bool:
        """Whether a trace is told of; `parent` is the caller's span and whether it is told of."""
        context = None
        if parent is not None:
            flags = TraceFlags(TraceFlags.SAMPLED if parent[1] else TraceFlags.DEFAULT)
            context = set_span_in_context(NonRecordingSpan(SpanContext(trace_id, parent[0], True, flags)))
        result = self._sampler.should_sample(context, trace_id, name, SpanKind.SERVER)
        return result.decision is Decision.RECORD_AND_SAMPLE

    def ended(self, span: EndedSpan) -> None:
        """Tell of a span that is sampled."""
        self._push.span(span)
