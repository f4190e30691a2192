"""`behest ledger`: the books from the command line."""

import argparse
import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from behest_proxy.cli.database import add_database_arguments, dsn_from, ledger_errors_shown


def add_parser(subparsers: Any) -> None:
    """Add `ledger` and its own commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "ledger", help="the books: migrate, verify, top", description="The books."
    )
    commands = parser.add_subparsers(dest="ledger_command", required=True, metavar="COMMAND")
    migrate = commands.add_parser("migrate", help="bring the schema to this version")
    verify = commands.add_parser(
        "verify",
        help="recompute every balance and name what differs",
        description="Recompute the books. Exit status 0: clean; 1: something differs, and is named.",
    )
    top = commands.add_parser("top", help="who spends what: sessions, users and models by cost")
    top.add_argument("--hours", type=float, default=24.0, help="how far to look back (default: %(default)s)")
    top.add_argument("--limit", type=int, default=20, help="rows (default: %(default)s)")
    for command in (migrate, verify, top):
        add_database_arguments(command)


def run(arguments: argparse.Namespace) -> int:
    """Run one of the ledger's commands."""
    dsn = dsn_from(arguments)
    act = {"migrate": _migrate, "verify": _verify, "top": _top}[arguments.ledger_command]
    with ledger_errors_shown():
        return asyncio.run(act(dsn, arguments))


async def _migrate(dsn: str, _arguments: argparse.Namespace) -> int:
    from behest_ledger.store.migrate import migrate

    applied = await migrate(dsn)
    for name in applied:
        print(f"applied {name}")
    print("the schema is up to date")
    return 0


async def _verify(dsn: str, _arguments: argparse.Namespace) -> int:
    from behest_ledger.store.pool import connect
    from behest_ledger.store.verify import verify

    connection = await connect(dsn)
    try:
        verdict = await verify(connection)
    finally:
        await connection.close()
    for finding in verdict.findings:
        print(f"NOT TRUE: {finding.check}: {finding.place}: expected {finding.expected}, found {finding.found}")
    print(f"{verdict.windows} windows, {verdict.postings} postings, {verdict.requests} requests", end=": ")
    print(f"{len(verdict.findings)} findings" if verdict.findings else "clean")
    if verdict.overrun_windows:
        print(f"{verdict.overrun_windows} windows were overrun: providers billed more than they may; see `overrun`")
    return 1 if verdict.findings else 0


async def _top(dsn: str, arguments: argparse.Namespace) -> int:
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
    head = ("SESSION", "USER", "MODEL", "PROJECT", "REQUESTS", "LIVE", "INPUT", "OUTPUT", "COST (USD)")
    table = [
        (
            row.session_id,
            row.user_id,
            row.model,
            row.project_id,
            str(row.requests),
            str(row.live),
            str(row.input_tokens),
            str(row.output_tokens),
            usd_from_pico(row.amount_pico),
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
