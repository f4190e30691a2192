"""`behest sim`: the OpenAI-compatible provider simulator as a process of its own."""

import argparse
import asyncio
import os
import signal
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from behest_proxy.sim.server import SimServer

_DESCRIPTION = """\
An OpenAI-compatible provider for tests and benchmarks. It speaks HTTP/1.1 and HTTP/2 (prior knowledge) on
one port and says simulated text whose token counts are true. GET /sim/requests tells for each request what was
sent and when it was cancelled; DELETE /sim/requests forgets them.

The member `sim` of a chat-completions body, or the header `x-sim` with the same JSON, asks for a behaviour; PUT
/sim/behaviour sets what is done where neither does:
"""


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",  # pyright: ignore[reportPrivateUsage]
) -> None:
    """Adds `sim` to the commands."""
    parser = subparsers.add_parser(
        "sim",
        help="run the OpenAI-compatible provider simulator",
        description=_DESCRIPTION + "\n" + behaviour_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=0, help="port to listen on (default: any free one)")
    parser.add_argument("--port-file", type=Path, metavar="PATH", help="write the port here once it listens")
    parser.add_argument("--recordings", type=Path, metavar="DIR", help="recorded answers that requests may name")
    parser.add_argument("--tls-cert", type=Path, metavar="PEM", help="speak TLS, with ALPN, by this certificate")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="the certificate's key, where it is apart")
    parser.set_defaults(run=run)


def _port(word: str) -> int:
    port = int(word)
    # uvloop would take a larger number modulo 65,536.
    if not 0 <= port <= 65_535:
        raise argparse.ArgumentTypeError(f"{port} is no port: they are 0 to 65535")
    return port


def behaviour_table() -> str:
    """The members of `sim` as lines of text."""
    from behest_proxy.sim.behaviour import behaviour_help

    lines: list[str] = []
    for row in behaviour_help():
        lines.append(f"  {row.name}: {row.values} (default {row.default})")
        lines.extend(textwrap.wrap(row.meaning, 100, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    """Runs the simulator until SIGTERM or SIGINT; returns the exit status."""
    from behest_proxy.sim.server import SimServer

    recordings: Path | None = arguments.recordings
    if recordings is not None and not recordings.is_dir():
        return _fail(f"{recordings} is not a folder")
    if arguments.tls_key is not None and arguments.tls_cert is None:
        return _fail("--tls-key needs --tls-cert")
    try:
        server = SimServer(
            host=arguments.host,
            port=arguments.port,
            recordings=recordings,
            tls_cert=arguments.tls_cert,
            tls_key=arguments.tls_key,
        )
        with asyncio.Runner(loop_factory=_new_event_loop) as runner:
            runner.run(_serve(server, arguments.port_file))
    except OSError as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    sys.stderr.write(f"behest sim: {message}\n")
    return 1


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # where there is no wheel for the platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _serve(server: "SimServer", port_file: Path | None) -> None:
    loop = asyncio.get_running_loop()
    told_to_end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_end.set)
    port = await server.start()
    sys.stdout.write(f"behest sim: simulated OpenAI API at {server.base_url}\n")
    sys.stdout.flush()
    if port_file is not None:
        _write_port(port_file, port)
    await told_to_end.wait()
    await server.aclose()


def _write_port(path: Path, port: int) -> None:
    """Whoever waits for the file never reads half a number."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(f"{port}\n", encoding="ascii")
    unfinished.replace(path)
