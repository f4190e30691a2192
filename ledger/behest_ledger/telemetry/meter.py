"""Counting in this process: what a request adds is a handful of additions, and nothing is ever sent from here.

An attribute set is a tuple of values in the order of the instrument's attributes; an empty value is an absent one.
Everything is bounded: values of an attribute, attribute sets of an instrument. Written by one thread; whoever reads
from another sees each number whole, and sums that are a moment apart.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import NamedTuple

from behest_ledger.telemetry.names import OTHER, SERIES_MAX, VALUE_CHARS_MAX, VALUES_MAX, Instrument

Key = tuple[str, ...]


def tellable(value: str, most: int = VALUE_CHARS_MAX) -> str:
    """A text that can be told: bounded, and what UTF-8 has no form for (half a surrogate pair) a question mark."""
    return value[:most].encode("utf-8", "replace").decode()


class Exemplar(NamedTuple):
    """One measurement and the span that it belongs to."""

    value: float
    time_ns: int
    trace_id: int
    span_id: int


class BoundedValues:
    """The values of one attribute: the first `most` of them, then `other`."""

    __slots__ = ("_known", "_most")

    def __init__(self, most: int = VALUES_MAX) -> None:
        self._known: dict[str, str] = {}
        self._most = most

    def __call__(self, value: str | None) -> str:
        """The value as it is told."""
        if not value:
            return ""
        known = self._known.get(value)
        if known is not None:
            return known
        told = tellable(value)
        if told in self._known:
            return told
        if len(self._known) >= self._most:
            return OTHER
        self._known[told] = told
        return told


class Counter:
    """Counts upwards, by attribute set."""

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self.series: dict[Key, int] = {}
        self._overflow = (OTHER,) * len(instrument.attributes)

    def add(self, key: Key, amount: int = 1) -> None:
        """Count so much more, in the instrument's unit divided by its scale."""
        series = self.series
        if key not in series and len(series) >= SERIES_MAX:
            key = self._overflow
        series[key] = series.get(key, 0) + amount


class Distribution:
    """One attribute set of a histogram."""

    __slots__ = ("buckets", "exemplar", "greatest", "least", "total")

    def __init__(self, buckets: int) -> None:
        self.buckets = [0] * buckets
        self.total = 0.0
        self.least = float("inf")
        self.greatest = float("-inf")
        self.exemplar: Exemplar | None = None
        """The last measurement that belongs to a span that is told of."""


class Histogram:
    """Distributions by attribute set."""

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self.series: dict[Key, Distribution] = {}
        self._bounds = instrument.bounds
        self._overflow = (OTHER,) * len(instrument.attributes)

    def record(self, key: Key, value: float, span: tuple[int, int, int] | None = None) -> None:
        """One measurement; `span` is the time in nanoseconds, the trace's and the span's id, where one is told of."""
        found = self.series.get(key)
        if found is None:
            if len(self.series) >= SERIES_MAX:
                key = self._overflow
            found = self.series.setdefault(key, Distribution(len(self._bounds) + 1))
        found.buckets[bisect_left(self._bounds, value)] += 1
        found.total += value
        if value < found.least:
            found.least = value
        if value > found.greatest:
            found.greatest = value
        if span is not None:
            found.exemplar = Exemplar(value, *span)


class Gauge:
    """What somebody knows when he is asked."""

    def __init__(self, instrument: Instrument, read: Callable[[], Mapping[Key, float]]) -> None:
        self.instrument = instrument
        self._read = read

    @property
    def series(self) -> dict[Key, float]:
        """How it is now; more than is told is left out."""
        return dict(list(self._read().items())[:SERIES_MAX])


class Meter:
    """The instruments of one process."""

    def __init__(self) -> None:
        self.started_ns = time.time_ns()
        self._instruments: dict[str, Counter | Histogram | Gauge] = {}

    @property
    def instruments(self) -> list[Counter | Histogram | Gauge]:
        """All of them."""
        return list(self._instruments.values())

    def counter(self, instrument: Instrument) -> Counter:
        """The counter of an instrument, made where there is none."""
        made = self._instruments.setdefault(instrument.name, Counter(instrument))
        assert isinstance(made, Counter)
        return made

    def histogram(self, instrument: Instrument) -> Histogram:
        """The histogram of an instrument, made where there is none."""
        made = self._instruments.setdefault(instrument.name, Histogram(instrument))
        assert isinstance(made, Histogram)
        return made

    def gauge(self, instrument: Instrument, read: Callable[[], Mapping[Key, float]]) -> None:
        """Ask `read` whenever somebody wants to know."""
        self._instruments[instrument.name] = Gauge(instrument, read)
