"""Which database a command means, and what its faults mean for the person: shared by all commands that read it."""

import argparse
import contextlib
import json
import os
from collections.abc import Generator, Mapping
from pathlib import Path

from behest_proxy.cli.terminal import UserError

DSN_VARIABLES = ("BEHEST_DATABASE_URL", "DATABASE_URL")
"""The first one that is set counts."""
DSN_FILE_VARIABLE = "BEHEST_DATABASE_URL_FILE"
"""Between the two: a file that holds it, as the sidecar takes it too."""

_CURE = "start one with `behest up`, or set DATABASE_URL"


def add_database_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--database-url` and `--data-dir`."""
    parser.add_argument("--database-url", metavar="URL", help="the ledger's database (default: DATABASE_URL)")
    parser.add_argument(
        "--data-dir",
        default=".behest",
        metavar="DIR",
        help="of a running `behest up`, whose database is used where no other is named (default: .behest)",
    )


def dsn_from(arguments: argparse.Namespace, *, environment: Mapping[str, str] | None = None) -> str:
    """The database that the arguments mean.

    `--database-url`, else BEHEST_DATABASE_URL, else what BEHEST_DATABASE_URL_FILE holds, else DATABASE_URL, else that
    of the `behest up` whose folder `--data-dir` names. Raises `UserError` where none of them leads anywhere.
    """
    environment = os.environ if environment is None else environment
    named: str | None = getattr(arguments, "database_url", None)
    if named:
        return named
    ours, general = DSN_VARIABLES
    if environment.get(ours):
        return environment[ours]
    if environment.get(DSN_FILE_VARIABLE):
        return _dsn_in(Path(environment[DSN_FILE_VARIABLE]))
    if environment.get(general):
        return environment[general]
    return _dsn_of_ready_file(Path(getattr(arguments, "data_dir", None) or ".behest"))


def _dsn_in(path: Path) -> str:
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read ({error})", f"look at {DSN_FILE_VARIABLE}") from None
    if not text:
        raise UserError(f"{path} is empty", f"look at {DSN_FILE_VARIABLE}")
    return text


def _dsn_of_ready_file(folder: Path) -> str:
    path = folder / "ready.json"
    try:
        ready = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"no database is named, and no `behest up` runs in {folder}", _CURE) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})", _CURE) from None
    dsn = ready.get("database_url") if isinstance(ready, dict) else None
    if not isinstance(dsn, str) or not dsn:
        raise UserError(f"{path} names no database_url", _CURE)
    return dsn


@contextlib.contextmanager
def ledger_errors_shown() -> Generator[None]:
    """Turn the ledger store's errors into errors that say what to do."""
    from behest_ledger.store.errors import LedgerError, LedgerUnavailableError, SchemaError

    try:
        yield
    except LedgerUnavailableError as error:
        cure = "start it with `behest up`, or check DATABASE_URL"
        raise UserError(f"the ledger's database does not answer ({error})", cure) from error
    except SchemaError as error:
        raise UserError(f"this release cannot use the database's ledger ({error.fault})", error.cure) from error
    except LedgerError as error:
        raise UserError(f"the ledger's database refused ({error})", "nothing was changed") from error
