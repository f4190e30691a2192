"""`behest ledger role`: the database roles of sidecars, each bound to its tenants by PostgreSQL itself."""

import argparse
import asyncio
import secrets
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from behest_proxy.cli.database import add_database_arguments, dsn_from, ledger_errors_shown
from behest_proxy.cli.folder import write_whole
from behest_proxy.cli.tables import print_table
from behest_proxy.cli.terminal import Terminal, UserError

if TYPE_CHECKING:
    from behest_ledger.store.roles import TenantRole

_EXAMPLES = """\
examples:
  behest ledger role create acme_sidecar --tenant acme         a password is made, and written to a file
  pass show db/acme | behest ledger role create acme_sidecar --tenant acme --password-stdin
  behest ledger role create gateway --all-tenants --existing   a role that somebody else made
  behest ledger role list
  behest ledger role drop acme_sidecar
"""


def add_role_parser(commands: Any) -> None:
    """Add `role` to the commands of `behest ledger`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "role",
        help="database roles for sidecars: create, list, drop",
        description="A sidecar that logs in as such a role can admit, extend, settle and report for its own tenants;"
        " it sees nobody else's rows and changes no table. Run these as the owner of the schema.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="role_action", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a role, or set anew what one may do")
    create.add_argument("name", metavar="NAME", help="a-z 0-9 _ -")
    whom = create.add_mutually_exclusive_group(required=True)
    whom.add_argument("--tenant", action="append", metavar="TENANT", help="for whom it acts; may be repeated")
    whom.add_argument("--all-tenants", action="store_true", help="it acts for everybody: a gateway for all")
    password = create.add_mutually_exclusive_group()
    password.add_argument("--password-stdin", action="store_true", help="read its password from standard input")
    password.add_argument(
        "--password-file", type=Path, metavar="FILE", help="where a new password is written (default: NAME.password)"
    )
    password.add_argument("--existing", action="store_true", help="the role is there already; its password stays")
    listing = actions.add_parser("list", help="show the roles and for whom they act")
    drop = actions.add_parser("drop", help="take a role's rights at once, and remove it")
    drop.add_argument("name", metavar="NAME")
    drop.add_argument("--keep", action="store_true", help="take only its rights in this ledger")
    for action in (create, listing, drop):
        add_database_arguments(action)


def run_role(arguments: argparse.Namespace) -> int:
    """Do it. Raises `UserError` for what the person can put right."""
    from behest_ledger.store.roles import RoleError

    act = {"create": _create, "list": _list, "drop": _drop}[arguments.role_action]
    dsn = dsn_from(arguments)
    with ledger_errors_shown():
        try:
            return asyncio.run(act(dsn, arguments, Terminal()))
        except RoleError as error:
            raise UserError(str(error), "nothing was changed") from error


async def _create(dsn: str, arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.store.pool import connect
    from behest_ledger.store.roles import create_role

    name: str = arguments.name
    password: str | None = None
    file: Path | None = None
    if arguments.password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    elif not arguments.existing:
        file = Path(arguments.password_file or f"{name}.password")
        password = secrets.token_hex(24)
        if file.exists():
            raise UserError(f"{file} exists already", "name another with --password-file")
    connection = await connect(dsn)
    try:
        if file is not None and password is not None:
            _write(file, password)
        try:
            await create_role(connection, name, tenants=arguments.tenant, password=password)
        except BaseException:
            if file is not None:
                file.unlink(missing_ok=True)
            raise
    finally:
        await connection.close()
    whom = ", ".join(sorted(set(arguments.tenant))) if arguments.tenant else "all tenants"
    terminal.line(f"role {name} acts for {whom}")
    if file is not None:
        terminal.line(f"its password is in {file} (mode 0600); its sidecars start with")
        terminal.line(f'  BEHEST_DATABASE_URL="{dsn_of_role(dsn, name, f"$(cat {shlex.quote(str(file))})")}"')
    else:
        terminal.line("its sidecars start with")
        terminal.line(f"  BEHEST_DATABASE_URL={dsn_of_role(dsn, name, 'PASSWORD')}")
    return 0


def _write(file: Path, password: str) -> None:
    try:
        write_whole(file, password + "\n")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror})", "choose another --password-file") from None


async def _list(dsn: str, _arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.store.pool import connect
    from behest_ledger.store.roles import list_roles

    connection = await connect(dsn)
    try:
        roles = await list_roles(connection)
    finally:
        await connection.close()
    if not roles:
        terminal.line("there are no roles for sidecars: see `behest ledger role create`")
        return 0
    rows = [(role.name, ", ".join(role.tenants) or "(all tenants)", _problem(role)) for role in roles]
    print_table(terminal, ("ROLE", "TENANTS", "PROBLEM"), rows)
    return 0


def _problem(role: "TenantRole") -> str:
    if role.too_mighty is not None:
        return f"not bound: it {role.too_mighty}"
    return "" if role.exists else "the server knows no such role"


async def _drop(dsn: str, arguments: argparse.Namespace, terminal: Terminal) -> int:
    from behest_ledger.store.pool import connect
    from behest_ledger.store.roles import drop_role

    connection = await connect(dsn)
    try:
        await drop_role(connection, arguments.name, keep=arguments.keep)
    finally:
        await connection.close()
    terminal.line(f"role {arguments.name} has no rights here any more" + ("" if arguments.keep else ", and is gone"))
    return 0


def dsn_of_role(dsn: str, name: str, password: str) -> str:
    """The same database, with another login. `password` goes in as it is."""
    parts = urlsplit(dsn)
    query = [(key, value) for key, value in parse_qsl(parts.query) if key not in ("user", "password", "passfile")]
    netloc = f"{name}:{password}@{parts.netloc.rpartition('@')[2]}"
    return urlunsplit(parts._replace(netloc=netloc, query=urlencode(query)))
