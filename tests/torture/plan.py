"""What a round of torture will do, drawn from a seed: streams, kills, faults, limits, clients that leave."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torture.recordings import MODEL, Recording

Unit = Literal["sessions", "project"]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much happens in a round."""

    sidecars: int
    streams: int
    round_s: float
    session_limit_usd: float
    intervals_ms: tuple[int, ...]
    tokens_per_chunk: tuple[int, ...]
    chunks_max: int
    recordings: Mapping[str, Recording] = field(default_factory=dict[str, Recording])
    """Where there are any, a third of the streams replays them."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """One client and what it asks the simulator for."""

    number: int
    """The simulator's `seed`: it finds the request again that no client was told the id of."""
    at_s: float
    sidecar: int
    http2: bool
    model: str
    chunks: int
    tokens_per_chunk: int
    interval_ms: int
    usage: Literal["asked", "never"]
    provider_dies_after: int | None
    """Chunks after which the provider closes the connection."""
    leaves_after: int | None
    """Chunks after which the client goes."""
    leaves_unanswered_s: float | None
    """The client goes after so long, while the provider has not even sent a head."""
    recording: Recording | None = None
    """Replayed instead, cut at random bytes."""
    split_bytes: int = 0

    @property
    def prompt_words(self) -> int:
        """How much longer the question must be, for the recorded provider billed that much."""
        return self.recording.prompt_tokens if self.recording is not None else 0

    @property
    def sim(self) -> dict[str, object]:
        """The member `sim` of the request."""
        members: dict[str, object] = {"seed": self.number}
        if self.recording is not None:
            members |= {
                "recording": self.recording.name,
                "chunk_split": self.split_bytes,
                "chunk_split_random": True,
                "chunk_interval_ms": self.interval_ms,
            }
        else:
            members |= {
                "output_tokens": self.chunks * self.tokens_per_chunk,
                "tokens_per_chunk": self.tokens_per_chunk,
                "chunk_interval_ms": self.interval_ms,
                "usage": self.usage,
            }
            if self.provider_dies_after is not None:
                members["reset_after_chunks"] = self.provider_dies_after
        if self.leaves_unanswered_s is not None:
            members["head_delay_ms"] = 60_000
        return members


Whom = int | Literal["postgres", "keeper"]
"""A sidecar by its number, or one of the others."""
How = Literal["kill", "term", "fast", "immediate"]
"""`kill -9` (of PostgreSQL: with all its processes), SIGTERM, or PostgreSQL's other ways to stop."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Somebody is ended, and comes back."""

    at_s: float
    whom: Whom
    how: How
    down_s: float


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The wire between a sidecar and PostgreSQL fails."""

    at_s: float
    sidecar: int
    what: Literal["cut", "stall", "lost", "late"]
    statement: str
    """Whose answer is `lost`, or which arrives `late`."""
    for_s: float


@dataclass(frozen=True, kw_only=True)
class LimitChange:
    """Another limit: of every session, or of the project above what it has spent so far."""

    at_s: float
    budget: Unit
    limit_usd: float


@dataclass(frozen=True, kw_only=True)
class Suspension:
    """The kill switch, for a while."""

    at_s: float
    budget: Unit
    for_s: float


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """Everything that happens in one round; times are seconds since its begin."""

    number: int
    streams: tuple[StreamPlan, ...]
    stops: tuple[Stop, ...]
    faults: tuple[Fault, ...]
    limits: tuple[LimitChange, ...]
    suspensions: tuple[Suspension, ...]
    project_usd: float
    """What the project may spend above what it has spent before the round."""
    new_session: bool


def plan_round(seed: int, number: int, scale: Scale, *, kill_postgres: bool | None = None) -> RoundPlan:
    """The same for the same arguments. `kill_postgres`: whether it is killed; None leaves it to chance."""
    rng = random.Random(f"{seed}/{number}")
    streams = tuple(_stream(rng, number * 100_000 + index + 1, scale) for index in range(scale.streams))
    stops = [_stop(rng, at_s, scale) for at_s in _moments(rng, rng.randint(1, max(1, scale.sidecars - 1)), scale)]
    by_chance = rng.random() < 0.4
    how: How = rng.choice(("kill", "kill", "fast", "immediate"))
    at_s, down_s = rng.uniform(0.2, 0.7) * scale.round_s, rng.choice([0.0, 0.3, 1.0, 3.0])
    if by_chance if kill_postgres is None else kill_postgres:
        how = how if kill_postgres is None else "kill"
        stops.append(Stop(at_s=at_s, whom="postgres", how=how, down_s=min(down_s, scale.round_s / 2)))
    if rng.random() < 0.2:
        stops.append(Stop(at_s=rng.uniform(0, 1) * scale.round_s, whom="keeper", how="kill", down_s=0.5))
    return RoundPlan(
        number=number,
        streams=streams,
        stops=tuple(sorted(stops, key=lambda stop: stop.at_s)),
        faults=tuple(_fault(rng, at_s, scale) for at_s in _moments(rng, rng.randint(0, 3), scale)),
        limits=tuple(_limit(rng, at_s, scale) for at_s in _moments(rng, rng.randint(0, 3), scale)),
        suspensions=tuple(
            Suspension(at_s=at_s, budget=rng.choice(("sessions", "project")), for_s=rng.uniform(0.3, 1.0))
            for at_s in _moments(rng, int(rng.random() < 0.25), scale)
        ),
        project_usd=scale.session_limit_usd * rng.choice([0.3, 0.8, 2.0, 5.0]),
        new_session=rng.random() < 0.5,
    )


def _moments(rng: random.Random, number: int, scale: Scale) -> list[float]:
    return sorted(rng.uniform(0.1, 1.0) * scale.round_s for _ in range(number))


def _stop(rng: random.Random, at_s: float, scale: Scale) -> Stop:
    # Now and then it stays away for so long that the keeper finds it dead, and charges what it held.
    down_s = rng.uniform(0.0, 1.0) if rng.random() < 0.85 else rng.uniform(3.0, 5.0)
    return Stop(at_s=at_s, whom=rng.randrange(scale.sidecars), how=rng.choice(("kill", "kill", "term")), down_s=down_s)


def _fault(rng: random.Random, at_s: float, scale: Scale) -> Fault:
    return Fault(
        at_s=at_s,
        sidecar=rng.randrange(scale.sidecars),
        what=rng.choice(("cut", "stall", "lost", "lost", "late")),
        statement=rng.choice(("ledger.settle_", "ledger.settle_", "ledger.extend_", "ledger.admit_")),
        for_s=rng.choice([0.2, 0.5, 2.5]),
    )


def _limit(rng: random.Random, at_s: float, scale: Scale) -> LimitChange:
    budget: Unit = rng.choice(("sessions", "project"))
    factor = rng.uniform(0.2, 1.5) if budget == "sessions" else rng.uniform(0.0, 2.0)
    return LimitChange(at_s=at_s, budget=budget, limit_usd=round(scale.session_limit_usd * factor, 6))


def _stream(rng: random.Random, number: int, scale: Scale) -> StreamPlan:
    chunks = rng.randint(1, rng.choice([20, scale.chunks_max]))
    fate = rng.random()
    recording = None
    if scale.recordings and rng.random() < 0.33:
        recording = scale.recordings[rng.choice(sorted(scale.recordings))]
    return StreamPlan(
        number=number,
        at_s=rng.uniform(0.0, 0.8) * scale.round_s,
        sidecar=rng.randrange(scale.sidecars),
        http2=rng.random() < 0.3,
        model=MODEL if recording is not None else rng.choice(["gpt-4o", "gpt-4o-mini"]),
        chunks=chunks,
        tokens_per_chunk=rng.choice(scale.tokens_per_chunk),
        interval_ms=rng.choice(scale.intervals_ms),
        usage=rng.choice(["asked", "asked", "asked", "never"]),
        provider_dies_after=rng.randint(1, chunks) if fate < 0.06 else None,
        leaves_after=rng.randint(0, chunks) if 0.1 < fate < 0.25 else None,
        leaves_unanswered_s=rng.uniform(0.0, 0.5) if 0.25 < fate < 0.3 else None,
        recording=recording,
        split_bytes=max(rng.choice([7, 60, 400]), recording.size_bytes // 100 if recording is not None else 0),
    )
