"""Spans, made at the end of what they tell of, with times that were taken on the way: nothing happens while it runs.

The ids come from the request's own context, because they are in its answer and in the call to the provider long before.
Whether a trace is told of is decided once, when the request comes: by OpenTelemetry's sampler, as `OTEL_TRACES_SAMPLER`
says.
"""

from collections.abc import Mapping, Sequence

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from behest_ledger.telemetry.otlp import Push

Value = str | int | float | bool | Sequence[str]

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class Spans:
    """Makes the spans of one process."""

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

    def ended(
        self,
        name: str,
        *,
        is_client: bool,
        trace_id: int,
        span_id: int,
        parent_id: int | None,
        parent_is_remote: bool,
        trace_state: str,
        started_ns: int,
        ended_ns: int,
        attributes: Mapping[str, Value],
        failed: bool,
    ) -> None:
        """Tell of a span that is sampled. `failed`: its status is an error, and `error.type` says which."""
        state = TraceState.from_header([trace_state]) if trace_state else None
        parent = None if parent_id is None else SpanContext(trace_id, parent_id, parent_is_remote, _SAMPLED, state)
        self._push.span(
            ReadableSpan(
                name,
                context=SpanContext(trace_id, span_id, False, _SAMPLED, state),
                parent=parent,
                resource=self._push.resource,
                attributes=attributes,
                kind=SpanKind.CLIENT if is_client else SpanKind.SERVER,
                status=_ERROR if failed else _UNSET,
                start_time=started_ns,
                end_time=ended_ns,
                instrumentation_scope=self._push.scope,
            )
        )


_UNSET = Status(StatusCode.UNSET)
_ERROR = Status(StatusCode.ERROR)
