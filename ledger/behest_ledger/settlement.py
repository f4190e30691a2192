"""From a charge to what is written into the books: the same for those who live and for those who are found dead."""

from typing import Any
from uuid import UUID

from behest_ledger.charging import Charge, Outcome
from behest_ledger.holds import Settlement, UsageLine
from behest_ledger.prices.rates import Rates


def settlement_for(
    *, tenant_id: str, request_id: UUID, outcome: Outcome, charge: Charge, rates: Rates, facts: dict[str, Any]
) -> Settlement:
    """The settlement of a charge at the rates that were fixed at its admission."""
    lines = lines_of(charge, rates)
    return Settlement(
        tenant_id=tenant_id,
        request_id=request_id,
        state="settled" if charge.sent else "void",
        outcome=outcome,
        source=charge.source,
        requests=int(charge.sent),
        input_tokens=charge.counts.input_tokens,
        output_tokens=charge.counts.output_tokens,
        amount_pico=sum(line.amount_pico for line in lines),
        lines=lines,
        facts=facts,
    )


def lines_of(charge: Charge, rates: Rates) -> list[UsageLine]:
    """The charge by class.

    A fee per request is owed where anything is: what was refused or never sent costs nothing at all.
    """
    return [
        UsageLine(
            class_=line.token_class,
            quantity=line.quantity,
            rate_pico=line.rate_pico,
            amount_pico=line.amount_pico,
            source=charge.source,
        )
        for line in rates.lines(charge.counts, requests=0 if charge.source == "none" else 1)
    ]
