"""The meter of one answer: what was forwarded so far, and how far the credit reaches.

Credit is counted in output tokens. Because a local count of visible text is often below the provider's own, the
credit must always cover a reserve above the count: `ceil(ratio x counted)`, 8 tokens a choice and 48 a tool call.
What the reserve covers is charged only if the provider says so.
"""

import math

RESERVE_PER_CHOICE_TOKENS = 8
RESERVE_PER_TOOL_CALL_TOKENS = 48
FIRST_TRANCHE_TOKENS = 512
TRANCHE_MAX_TOKENS = 16_384
GRANT_MIN_TOKENS = 16
"""The least that is asked for, so that a stream does not ask for every chunk."""


class Meter:
    """Counts and credit of one request. Pure arithmetic: who asks for credit, and when, is the exchange's part."""

    __slots__ = (
        "_cap_tokens",
        "_enough_tokens",
        "_payable_tokens",
        "_ratio_percent",
        "_tool_call_tokens",
        "credit_tokens",
        "output",
        "reasoning",
        "reserve_tokens",
        "tranche_tokens",
    )

    def __init__(
        self, *, ratio: float, choices: int, credit_tokens: int, cap_tokens: int | None, metered: bool
    ) -> None:
        """`cap_tokens` is the most that the provider may bill, where its own limit makes that known.

        `metered` False means that the whole answer was held for: then no reserve is kept, and the credit is only
        reached by a provider that generates past its limit.
        """
        # Rounded up; the inner rounding only takes away what binary fractions add.
        self._ratio_percent = math.ceil(round(ratio * 100, 6)) if metered else 100
        self._cap_tokens = cap_tokens
        self._tool_call_tokens = RESERVE_PER_TOOL_CALL_TOKENS if metered else 0
        self.reserve_tokens = RESERVE_PER_CHOICE_TOKENS * choices if metered else 0
        self.credit_tokens = credit_tokens
        self.tranche_tokens = credit_tokens
        self.output = 0
        self.reasoning = 0
        self._look_ahead()

    @property
    def counted_tokens(self) -> int:
        """Everything forwarded so far, of whatever class."""
        return self.output + self.reasoning

    def required_tokens(self, counted_tokens: int) -> int:
        """The credit that must be there once so many tokens were forwarded."""
        required = -(-counted_tokens * self._ratio_percent // 100) + self.reserve_tokens
        if self._cap_tokens is not None and required > self._cap_tokens:
            # The provider stops there: beyond, only what is really forwarded has to be covered.
            return max(self._cap_tokens, counted_tokens)
        return required

    def pay(self, output: int, reasoning: int = 0) -> bool:
        """Count tokens that are about to be forwarded. False: the credit does not reach, and nothing was counted."""
        if self.output + self.reasoning + output + reasoning > self._payable_tokens:
            return False
        self.output += output
        self.reasoning += reasoning
        return True

    def _look_ahead(self) -> None:
        """How far the credit reaches, as counts: `pay` and `runs_low` come with every read, new credit seldom."""
        if self.is_covered:
            self._payable_tokens = self._enough_tokens = self.credit_tokens
        else:
            self._payable_tokens = self._reach(self.credit_tokens)
            self._enough_tokens = self._reach(self.credit_tokens - (self.tranche_tokens + 1) // 2)

    def _reach(self, credit_tokens: int) -> int:
        """The highest count that some credit below the cap covers: the inverse of `required_tokens`."""
        return (credit_tokens - self.reserve_tokens) * 100 // self._ratio_percent

    def reserve_tool_calls(self, calls: int) -> None:
        """Keep more in reserve for tool calls, whose framing the provider bills and nobody sees."""
        self.reserve_tokens += self._tool_call_tokens * calls
        self._look_ahead()

    def add_credit(self, tokens: int) -> None:
        """More credit was granted."""
        self.credit_tokens += tokens
        self.tranche_tokens = tokens
        self._look_ahead()

    def missing_tokens(self, output: int, reasoning: int) -> int:
        """What has to be asked for at least, so that these tokens can be forwarded."""
        required = self.required_tokens(self.output + self.reasoning + output + reasoning)
        return max(required - self.credit_tokens, 1)

    @property
    def runs_low(self) -> bool:
        """Half of the last tranche is used: time to ask for the next one, while the stream goes on."""
        return self.output + self.reasoning > self._enough_tokens

    @property
    def is_covered(self) -> bool:
        """The credit covers the most that the provider may bill: no more is ever needed."""
        return self._cap_tokens is not None and self.credit_tokens >= self._cap_tokens

    def next_want_tokens(self, need_tokens: int) -> int:
        """The size of the next tranche: they double, so that a long stream asks seldom."""
        want = max(need_tokens, min(self.tranche_tokens * 2, TRANCHE_MAX_TOKENS), GRANT_MIN_TOKENS)
        if self._cap_tokens is not None:
            want = max(need_tokens, min(want, self._cap_tokens - self.credit_tokens))
        return want
