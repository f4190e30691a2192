"""Money as exact integers of pico-USD, and its decimal forms for people.

One USD is 10**12 pico-USD. A rate in USD per million tokens times 1,000,000 is therefore an integer number
of pico-USD per token, even for the cheapest published prices (3.625 nano-USD for a cached token).
"""

from decimal import Decimal, InvalidOperation

PICO_PER_USD = 10**12
PICO_PER_TOKEN_PER_USD_PER_MILLION = 10**6


class MoneyError(ValueError):
    """An amount that cannot be written as a whole, non-negative number of pico-USD."""


def pico_from_usd(text: str | Decimal) -> int:
    """The pico-USD in a decimal amount of USD, exactly.

    Raises `MoneyError` for what is no number, negative, or finer than a pico-USD.
    """
    return _exact(text, PICO_PER_USD)


def rate_pico_from_usd_per_million(text: str | Decimal) -> int:
    """The pico-USD per token in a price of USD per million tokens, exactly.

    Raises `MoneyError` for what is no number, negative, or finer than a pico-USD per token.
    """
    return _exact(text, PICO_PER_TOKEN_PER_USD_PER_MILLION)


def usd_from_pico(amount_pico: int) -> str:
    """The amount in USD as a plain decimal string without trailing zeros: 1500000000000 -> "1.5"."""
    sign = "-" if amount_pico < 0 else ""
    whole, rest = divmod(abs(amount_pico), PICO_PER_USD)
    if not rest:
        return f"{sign}{whole}"
    return f"{sign}{whole}.{rest:012d}".rstrip("0")


def usd_per_million_from_rate_pico(rate_pico: int) -> str:
    """The price in USD per million tokens of a rate in pico-USD per token: 150000 -> "0.15"."""
    return usd_from_pico(rate_pico * PICO_PER_TOKEN_PER_USD_PER_MILLION)


def _exact(text: str | Decimal, scale: int) -> int:
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise MoneyError(f"{text!r} is not a decimal number") from None
    if not value.is_finite():
        raise MoneyError(f"{text!r} is not a finite number")
    if value < 0:
        raise MoneyError(f"{text!r} is negative")
    # Beyond 30 digits no budget is meant, and Decimal's context would start to round.
    if value.adjusted() > 15:
        raise MoneyError(f"{text!r} is too large")
    scaled = value * scale
    if scaled != scaled.to_integral_value():
        raise MoneyError(f"{text!r} is finer than a pico-USD")
    return int(scaled)
