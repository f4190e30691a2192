"""A charge as it goes into a bill: the lines of one hour that differ in nothing but the request, summed up.

Everything in it was fixed at the admission and is under the ledger's seals: labels, price and model are what was true
then, whatever a project says today.
"""

from datetime import UTC, datetime, timedelta
from typing import Literal

import msgspec

HOUR = timedelta(hours=1)

Part = Literal["charge", "reversal", "replacement"]
"""As it was settled; or of a correction, what takes back the charge before (`reversal`) and what is charged instead."""


class BillingPeriodError(ValueError):
    """A period that cannot be billed, with what it must be."""


class BillingRow(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of one hour, project, model, class and price."""

    hour: datetime
    """When the requests ended, to the hour, UTC."""
    booked_month: datetime
    """The month in which the ledger wrote these lines: for a correction later than the hour's."""
    part: Part
    tenant_id: str
    project_id: str
    """`<namespace>/<name>`."""
    model: str
    """As it was asked for."""
    upstream: str
    """`<namespace>/<name>` of the Upstream that served it; empty where that was not written down."""
    upstream_model: str
    byok: bool
    """The provider bills the tenant itself."""
    namespace: str
    """Of the pod, or without one of the project."""
    workload: str | None
    team: str | None
    cost_center: str | None
    price_key: str
    token_class: str
    """One of `TOKEN_CLASSES`, or `request`."""
    rate_pico: int
    """Pico-USD for one unit."""
    source: str
    """Who counted: provider, local, estimate."""
    quantity: int
    """Below zero in a reversal."""
    amount_pico: int
    user_id: str | None = None
    """With `session_id`: where the bill is told by session."""
    session_id: str | None = None


def hours_between(begin: datetime, end: datetime) -> int:
    """How many hours a period has. Raises `BillingPeriodError` where it does not begin and end with one."""
    for moment in (begin, end):
        if moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0) != moment:
            raise BillingPeriodError(f"{moment.isoformat()} is not a whole hour: what is billed are hours, in UTC")
    if begin >= end:
        raise BillingPeriodError(f"the period is empty: it ends at {end.isoformat()}, not after {begin.isoformat()}")
    return int((end - begin) / HOUR)
