"""Counting: exact sums, buckets as OpenTelemetry has them, and bounds that nobody passes."""

from behest_ledger.telemetry.meter import BoundedValues, Meter, tellable
from behest_ledger.telemetry.names import COST, DURATION, OTHER, OUTCOMES, SERIES_MAX, STREAMS_ACTIVE, VALUES_MAX
from behest_ledger.telemetry.prometheus import page

KEY = tuple("abcdefg")


def test_money_is_added_up_as_whole_numbers() -> None:
    counter = Meter().counter(COST)
    for _ in range(1000):
        counter.add((*KEY, "completed"), 10**11 + 1)
    assert counter.series == {(*KEY, "completed"): 10**14 + 1000}


def test_a_value_on_a_bound_is_in_the_bucket_below_it() -> None:
    # OpenTelemetry's metrics data model: buckets are exclusive of their lower bound and inclusive of their upper one.
    histogram = Meter().histogram(DURATION)
    key = ("",) * len(DURATION.attributes)
    for value in (0.0, 0.01, 0.0100001, 81.92, 100.0):
        histogram.record(key, value)
    (found,) = histogram.series.values()
    assert (found.buckets[0], found.buckets[1], found.buckets[-2], found.buckets[-1]) == (2, 1, 1, 1)
    assert (sum(found.buckets), found.least, found.greatest) == (5, 0.0, 100.0)


def test_an_attribute_has_so_many_values_and_then_other() -> None:
    bounded = BoundedValues()
    told = [bounded(f"value {number}") for number in range(VALUES_MAX + 100)]
    assert told[:VALUES_MAX] == [f"value {number}" for number in range(VALUES_MAX)]
    assert set(told[VALUES_MAX:]) == {OTHER}
    assert bounded("value 7") == "value 7"
    assert bounded("") == bounded(None) == ""


def test_what_cannot_be_told_is_bounded_and_told_otherwise() -> None:
    bounded = BoundedValues()
    assert bounded("m\udc00" + "x" * 1000) == "m?" + "x" * 118
    assert bounded("m\udc00" + "x" * 2000) == "m?" + "x" * 118
    assert tellable("\ud800", 1) == "?"


def test_a_metric_has_so_many_series_and_then_one_for_the_rest() -> None:
    counter = Meter().counter(OUTCOMES)
    for number in range(SERIES_MAX + 500):
        counter.add((*KEY, str(number)))
    assert len(counter.series) == SERIES_MAX + 1
    assert counter.series[(OTHER,) * len(OUTCOMES.attributes)] == 500


def test_the_page_for_prometheus_escapes_what_is_hostile_and_leaves_out_what_is_empty() -> None:
    meter = Meter()
    meter.counter(OUTCOMES).add(('p"\n\\', "", "", "", "", "", "", "completed"), 3)
    meter.gauge(STREAMS_ACTIVE, lambda: {("p", "m"): 2.0})
    lines = page(meter).decode().splitlines()
    (line,) = [line for line in lines if line.startswith("behest_stream_outcomes_total{")]
    assert 'behest_project="p\\"\\n\\\\"' in line
    assert line.endswith(" 3.0")
    assert 'behest_streams_active{behest_project="p",gen_ai_request_model="m"} 2.0' in lines
