"""How a budget stands: its current windows summed up, and the one word for it that people read first."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, TypeAlias

import msgspec

from behest_ledger.configuration.records import BudgetRecord
from behest_ledger.money import usd_from_pico

Phase: TypeAlias = Literal["Active", "Warning", "Exhausted", "Suspended"]

_SPARE_PICO_MAX = 10**9
"""A tenth of a cent."""
_SPARE_TOKENS = 16
"""The smallest hold of output."""


class SubjectStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One subject's current window."""

    subject: list[str]
    """The values of the budget's `per` attributes, in order; empty: the budget itself."""
    spent: int
    held: int
    """Held or in suspense: not spent, and not to be had either."""


class BudgetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A budget and its current windows. Amounts are in the budget's unit."""

    record: BudgetRecord
    spent: int = 0
    """Of all current windows."""
    held: int = 0
    """Of all current windows; suspense is in it."""
    overrun: int = 0
    """Charged beyond what the windows could pay: the provider did not keep its word."""
    remaining: int
    """Of the subject that has least; the limit where no window is open. Of a soft budget it may be below zero."""
    active: int = 0
    """Subjects with a current window."""
    exhausted: int = 0
    """Those of them that cannot pay another request; none, where the budget is soft."""
    most_used: int = 0
    """What was charged to the subject to which most was, overrun included: what alert thresholds go by."""
    window_ends_at: datetime | None = None
    """When the last of the current windows ends; None: none is open, or it never ends."""
    biggest: list[SubjectStatus] = []
    """The subjects that used most, at most five."""

    @property
    def phase(self) -> Phase:
        """Exhausted where no subject can pay any more; Warning where one has reached an alert threshold."""
        return phase_of(
            limit_amount=self.record.limit_amount,
            used=self.most_used,
            thresholds=self.record.alert_thresholds,
            soft=self.record.enforcement == "soft",
            exhausted=self.active > 0 and self.exhausted == self.active,
            suspended=self.record.suspended,
        )

    def wire(self) -> dict[str, Any]:
        """The status of a Budget resource."""
        unit = self.record.unit
        status: dict[str, Any] = {
            "phase": self.phase,
            "spent": shown_amount(self.spent, unit),
            "held": shown_amount(self.held, unit),
            "remaining": shown_amount(self.remaining, unit),
            "subjects": {"active": self.active, "exhausted": self.exhausted},
        }
        if self.overrun:
            status["overrun"] = shown_amount(self.overrun, unit)
        if self.window_ends_at is not None:
            status["windowEndsAt"] = self.window_ends_at.strftime("%Y-%m-%dT%H:%M:%SZ")
        if self.record.per:
            status["biggest"] = [
                {
                    "subject": dict(zip(self.record.per, entry.subject, strict=False)),
                    "spent": shown_amount(entry.spent, unit),
                    "held": shown_amount(entry.held, unit),
                }
                for entry in self.biggest
            ]
        return status


def phase_of(
    *, limit_amount: int, used: int, thresholds: Sequence[int], soft: bool, exhausted: bool, suspended: bool
) -> Phase:
    """The one word for a budget of which `used` was charged, overrun included.

    A soft budget is never Exhausted, because it stops nobody: above its limit it is a Warning, threshold or none.
    """
    if suspended:
        return "Suspended"
    if exhausted and not soft:
        return "Exhausted"
    if thresholds and used * 100 >= thresholds[0] * limit_amount:
        return "Warning"
    return "Warning" if soft and used >= limit_amount else "Active"


def shown_amount(amount: int, unit: str) -> str:
    """An amount as a decimal string: USD, or a count."""
    return usd_from_pico(amount) if unit == "usd" else str(amount)


def spare_amount(unit: str, limit_amount: int) -> int:
    """With less than this left, no request can be paid: a budget is rarely used up to its last pico-USD."""
    if unit == "usd":
        return max(1, min(limit_amount // 1000, _SPARE_PICO_MAX))
    if unit == "tokens":
        return max(1, min(limit_amount // 100, _SPARE_TOKENS))
    return 1
