"""`behest provider-keys`: a project's own keys for providers, sealed before they reach the ledger."""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from behest_proxy.cli.database import add_database_arguments, dsn_from, ledger_errors_shown
from behest_proxy.cli.tables import print_table
from behest_proxy.cli.terminal import Terminal, UserError

MASTER_KEY_VARIABLE = "BEHEST_MASTER_KEY_FILE"

_EXAMPLES = """\
examples:
  behest provider-keys set --project default/demo --provider openai < key.txt
  behest provider-keys list
  behest provider-keys delete --project default/demo --provider openai

An Upstream with `byok: true` is called with the key of the project that asks, and the provider bills its owner.
The provider is the one of the price book (`behest prices show`); of an address that it does not know, the
name of the Upstream.
"""


def add_parser(subparsers: Any) -> None:
    """Add `behest provider-keys`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "provider-keys",
        help="a project's own keys for providers (bring your own key)",
        description="Keys are sealed under their tenant's key, which comes out of the master key. Without a master key"
        " none is written. Of a stored key only the last four characters are ever shown.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    setting = actions.add_parser("set", help="store a key, read from the standard input or a file")
    setting.add_argument("--key-file", type=Path, metavar="FILE", help="the file that holds it (default: stdin)")
    setting.add_argument(
        "--master-key-file",
        type=Path,
        metavar="FILE",
        help=f"32 bytes in base64 (default: {MASTER_KEY_VARIABLE}, then that of a running `behest up`)",
    )
    listing = actions.add_parser("list", help="list keys by their last four characters")
    deleting = actions.add_parser("delete", help="forget a key; calls with it end within a second")
    for action in (setting, deleting):
        action.add_argument("--project", required=True, metavar="NAMESPACE/NAME", help="whose key it is")
        action.add_argument("--provider", required=True, metavar="NAME", help="such as openai or anthropic")
    listing.add_argument("--project", metavar="NAMESPACE/NAME", help="only this project's")
    for action in (setting, listing, deleting):
        action.add_argument("--tenant", metavar="NAME", help="only in this tenant (default: the project's)")
        add_database_arguments(action)


def run(arguments: argparse.Namespace) -> int:
    """Do it. Raises `UserError` for what the person can put right."""
    actions = {"set": _set, "list": _list, "delete": _delete}
    dsn = dsn_from(arguments)
    with ledger_errors_shown():
        return asyncio.run(actions[arguments.action](dsn, arguments, Terminal()))


async def _set(dsn: str, arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.sealing import SealingError, tenant_key
    from behest_ledger.store.pool import connect
    from behest_ledger.store.provider_keys import project_place, put_key
    from behest_proxy.cli.keys import tenant_of

    master_key = _master_key(arguments)
    secret = _secret(arguments.key_file)
    tenant_id = await tenant_of(dsn, arguments.project, arguments.tenant)
    connection = await connect(dsn)
    try:
        new = await put_key(
            connection,
            tenant_id=tenant_id,
            place=project_place(arguments.project, arguments.provider),
            secret=secret,
            key=tenant_key(master_key, tenant_id),
        )
    except SealingError as error:
        raise UserError(str(error), "give the key as the provider shows it") from None
    finally:
        await connection.close()
    shown = f"...{secret[-4:]}" if len(secret) >= 12 else "(too short to show)"
    terminal.line(
        f"{arguments.project} calls {arguments.provider} with {shown}" + ("." if new else ", as it did before.")
    )
    return 0


def _master_key(arguments: argparse.Namespace) -> bytes:
    from behest_ledger.sealing import SealingError, key_from_text

    path: Path | None = arguments.master_key_file
    if path is None and os.environ.get(MASTER_KEY_VARIABLE):
        path = Path(os.environ[MASTER_KEY_VARIABLE])
    if path is None:
        path = Path(arguments.data_dir or ".behest") / "keys" / "master-key"
        if not path.exists():
            raise UserError(
                "there is no master key to seal it under",
                f"name its file with --master-key-file or {MASTER_KEY_VARIABLE} (make one: openssl rand -base64 32)",
            )
    try:
        return key_from_text(path.read_text("utf-8"))
    except (OSError, UnicodeError) as error:
        raise UserError(f"the master key {path} cannot be read ({error})", "name its file: --master-key-file") from None
    except SealingError as error:
        raise UserError(f"{path}: {error}", "name another file: --master-key-file") from None


def _secret(path: Path | None) -> str:
    """Never an argument: those are seen by everybody who may list processes, and kept by shells."""
    try:
        text = sys.stdin.read(100_000) if path is None else path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"the key cannot be read ({error})", "give it on the standard input or with --key-file"
        ) from None
    if not text.strip():
        raise UserError("the key is empty", "give it on the standard input or with --key-file")
    return text.strip()


async def _list(dsn: str, arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.store.pool import connect
    from behest_ledger.store.provider_keys import load_keys, project_of_place

    connection = await connect(dsn)
    try:
        keys = await load_keys(connection, arguments.tenant)
    finally:
        await connection.close()
    rows: list[tuple[str, str, str, str]] = []
    for key in keys:
        found = project_of_place(key.place)
        if found is not None and arguments.project in (None, found[0]):
            rows.append((key.tenant_id, *found, f"...{key.last_four}"))
    if rows:
        print_table(terminal, ("TENANT", "PROJECT", "PROVIDER", "KEY"), rows)
    else:
        terminal.line("No project has keys of its own: behest provider-keys set --help")
    return 0


async def _delete(dsn: str, arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.store.pool import connect
    from behest_ledger.store.provider_keys import delete_key, project_place
    from behest_proxy.cli.keys import tenant_of

    tenant_id = await tenant_of(dsn, arguments.project, arguments.tenant)
    connection = await connect(dsn)
    try:
        place = project_place(arguments.project, arguments.provider)
        if not await delete_key(connection, tenant_id=tenant_id, place=place):
            raise UserError(
                f"{arguments.project} has no key for {arguments.provider}", "see `behest provider-keys list`"
            )
    finally:
        await connection.close()
    terminal.line(f"{arguments.project} has no key for {arguments.provider} any more.")
    return 0
