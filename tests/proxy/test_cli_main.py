"""The console script: it finds commands without importing the rest, and every error names its cure."""

import argparse
import importlib.metadata
import signal
import subprocess
import sys
import types
from typing import Any

import pytest

from behest_proxy.cli import main as cli
from behest_proxy.cli.terminal import UserError


class FakeCommand:
    """A command whose ending the test chooses."""

    def __init__(self, ending: int | BaseException) -> None:
        self.ending = ending
        self.seen: argparse.Namespace | None = None

    def add_parser(self, subparsers: Any) -> None:
        parser = subparsers.add_parser("fake")
        parser.add_argument("--number", type=int, required=True)

    def run(self, arguments: argparse.Namespace) -> int:
        self.seen = arguments
        if isinstance(self.ending, BaseException):
            raise self.ending
        return self.ending


def install(monkeypatch: pytest.MonkeyPatch, command: FakeCommand) -> None:
    module = types.ModuleType("fake_behest_command")
    vars(module).update(add_parser=command.add_parser, run=command.run)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command(module.__name__, "only a test", "Tests"))


def test_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in {**cli.COMMANDS, **cli.EXTRAS}.items():
        assert f"  {name:<14} {command.help}" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_nothing_at_all_shows_the_help_and_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: behest COMMAND" in capsys.readouterr().out


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"behest {importlib.metadata.version('behest-sidecar')}\n"


def test_the_status_and_the_arguments_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    command = FakeCommand(3)
    install(monkeypatch, command)
    assert cli.main(["fake", "--number", "5"]) == 3
    assert command.seen is not None
    assert command.seen.number == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["upp"], "behest: there is no command `upp`; did you mean `up`?\n"),
        (["zzz"], "behest: there is no command `zzz`; see `behest --help`\n"),
        (["--verbose"], "behest: unknown option --verbose; a command comes first: see `behest --help`\n"),
        (
            ["webhook"],
            (
                "behest: the command `webhook` is not installed; "
                "install it with `pip install 'behest-sidecar[operator]'`\n"
            ),
        ),
        (["fake"], "behest: the following arguments are required: --number; see `behest fake --help`\n"),
        (["fake", "--number", "1", "--x"], "behest: unknown argument '--x'; see `behest fake --help`\n"),
    ],
)
def test_a_mistake_is_one_line_with_its_cure(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, FakeCommand(0))
    monkeypatch.setattr(cli, "_entry_points", dict)
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("ending", "status"),
    [(UserError("a is wrong", "do b"), 2), (KeyboardInterrupt(), 130), (BrokenPipeError(), 130)],
)
def test_every_ending_has_its_status(
    ending: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, FakeCommand(ending))
    assert cli.main(["fake", "--number", "1"]) == status
    assert capsys.readouterr().err == ("behest: a is wrong; do b\n" if status == 2 else "")


def test_an_extra_command_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    command = FakeCommand(4)
    install(monkeypatch, command)
    point = importlib.metadata.EntryPoint("fake", "fake_behest_command", cli.ENTRY_POINTS)
    monkeypatch.delitem(cli.COMMANDS, "fake")
    monkeypatch.setattr(cli, "_entry_points", lambda: {"fake": point})
    assert cli.main(["fake", "--number", "1"]) == 4


def test_an_extra_that_cannot_be_imported_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = importlib.metadata.EntryPoint("operator", "no_such_module_here", cli.ENTRY_POINTS)
    monkeypatch.setattr(cli, "_entry_points", lambda: {"operator": point})
    assert cli.main(["operator"]) == 2
    assert "pip install 'behest-sidecar[operator]'" in capsys.readouterr().err


def test_help_and_up_start_without_the_heavy_packages() -> None:
    code = (
        "import sys; from behest_proxy.cli import main; main.main(['--help']); import behest_proxy.cli.up; "
        "heavy = {'asyncpg', 'cryptography', 'hypercorn', 'starlette', 'openai', 'yaml'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == ""


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-P", "-m", "behest_proxy.cli.main", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert err == b""
    assert process.returncode in (0, 130)


def test_the_first_process_of_a_container_ends_when_it_is_told_before_its_command_listens() -> None:
    code = (
        "import os, signal; os.getpid = lambda: 1\n"
        "from behest_proxy.cli import main as cli\n"
        "cli._run = lambda argv: signal.raise_signal(signal.SIGTERM)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # what the kernel does to a first process
        "cli.main([])"
    )
    ran = subprocess.run([sys.executable, "-I", "-c", code], check=False, timeout=60)
    assert ran.returncode == 128 + signal.SIGTERM
