"""The figure `field`: Behest and every gateway that can be installed here, on one simulator, in one run.

What each of them did meanwhile is said beside its figures: Behest has everything on, the others what they start with.
"""

import asyncio
import contextlib
import json
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import Request, urlopen

from bench import cancel, footprint, latency, plain
from bench.answers import BrokenAnswer
from bench.chunk import Bench, Case, Effort, Result
from bench.footprint import Footprint
from bench.gateways import Gateway
from bench.latency import Latency
from bench.load import Wave, Wire, pace_of
from bench.peers import Peer, PeerError, simulator
from bench.plain import Throughput

_SLOW_US = 500
_SLOW_ABORTS = 20
_AFTER_FAULT_S = 3.0
"""Then a case is tried once more: on a busy machine a database may be too slow for the begin of two hundred streams."""
_FIGURE_S = 420.0
"""What does not end by then will not."""
DIRECT = "direct"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    cases: list[tuple[Case, Effort, Effort | None]]
    """With what is played of it: for most, and for those whose chunks cost so much that it would take all day."""
    responses: int
    """Of each of five streams, for latencies."""
    open_streams: int
    aborts: int
    plain_s: float


def _case(wire: Wire, streams: int, interval_ms: int) -> Case:
    return Case(wire=wire, streams=streams, connections=max(2, streams // 60), interval_ms=interval_ms)


def _effort(short_chunks: int, long_chunks: int, *, turns: int, responses: int = 1) -> Effort:
    return Effort(short_responses=responses, short_chunks=short_chunks, long_chunks=long_chunks, turns=turns)


def plan(*, quick: bool, turns: int) -> Plan:
    """Quick: a look in under three minutes, whose figures are rough. Else the whole, each case so many times."""
    if quick:
        brief, slow = _effort(100, 300, turns=1), _effort(30, 130, turns=1)
        cases: list[tuple[Case, Effort, Effort | None]] = [
            (_case(wire, 20, interval_ms), brief, slow) for wire in cancel.WIRES for interval_ms in (10, 0)
        ]
        return Plan(cases=cases, responses=6, open_streams=100, aborts=20, plain_s=2.0)
    cases = []
    for wire in cancel.WIRES:
        cases += [
            (_case(wire, 20, 10), _effort(100, 1000, turns=turns, responses=2), _effort(100, 1000, turns=1)),
            (_case(wire, 200, 20), _effort(100, 1000, turns=turns), _effort(20, 120, turns=1)),
            (_case(wire, 1000, 100), _effort(30, 130, turns=turns), None),
            (_case(wire, 20, 0), _effort(100, 1000, turns=turns, responses=2), _effort(100, 1000, turns=1)),
            (_case(wire, 200, 0), _effort(100, 1000, turns=turns), _effort(20, 120, turns=1)),
        ]
    return Plan(cases=cases, responses=60, open_streams=500, aborts=200, plain_s=6.0)


@dataclass
class Figures:
    """What came out, by gateway and wire. What is missing could not be measured: `faults` says why."""

    gateways: list[Gateway]
    missing: list[tuple[str, str]]
    chunks: dict[str, dict[str, Result]] = field(default_factory=dict[str, dict[str, Result]])
    """By the case's name."""
    latencies: dict[tuple[str, Wire], Latency] = field(default_factory=dict[tuple[str, Wire], Latency])
    footprints: dict[tuple[str, Wire], Footprint] = field(default_factory=dict[tuple[str, Wire], Footprint])
    aborts: dict[tuple[str, Wire], cancel.Latencies] = field(default_factory=dict[tuple[str, Wire], cancel.Latencies])
    plain: dict[str, Throughput] = field(default_factory=dict[str, Throughput])
    faults: list[str] = field(default_factory=list[str])

    async def note(self, what: str, work: Awaitable[None]) -> None:
        """A figure that cannot be measured is named, and the others go on."""
        try:
            async with asyncio.timeout(_FIGURE_S):
                await work
        except (BrokenAnswer, PeerError, OSError, TimeoutError) as error:
            self.faults.append(f"{what}: {error or type(error).__name__}")
        except Exception:  # noqa: BLE001 - a gateway of somebody else's may fail in any way
            self.faults.append(f"{what}: {traceback.format_exc(limit=1).strip().splitlines()[-1]}")


def measure(
    folder: Path,
    gateways: list[Gateway],
    missing: list[tuple[str, str]],
    wanted: Plan,
    run: Callable[[Awaitable[None]], None],
    say: Callable[[str], None],
) -> Figures:
    """Everything. `run` awaits, on the event loop of the bench."""
    figures = Figures(gateways, missing)
    with simulator(folder) as (upstream_url, simulator_pid):
        behave = _behave(upstream_url)
        for gateway in gateways:
            for wire in cancel.WIRES:
                run(
                    figures.note(
                        f"memory of {gateway.name} over {wire}",
                        _memory(folder, gateway, wire, upstream_url, wanted, figures, behave, say),
                    )
                )
        with contextlib.ExitStack() as stack:
            streams = max(case.streams for case, _, _ in wanted.cases)
            peers: list[Peer] = []
            for gateway in gateways:
                say(f"starting {gateway.name} {gateway.version}")
                try:
                    peers.append(stack.enter_context(gateway.start(_own(folder, gateway.name), upstream_url, streams)))
                except PeerError as error:
                    figures.faults.append(f"{gateway.name}: {error}")
            direct = Peer(DIRECT, upstream_url.removesuffix("/v1"), simulator_pid, ["none"] * streams)
            run(_all_else(figures, wanted, peers, direct, upstream_url, behave, say))
    return figures


def _own(folder: Path, name: str) -> Path:
    """A folder that nobody used before: PostgreSQL's, which is another user's, must be able to come through it."""
    number = sum(1 for _ in folder.iterdir())
    made = folder / f"{name}-{number}"
    made.mkdir()
    made.chmod(0o711)
    return made


def _behave(upstream_url: str) -> footprint.Announce:
    """Tells the simulator what to do where a gateway does not pass on what it was asked."""
    url = upstream_url.removesuffix("/v1") + "/sim/behaviour"

    def put(behaviour: Mapping[str, int]) -> None:
        request = Request(url, data=json.dumps(behaviour).encode(), method="PUT")
        with urlopen(request, timeout=10) as answer:
            answer.read()

    async def behave(behaviour: Mapping[str, int]) -> None:
        await asyncio.to_thread(put, behaviour)

    return behave


async def _memory(
    folder: Path,
    gateway: Gateway,
    wire: Wire,
    upstream_url: str,
    wanted: Plan,
    figures: Figures,
    behave: footprint.Announce,
    say: Callable[[str], None],
) -> None:
    """Of a process that was started for it."""
    if wire == "h2" and gateway.name not in ("behest", "envoy"):
        return
    say(f"memory of {gateway.name} over {wire}, {wanted.open_streams} open streams")
    with gateway.start(_own(folder, gateway.name), upstream_url, wanted.open_streams) as peer:
        figures.footprints[gateway.name, wire] = await footprint.measure(wire, wanted.open_streams, peer, behave)


async def _all_else(
    figures: Figures,
    wanted: Plan,
    peers: list[Peer],
    direct: Peer,
    upstream_url: str,
    behave: footprint.Announce,
    say: Callable[[str], None],
) -> None:
    slow = {gateway.name for gateway in figures.gateways if gateway.chunk_cost_us >= _SLOW_US}
    for wire in cancel.WIRES:
        for peer in [direct, *peers]:
            if wire in peer.wires:
                await figures.note(
                    f"latency of {peer.name} over {wire}", _latency(figures, wanted, peer, wire, behave, say)
                )
                if peer is not direct:
                    streams = min(wanted.aborts, _SLOW_ABORTS) if peer.name in slow else wanted.aborts
                    work = _aborts(figures, streams, peer, wire, upstream_url, behave, say)
                    await figures.note(f"aborts of {peer.name} over {wire}", work)
    for peer in [direct, *peers]:
        await figures.note(f"whole answers of {peer.name}", _plain(figures, wanted, peer, behave, say))

    async def announce(wave: Wave) -> None:
        await behave(pace_of(wave))

    bench = Bench(peers, simulator_pid=direct.pid, say=say, announce=announce)
    await bench.rest()
    for case, effort, slow_effort in wanted.cases:
        found = figures.chunks.setdefault(case.name, {})
        speaking = [peer for peer in peers if case.wire in peer.wires]
        groups = [([peer for peer in speaking if peer.name not in slow], effort)]
        if slow_effort is not None:
            groups.append(([peer for peer in speaking if peer.name in slow], slow_effort))
        for group, played in groups:
            if group:
                await figures.note(case.name, _chunks(bench, case, played, group, found))


async def _chunks(bench: Bench, case: Case, effort: Effort, group: list[Peer], found: dict[str, Result]) -> None:
    for last_try in (False, True):
        try:
            found.update(await bench.run(case, effort, group))
        except BrokenAnswer:
            if last_try:
                raise
            await asyncio.sleep(_AFTER_FAULT_S)
        else:
            return


async def _latency(
    figures: Figures, wanted: Plan, peer: Peer, wire: Wire, behave: footprint.Announce, say: Callable[[str], None]
) -> None:
    say(f"latency of {peer.name} over {wire}")
    load = latency.wave(wire, responses=wanted.responses)
    await behave(pace_of(load))
    figures.latencies[peer.name, wire] = await latency.measure(load, peer.base_url, peer.tokens)


async def _aborts(
    figures: Figures,
    streams: int,
    peer: Peer,
    wire: Wire,
    upstream_url: str,
    behave: footprint.Announce,
    say: Callable[[str], None],
) -> None:
    await behave(cancel.PACE)
    figures.aborts[peer.name, wire] = await cancel.measure(
        wire, peer.base_url, upstream_url, peer.tokens[0], say, streams=streams
    )


async def _plain(
    figures: Figures, wanted: Plan, peer: Peer, behave: footprint.Announce, say: Callable[[str], None]
) -> None:
    say(f"whole answers of {peer.name}, {wanted.plain_s:.0f} s")
    await behave({"output_tokens": 20})
    figures.plain[peer.name] = await plain.measure(peer, wanted.plain_s)
