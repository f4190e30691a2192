"""What the operator and the webhook tell of themselves: calls by what came of them, times, a certificate's end."""

from typing import Literal

from behest_ledger.telemetry import names
from behest_ledger.telemetry.meter import Meter

Reconciled = Literal["accepted", "refused", "removed", "failed"]
Reviewed = Literal["injected", "left", "refused", "invalid"]


class OperatorWatch:
    """The instruments of one operator."""

    def __init__(self, meter: Meter) -> None:
        self._reconciles = meter.counter(names.RECONCILES)
        self._duration = meter.histogram(names.RECONCILE_DURATION)

    def reconciled(self, kind: str, result: Reconciled, seconds: float) -> None:
        """A resource was carried into the ledger, taken out of it, or neither."""
        self._reconciles.add((kind, result))
        self._duration.record((kind,), seconds)


class WebhookWatch:
    """The instruments of one webhook."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._reviews = meter.counter(names.REVIEWS)
        self._duration = meter.histogram(names.REVIEW_DURATION)
        self._expires_at_s: float | None = None
        meter.gauge(names.CERTIFICATE_EXPIRY, lambda: {} if self._expires_at_s is None else {(): self._expires_at_s})

    def reviewed(self, result: Reviewed, seconds: float) -> None:
        """A review was answered."""
        self._reviews.add((result,))
        self._duration.record((), seconds)

    def serves(self, expires_at_s: float) -> None:
        """The certificate that is served is good until then, Unix time."""
        self._expires_at_s = expires_at_s
