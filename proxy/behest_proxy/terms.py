"""What is fixed of an exchange when its request is admitted, and the phases that it goes through."""

import enum
from collections.abc import Callable, Sequence

import msgspec

from behest_ledger.token_counts import TokenCounts


class Phase(enum.Enum):
    """Where an exchange is; the drawing in `exchange` shows how they follow each other."""

    ADMITTING = "admitting"
    CALLING = "calling"
    REFUSED = "refused"
    """The provider answered other than 2xx: its body is read, within a bound."""
    STREAMING = "streaming"
    LINGERING = "lingering"
    """The client has every finish_reason and left: only the usage is waited for."""
    ENDED = "ended"


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What a request was admitted with: see `exchange`."""

    streamed: bool
    """The client asked for a stream; otherwise the answer is put together and given as a whole."""
    include_usage: bool
    upstream_streams: bool = True
    """False: the provider gives its answer as a whole, whatever the client asked for."""
    kept: bool = False
    """What is not streamed is remembered chunk by chunk too."""
    said: Sequence[bytes] = ()
    """Chunks of earlier attempts at the same answer, which is given as a whole."""
    choices: int
    input_bound_tokens: int
    """What was held for the input: no tokenizer makes more of it."""
    input_counts: TokenCounts
    count: Callable[[str], int]
    """Tokens in a text."""
    ratio: float
    """What a local count is multiplied with to be above the provider's."""
    amount_pico: Callable[[TokenCounts], int]
    """The price of some tokens, by the rates fixed at admission."""
    metered: bool
    """Held in tranches; False: the worst case is held, and the provider was told to stop there."""
    clamp_tokens: int | None = None
    """The limit per choice that we set or lowered; None: the caller's own limit stands."""
    cap_tokens: int | None = None
    """The most output that the provider may bill, over all choices, where its limits make that known."""
    hidden_tokens_per_second: int = 0

    def hidden_tokens(self, elapsed_s: float, *, seen_tokens: int, room_tokens: int) -> int:
        """An estimate of what a model thought in so long beside what was seen of it, within what is held."""
        made_tokens = int(max(0.0, elapsed_s) * self.hidden_tokens_per_second)
        return max(0, min(room_tokens, made_tokens - seen_tokens))
