"""Holds and settlements as values: what a sidecar asks of the books, and what they answer."""

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec

from behest_ledger.charging import Outcome, Source


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """One request asking to be admitted against every budget that matches it."""

    tenant_id: str
    request_id: UUID
    holder_id: UUID
    attributes: dict[str, Any]
    """namespace, project, user, session, model, tier, upstream, provider ...: verified, never the client's word."""
    price_key: str
    input_tokens: int
    input_amount_pico: int
    """The input's upper bound, at the dearest rate that the answer can carry, plus fees."""
    output_rate_pico: int
    """pico-USD per output token, at the dearest output rate."""
    need_tokens: int
    """Output tokens without which it is not worth to begin."""
    want_tokens: int
    shares: int
    """The grant is at most 1/(shares x live requests) of what a window has left."""


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """A definite no. Balances are in the budget's unit."""

    reason: Literal["quota", "rate", "suspended"]
    budget: str = ""
    scope: dict[str, str] = {}
    subject: list[Any] = []
    unit: Literal["usd", "tokens", "requests", "concurrency"] = "usd"
    window_id: int = 0
    limit: int = 0
    spent: int = 0
    held: int = 0
    remaining: int = 0
    resets_at: str | None = None
    retry_after_s: int | None = None
    what: str = ""
    """For `suspended`: "project" or "budget"."""
    name: str = ""


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """How a rate of the caller's tier stands, this request included."""

    unit: str
    """requests or tokens."""
    limit: int
    remaining: int
    resets_at: datetime | None = None


class Granted(msgspec.Struct, frozen=True, kw_only=True):
    """Output tokens that are held now and may be forwarded."""

    output_tokens: int
    windows: tuple[int, ...] = ()
    """Those in which something is held for it now."""
    amounts: tuple[int, ...] = ()
    """What is held in each of them, in its unit."""
    bound_by: Refused | None = None
    """The window that granted less than the wish, with its balances before this hold."""
    rates: tuple[Rate, ...] = ()
    """The rates of the tier that the request was admitted under."""


class Gone(msgspec.Struct, frozen=True):
    """The hold is not open (voided, settled or expired): nothing moved."""


Answer = Granted | Refused | Gone


class Extension(msgspec.Struct, frozen=True, kw_only=True):
    """More output tokens for an open hold. `seq` counts up from 1; the same seq gets the same answer."""

    tenant_id: str
    request_id: UUID
    seq: int
    need_tokens: int
    want_tokens: int


class UsageLine(msgspec.Struct, frozen=True, kw_only=True):
    """One class of a charge: amount_pico = quantity x rate_pico, exactly."""

    class_: str = msgspec.field(name="class")
    quantity: int
    rate_pico: int
    amount_pico: int
    source: Source


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one request in the books."""

    tenant_id: str
    request_id: UUID
    state: Literal["settled", "void"]
    outcome: Outcome
    source: Source
    requests: int
    """1 charges a budget of requests, 0 gives the unit back."""
    input_tokens: int
    output_tokens: int
    amount_pico: int
    lines: list[UsageLine]
    facts: dict[str, Any]
    """What explains the charge: chunks, finish reasons, times in milliseconds."""


def void(tenant_id: str, request_id: UUID, outcome: Outcome) -> Settlement:
    """The settlement of a request that was never sent: everything held is free again."""
    return Settlement(
        tenant_id=tenant_id,
        request_id=request_id,
        state="void",
        outcome=outcome,
        source="none",
        requests=0,
        input_tokens=0,
        output_tokens=0,
        amount_pico=0,
        lines=[],
        facts={},
    )
