"""Which number is charged: the one table from an ended request to its tokens.

A provider's usage wins whenever it arrived, whatever the outcome, even when it is lower. Without it a request is
charged what was really passed on:

| outcome | charged |
|---|---|
| not (fully) sent upstream; refused | nothing |
| cancelled, killed or draining before the first byte, sent in full | input |
| upstream error or timeout before the first byte | nothing |
| anything that ended after the first byte, or completed without usage | input and the output forwarded |

A model whose output is partly hidden and that was cut short, also before its first byte, is charged an estimate of the
hidden part as well.
"""

import enum
from typing import Literal

import msgspec

from behest_ledger.token_counts import TokenCounts

Source = Literal["provider", "local", "estimate", "none"]
"""Who counted: the provider, our own tokenizer, an estimate for hidden output, or nobody (nothing charged)."""


class Outcome(enum.StrEnum):
    """How a request ended. Every request has exactly one."""

    COMPLETED = "completed"
    CLIENT_CANCELLED = "client_cancelled"
    QUOTA_EXCEEDED = "quota_exceeded"
    KILLED = "killed"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    DRAINING = "draining"
    LEDGER_UNAVAILABLE = "ledger_unavailable"
    CRASHED = "crashed"
    REFUSED = "refused"


_UPSTREAM_FAULTS = (Outcome.UPSTREAM_ERROR, Outcome.UPSTREAM_TIMEOUT)


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a request when it ends."""

    request_sent: bool
    """The whole request was handed to the provider's connection."""
    first_byte: bool
    """At least one byte of a successful answer's body came back."""
    counted: TokenCounts
    """Our own count: the whole input, and the output that was forwarded to the client."""
    provider: TokenCounts | None = None
    """The provider's usage so far; None where none arrived."""
    forwarded_since_provider: TokenCounts = TokenCounts()
    """Output forwarded after the provider's last usage, where that was not a final one."""
    hidden_tokens: int = 0
    """The estimate of hidden output up to the cut, already bounded by the hold; 0 where the model hides nothing."""


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens to charge and who counted them."""

    counts: TokenCounts
    source: Source
    sent: bool
    """False: nothing was sent upstream, so a budget of requests gets its unit back."""


def charge(outcome: Outcome, evidence: Evidence) -> Charge:
    """The charge of a request that ended so. Pure: the table above and nothing else."""
    if not evidence.request_sent or outcome is Outcome.REFUSED:
        return Charge(counts=TokenCounts(), source="none", sent=evidence.request_sent)
    if evidence.provider is not None:
        since = evidence.forwarded_since_provider
        counts = msgspec.structs.replace(
            evidence.provider,
            output=evidence.provider.output + since.output,
            reasoning=evidence.provider.reasoning + since.reasoning,
            audio_output=evidence.provider.audio_output + since.audio_output,
        )
        return Charge(counts=counts, source="local" if since.output_tokens else "provider", sent=True)
    if not evidence.first_byte and outcome in _UPSTREAM_FAULTS:
        return Charge(counts=TokenCounts(), source="none", sent=True)
    counts = evidence.counted if evidence.first_byte else _input_only(evidence.counted)
    if evidence.hidden_tokens and outcome is not Outcome.COMPLETED:
        counts = msgspec.structs.replace(counts, reasoning=counts.reasoning + evidence.hidden_tokens)
        return Charge(counts=counts, source="estimate", sent=True)
    return Charge(counts=counts, source="local", sent=True)


def _input_only(counts: TokenCounts) -> TokenCounts:
    return msgspec.structs.replace(counts, output=0, reasoning=0, audio_output=0)
