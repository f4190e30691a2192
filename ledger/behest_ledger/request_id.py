"""Request ids: UUIDv7, made here, never taken from a provider or a client.

The time inside an id names the month of its rows (`ledger.month_of_v1`); time and randomness come in as
arguments, so that this stays a pure value.
"""

from uuid import UUID

_VERSION = 0x7 << 76
_VARIANT = 0b10 << 62


def request_id(unix_ms: int, random_bits: int) -> UUID:
    """A UUIDv7 (RFC 9562, section 5.7) of a time in milliseconds and at least 74 random bits."""
    rand_a = random_bits & 0xFFF
    rand_b = (random_bits >> 12) & ((1 << 62) - 1)
    return UUID(int=((unix_ms & ((1 << 48) - 1)) << 80) | _VERSION | (rand_a << 64) | _VARIANT | rand_b)


def unix_ms_of(name: UUID) -> int:
    """The time inside a UUIDv7."""
    return name.int >> 80
