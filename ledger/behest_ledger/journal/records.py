"""The records of a journal: what happened to a request, each complete in itself.

They hold ids, counts, rates and attribution; never a prompt, an answer or a secret. Their order does not matter, and
having one twice changes nothing: what a request comes to is in `history`.
"""

from typing import Any
from uuid import UUID

import msgspec

from behest_ledger.holds import Admission, Settlement
from behest_ledger.journal.errors import RecordRefusedError
from behest_ledger.journal.frames import PAYLOAD_BYTES_MAX, frame
from behest_ledger.prices.rates import Rates
from behest_ledger.token_counts import TOKEN_CLASSES, TokenCounts


class Admitted(msgspec.Struct, frozen=True, kw_only=True, tag="admitted", tag_field="kind"):
    """A request is about to be admitted. With its slot this is all that is needed to charge it after a crash."""

    tenant_id: str
    request_id: UUID
    holder_id: UUID
    input_counts: TokenCounts
    """Our own count of the input."""
    rates: dict[str, int]
    """Pico-USD per token of every class, those of this request's context tier."""
    request_fee_pico: int
    price_key: str
    attributes: dict[str, Any]
    """The verified attributes of the admission: they explain the charge."""

    def __post_init__(self) -> None:
        missing = [name for name in TOKEN_CLASSES if name not in self.rates]
        if missing:
            raise ValueError(f"no rate for {', '.join(missing)}")

    @classmethod
    def of(cls, admission: Admission, *, input_counts: TokenCounts, rates: Rates) -> "Admitted":
        """The record of an admission at the rates that are fixed with it."""
        fixed = rates.at(input_counts.input_tokens)
        return cls(
            tenant_id=admission.tenant_id,
            request_id=admission.request_id,
            holder_id=admission.holder_id,
            input_counts=input_counts,
            rates={name: fixed.rate_pico(name) for name in TOKEN_CLASSES},
            request_fee_pico=rates.request_pico,
            price_key=rates.price_key,
            attributes=admission.attributes,
        )


class Extended(msgspec.Struct, frozen=True, kw_only=True, tag="extended", tag_field="kind"):
    """The ledger granted output tokens, at the admission or later."""

    request_id: UUID
    granted_tokens: int
    """All that was granted so far, not only this time: a total can be read twice without counting twice."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What a slot says: how far an answer came."""

    output: int = 0
    """Output tokens that were handed to the client's connection, or are about to be."""
    reasoning: int = 0
    chunks: int = 0
    sent: bool = False
    """The whole request was handed to the provider's connection."""
    first_byte: bool = False
    """At least one byte of a successful answer came back."""

    def joined(self, other: "Progress") -> "Progress":
        """The farther of the two in each: everything here only grows."""
        return Progress(
            output=max(self.output, other.output),
            reasoning=max(self.reasoning, other.reasoning),
            chunks=max(self.chunks, other.chunks),
            sent=self.sent or other.sent,
            first_byte=self.first_byte or other.first_byte,
        )


class Carried(msgspec.Struct, frozen=True, kw_only=True, tag="carried", tag_field="kind"):
    """What the slot of a crashed request said, so that the slot is free for others. Written by the journal itself."""

    request_id: UUID
    progress: Progress


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended", tag_field="kind"):
    """The request is over, and this is to be written into the books."""

    settlement: Settlement

    @property
    def request_id(self) -> UUID:
        """Whose end it is."""
        return self.settlement.request_id


class Acknowledged(msgspec.Struct, frozen=True, kw_only=True, tag="acknowledged", tag_field="kind"):
    """The books have it, durably, or there is nothing to write: the request is finished here."""

    request_id: UUID


Record = Admitted | Extended | Carried | Ended | Acknowledged

PAD = frame(bytes(2048))
"""A frame that means nothing, as large as a large record: to see whether the disk takes one."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


def encode(record: Record) -> bytes:
    """The frame of a record. Raises `RecordRefusedError`."""
    try:
        payload = _encoder.encode(record)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RecordRefusedError(f"a record of request {record.request_id} cannot be written: {error}") from error
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise RecordRefusedError(f"a record of request {record.request_id} is too large: {len(payload)} bytes")
    return frame(payload)


def is_padding(payload: bytes) -> bool:
    """Whether a payload means nothing. A record begins with the head of a map, never with a zero."""
    return payload[:1] == b"\0"


def decode(payload: bytes) -> Record | None:
    """The record in a whole frame; None: not one of this version's."""
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        return None
