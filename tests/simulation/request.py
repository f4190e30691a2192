"""One request of a simulated world: what is asked, what the provider will do, and what really happened."""

import math
import random
from typing import Any, Literal
from uuid import UUID

import msgspec

from behest_ledger.prices.rates import ClassRates, Rates
from behest_ledger.request_id import request_id
from behest_ledger.token_counts import TokenCounts
from behest_proxy.models import ModelFacts
from behest_proxy.request import InputCount, parse
from simulation.plan import Faults
from simulation.world import EPOCH_S

TOKEN = "~"
"""A token in an answer: text is counted by its length, and by this sign in what a client got."""
USERS = ("ann", "bob", "eve")
RATES = (
    Rates(price_key="plain", base=ClassRates.of({"input": 3, "output": 10})),
    Rates(price_key="fee", base=ClassRates.of({"input": 2, "output": 7, "reasoning": 11}), request_pico=50),
)
Usage = Literal["none", "last", "growing"]
End = Literal["done", "close", "break", "stall"]


class Script(msgspec.Struct, kw_only=True):
    """What the provider does with a request."""

    head_delay_s: float
    status: int
    """0: no connection."""
    chunks: list[int]
    """Visible tokens of each; below zero: reasoning."""
    interval_s: float
    per_read: int
    cut: bool
    """Reads end anywhere, also inside of a chunk."""
    usage: Usage
    end: End
    extra_tokens: int
    """Billed beyond what is visible, as far as the reserve allows."""
    keeps_word: bool
    """It stops at its limit, and bills no more than it documents."""


class Asked:
    """A request, and the truth about it, as no process knows it."""

    def __init__(self, number: int, seed: int, faults: Faults, clock_s: float) -> None:
        pick = random.Random(f"request {seed} {number}")
        self.number = number
        self.request_id: UUID = request_id(int((EPOCH_S + clock_s) * 1000), pick.getrandbits(74))
        self.random = pick
        self.user = pick.choice(USERS)
        self.session = f"s{pick.randint(1, 3)}"
        self.rates = pick.choice(RATES)
        self.facts = ModelFacts(visible_only=pick.random() < 0.7)
        self.ratio = pick.choice([1.0, 1.35])
        streamed = pick.random() < 0.8
        best = pick.randint(1, 40)
        self.input = InputCount(best, best + pick.choice([0, 5]), True)
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "stream": streamed}
        if streamed and pick.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
        if pick.random() < 0.3:
            body["max_tokens"] = pick.randint(1, 400)
        self.request = parse(msgspec.json.encode(body))
        self.script = _script(pick, faults)
        self.leaves_after_s = pick.uniform(0.0, 4.0) if pick.random() < faults.client_leaves else None
        self.stalls_after_bytes = pick.randint(0, 3000) if pick.random() < faults.client_stalls else None
        self.stalls_for_s = pick.choice([0.5, 100.0])

        self.begun = False
        self.sent = False
        """The provider has the whole request."""
        self.sending = False
        self.first_byte = False
        self.handed = 0
        """Output tokens that were written to the client's stream, whether or not it was still there."""
        self.received = 0
        self.delivered = 0
        """Output tokens that the provider gave to the process."""
        self.usage: TokenCounts | None = None
        """What the provider said last, as far as the process got it."""
        self.usage_is_final = False
        self.killed = False
        """Its process was killed while it lived."""
        self.forgotten = False
        """Its process was killed, and its journal is gone or was not whole."""
        self.ended = False
        """The client's answer came to an end, of whatever kind."""
        self.refused_here = False

    @property
    def keeps_word(self) -> bool:
        """Whether its provider does what it documents."""
        return self.script.keeps_word

    def attributes(self) -> dict[str, Any]:
        """The verified attributes."""
        return {"namespace": "demo", "project": "demo/shop", "user": self.user, "session": self.session, "model": "m"}

    def billed(self, visible: int, cap_tokens: int | None) -> TokenCounts:
        """What the provider bills for so many visible tokens."""
        output = visible + self.script.extra_tokens
        if self.script.keeps_word:
            output = min(output, math.ceil(visible * self.ratio) + 8)
            if cap_tokens is not None:
                output = max(min(output, cap_tokens), visible)
        return TokenCounts(input=self.input.best_tokens, output=output)


def _script(pick: random.Random, faults: Faults) -> Script:
    keeps_word = pick.random() >= faults.breaks_word
    count = pick.choice([1, 4, 12, 40])
    end: End = "done"
    status = 200
    if pick.random() < faults.provider_breaks:
        end = pick.choice(["break", "close"])
        count = pick.randint(0, count)
    elif pick.random() < faults.provider_stalls:
        end = "stall"
        count = pick.randint(0, count)
    if pick.random() < faults.provider_refuses:
        status = pick.choice([0, 400, 429, 500])
    return Script(
        head_delay_s=pick.choice([0.0, 0.05, 1.0]),
        status=status,
        chunks=[pick.choice([1, 3, 8, 20]) * (1 if pick.random() < 0.9 else -1) for _ in range(count)],
        interval_s=pick.choice([0.0, 0.02, 0.1]),
        per_read=pick.choice([1, 1, 3]),
        cut=pick.random() < 0.3,
        usage="none" if pick.random() < faults.no_usage else pick.choice(["last", "last", "growing"]),
        end=end,
        extra_tokens=pick.choice([0, 2, 8]) if keeps_word else pick.choice([300, 2000]),
        keeps_word=keeps_word,
    )
