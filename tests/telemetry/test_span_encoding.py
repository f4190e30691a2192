"""Our encoding of spans is OpenTelemetry's, message by message, and both of its exporters use it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common import trace_encoder
from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as by_grpc
from opentelemetry.exporter.otlp.proto.http import trace_exporter as by_http
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from behest_ledger.telemetry import otlp, span_encoding
from behest_ledger.telemetry.span_encoding import EndedSpan, SpanEncoder

RESOURCE = otlp.resource({"service.version": "1.2", "service.instance.id": "pod-ü"})
SCOPE = InstrumentationScope("behest", "1.2")
TEXTS = st.one_of(st.sampled_from(["", "gpt-4o", "search"]), st.text(st.characters(exclude_categories=["Cs"])))
VALUES = st.one_of(
    TEXTS,
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.lists(TEXTS, max_size=3),
)
SPAN_IDS = st.integers(1, 2**64 - 1)
SPANS = st.builds(
    EndedSpan,
    TEXTS,
    is_client=st.booleans(),
    trace_id=st.integers(1, 2**128 - 1),
    span_id=SPAN_IDS,
    parent_id=st.none() | SPAN_IDS,
    parent_is_remote=st.booleans(),
    trace_state=st.sampled_from(["", "a=1", "a=1,b@c=2 x", "no state", "a=1,,b=2"]),
    started_ns=st.integers(0, 2**63),
    ended_ns=st.integers(0, 2**63),
    attributes=st.dictionaries(TEXTS.filter(bool), VALUES, max_size=8),
    failed=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(SPANS, min_size=1, max_size=4))
def test_the_message_is_the_one_that_opentelemetry_makes(spans: list[EndedSpan]) -> None:
    theirs = trace_encoder.encode_spans([span.readable(RESOURCE, SCOPE) for span in spans])
    encoder = SpanEncoder(RESOURCE, SCOPE)
    for _ in range(2):  # the second time out of what is remembered
        assert encoder(spans) == theirs
    others: Any = [span.readable(RESOURCE, SCOPE) for span in spans]
    assert encoder(others) == theirs, "spans that are not ours"


def a_span(**attributes: Any) -> EndedSpan:
    return EndedSpan(
        "chat", is_client=True, trace_id=1, span_id=2, parent_id=3, parent_is_remote=False, trace_state="",
        started_ns=4, ended_ns=5, attributes=attributes, failed=False,
    )  # fmt: skip


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_encoding, "CACHED_MAX", 3)
    encoder = SpanEncoder(RESOURCE, SCOPE)
    remembered = encoder._cached  # pyright: ignore[reportPrivateUsage]
    for number in range(10):
        encoder([a_span(session=f"s{number}", long="x" * 1000)])
        assert len(remembered) <= 3
    assert not [value for _, value in remembered if len(value) > span_encoding.CACHED_CHARS_MAX]


@pytest.mark.parametrize("module", [by_http, by_grpc], ids=["http", "grpc"])
def test_both_exporters_encode_by_it(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "encode_spans", trace_encoder.encode_spans)
    exporter = module.OTLPSpanExporter("http://127.0.0.1:9")
    told = otlp._Spans(exporter, RESOURCE, SCOPE)  # pyright: ignore[reportPrivateUsage]
    assert told.encodes
    assert isinstance(module.encode_spans, SpanEncoder)
    exporter.shutdown()


def test_an_exporter_that_does_not_let_us_gets_spans_in_its_own_form() -> None:
    class Other(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            assert trace_encoder.encode_spans(spans) == SpanEncoder(RESOURCE, SCOPE)([a_span(model="m")])
            return SpanExportResult.SUCCESS

    told = otlp._Spans(Other(), RESOURCE, SCOPE)  # pyright: ignore[reportPrivateUsage]
    assert not told.encodes
    spans: Any = [a_span(model="m")]
    assert told.export(spans) is SpanExportResult.SUCCESS
