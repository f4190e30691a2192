"""`behest keys`: create, list and revoke API keys; see and revoke signing keys."""

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

from behest_proxy.cli.database import add_database_arguments, dsn_from, ledger_errors_shown
from behest_proxy.cli.tables import print_table
from behest_proxy.cli.terminal import Terminal, UserError
from behest_proxy.identity.caller import ROLES, is_clean_text

_EXAMPLES = """\
examples:
  behest keys create --project default/demo            a key whose tokens have the role user
  behest keys create --project demo/shop --role admin --name billing
  behest keys list --project demo/shop
  behest keys revoke key_0123456789abcdef
  behest keys signing                                  whose signatures on tokens are believed
  behest keys signing --retire=KID                     after a rotation: its tokens live until they expire
  behest keys signing --revoke=KID                     tokens it signed end within seconds
"""


def add_parser(subparsers: Any) -> None:
    """Add `behest keys`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "keys",
        help="create, list and revoke API keys; signing keys",
        description="API keys are exchanged for tokens at POST /v1/auth/mint. A key is shown once, when it is"
        " made: the ledger keeps only its hashes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    create = actions.add_parser("create", help="make an API key and print it, once")
    create.add_argument("--project", required=True, metavar="NAMESPACE/NAME", help="the project it mints for")
    create.add_argument("--role", choices=ROLES, default="user", help="the highest role of its tokens (default: user)")
    create.add_argument("--name", default="", help="what it is for, to tell it from others")

    listing = actions.add_parser("list", help="list API keys by their last four characters")
    listing.add_argument("--project", metavar="NAMESPACE/NAME", help="only this project's")

    revoke = actions.add_parser("revoke", help="revoke an API key; it mints no more within a second")
    revoke.add_argument("key_id", metavar="KEY_ID", help="as `behest keys list` shows it")

    signing = actions.add_parser("signing", help="list the keys whose signatures on tokens are believed")
    change = signing.add_mutually_exclusive_group()
    change.add_argument("--retire", metavar="KID", help="its tokens are good until they expire: after a rotation")
    change.add_argument("--revoke", metavar="KID", help="revoke this one: tokens it signed end")

    for action in (create, listing, revoke, signing):
        action.add_argument("--tenant", metavar="NAME", help="only in this tenant (default: the project's)")
        add_database_arguments(action)


def run(arguments: argparse.Namespace) -> int:
    """Do it. Raises `UserError` for what the person can put right."""
    from behest_ledger.store.identity import KeyConflictError

    actions = {"create": _create, "list": _list, "revoke": _revoke, "signing": _signing}
    dsn = dsn_from(arguments)
    with ledger_errors_shown():
        try:
            return asyncio.run(actions[arguments.action](dsn, arguments, Terminal()))
        except KeyConflictError as error:
            raise UserError(str(error), "see `behest keys signing` and `behest keys list`") from error


async def _create(dsn: str, arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.api_key_hash import new_api_key
    from behest_ledger.store.identity import register_api_key

    if arguments.name and not is_clean_text(arguments.name):
        raise UserError("--name is too long or has control characters", "give it at most 255 plain characters")
    tenant_id = await tenant_of(dsn, arguments.project, arguments.tenant)
    key = new_api_key()
    record = await register_api_key(
        dsn,
        tenant_id=tenant_id,
        project_id=arguments.project,
        key=key,
        role=arguments.role,
        name=arguments.name,
    )
    # Only the key stands on the first line, so that `| head -1` takes it; it is never shown again.
    terminal.line(key)
    terminal.note(f"{record.key_id}: project {arguments.project}, tenant {tenant_id}, role {record.role}")
    terminal.note("Keep it now: it is not shown again.")
    return 0


async def tenant_of(dsn: str, project_id: str, asked: str | None) -> str:
    """The project's tenant. A key for a project that does not exist would be refused at every mint."""
    from behest_ledger.store.identity import tenants_of_project

    tenants = await tenants_of_project(dsn, project_id)
    if asked is not None:
        tenants = [tenant for tenant in tenants if tenant == asked]
    if not tenants:
        where = "" if asked is None else f" of tenant {asked!r}"
        raise UserError(
            f"there is no project {project_id!r}{where}",
            "write it as NAMESPACE/NAME, and make it first: behest apply -f FILE",
        )
    if len(tenants) > 1:
        raise UserError(f"several tenants have a project {project_id!r}", "name one with --tenant")
    return tenants[0]


async def _list(dsn: str, arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.store.identity import list_api_keys

    records = await list_api_keys(dsn, tenant_id=arguments.tenant, project_id=arguments.project)
    rows = [
        (
            record.key_id,
            f"...{record.last_four}",
            record.tenant_id,
            record.project_id,
            record.role,
            f"{record.created_at:%Y-%m-%d}",
            "good" if record.revoked_at is None else f"revoked {record.revoked_at:%Y-%m-%d}",
            record.name,
        )
        for record in records
    ]
    header = ("KEY ID", "KEY", "TENANT", "PROJECT", "ROLE", "CREATED", "STATE", "NAME")
    _table(terminal, header, rows, nothing="There are no API keys: behest keys create --project NAMESPACE/NAME")
    return 0


async def _revoke(dsn: str, arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.store.identity import revoke_api_key

    if not await revoke_api_key(dsn, key_id=arguments.key_id, tenant_id=arguments.tenant):
        raise UserError(f"there is no API key {arguments.key_id!r} that could be revoked", "see `behest keys list`")
    terminal.line(f"{arguments.key_id} is revoked. Tokens it minted live on until they expire.")
    return 0


async def _signing(dsn: str, arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.store.identity import load_signing_keys, set_signing_key_state

    if arguments.revoke is not None:
        await set_signing_key_state(dsn, kid=arguments.revoke, state="revoked", tenant_id=arguments.tenant)
        terminal.line(f"{arguments.revoke} is revoked: tokens it signed are refused.")
        return 0
    if arguments.retire is not None:
        await set_signing_key_state(dsn, kid=arguments.retire, state="previous", tenant_id=arguments.tenant)
        terminal.line(f"{arguments.retire} is retired: tokens it signed are good until they expire, then revoke it.")
        return 0
    records = await load_signing_keys(dsn)
    rows = [
        (
            record.kid,
            record.state,
            record.kind,
            record.algorithm,
            record.tenant_id or "(every)",
            f"{record.created_at:%Y-%m-%d}" if record.created_at else "",
        )
        for record in records
        if arguments.tenant is None or record.tenant_id == arguments.tenant
    ]
    header = ("KID", "STATE", "KIND", "ALGORITHM", "TENANT", "CREATED")
    _table(terminal, header, rows, nothing="There are no signing keys yet: the sidecar brings its own.")
    return 0


def _table(terminal: Terminal, header: Sequence[str], rows: Sequence[Sequence[str]], *, nothing: str) -> None:
    if rows:
        print_table(terminal, header, rows)
    else:
        terminal.line(nothing)
