"""The settlement of a request that did not live to see its end. Pure, and always the same for the same remains."""

from typing import Any

import msgspec

from behest_ledger.charging import Evidence, Outcome, charge
from behest_ledger.holds import Settlement
from behest_ledger.journal.history import Unfinished
from behest_ledger.journal.records import Admitted, Progress
from behest_ledger.prices.rates import ClassRates, Rates
from behest_ledger.settlement import settlement_for


def settlement_of(unfinished: Unfinished) -> Settlement | None:
    """What has to be written into the books for a request that an earlier life left.

    Its own settlement where it had ended. Otherwise the outcome is `crashed`, charged like every other by
    `behest_ledger.charging`: nothing where the request was not sent, the input where no byte had come back, else the
    input and what was forwarded, at the rates that were fixed at its admission.

    None where its slot is lost: whether it was sent, and what the client got, nobody knows. Its hold goes to suspense
    with its holder, where the policy decides; a guess here would be final.
    """
    if unfinished.settlement is not None:
        return unfinished.settlement
    if unfinished.admitted is None or unfinished.progress is None:
        return None
    return _crashed(unfinished.admitted, unfinished.progress, unfinished.granted_tokens)


def _crashed(admitted: Admitted, progress: Progress, granted_tokens: int) -> Settlement:
    # What was forwarded came from somewhere, whatever else had been noted by then.
    forwarded = bool(progress.output or progress.reasoning or progress.chunks)
    first_byte = progress.first_byte or forwarded
    charged = charge(
        Outcome.CRASHED,
        Evidence(
            request_sent=progress.sent or first_byte,
            first_byte=first_byte,
            counted=msgspec.structs.replace(
                admitted.input_counts, output=progress.output, reasoning=progress.reasoning
            ),
        ),
    )
    rates = Rates(
        price_key=admitted.price_key,
        base=ClassRates.of(admitted.rates),
        request_pico=admitted.request_fee_pico,
    )
    facts: dict[str, Any] = {
        "recovered": True,
        "chunks": progress.chunks,
        "counted_output_tokens": progress.output + progress.reasoning,
        "first_byte": first_byte,
        "price_key": admitted.price_key,
        "holder_id": str(admitted.holder_id),
        "attributes": admitted.attributes,
    }
    if granted_tokens:
        facts["held_output_tokens"] = granted_tokens
    return settlement_for(
        tenant_id=admitted.tenant_id,
        request_id=admitted.request_id,
        outcome=Outcome.CRASHED,
        charge=charged,
        rates=rates,
        facts=facts,
    )
