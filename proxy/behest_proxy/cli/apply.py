"""`behest apply`: write projects, upstreams, tiers and budgets from manifests, all of them or none."""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from behest_ledger.configuration.kinds import Manifest
from behest_ledger.configuration.manifests import parse
from behest_ledger.configuration.problems import InvalidManifestsError, ManifestError
from behest_proxy.cli.database import add_database_arguments, dsn_from, ledger_errors_shown
from behest_proxy.cli.terminal import Terminal, UserError

FILE_BYTES_MAX = 1024 * 1024
"""The bound of `configuration.documents`, known before a file is read."""

_EXAMPLES = """\
examples:
  behest apply -f budget.yaml
  behest apply -f project.yaml -f budgets.yaml --dry-run
  kubectl get budgets,tiers -o yaml | behest apply -f -
"""


def add_parser(subparsers: Any) -> None:
    """Add `behest apply`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "apply",
        help="apply manifests: projects, upstreams, tiers, budgets",
        description="Write manifests (YAML or JSON) to the ledger. All of them are applied or, if one is wrong, none."
        " They are the same manifests that a cluster takes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-f",
        "--filename",
        action="append",
        required=True,
        metavar="FILE",
        dest="files",
        help="the manifests, - for standard input; may be repeated",
    )
    parser.add_argument(
        "-n",
        "--namespace",
        default="default",
        metavar="NAME",
        help="of manifests that name none (default: default)",
    )
    parser.add_argument(
        "--tenant",
        metavar="NAME",
        help="of namespaces that belong to no tenant yet (default: the namespace's own name)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="find every error, tell what would change, write nothing"
    )
    add_database_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it. Raises `UserError` for what the person can put right."""
    try:
        manifests = _read(arguments.files, arguments.namespace)
        return asyncio.run(_apply(dsn_from(arguments), manifests, arguments, Terminal()))
    except InvalidManifestsError as error:
        for each in error.errors:
            print(f"behest: {each}", file=sys.stderr)
        if len(error.errors) > 1:
            print(f"behest: {len(error.errors)} errors; nothing was applied", file=sys.stderr)
        return 2


async def _apply(dsn: str, manifests: list[Manifest], arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.store.configuration import apply_manifests

    with ledger_errors_shown():
        report = await apply_manifests(dsn, manifests, default_tenant=arguments.tenant, dry_run=arguments.dry_run)
    for line in report.lines():
        terminal.line(line)
    for warning in report.warnings:
        print(f"behest: warning: {warning}", file=sys.stderr)
    return 0


def _read(files: list[str], namespace: str) -> list[Manifest]:
    """The manifests of all files; errors of all of them at once."""
    manifests: list[Manifest] = []
    errors: list[ManifestError] = []
    for name in files:
        try:
            manifests += parse(_text(name), namespace, source="standard input" if name == "-" else name)
        except InvalidManifestsError as error:
            errors += error.errors
    if errors:
        raise InvalidManifestsError(errors)
    return manifests


def _text(name: str) -> str:
    try:
        data = _bytes(name)
    except OSError as error:
        raise UserError(
            f"{name} cannot be read: {error.strerror}", "name a file of manifests, or - for input"
        ) from None
    if len(data) > FILE_BYTES_MAX:
        raise UserError(f"{name} is longer than {FILE_BYTES_MAX} bytes", "split it into several files")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} is not text in UTF-8", "save it as UTF-8") from None


def _bytes(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read(FILE_BYTES_MAX + 1)
    with Path(name).open("rb") as file:
        return file.read(FILE_BYTES_MAX + 1)
