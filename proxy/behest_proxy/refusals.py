"""A budget's refusal, said to the caller: which budget, its balances, and when there is money again."""

from typing import Any

from behest_ledger.holds import Refused
from behest_ledger.money import usd_from_pico
from behest_proxy.errors import Forbidden, LedgerUnavailable, QuotaExceeded, RateLimited, ShownError

RETRY_AFTER_MAX_S = 60
"""Nobody's SDK waits longer by itself: the OpenAI SDKs then come back within seconds, to be refused again."""


def shown(refusal: Refused, *, partial: Any = None) -> ShownError:
    """The error for a refusal: 403 for what is suspended, 429 for a rate, 402 for money.

    `partial` is what of the answer is there already, for a call that is answered as a whole.
    """
    if refusal.reason == "suspended":
        return Forbidden(
            f"{refusal.what} {refusal.name} is suspended",
            details={"reason": "suspended", "what": refusal.what, "name": refusal.name},
        )
    details: dict[str, Any] = {
        "budget": refusal.budget,
        "scope": refusal.scope,
        "unit": refusal.unit,
        "limit": _amount(refusal.unit, refusal.limit),
        "spent": _amount(refusal.unit, refusal.spent),
        "held": _amount(refusal.unit, refusal.held),
        "remaining": _amount(refusal.unit, refusal.remaining),
        "resets_at": refusal.resets_at,
    }
    if partial is not None:
        details["partial"] = partial
    if refusal.unit == "concurrency":
        text = f"{details['held']} of {details['limit']} requests run at once"
    else:
        unit = "USD" if refusal.unit == "usd" else refusal.unit
        text = f"{details['spent']} of {details['limit']} {unit} are spent and {details['held']} held"
    until = f"; it resets at {refusal.resets_at}" if refusal.resets_at else ""
    if refusal.reason == "rate":
        retry_after_s = refusal.retry_after_s or 1
        return RateLimited(
            f"limit {refusal.budget} is reached: {text}{until}",
            details=details,
            retry_after_s=retry_after_s,
            may_retry=refusal.unit != "concurrency" and retry_after_s <= RETRY_AFTER_MAX_S,
        )
    return QuotaExceeded(f"budget {refusal.budget} cannot pay for this: {text}{until}", details=details)


def _amount(unit: str, amount: int) -> str:
    return usd_from_pico(amount) if unit == "usd" else str(amount)


def no_ledger() -> ShownError:
    """The ledger gave no answer."""
    return LedgerUnavailable("the ledger cannot be reached, and nothing is spent without it", retry_after_s=1)
