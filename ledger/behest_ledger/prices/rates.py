"""Rates of one model as integers, and the one pricing function: holds and settlements both call it.

All rates are pico-USD per token (USD per million tokens x 1,000,000), so every amount is an exact integer.
"""

from collections.abc import Iterator

import msgspec

from behest_ledger.token_counts import INPUT_CLASSES, OUTPUT_CLASSES, TOKEN_CLASSES, TokenCounts

REQUEST_CLASS = "request"
"""The class of per-request fees, beside the token classes."""

FALLBACKS = {
    "cache_read": "input",
    "cache_write": "input",
    "audio_input": "input",
    "reasoning": "output",
    "audio_output": "output",
}
"""Which class's rate holds for a class without one of its own. Providers bill so where they publish no special rate."""


class ClassRates(msgspec.Struct, frozen=True, kw_only=True):
    """Pico-USD per token for every class; fallbacks are already filled in."""

    input: int
    cache_read: int
    cache_write: int
    output: int
    reasoning: int
    audio_input: int
    audio_output: int

    @classmethod
    def of(cls, known: dict[str, int]) -> "ClassRates":
        """The rates of the classes that are known, the others by `FALLBACKS`. Needs `input` and `output`."""
        return cls(**{name: known[name if name in known else FALLBACKS[name]] for name in TOKEN_CLASSES})

    def rate_pico(self, token_class: str) -> int:
        """The rate of one class."""
        rate: int = getattr(self, token_class)
        return rate

    @property
    def dearest_input_pico(self) -> int:
        """The highest rate that an input token can have."""
        return max(self.rate_pico(name) for name in INPUT_CLASSES)

    @property
    def dearest_output_pico(self) -> int:
        """The highest rate that an output token can have."""
        return max(self.rate_pico(name) for name in OUTPUT_CLASSES)


class ContextTier(msgspec.Struct, frozen=True, kw_only=True):
    """Rates of requests with a long input: above the start they hold for all tokens of the request."""

    start_input_tokens: int
    """The tier holds for requests with more input tokens than this."""
    rates: ClassRates


class ChargeLine(msgspec.Struct, frozen=True, kw_only=True):
    """What one class of a request costs: quantity x rate."""

    token_class: str
    """One of `TOKEN_CLASSES`, or `request`."""
    quantity: int
    rate_pico: int
    amount_pico: int


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What a model costs under one price key. Equal keys mean equal rates, for ever."""

    price_key: str
    """Names the book's version, the provider, the model and, where there are several, the price among its prices."""
    base: ClassRates
    tiers: tuple[ContextTier, ...] = ()
    """Ascending by `start_input_tokens`."""
    request_pico: int = 0
    """Pico-USD per request, whatever its tokens."""
    fees: tuple[tuple[str, int], ...] = ()
    """(tool, pico-USD for each use) of tools that the provider runs itself. No answer here carries one: a request for
    such a tool is refused, and so is a model that uses them unasked, unless a resource prices it."""
    text_only: bool = False
    """Input that is no text is billed in units that are not counted here: it has no price."""
    stated: tuple[str, ...] = ()
    """The classes for which the source states a rate; the others are fallbacks."""
    free: bool = False
    """Costs nothing, and that is meant: a resource says so, or the source states zero for everything."""

    def at(self, input_tokens: int) -> ClassRates:
        """The rates of a request with so many input tokens, of whatever class."""
        found = self.base
        for tier in self.tiers:
            if input_tokens <= tier.start_input_tokens:
                break
            found = tier.rates
        return found

    def lines(self, counts: TokenCounts, requests: int = 1) -> list[ChargeLine]:
        """What the usage of `requests` requests costs, by class; classes without tokens have no line.

        The context tier is that of `counts` as one request: sum usage after pricing, not before.
        """
        return list(self._lines(counts, requests))

    def _lines(self, counts: TokenCounts, requests: int) -> Iterator[ChargeLine]:
        rates = self.at(counts.input_tokens)
        for token_class, quantity in counts.by_class().items():
            yield _line(token_class, quantity, rates.rate_pico(token_class))
        if requests and self.request_pico:
            yield _line(REQUEST_CLASS, requests, self.request_pico)

    def amount_pico(self, counts: TokenCounts, requests: int = 1) -> int:
        """What the usage costs in all, exactly: the sum of its lines."""
        rates = self.at(counts.input_tokens)
        return (
            counts.input * rates.input
            + counts.cache_read * rates.cache_read
            + counts.cache_write * rates.cache_write
            + counts.output * rates.output
            + counts.reasoning * rates.reasoning
            + counts.audio_input * rates.audio_input
            + counts.audio_output * rates.audio_output
            + requests * self.request_pico
        )

    def dearest_within(self, input_tokens_max: int) -> tuple[int, int]:
        """The highest (input, output) rates of a request that has at most so many input tokens."""
        reachable = [self.base] + [tier.rates for tier in self.tiers if input_tokens_max > tier.start_input_tokens]
        return (
            max(rates.dearest_input_pico for rates in reachable),
            max(rates.dearest_output_pico for rates in reachable),
        )


def _line(token_class: str, quantity: int, rate_pico: int) -> ChargeLine:
    return ChargeLine(token_class=token_class, quantity=quantity, rate_pico=rate_pico, amount_pico=quantity * rate_pico)
