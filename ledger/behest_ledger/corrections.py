"""Corrections as values: what somebody knows better about an ended request, and the charge that follows from it.

A correction says what is true of a request as a whole, never a difference: applied twice it changes nothing the second
time. What it does not mention stays as it was charged.
"""

from collections.abc import Mapping, Sequence
from uuid import UUID

import msgspec

from behest_ledger.charging import Source
from behest_ledger.holds import UsageLine
from behest_ledger.prices.rates import REQUEST_CLASS, Rates
from behest_ledger.token_counts import INPUT_CLASSES, TOKEN_CLASSES

CLASSES = (*TOKEN_CLASSES, REQUEST_CLASS)
QUANTITY_MAX = 10**12
RATE_PICO_MAX = 10**15
SOURCE: Source = "provider"


class CorrectionError(ValueError):
    """A correction that cannot be applied: which one, and why, for a person to put right."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(f"{place}: {message}")
        self.place = place
        self.message = message


class CorrectionsRefusedError(Exception):
    """Nothing was changed; and everything that is wrong."""

    def __init__(self, errors: Sequence[CorrectionError]) -> None:
        super().__init__("; ".join(str(error) for error in errors))
        self.errors = tuple(errors)


class Correction(msgspec.Struct, frozen=True, kw_only=True):
    """What is known better about one request."""

    place: str
    """Where it was said ("line 3"), for errors."""
    request_id: UUID
    correction_id: str
    """The caller's: the same one is applied to a request once."""
    reason: str
    quantities: Mapping[str, int]
    """By class, the true ones of the whole request."""
    complete: bool = False
    """These are all its tokens: classes that are not named have none. Fees stay."""
    rates_pico: Mapping[str, int] = {}
    """Rates that hold instead of those of the request's price key, by class."""
    tenant_id: str | None = None
    """None: whose request it is will be looked up."""


def corrected_lines(charged: Mapping[str, UsageLine], correction: Correction, rates: Rates | None) -> list[UsageLine]:
    """The whole charge of a request as it should be, in the order of `CLASSES`.

    `charged` are its lines as they are, `rates` those of its price key where the price book has it. A class is charged
    at the rate that the correction gives, else at that of the price key for the corrected input, else at the rate at
    which it was charged before. Raises `CorrectionError` for a class that has none of them.
    """
    quantities = {name: line.quantity for name, line in charged.items()}
    if correction.complete:
        quantities = {name: quantity for name, quantity in quantities.items() if name == REQUEST_CLASS}
    quantities |= correction.quantities
    input_tokens = sum(quantities.get(name, 0) for name in INPUT_CLASSES)
    lines: list[UsageLine] = []
    for name in CLASSES:
        quantity = quantities.get(name, 0)
        if not quantity:
            continue
        if name not in correction.quantities:
            lines.append(charged[name])
            continue
        rate_pico = correction.rates_pico.get(name)
        if rate_pico is None and rates is not None:
            rate_pico = rates.request_pico if name == REQUEST_CLASS else rates.at(input_tokens).rate_pico(name)
        if rate_pico is None and name in charged:
            rate_pico = charged[name].rate_pico
        if rate_pico is None:
            raise CorrectionError(
                correction.place, f"rate_pico: request {correction.request_id} has no known rate for {name}; give one"
            )
        lines.append(
            UsageLine(
                class_=name, quantity=quantity, rate_pico=rate_pico, amount_pico=quantity * rate_pico, source=SOURCE
            )
        )
    return lines
