"""The figure `chunk`: CPU per forwarded chunk, Behest with everything on against Envoy with nothing on.

Both stand before the same simulator and get the same load, in turns: behest, envoy, behest, envoy. Short and long
answers are played; what a longer answer costs more is the cost of its chunks, what is left is the cost of a request:

    cost of an answer = per request + chunks x per chunk
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from bench.cpu import MachineUse, cpu_s, descendants, snapshot, used_since_s
from bench.load import Played, Wave, Wire, play
from bench.peers import Peer

_SETTLE_S = 0.4
"""After a wave: what is written behind it (the ledger) counts too."""
_IDLE_S = 3.0

ALL_IN_CHUNKS = 500

Length = Literal["short", "long"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table. The pace is such that no process needs a core for itself: see `Turn.busiest`."""

    wire: Wire
    streams: int
    connections: int
    interval_ms: int

    @property
    def name(self) -> str:
        """`chunk-h2-20`; without a pace `chunk-h2-20-bursts`."""
        return f"chunk-{self.wire}-{self.streams}" + ("" if self.interval_ms else "-bursts")


CASES = [
    Case(wire="h2", streams=20, connections=2, interval_ms=10),
    Case(wire="h2", streams=200, connections=4, interval_ms=20),
    Case(wire="h1", streams=20, connections=20, interval_ms=10),
    Case(wire="h1", streams=200, connections=200, interval_ms=20),
]
TOKENS = max(case.streams for case in CASES)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is played: answers per stream in a short wave, chunks of an answer, turns of each proxy."""

    short_responses: int
    short_chunks: int
    long_chunks: int
    turns: int


DEFAULT = Effort(short_responses=3, short_chunks=100, long_chunks=500, turns=2)
QUICK = Effort(short_responses=1, short_chunks=100, long_chunks=300, turns=1)
THOROUGH = Effort(short_responses=4, short_chunks=100, long_chunks=1000, turns=5)


@dataclass(frozen=True)
class Spent:
    """What one proxy used for a wave."""

    requests: int
    chunks: int
    cpu_s: float


@dataclass(frozen=True)
class Turn:
    """What one proxy used in one turn of a case."""

    short: Spent
    long: Spent

    @property
    def slope_us(self) -> float:
        """What a chunk costs."""
        short, long = self.short, self.long
        more_s = long.cpu_s / long.requests - short.cpu_s / short.requests
        return more_s / (long.chunks / long.requests - short.chunks / short.requests) * 1e6

    @property
    def request_ms(self) -> float:
        """What a request costs beside its chunks: the intercept."""
        return (self.short.cpu_s - self.short.chunks * self.slope_us / 1e6) / self.short.requests * 1e3

    @property
    def all_in_us(self) -> float:
        """What a chunk of an answer of 500 costs with its share of the request."""
        return self.slope_us + self.request_ms * 1e3 / ALL_IN_CHUNKS


@dataclass
class Result:
    """What one proxy showed in one case: figures are those of the turn in the middle."""

    turns: list[Turn] = field(default_factory=list[Turn])
    postgres_cpu_s: float = 0.0
    shares: dict[str, float] = field(default_factory=dict[str, float])
    """The largest part of a core that each process took during a wave, and `others` of the whole machine."""

    @property
    def slopes_us(self) -> list[float]:
        """Each turn's own, to show how far they differ."""
        return [turn.slope_us for turn in self.turns]

    @property
    def median_us(self) -> float:
        """What a chunk costs."""
        return statistics.median(self.slopes_us)

    @property
    def per_request_ms(self) -> float:
        """What a request costs beside its chunks."""
        return statistics.median(turn.request_ms for turn in self.turns)

    @property
    def all_in_us(self) -> float:
        """What a chunk of an answer of 500 costs with its share of the request."""
        return statistics.median(turn.all_in_us for turn in self.turns)

    @property
    def requests(self) -> int:
        """Answers in all waves."""
        return sum(turn.short.requests + turn.long.requests for turn in self.turns)


class Bench:
    """The processes under measurement, and what they use when nobody asks anything of them."""

    def __init__(
        self,
        peers: list[Peer],
        *,
        simulator_pid: int,
        say: Callable[[str], None],
        announce: Callable[[Wave], Awaitable[None]] | None = None,
    ) -> None:
        """`announce` is told of each wave before it is played."""
        self._peers = peers
        self._simulator_pid = simulator_pid
        self._say = say
        self._announce = announce
        self._idle_share: dict[str, float] = {}

    async def rest(self) -> None:
        """Measure the baseline."""
        self._say(f"idle baseline, {_IDLE_S:.0f} s")
        before = {peer.name: cpu_s(peer.pid) for peer in self._peers}
        await asyncio.sleep(_IDLE_S)
        self._idle_share = {peer.name: (cpu_s(peer.pid) - before[peer.name]) / _IDLE_S for peer in self._peers}
        self._say("  " + ", ".join(f"{name} {share:.2%} of a core" for name, share in self._idle_share.items()))

    async def run(self, case: Case, effort: Effort, peers: list[Peer] | None = None) -> dict[str, Result]:
        """Play a case's waves in turns, for all peers if none are named."""
        peers = self._peers if peers is None else peers
        results = {peer.name: Result() for peer in peers}
        waves: dict[Length, Wave] = {
            "short": _wave(case, responses=effort.short_responses, chunks=effort.short_chunks),
            "long": _wave(case, responses=1, chunks=effort.long_chunks),
        }
        warm = _wave(case, responses=1, chunks=20)
        for peer in peers:
            if self._announce is not None:
                await self._announce(warm)
            await play(warm, peer.base_url, peer.tokens)
        for turn in range(effort.turns):
            spent: dict[str, dict[Length, Spent]] = {peer.name: {} for peer in peers}
            for length, wave in waves.items():
                for peer in peers:
                    self._say(
                        f"{case.name}: turn {turn + 1} of {effort.turns}, {peer.name}, {wave.requests} answers"
                        f" of {wave.chunks} chunks, {wave.expected_s:.0f} s"
                    )
                    spent[peer.name][length] = await self._measured(peer, wave, results[peer.name])
            for name, by_length in spent.items():
                results[name].turns.append(Turn(by_length["short"], by_length["long"]))
        return results

    async def _measured(self, peer: Peer, wave: Wave, result: Result) -> Spent:
        if self._announce is not None:
            await self._announce(wave)
        postgres = snapshot(descendants(peer.parent_pid, "postgres") if peer.parent_pid else [])
        started_s, machine = time.monotonic(), MachineUse.now()
        proxy_s, simulator_s = cpu_s(peer.pid), cpu_s(self._simulator_pid)
        played = await play(wave, peer.base_url, peer.tokens)
        await asyncio.sleep(_SETTLE_S)
        elapsed_s = time.monotonic() - started_s
        used = {
            peer.name: cpu_s(peer.pid) - proxy_s,
            "simulator": cpu_s(self._simulator_pid) - simulator_s,
            "client": played.client_cpu_s,
            "postgres": used_since_s(postgres),
        }
        result.postgres_cpu_s += used["postgres"]
        self._note_shares(result, used, played, machine)
        used_s = used[peer.name] - self._idle_share.get(peer.name, 0.0) * elapsed_s
        return Spent(played.requests, wave.requests * wave.chunks, used_s)

    @staticmethod
    def _note_shares(result: Result, used: dict[str, float], played: Played, machine_before: MachineUse) -> None:
        machine = MachineUse.now()
        busy_s = machine.busy_s - machine_before.busy_s
        others = max(0.0, busy_s - sum(used.values())) / (machine.total_s - machine_before.total_s)
        shares = {name: seconds / played.elapsed_s for name, seconds in used.items()}
        for name, share in {**shares, "others": others}.items():
            result.shares[name] = max(result.shares.get(name, 0.0), share)


def _wave(case: Case, *, responses: int, chunks: int) -> Wave:
    return Wave(
        wire=case.wire,
        streams=case.streams,
        connections=case.connections,
        responses=responses,
        chunks=chunks,
        interval_ms=case.interval_ms,
    )


def table(results: dict[str, dict[str, Result]]) -> str:
    """All cases, for people."""
    head = (
        f"{'case':<14}{'proxy':<8}{'us/chunk':>9}{'each turn':>28}{'ms/request':>12}{'us, all in':>12}"
        f"{'postgres ms/req':>17}   most of a core in a wave"
    )
    lines = [head]
    for name, by_peer in results.items():
        for peer, result in by_peer.items():
            turns = " ".join(f"{slope:.1f}" for slope in result.slopes_us)
            postgres = f"{result.postgres_cpu_s / result.requests * 1e3:.2f}" if peer == "behest" else "-"
            shares = ", ".join(f"{who} {share:.0%}" for who, share in result.shares.items() if share >= 0.005)
            lines.append(
                f"{name:<14}{peer:<8}{result.median_us:>9.1f}{turns:>28}{result.per_request_ms:>12.2f}"
                f"{result.all_in_us:>12.1f}{postgres:>17}   {shares}"
            )
    return "\n".join(lines)


def lines(results: dict[str, dict[str, Result]]) -> list[str]:
    """One line per case, for machines too."""
    found: list[str] = []
    for name, by_peer in results.items():
        behest, envoy = by_peer["behest"], by_peer["envoy"]
        ratio = behest.median_us / envoy.median_us
        found.append(
            f"{name}: behest {behest.median_us:.1f} us, envoy {envoy.median_us:.1f} us, ratio {ratio:.2f}"
            f" (per request: {behest.per_request_ms:.2f} ms, {envoy.per_request_ms:.2f} ms;"
            f" {behest.all_in_us / envoy.all_in_us:.2f} all in)"
        )
    return found
