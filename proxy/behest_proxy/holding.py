"""How much to hold for a request before it is sent, and which limit the provider is given for it.

Two ways. *Metered*: everything that is billed is seen in the stream, so the input and a first tranche of output are
held, and more is asked for while it runs. *Worst case*: part of the output may be hidden, or the answer is given as a
whole; then all that the provider may bill is held at once, and the provider is told to stop there.
"""

import msgspec

from behest_ledger.prices.rates import Rates
from behest_proxy.meter import FIRST_TRANCHE_TOKENS, GRANT_MIN_TOKENS, RESERVE_PER_CHOICE_TOKENS
from behest_proxy.models import ModelFacts
from behest_proxy.request import ChatRequest, InputCount

UNKNOWN_LIMIT_TOKENS = 4096
"""Per choice, where neither the caller nor anybody else says how much a model may generate."""
METERED_SHARES = 4
"""A tranche is at most a quarter of a fair share of what a window has left: others come later and want some too."""
WORST_CASE_SHARES = 2


class HoldPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask the ledger for."""

    metered: bool
    input_tokens: int
    """The input's upper bound."""
    input_amount_pico: int
    output_rate_pico: int
    need_tokens: int
    want_tokens: int
    shares: int
    limit_tokens: int | None
    """The most output per choice, by the caller's word or the model's nature; None: nobody knows."""


class OutputLimit(msgspec.Struct, frozen=True):
    """What the provider may generate once a hold was granted."""

    send_tokens: int | None
    """The limit per choice to write into the request; None leaves the caller's own, or none."""
    cap_tokens: int | None
    """The most that may be billed over all choices; None: no limit is known, tranches follow the stream."""
    lowered_by_budget: bool
    """The budget is the reason for `send_tokens`: reaching it is `quota_exceeded`, not `length`."""


def plan(
    request: ChatRequest, facts: ModelFacts, rates: Rates, input_count: InputCount, *, upstream_streams: bool = True
) -> HoldPlan:
    """What has to be held before this request may be sent."""
    metered = request.stream and facts.visible_only and upstream_streams
    input_rate_pico, output_rate_pico = rates.dearest_within(input_count.bound_tokens)
    limit_tokens = _limit(request.output_limit_tokens, None if metered else facts.output_limit_tokens)
    if metered:
        need = (RESERVE_PER_CHOICE_TOKENS + GRANT_MIN_TOKENS // 2) * request.choices
        want = max(FIRST_TRANCHE_TOKENS, need)
        if limit_tokens is not None:
            need, want = min(need, limit_tokens * request.choices), min(want, limit_tokens * request.choices)
    else:
        want = (UNKNOWN_LIMIT_TOKENS if limit_tokens is None else limit_tokens) * request.choices
        need = min(want, GRANT_MIN_TOKENS * request.choices)
    return HoldPlan(
        metered=metered,
        input_tokens=input_count.bound_tokens,
        input_amount_pico=input_count.bound_tokens * input_rate_pico + rates.request_pico,
        output_rate_pico=output_rate_pico,
        need_tokens=need,
        want_tokens=want,
        shares=METERED_SHARES if metered else WORST_CASE_SHARES,
        limit_tokens=limit_tokens,
    )


def limit_for(hold: HoldPlan, *, granted_tokens: int, choices: int) -> OutputLimit:
    """The limit that fits what was granted."""
    cap = hold.limit_tokens * choices if hold.limit_tokens is not None else None
    if hold.metered:
        return OutputLimit(send_tokens=None, cap_tokens=cap, lowered_by_budget=False)
    if cap is not None and granted_tokens >= cap:
        return OutputLimit(send_tokens=None, cap_tokens=cap, lowered_by_budget=False)
    per_choice = max(1, granted_tokens // choices)
    return OutputLimit(
        send_tokens=per_choice,
        cap_tokens=per_choice * choices,
        lowered_by_budget=granted_tokens < hold.want_tokens,
    )


def _limit(*limits: int | None) -> int | None:
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None
