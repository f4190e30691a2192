"""`behest proxy`: the sidecar process, configured by its environment."""

import argparse
import asyncio
import contextlib
import gc
import inspect
import logging
import os
import re
import signal
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from behest_ledger.telemetry.logs import configure as configure_logs
from behest_ledger.telemetry.settings import (
    VARIABLES,
    TelemetrySettings,
    TelemetrySettingsError,
    telemetry_settings,
)
from behest_proxy.app.settings import Settings, SettingsError, from_environment
from behest_proxy.cli.terminal import UserError

if TYPE_CHECKING:
    from behest_proxy.app.gateway import Gateway
    from behest_proxy.edge.limits import EdgeLimits

_STOP_S = 1.0
"""After the drain: for the last bytes of what was ended."""
_PATIENCE_S = 60.0
"""A ledger that is away at the start is waited for so long: whoever restarts the process waits longer each time."""
_RETRY_S = 0.5

logger = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    """Add `proxy` to the commands."""
    subparsers.add_parser(
        "proxy",
        help="run the sidecar",
        description="Run the sidecar until SIGTERM. It is configured by its environment.",
        epilog="environment:\n" + _environment_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(arguments: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT. Exit status 0 after a wanted stop, 2 for a mistake in the environment."""
    del arguments
    try:
        settings, telemetry = from_environment(), telemetry_settings(os.environ)
    except (SettingsError, TelemetrySettingsError) as error:
        raise UserError(str(error), "see `behest proxy --help`") from None
    configure_logs(settings.log_level, settings.log_format)
    import uvloop

    try:
        return uvloop.run(_serve(settings, telemetry))
    except ExceptionGroup as failures:
        faults, others = failures.split(OSError)
        if faults is None or others is not None:
            raise
        (fault, *_) = faults.exceptions
        raise UserError(f"the sidecar cannot listen: {fault}", "look at BEHEST_BIND and BEHEST_ADMIN_BIND") from None


async def _serve(settings: Settings, telemetry: TelemetrySettings) -> int:
    from behest_ledger.journal import JournalError
    from behest_ledger.store.errors import LedgerError
    from behest_proxy.app.asgi import admin_app, client_app
    from behest_proxy.edge.server import TlsFiles, serve

    loop = asyncio.get_running_loop()
    asked_to_stop = asyncio.Event()
    drained = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    try:
        gateway = await _started(settings, telemetry, asked_to_stop)
    except (LedgerError, JournalError, OSError, ValueError) as error:
        raise UserError(str(error), "look at BEHEST_DATABASE_URL and BEHEST_SIGNING_KEY_FILE") from None
    if gateway is None:
        return 0
    limits = edge_limits(settings)

    def on_refused() -> None:
        gateway.telemetry.connections_refused.add(())

    tls = None
    if settings.tls_cert_file is not None and settings.tls_key_file is not None:
        tls = TlsFiles(certificate=settings.tls_cert_file, key=settings.tls_key_file)
    async with contextlib.aclosing(gateway), asyncio.TaskGroup() as group:
        group.create_task(
            serve(
                client_app(gateway),
                binds=[settings.bind],
                tls=tls,
                limits=limits,
                on_refused=on_refused,
                shutdown_trigger=asked_to_stop.wait,
                graceful_timeout_s=settings.drain_s + _STOP_S,
            )
        )
        if settings.pod_bind is not None:
            group.create_task(
                serve(
                    client_app(gateway, by_pod=True),
                    binds=[settings.pod_bind],
                    limits=limits,
                    on_refused=on_refused,
                    shutdown_trigger=asked_to_stop.wait,
                    graceful_timeout_s=settings.drain_s + _STOP_S,
                )
            )
        # Probes are answered to the end: "draining" is an answer too.
        group.create_task(
            serve(
                admin_app(gateway),
                binds=[settings.admin_bind],
                shutdown_trigger=drained.wait,
                graceful_timeout_s=_STOP_S,
            )
        )
        _spare_what_stays()
        await asked_to_stop.wait()
        await gateway.drain()
        drained.set()
    return 0


def edge_limits(settings: Settings) -> "EdgeLimits":
    """What clients may do, as it was set."""
    from behest_proxy.edge.limits import EdgeLimits

    return EdgeLimits(
        connections=settings.edge_connections_max,
        concurrent_streams=settings.edge_streams_max,
        resets=settings.edge_resets_max,
        control_frames=settings.edge_control_frames_max,
        header_list_bytes=settings.edge_header_bytes_max,
        idle_timeout_s=settings.edge_idle_timeout_s,
        head_timeout_s=settings.edge_head_timeout_s,
        body_timeout_s=settings.edge_body_timeout_s,
    )


def _spare_what_stays() -> None:
    """Let the garbage collector look only at what came after the start: the modules alone cost it 30 ms each time.

    Its full passes stop every stream, and come whenever a quarter more is alive; a sidecar's own garbage is small.
    """
    gc.collect()
    gc.freeze()


async def _started(settings: Settings, telemetry: TelemetrySettings, asked_to_stop: asyncio.Event) -> "Gateway | None":
    """The sidecar, once its ledger is there. None: it was told to stop before."""
    from behest_ledger.store.errors import LedgerUnavailableError
    from behest_proxy.app.gateway import Gateway

    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + _PATIENCE_S
    while not asked_to_stop.is_set():
        gateway = Gateway(settings, telemetry)
        try:
            await gateway.start()
            return gateway
        except LedgerUnavailableError as error:
            if loop.time() > deadline_s:
                raise
            logger.warning("the ledger cannot be reached, trying again: %s", error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETRY_S):
                await asked_to_stop.wait()
    return None


def _environment_help() -> str:
    """The settings with their docstrings: what is documented is what is read."""
    source = inspect.getsource(Settings)
    lines: list[str] = []
    for field in fields(Settings):
        match = re.search(rf'    {field.name}: .*\n    """(.*?)"""', source, re.DOTALL)
        meaning = " ".join(match[1].split()) if match else ""
        default = "" if field.default is MISSING or field.default is None else f" (default: {field.default})"
        lines.append(f"  BEHEST_{field.name.upper()}{default}\n      {meaning}")
    lines += [f"  {name}\n      {meaning.replace('`', '')}" for name, meaning in VARIABLES.items()]
    return "\n".join(lines)
