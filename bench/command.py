"""The command line of the bench."""

import argparse
import asyncio
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path

import uvloop
from bench import books, cancel, chunk, field, field_page, identity, ledger, telemetry, through, usage
from bench.answers import BrokenAnswer
from bench.gateways import gateways
from bench.peers import Peer, PeerError, behest, envoy, envoy_version, simulator

_DESCRIPTION = """\
Measure Behest against its peers, in the same run and on this machine.

figures:
  chunk   CPU per forwarded chunk and per request. Behest (authentication, metering, budgets and ledger on)
          against Envoy (a plain pass-through with one worker), over HTTP/2 and HTTP/1.1, with 20 and 200 streams.
          Before the two stands the same load, behind them the same simulator (HTTP/1.1). They take turns.
  cancel  milliseconds from a client's reset to the moment in which the provider sees the cancel, over 200 streams,
          over HTTP/2 and HTTP/1.1.
  ledger  in a PostgreSQL of its own with the settings of `behest up`: admission, holds on one hot window, settling,
          and through the sidecar statements a stream and the time from the kill switch to the last chunk.
  usage   questions about usage over a million requests, in a PostgreSQL of its own.
  identity  verifying tokens, and 200 mints a second beside 50 streams.
  field   Behest against every gateway that can be installed here (Envoy, ferrogw, LiteLLM): CPU per chunk, added
          latency, memory, aborts, whole answers. Written to docs/field.md. With --quick only printed, in under three
          minutes (installing the others takes one more, once). With --thorough five turns: an hour.
  telemetry  CPU that metrics, spans and log lines add to a request; to a chunk they add nothing.
"""
_EPILOG = """\
examples:
  make bench                                       everything, 10 minutes
  make bench ARGS="--quick"                        a first look, under 60 seconds: one turn, HTTP/2 and 20 streams
  make bench ARGS="chunk --case chunk-h2-200"      one case
  make bench ARGS=ledger                           the ledger alone, 3 minutes
  make bench ARGS=usage                            usage over a million requests, 3 minutes
  make bench ARGS=identity                         tokens, under a minute
  make bench ARGS=field                            all that can be installed, 20 minutes; see docs/field.md
  make bench ARGS="field --quick --gateway envoy --gateway behest"
  make bench ARGS=telemetry                        what a request's telemetry costs, seconds
  make bench ARGS="chunk --thorough"               1,000-chunk answers, medians of five turns, 16 minutes

A figure is the ratio, not the microseconds: those are this machine's. Look at `others` in the table: when other
processes take more than a tenth of the machine, run it again.
"""
_OTHERS_MOST = 0.10
_CORE_MOST = 0.85


def main() -> int:
    """Run what was asked for. Exit status 1: it could not be measured."""
    arguments = _parser().parse_args()
    if not sys.platform.startswith("linux"):
        print("bench: needs Linux: it reads /proc and the CPU clocks of processes", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever stops us, what we started must stop too
        signal.signal(number, signal.default_int_handler)
    started_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started_s:5.0f} s] {text}", flush=True)

    try:
        with tempfile.TemporaryDirectory(prefix="behest-bench-", ignore_cleanup_errors=True) as folder:
            Path(folder).chmod(0o711)  # root's PostgreSQL is somebody else's process: nothing may be left elsewhere
            return _figures(arguments, Path(folder), say)
    except (PeerError, BrokenAnswer) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/run.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "figure",
        nargs="?",
        default="all",
        choices=["all", "chunk", "cancel", "field", "ledger", "usage", "identity", "telemetry"],
        help="what to measure (default: all)",
    )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="under 60 seconds, less exact")
    effort.add_argument("--thorough", action="store_true", help="longer answers, more turns")
    parser.add_argument(
        "--case", action="append", choices=[case.name for case in chunk.CASES], help="only this case (repeatable)"
    )
    parser.add_argument("--gateway", action="append", help="of `field`: only this one (repeatable)")
    parser.add_argument("--write", action="store_true", help="of `field`: write docs/field.md in any case")
    return parser


def _figures(arguments: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> int:
    effort = chunk.QUICK if arguments.quick else chunk.THOROUGH if arguments.thorough else chunk.DEFAULT
    cases = chunk.CASES
    if arguments.case:
        cases = [case for case in cases if case.name in arguments.case]
    elif arguments.quick:
        cases = cases[:3]
    print(_machine())
    if arguments.figure == "telemetry":
        for line in telemetry.measure():
            print(line)
        return 0
    if arguments.figure == "field":
        return _field(arguments, folder, say)
    if arguments.figure == "ledger" or (arguments.figure == "all" and not arguments.quick):
        _ledger(folder / "ledger", say)
    if arguments.figure == "usage" or (arguments.figure == "all" and not arguments.quick):
        _usage(folder / "usage", say)
    if arguments.figure == "identity" or (arguments.figure == "all" and not arguments.quick):
        _identity(folder / "identity", say)
    if arguments.figure in ("ledger", "usage", "identity"):
        return 0
    with simulator(folder) as (upstream_url, simulator_pid):
        say("starting behest (PostgreSQL, ledger, sidecar)")
        with behest(folder, upstream_url, tokens=chunk.TOKENS) as ours:
            latencies = []
            if arguments.figure != "chunk":
                for wire in cancel.WIRES:
                    work = cancel.measure(wire, ours.base_url, upstream_url, ours.tokens[0], say)
                    latencies.append(uvloop.run(work))
            if arguments.figure == "cancel":
                cases = []
            say(f"starting envoy {envoy_version()}")
            with envoy(folder, upstream_url, tokens=chunk.TOKENS) as theirs:
                results = uvloop.run(_cases(cases, effort, [ours, theirs], simulator_pid, say))
    print()
    for latency in latencies:
        print(latency.line())
    if not cases:
        return 0
    print(chunk.table(results))
    print()
    for warning in _warnings(results):
        print(f"warning: {warning}")
    for line in chunk.lines(results):
        print(line)
    return 0


def _field(arguments: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> int:
    taking_part, missing = gateways(say, arguments.gateway)
    wanted = field.plan(quick=arguments.quick, turns=5 if arguments.thorough else 1)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        def run(work: Awaitable[None]) -> None:
            async def awaited() -> None:
                await work

            runner.run(awaited())

        before = os.getloadavg()[0]
        figures = field.measure(folder, taking_part, missing, wanted, run, say)
    command = "make bench ARGS=" + shlex.quote(" ".join(sys.argv[1:]))
    load = f"Load of the machine: {before:.1f} before, {os.getloadavg()[0]:.1f} at the end, this run's own included."
    text = field_page.page(figures, command=command, machine=_machine(), load=load)
    print("\n" + text)
    if arguments.write or not (arguments.quick or arguments.gateway):
        docs = Path(__file__).resolve().parent.parent / "docs"
        (docs / field_page.PAGE).write_text(text, encoding="utf-8")
        (docs / field_page.PICTURE).write_text(field_page.picture(figures), encoding="utf-8")
        say(f"written: docs/{field_page.PAGE}, docs/{field_page.PICTURE}")
    return 1 if figures.faults else 0


def _ledger(folder: Path, say: Callable[[str], None]) -> None:
    """Each line is printed when it is known: what comes later may break."""
    folder.mkdir()
    say("starting PostgreSQL")
    with books.server(folder) as dsn:

        async def alone() -> str:
            async for line in ledger.measure(dsn, say):
                print(line, flush=True)
            return await books.database(dsn, "through")

        database = uvloop.run(alone())
        with simulator(folder) as (upstream_url, _):
            say("starting behest on it")
            with behest(folder, upstream_url, tokens=through.STREAMS, database_url=database) as peer:
                for stagger_s in (1.0, 20.0):
                    work = through.statements(peer, database, say, stagger_s=stagger_s)
                    print(uvloop.run(work), flush=True)
                print(uvloop.run(through.kill(peer, database, say)), flush=True)
    print()


def _usage(folder: Path, say: Callable[[str], None]) -> None:
    folder.mkdir()
    say("starting PostgreSQL")
    with books.server(folder) as dsn:

        async def ask() -> None:
            async for line in usage.measure(await books.database(dsn, "usage"), say):
                print(line, flush=True)

        uvloop.run(ask())
    print()


def _identity(folder: Path, say: Callable[[str], None]) -> None:
    folder.mkdir()
    for line in identity.verify():
        print(line, flush=True)
    with simulator(folder) as (upstream_url, _):
        say("starting behest (PostgreSQL, ledger, sidecar)")
        with behest(folder, upstream_url, tokens=identity.STREAMS) as peer:
            print(uvloop.run(identity.mint(peer, say)), flush=True)
    print()


async def _cases(
    cases: list[chunk.Case],
    effort: chunk.Effort,
    peers: list[Peer],
    simulator_pid: int,
    say: Callable[[str], None],
) -> dict[str, dict[str, chunk.Result]]:
    bench = chunk.Bench(peers, simulator_pid=simulator_pid, say=say)
    await bench.rest()
    return {case.name: await bench.run(case, effort) for case in cases}


def _warnings(results: dict[str, dict[str, chunk.Result]]) -> list[str]:
    found: list[str] = []
    for name, by_peer in results.items():
        for peer, result in by_peer.items():
            for who, share in result.shares.items():
                if who == "others" and share > _OTHERS_MOST:
                    found.append(f"{name}, {peer}: other processes took {share:.0%} of the machine: not a quiet run")
                elif who != "others" and share > _CORE_MOST:
                    found.append(f"{name}, {peer}: {who} took {share:.0%} of a core: it is a bottleneck")
    return found


def _machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    parts = [f"{name} {version(name)}" for name in ("uvloop", "msgspec", "h2")]
    return (
        f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {platform.python_version()}, "
        f"{', '.join(parts)}, load {os.getloadavg()[0]:.1f}"
    )
