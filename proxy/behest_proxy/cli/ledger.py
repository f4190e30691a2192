"""`behest ledger`: the books from the command line."""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from behest_proxy.cli.correct import add_correct_parser, run_correct
from behest_proxy.cli.database import add_database_arguments, dsn_from, ledger_errors_shown
from behest_proxy.cli.export import add_export_parser, run_export
from behest_proxy.cli.roles import add_role_parser, run_role
from behest_proxy.cli.terminal import UserError

if TYPE_CHECKING:
    from behest_ledger.store.seals import Seal


def add_parser(subparsers: Any) -> None:
    """Add `ledger` and its own commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "ledger", help="the books: migrate, verify, top, keep, export, correct, role", description="The books."
    )
    commands = parser.add_subparsers(dest="ledger_command", required=True, metavar="COMMAND")
    migrate = commands.add_parser("migrate", help="bring the schema to this version")
    migrate.add_argument(
        "--wait",
        type=_seconds,
        default=None,
        metavar="SECONDS",
        help="wait so long for a database that is not there yet (default: do not wait)",
    )
    verify = commands.add_parser(
        "verify",
        help="recompute every balance and name what differs",
        description="Recompute the books and the seals over them."
        " Exit status 0: clean; 1: something differs, and is named."
        " The newest seal of each tenant is printed: kept elsewhere, it vouches for everything before it.",
    )
    verify.add_argument(
        "--against",
        metavar="FILE",
        help="what `verify` printed some time ago: every seal in it must still be in its chain",
    )
    verify.add_argument(
        "--detached",
        action="store_true",
        help="look also at the rows of months that were put away, as far as their tables are here",
    )
    top = commands.add_parser(
        "top",
        help="what goes on: budgets, sessions, requests",
        description="On a terminal, what goes on, again and again: budgets with what is spent and held, the sessions"
        " that spend most, recent requests. Into a pipe: a table of sessions, users and models by cost, what runs"
        " included.",
    )
    top.add_argument("--once", action="store_true", help="print it once, wherever it goes")
    top.add_argument("--hours", type=float, default=24.0, help="how far to look back (default: %(default)s)")
    top.add_argument("--limit", type=int, default=20, help="rows (default: %(default)s)")
    top.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="SECONDS", help="between two looks (default: %(default)s)"
    )
    for command in (migrate, verify, top, _add_keep(commands)):
        add_database_arguments(command)
    add_export_parser(commands)
    add_correct_parser(commands)
    add_role_parser(commands)


def _add_keep(commands: Any) -> argparse.ArgumentParser:
    keep: argparse.ArgumentParser = commands.add_parser(
        "keep",
        help="end what sidecars left behind, until stopped",
        description="Run the keeper until SIGTERM or SIGINT: holds of sidecars that are gone go to suspense and are"
        " charged after a period of grace; what is written is sealed; partitions are made ahead, and put away when they"
        " are old. Of several keepers one works, others stand by.",
    )
    keep.add_argument(
        "--interval", type=_seconds, default=5.0, metavar="SECONDS", help="between two rounds (default: %(default)s)"
    )
    keep.add_argument(
        "--grace-hours",
        type=_hours,
        default=24.0,
        metavar="HOURS",
        help="how long a request waits for the journal of its sidecar (default: %(default)s)",
    )
    keep.add_argument(
        "--policy",
        choices=("checkpoint", "hold"),
        default="checkpoint",
        help="what it is charged after that: its last checkpoint, or all that was held (default: %(default)s)",
    )
    keep.add_argument(
        "--retention-months",
        type=_months,
        default=13,
        metavar="N",
        help="whole months that stay; older ones are taken out of the tables and kept beside them, as <table>_detached;"
        " 0: all stay (default: %(default)s)",
    )
    keep.add_argument(
        "--drop", action="store_true", help="drop the months that are taken out; only their balances and seals stay"
    )
    keep.add_argument(
        "--thread-days",
        type=_days,
        default=90,
        metavar="DAYS",
        help="threads are deleted so long after their last message, unless their project says otherwise"
        " (default: %(default)s)",
    )
    keep.add_argument(
        "--metrics",
        type=_address,
        metavar="ADDRESS",
        help="answer Prometheus at host:port, such as 127.0.0.1:9464 (default: nowhere); OTEL_* variables push",
    )
    return keep


def run(arguments: argparse.Namespace) -> int:
    """Run one of the ledger's commands."""
    if arguments.ledger_command == "role":
        return run_role(arguments)
    if arguments.ledger_command == "export":
        return run_export(arguments)
    if arguments.ledger_command == "correct":
        return run_correct(arguments)
    dsn = dsn_from(arguments)
    act = {"migrate": _migrate, "verify": _verify, "top": _top, "keep": _keep}[arguments.ledger_command]
    with ledger_errors_shown():
        return asyncio.run(act(dsn, arguments))


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.1 and 3600 seconds")
    return value


def _hours(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 10000 hours")
    return value


def _months(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 1200:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1200 months")
    return value


def _days(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 36_500:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 36500 days")
    return value


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not host:port")
    return text


async def _keep(dsn: str, arguments: argparse.Namespace) -> int:
    from behest_ledger.store.errors import LedgerUnavailableError
    from behest_ledger.store.keeper import Keeper
    from behest_ledger.store.keeper_watch import KeeperWatch
    from behest_ledger.store.migrate import check_schema
    from behest_ledger.store.pool import connect
    from behest_ledger.telemetry import logs
    from behest_ledger.telemetry.meter import Meter
    from behest_ledger.telemetry.process import told
    from behest_ledger.telemetry.settings import TelemetrySettingsError

    # A wrong schema is told at once; a database that is away is waited for.
    with contextlib.suppress(LedgerUnavailableError):
        connection = await connect(dsn)
        try:
            await check_schema(connection)
        finally:
            await connection.close()
    logs.configure("info")
    meter = Meter()
    keeper = Keeper(
        dsn,
        interval_s=arguments.interval,
        grace_s=arguments.grace_hours * 3600,
        policy=arguments.policy,
        retention_months=arguments.retention_months,
        drop_months=arguments.drop,
        thread_days=arguments.thread_days,
        watch=KeeperWatch(meter),
    )
    try:
        async with told(meter, "keeper", os.environ, bind=arguments.metrics or ""):
            await _until_stopped(keeper.run())
    except TelemetrySettingsError as error:
        raise UserError(str(error), "see docs/telemetry.md") from None
    except OSError as error:
        raise UserError(f"--metrics {arguments.metrics}: {error.strerror or error}", "name a free address") from None
    return 0


async def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run it until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _migrate(dsn: str, arguments: argparse.Namespace) -> int:
    from behest_ledger.store.migrate import migrate

    if arguments.wait is not None:
        await _await_database(dsn, arguments.wait)
    migrated = await migrate(dsn)
    for name in migrated.applied:
        print(f"applied {name}")
    if migrated.later:
        print(f"the schema is a later release's, no migration is applied (it has {', '.join(migrated.later)})")
    else:
        print("the schema is up to date")
    if version := await _first_prices(dsn):
        print(f"stored the price book {version}")
    return 0


async def _await_database(dsn: str, timeout_s: float) -> None:
    from behest_ledger.store.errors import LedgerUnavailableError
    from behest_ledger.store.pool import connect

    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            await (await connect(dsn)).close()
        except LedgerUnavailableError as error:
            if time.monotonic() > deadline_s:
                raise
            print(f"waiting for the database: {error}", flush=True)
            await asyncio.sleep(1)
        else:
            return


async def _first_prices(dsn: str) -> str | None:
    """A ledger without any price refuses every model: it begins with the book that this version brings."""
    from behest_ledger.prices.snapshot import compile_package_book
    from behest_ledger.store.pool import connect
    from behest_ledger.store.prices import list_versions, store_book

    connection = await connect(dsn)
    try:
        if await list_versions(connection):
            return None
        return await store_book(connection, compile_package_book(), effective_from=datetime.now(UTC))
    finally:
        await connection.close()


async def _verify(dsn: str, arguments: argparse.Namespace) -> int:
    from behest_ledger.store.pool import connect
    from behest_ledger.store.verify import verify

    noted = _noted(arguments.against) if arguments.against else []
    # Told only where somebody looks on, and wiped away before anything else is written.
    shown = sys.stderr.isatty()

    def tell(check: str, done: float) -> None:
        if shown:
            sys.stderr.write(f"\r\x1b[K{done:4.0%} {check}"[:100])
            sys.stderr.flush()

    connection = await connect(dsn)
    try:
        verdict = await verify(connection, noted=noted, look_at_detached=arguments.detached, progress=tell)
    finally:
        await connection.close()
        if shown:
            sys.stderr.write("\r\x1b[K")
    for finding in verdict.findings:
        print(f"NOT TRUE: {finding.check}: {finding.place}: expected {finding.expected}, found {finding.found}")
    print(f"{verdict.windows} windows, {verdict.postings} postings, {verdict.requests} requests", end=": ")
    print(f"{len(verdict.findings)} findings" if verdict.findings else "clean")
    if verdict.overrun_windows:
        print(f"{verdict.overrun_windows} windows were overrun: providers billed more than they may; see `overrun`")
    if arguments.detached:
        for month in verdict.months_away:
            print(month)
    elif verdict.months_away:
        print(f"{len(verdict.months_away)} months were put away", end=": ")
        print("what they left behind was looked at, their rows were not (--detached)")
    for seal in verdict.seals:
        print(seal)
    return 1 if verdict.findings else 0


def _noted(name: str) -> list["Seal"]:
    from behest_ledger.store.seals import parse_noted

    try:
        noted = parse_noted(Path(name).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read ({error})", "name a file that `behest ledger verify` wrote") from None
    if not noted:
        raise UserError(
            f"{name} has no line like `seal 17 <hash> <tenant>`", "name what `behest ledger verify` printed"
        )
    return noted


async def _top(dsn: str, arguments: argparse.Namespace) -> int:
    from behest_proxy.cli.glance import show

    if arguments.once or sys.stdout.isatty():
        return await show(
            dsn,
            hours=arguments.hours,
            rows=arguments.limit,
            interval_s=arguments.interval,
            once=arguments.once,
            out=sys.stdout,
        )
    from behest_ledger.money import usd_from_pico
    from behest_ledger.store.pool import connect
    from behest_ledger.store.reports import top

    connection = await connect(dsn)
    try:
        since = datetime.now(UTC) - timedelta(hours=arguments.hours)
        rows = await top(connection, since=since, limit=arguments.limit)
    finally:
        await connection.close()
    if not rows:
        print("nothing was spent yet")
        return 0
    # What runs now is in the sums as far as its checkpoints say, and its cost is shown apart too.
    head = ("SESSION", "USER", "MODEL", "PROJECT", "REQUESTS", "LIVE", "INPUT", "OUTPUT", "COST (USD)", "LIVE (USD)")
    table = [
        (
            row.session_id,
            row.user_id,
            row.model,
            row.project_id,
            str(row.requests),
            str(row.live),
            str(row.input_tokens + row.live_input_tokens),
            str(row.output_tokens + row.live_output_tokens),
            usd_from_pico(row.amount_pico + row.live_amount_pico),
            usd_from_pico(row.live_amount_pico),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *table]) for column in range(len(head))]
    for line in [head, *table]:
        cells = [
            cell.ljust(width) if column < 4 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    return 0
