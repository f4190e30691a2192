"""What a seed makes of the world: how many of whom, and which faults may happen how often."""

import random
from dataclasses import dataclass, field
from typing import Literal

FaultName = Literal["kill", "lost_node", "freeze", "drain", "outage", "restart", "limits", "suspension", "full_disk"]

TTL_S = 6.0
GRACE_S = 8.0
END_S = 90.0
"""By then every request must have ended, and the keeper have had its grace."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Probabilities, each per statement or per request. A seed has some of them and not the others."""

    lost_before: float = 0.0
    lost_after: float = 0.0
    silent: float = 0.0
    """Of what is lost, how much is lost without a word, so that only a timeout tells."""
    conflict: float = 0.0
    busy: float = 0.0
    """A lock timeout."""
    slow: float = 0.0
    """A statement that takes seconds to arrive: it may come after its caller gave up, or its successors."""
    repeated: float = 0.0
    """The same statement arrives a second time, later."""
    client_leaves: float = 0.0
    client_stalls: float = 0.0
    provider_breaks: float = 0.0
    provider_stalls: float = 0.0
    provider_refuses: float = 0.0
    no_usage: float = 0.0
    breaks_word: float = 0.0
    """Providers that generate or bill beyond what they were told or document."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A world before it begins."""

    seed: int
    sidecars: int
    requests: int
    arrivals_s: float
    faults: Faults
    incidents: tuple[tuple[float, FaultName], ...]
    """When something happens to somebody."""
    limit_percent: int
    """Of what all requests would cost."""
    policy: Literal["checkpoint", "hold"]
    keeper_interval_s: float
    latency_s: float
    periods: tuple[str, ...] = field(default=("lifetime",))

    @property
    def provider_keeps_its_word(self) -> bool:
        """Whether overshoot must be zero."""
        return self.faults.breaks_word == 0.0


_NAMES: tuple[FaultName, ...] = (
    "kill", "lost_node", "freeze", "drain", "outage", "restart", "limits", "suspension", "full_disk",
)  # fmt: skip


def plan_for(seed: int) -> Plan:
    """A small world: 2 to 8 sidecars, and a mix of faults of its own."""
    pick = random.Random(f"plan {seed}")

    def some(most: float) -> float:
        return pick.random() * most if pick.random() < 0.5 else 0.0

    faults = Faults(
        lost_before=some(0.06),
        lost_after=some(0.06),
        silent=pick.random(),
        conflict=some(0.1),
        busy=some(0.04),
        slow=some(0.04),
        repeated=some(0.08),
        client_leaves=some(0.5),
        client_stalls=some(0.1),
        provider_breaks=some(0.3),
        provider_stalls=some(0.1),
        provider_refuses=some(0.2),
        no_usage=some(0.8),
        breaks_word=0.3 if pick.random() < 0.1 else 0.0,
    )
    names: list[FaultName] = [name for name in _NAMES if pick.random() < 0.4]
    arrivals_s = pick.choice([1.0, 4.0, 10.0])
    incidents: list[tuple[float, FaultName]] = [
        (pick.uniform(0.3, arrivals_s + 3.0), pick.choice(names)) for _ in range(pick.randint(0, 8)) if names
    ]
    sidecars = pick.randint(2, 8)
    return Plan(
        seed=seed,
        sidecars=sidecars,
        requests=pick.randint(3, 8) * sidecars,
        arrivals_s=arrivals_s,
        faults=faults,
        incidents=tuple(sorted(incidents)),
        limit_percent=pick.choice([15, 40, 80, 300]),
        policy=pick.choice(["checkpoint", "hold"]),
        keeper_interval_s=pick.choice([0.5, 2.0, 5.0]),
        latency_s=pick.choice([0.0, 0.002, 0.02, 0.2]),
        periods=tuple(sorted({"lifetime", pick.choice(["lifetime", "minute"])})),
    )


def crowd_for(seed: int) -> Plan:
    """A large world: 300 sidecars, and few faults."""
    pick = random.Random(f"crowd {seed}")
    names: list[FaultName] = ["kill", "kill", "lost_node", "freeze", "drain", "outage", "limits"]
    incidents: list[tuple[float, FaultName]] = [(pick.uniform(0.5, 8.0), pick.choice(names)) for _ in range(30)]
    return Plan(
        seed=seed,
        sidecars=300,
        requests=600,
        arrivals_s=6.0,
        faults=Faults(
            lost_before=0.005,
            lost_after=0.01,
            silent=0.3,
            conflict=0.02,
            repeated=0.01,
            client_leaves=0.1,
            provider_breaks=0.05,
            no_usage=0.2,
        ),
        incidents=tuple(sorted(incidents)),
        limit_percent=pick.choice([60, 400]),
        policy="checkpoint",
        keeper_interval_s=2.0,
        latency_s=0.005,
    )
