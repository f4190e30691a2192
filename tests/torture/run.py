"""The long form of the torture: rounds of kills, limits and leaving clients; a line each, and a summary.

make torture ARGS="--rounds 10 --seed 42"    the same seed plans the same rounds; its timing is the machine's
"""

import argparse
import asyncio
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from torture.cluster import Cluster, running_cluster
from torture.judge import Figures
from torture.plan import Scale, plan_round
from torture.recordings import read_recordings
from torture.rounds import RoundEnd, Torture

FINDINGS_SHOWN = 10


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torture", description="Kill sidecars and PostgreSQL, and look at the books.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--sidecars", type=int, default=4)
    parser.add_argument("--streams", type=int, default=200, help="streams of each round")
    parser.add_argument("--round-s", type=float, default=3.0, help="seconds in which a round's streams begin")
    parser.add_argument("--limit-usd", type=float, default=1.0, help="the budget of a session")
    parser.add_argument("--seed", type=int, help="plan the rounds of an earlier run; without it a new one is drawn")
    parser.add_argument("--first-round", type=int, default=1, help="begin with this round of the seed")
    parser.add_argument(
        "--recordings",
        type=Path,
        default=os.environ.get("BEHEST_RECORDINGS"),
        metavar="FOLDER",
        help="a third of the streams replays recorded ones, FOLDER/chat/*.sse, cut at random bytes"
        " (default: BEHEST_RECORDINGS)",
    )
    parser.add_argument("--keep", action="store_true", help="keep data and logs also where all is well")
    return parser.parse_args()


def _line(end: RoundEnd, number: int, *, elapsed_s: float, so_far: str) -> str:
    figures = end.figures
    streams = ", ".join(f"{count} {name}" for name, count in sorted(figures.streams.items()))
    return (
        f"round {number}: {end.took_s:.1f} s ({elapsed_s:.0f} s in all; {so_far}); {streams};"
        f" received {figures.received_tokens}, charged {figures.charged_tokens}; fullest"
        f" {figures.fullest_percent:.1f} %; overshoot {figures.overshoot_pico} | " + "; ".join(end.events)
    )


def _so_far(cluster: Cluster) -> str:
    kills = sum(len(sidecar.kills_s) for sidecar in cluster.sidecars)
    drains = sum(sidecar.drains for sidecar in cluster.sidecars)
    stops = ", ".join(f"{times} {how}" for how, times in sorted(cluster.database.stops.items())) or "none"
    return f"{kills} sidecars killed, {drains} drained; PostgreSQL: {stops}"


def _summary(total: Figures, cluster: Cluster) -> str:
    keeper, hits = cluster.keeper, sum(sidecar.wire.hits for sidecar in cluster.sidecars)
    killed = f"received {total.killed_received_tokens}, charged {total.killed_charged_tokens}"
    left = f"received {total.cancelled_received_tokens}, charged {total.cancelled_charged_tokens}"
    return "\n".join(
        [
            _so_far(cluster),
            f"keeper: {keeper.found_dead} holders found dead, {keeper.charged} requests charged, then corrected",
            f"wires: {hits} answers lost or statements late; {total.settled_again} settlements sent again",
            f"the slowest start of a sidecar took {max(s.slowest_start_s for s in cluster.sidecars):.1f} s",
            f"streams: {sum(total.streams.values())} ({dict(sorted(total.streams.items()))})",
            f"windows looked at {total.samples} times; fullest {total.fullest_percent:.2f} % of its highest limit",
            f"overshoot: {total.overshoot_pico} pico-USD",
            f"tokens received {total.received_tokens}, charged {total.charged_tokens}",
            f" {total.killed_streams} streams of killed sidecars: {killed}, <= {total.killed_excess_chunks_max} chunks",
            f" clients that left: {left}",
        ]
    )


async def _torture(arguments: argparse.Namespace, seed: int, folder: Path) -> int:
    """How many findings there were."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # nothing is left behind
    scale = Scale(
        sidecars=arguments.sidecars,
        streams=arguments.streams,
        round_s=arguments.round_s,
        session_limit_usd=arguments.limit_usd,
        intervals_ms=(5, 10, 20),
        tokens_per_chunk=(1, 7, 40, 120),
        chunks_max=250,
        recordings=read_recordings(arguments.recordings) if arguments.recordings else {},
    )
    began_s = time.monotonic()
    total = Figures()
    findings = 0
    async with running_cluster(folder, sidecars=scale.sidecars, recordings=arguments.recordings) as cluster:
        torture = Torture(cluster=cluster, scale=scale)
        for number in range(arguments.first_round, arguments.first_round + arguments.rounds):
            end = await torture.round(plan_round(seed, number, scale))
            total.add(end.figures)
            so_far = f"{_so_far(cluster)}; {torture.spent_usd:.2f} USD spent"
            print(_line(end, number, elapsed_s=time.monotonic() - began_s, so_far=so_far), flush=True)
            for finding in end.findings[:FINDINGS_SHOWN]:
                print(f"  WRONG (seed {seed}, round {number}): {finding}", flush=True)
            findings += len(end.findings)
        torture.close()
        errors = cluster.database.errors()
        print(_summary(total, cluster))
        print(f"PostgreSQL's errors: {dict(errors)}")
    return findings


def main() -> int:
    """Exit status 0 where every sentence was true, else 1."""
    arguments = _arguments()
    logging.basicConfig(level=logging.WARNING)
    seed: int = arguments.seed if arguments.seed is not None else secrets.randbelow(10**9)
    # PostgreSQL of root runs as somebody else, who must be able to pass.
    folder = Path(tempfile.mkdtemp(prefix="behest-torture-"))
    folder.chmod(0o711)
    print(f"seed {seed}; logs and data in {folder}", flush=True)
    began_s = time.monotonic()
    findings = -1
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            findings = runner.run(_torture(arguments, seed, folder))
    finally:
        if findings == 0 and not arguments.keep:
            shutil.rmtree(folder)
        else:
            print(f"kept: {folder}", flush=True)
    print(f"{arguments.rounds} rounds in {time.monotonic() - began_s:.0f} s, seed {seed}: {findings} findings")
    return 0 if findings == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
