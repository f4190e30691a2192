"""Spans as OTLP has them on the wire, encoded by ourselves: OpenTelemetry's encoder makes an object of each attribute
and each value, and takes four times as long, which a process with one interpreter lock takes from those it serves.

What comes out is a message of OpenTelemetry's own types, the same that their encoder makes (a property test), and goes
through their exporters. https://protobuf.dev/programming-guides/encoding, opentelemetry/proto/trace/v1/trace.proto.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import cast

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

Value = str | int | float | bool | Sequence[str]

CACHED_MAX = 4096
"""Attributes whose bytes are remembered: most values are the same few again and again."""
CACHED_CHARS_MAX = 64

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_U64 = (1 << 64) - 1
# A field's number times eight, and its wire type: 0 a varint, 1 eight bytes, 2 a length and its bytes, 5 four bytes.
_REQUEST_RESOURCE_SPANS = b"\x0a"
_RESOURCE, _SCOPE_SPANS, _SCHEMA_URL = b"\x0a", b"\x12", b"\x1a"
_SCOPE, _SPANS = b"\x0a", b"\x12"
_KEY, _VALUE, _ATTRIBUTES = b"\x0a", b"\x12", b"\x4a"
_STRING, _BOOL, _INT, _DOUBLE, _ARRAY = b"\x0a", b"\x10", b"\x18", b"\x21", b"\x2a"
_CLIENT, _SERVER = b"\x30\x03", b"\x30\x02"
_STATUS_UNSET, _STATUS_ERROR = b"\x7a\x00", b"\x7a\x02\x18\x02"
_FLAGS_LOCAL = b"\x85\x01" + struct.pack("<I", 0x100)
_FLAGS_REMOTE = b"\x85\x01" + struct.pack("<I", 0x300)
_times = struct.Struct("<cQcQ").pack
_double = struct.Struct("<d").pack


class EndedSpan:
    """A span that is over, as it waits to be pushed."""

    __slots__ = (
        "attributes",
        "ended_ns",
        "failed",
        "is_client",
        "name",
        "parent_id",
        "parent_is_remote",
        "span_id",
        "started_ns",
        "trace_id",
        "trace_state",
    )

    context = SpanContext(1, 1, is_remote=False, trace_flags=_SAMPLED)
    """What a span processor looks at: only sampled spans are made."""

    def __init__(
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
        """`failed`: its status is an error, and `error.type` says which."""
        self.name = name
        self.is_client = is_client
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_id = parent_id
        self.parent_is_remote = parent_is_remote
        self.trace_state = trace_state
        self.started_ns = started_ns
        self.ended_ns = ended_ns
        self.attributes = attributes
        self.failed = failed

    def readable(self, described: Resource, scope: InstrumentationScope) -> ReadableSpan:
        """As OpenTelemetry's SDK has it."""
        state = TraceState.from_header([self.trace_state]) if self.trace_state else None
        parent = None
        if self.parent_id is not None:
            parent = SpanContext(self.trace_id, self.parent_id, self.parent_is_remote, _SAMPLED, state)
        return ReadableSpan(
            self.name,
            context=SpanContext(self.trace_id, self.span_id, False, _SAMPLED, state),
            parent=parent,
            resource=described,
            attributes=self.attributes,
            kind=SpanKind.CLIENT if self.is_client else SpanKind.SERVER,
            status=Status(StatusCode.ERROR if self.failed else StatusCode.UNSET),
            start_time=self.started_ns,
            end_time=self.ended_ns,
            instrumentation_scope=scope,
        )


class SpanEncoder:
    """Encodes the spans of one process. Called by one thread."""

    def __init__(self, described: Resource, scope: InstrumentationScope) -> None:
        sample = EndedSpan(
            "", is_client=False, trace_id=1, span_id=1, parent_id=None, parent_is_remote=False, trace_state="",
            started_ns=0, ended_ns=0, attributes={}, failed=False,
        )  # fmt: skip
        (resource_spans,) = encode_spans([sample.readable(described, scope)]).resource_spans
        (scope_spans,) = resource_spans.scope_spans
        self._resource = _part(_RESOURCE, resource_spans.resource.SerializeToString())
        self._resource_end = (
            _part(_SCHEMA_URL, resource_spans.schema_url.encode()) if resource_spans.schema_url else b""
        )
        self._scope = _part(_SCOPE, scope_spans.scope.SerializeToString())
        self._scope_end = _part(_SCHEMA_URL, scope_spans.schema_url.encode()) if scope_spans.schema_url else b""
        self._cached: dict[tuple[str, str], bytes] = {}

    def __call__(self, spans: Sequence[EndedSpan] | Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
        """The request with these spans. Those of somebody else in this process are encoded as ever."""
        if not (spans and isinstance(spans[0], EndedSpan)):
            return encode_spans(cast("Sequence[ReadableSpan]", spans))
        ours = cast("Sequence[EndedSpan]", spans)
        encoded = b"".join([_part(_SPANS, self._span(span)) for span in ours])
        scoped = _part(_SCOPE_SPANS, self._scope + encoded + self._scope_end)
        whole = _part(_REQUEST_RESOURCE_SPANS, self._resource + scoped + self._resource_end)
        request: ExportTraceServiceRequest = ExportTraceServiceRequest.FromString(whole)
        return request

    def _span(self, span: EndedSpan) -> bytes:
        parts = [b"\x0a\x10", span.trace_id.to_bytes(16, "big"), b"\x12\x08", span.span_id.to_bytes(8, "big")]
        if span.trace_state:
            state = TraceState.from_header([span.trace_state])
            if state:
                parts.append(_part(b"\x1a", ",".join(f"{key}={value}" for key, value in state.items()).encode()))
        if span.parent_id is not None:
            parts.append(b"\x22\x08" + span.parent_id.to_bytes(8, "big"))
        if span.name:
            parts.append(_part(b"\x2a", span.name.encode()))
        parts.append(_CLIENT if span.is_client else _SERVER)
        parts.append(_times(b"\x39", span.started_ns, b"\x41", span.ended_ns))
        cached = self._cached
        for key, value in span.attributes.items():
            if not isinstance(value, str):
                parts.append(_attribute(key, value))
                continue
            found = cached.get((key, value))
            if found is None:
                found = _attribute(key, value)
                if len(value) <= CACHED_CHARS_MAX:
                    if len(cached) >= CACHED_MAX:
                        cached.clear()
                    cached[key, value] = found
            parts.append(found)
        parts.append(_STATUS_ERROR if span.failed else _STATUS_UNSET)
        parts.append(_FLAGS_REMOTE if span.parent_id is not None and span.parent_is_remote else _FLAGS_LOCAL)
        return b"".join(parts)


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _BYTES[number]
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


_BYTES = [bytes([number]) for number in range(0x80)]


def _part(tag: bytes, content: bytes) -> bytes:
    return tag + _varint(len(content)) + content


def _attribute(key: str, value: Value) -> bytes:
    return _part(_ATTRIBUTES, _part(_KEY, key.encode()) + _part(_VALUE, _any(value)))


def _any(value: Value) -> bytes:
    if isinstance(value, str):
        return _part(_STRING, value.encode())
    if isinstance(value, bool):
        return _BOOL + _BYTES[value]
    if isinstance(value, int):
        return _INT + _varint(value & _U64)
    if isinstance(value, float):
        return _DOUBLE + _double(value)
    return _part(_ARRAY, b"".join([_part(_STRING, _any(item)) for item in value]))
