"""What a gateway adds to the time to the first byte, and to the time between two chunks, against the provider alone."""

import asyncio
import time
from dataclasses import dataclass

from bench.answers import Answer
from bench.books import Spread
from bench.load import Wave, Wire, play


class TimedAnswer(Answer):
    """Notes when each of its reads came. Its clock starts when it is made, right before the request is sent."""

    __slots__ = ("began_s", "reads_s")

    def __init__(self) -> None:
        super().__init__()
        self.began_s = time.perf_counter()
        self.reads_s: list[float] = []

    def feed(self, data: bytes) -> None:
        """Body bytes."""
        self.reads_s.append(time.perf_counter())
        super().feed(data)


@dataclass(frozen=True)
class Latency:
    """What a client saw."""

    first_byte: Spread
    gap: Spread

    def added_ms(self, direct: "Latency") -> tuple[float, float, float, float]:
        """First byte p50 and p99, gap p50 and p99: more than without anything in between, which p99s may not be."""
        return (
            self.first_byte.ms(0.5) - direct.first_byte.ms(0.5),
            self.first_byte.ms(0.99) - direct.first_byte.ms(0.99),
            self.gap.ms(0.5) - direct.gap.ms(0.5),
            self.gap.ms(0.99) - direct.gap.ms(0.99),
        )


def wave(wire: Wire, *, responses: int) -> Wave:
    """Five streams at once, answers of twenty chunks: the machine is far from busy."""
    return Wave(wire=wire, streams=5, connections=1, responses=responses, chunks=20, interval_ms=10)


async def measure(load: Wave, base_url: str, tokens: list[str]) -> Latency:
    """Play it once to warm up, and once to measure."""
    await play(load, base_url, tokens)
    answers: list[TimedAnswer] = []

    def watch() -> TimedAnswer:
        answers.append(TimedAnswer())
        return answers[-1]

    await asyncio.sleep(0.5)
    await play(load, base_url, tokens, watch=watch)
    first = [answer.reads_s[0] - answer.began_s for answer in answers]
    gaps = [
        later - sooner
        for answer in answers
        for sooner, later in zip(answer.reads_s, answer.reads_s[1:-1], strict=False)  # the end comes in one go
    ]
    return Latency(Spread(first), Spread(gaps))
