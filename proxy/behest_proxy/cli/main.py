"""The console script `behest`: finds the command, imports only that one, and shows errors with their cure.

A command is a module with `add_parser(subparsers)` and `run(arguments) -> int`. The built-in ones are in
`COMMANDS`; other distributions add theirs through the entry-point group `behest.commands`.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, cast

from behest_proxy.cli.terminal import Terminal, UserError, complain, drop_output

ENTRY_POINTS = "behest.commands"
INTERRUPTED = 130
"""The exit status after Ctrl-C or a closed pipe."""
FIRST_PROCESS = 1
"""The first process of a container: the kernel drops signals that it has no handler for (pid_namespaces(7)), so it gets
one for the time until its command brings its own, and acts as every other process would."""


class CommandModule(Protocol):
    """What every command offers."""

    def add_parser(self, subparsers: Any) -> None:
        """Add this command's parser; `subparsers` is what `ArgumentParser.add_subparsers` gave."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it, and return the exit status."""
        ...


@dataclass(frozen=True)
class Command:
    """Where a command lives and what it is for, in a line."""

    module: str
    help: str
    group: str


_TRY, _RUN, _SET, _BOOKS = "Try it on one machine", "Run it", "Configure it", "The books"

COMMANDS: dict[str, Command] = {
    "up": Command("behest_proxy.cli.up", "start everything here: database, provider simulator, sidecar", _TRY),
    "down": Command("behest_proxy.cli.down", "stop what `behest up` started", _TRY),
    "sim": Command("behest_proxy.cli.sim", "run the provider simulator alone", _TRY),
    "proxy": Command("behest_proxy.cli.proxy", "run the sidecar, configured by environment variables", _RUN),
    "drain": Command("behest_proxy.cli.drain", "let a sidecar finish before it is stopped (a pod's preStop)", _RUN),
    "apply": Command("behest_proxy.cli.apply", "apply manifests: projects, upstreams, tiers, budgets", _SET),
    "get": Command("behest_proxy.cli.get", "show what is configured and what is spent", _SET),
    "keys": Command("behest_proxy.cli.keys", "create, list and revoke API keys; signing keys", _SET),
    "provider-keys": Command("behest_proxy.cli.provider_keys", "keep projects' own keys for providers", _SET),
    "prices": Command("behest_proxy.cli.prices", "show, compare and update the price book", _SET),
    "ledger": Command("behest_proxy.cli.ledger", "migrate, verify, top, keep, export", _BOOKS),
}

EXTRAS: dict[str, Command] = {
    "operator": Command("operator", "run the Kubernetes operator", _RUN),
    "webhook": Command("operator", "run the admission webhook that injects sidecars", _RUN),
}
"""Commands of an extra: here `module` is the extra's name."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s, for this command and all below it."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage."""
        raise UserError(message, f"see `{self.prog} --help`")


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _help() -> str:
    terminal = Terminal()
    found = _entry_points()
    rows = dict(COMMANDS)
    for name, extra in EXTRAS.items():
        hint = "" if name in found else f"  (needs behest-sidecar[{extra.module}])"
        rows[name] = Command(extra.module, extra.help + hint, extra.group)
    for name in found.keys() - rows.keys():
        rows[name] = Command("", f"from {found[name].value.partition(':')[0]}", "Others")
    lines = ["usage: behest COMMAND [options]", ""]
    lines += ["Behest: an OpenAI-compatible streaming gateway whose budgets hold, to the last token.", ""]
    for group in dict.fromkeys(row.group for row in rows.values()):
        lines.append(terminal.bold(group))
        lines += [f"  {name:<14} {row.help}" for name, row in rows.items() if row.group == group]
        lines.append("")
    lines += ["`behest COMMAND --help` tells the rest; `behest --version` the version.", ""]
    return "\n".join(lines)


def _load(name: str) -> CommandModule:
    """The module of a command. Raises `UserError` for one that does not exist or is not installed."""
    command = COMMANDS.get(name)
    if command is not None:
        return cast("CommandModule", importlib.import_module(command.module))
    found = _entry_points()
    point = found.get(name)
    extra = EXTRAS.get(name)
    cure = f"install it with `pip install 'behest-sidecar[{extra.module}]'`" if extra else "see `behest --help`"
    if point is not None:
        try:
            return cast("CommandModule", point.load())
        except ImportError as error:
            raise UserError(f"the command `{name}` cannot be loaded ({error})", cure) from error
    if extra is not None:
        raise UserError(f"the command `{name}` is not installed", cure)
    near = difflib.get_close_matches(name, [*COMMANDS, *EXTRAS, *found], n=1)
    raise UserError(f"there is no command `{name}`", f"did you mean `{near[0]}`?" if near else cure)


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        sys.stdout.write(f"behest {importlib.metadata.version('behest-sidecar')}\n")
        return 0
    if argv[0].startswith("-"):
        raise UserError(f"unknown option {argv[0]}", "a command comes first: see `behest --help`")
    module = _load(argv[0])
    parser = Parser(prog="behest")
    module.add_parser(parser.add_subparsers(dest="command", metavar="COMMAND", required=True))
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}", f"see `behest {argv[0]} --help`")
    return module.run(arguments)


def _end_at_once(number: int, _frame: object) -> NoReturn:
    os._exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0, 1 when the command failed, 2 for a mistake of the user, 130 interrupted."""
    if os.getpid() == FIRST_PROCESS:
        signal.signal(signal.SIGTERM, _end_at_once)
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except UserError as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        drop_output(sys.stdout)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
