"""What a person sees: colour only where it belongs, steps with their times, errors with their cure."""

import io
import sys
from pathlib import Path

import pytest

from behest_proxy.cli.terminal import Terminal, UserError, complain, own_command, shown_path


class Tty(io.StringIO):
    """An output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_pipe_gets_neither_colour_nor_moving_lines() -> None:
    out = io.StringIO()
    terminal = Terminal(out, environment={})
    with terminal.step("first") as step:
        step.label = "first, more exactly"
    terminal.note(terminal.bold("a note"))
    lines = out.getvalue().splitlines()
    assert "first, more exactly" in lines[0]
    assert lines[0].endswith("0.00 s")
    assert lines[1] == "    a note"
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_colour_unless_no_color_is_set() -> None:
    assert Terminal(Tty(), environment={}).bold("x") == "\x1b[1mx\x1b[0m"
    assert Terminal(Tty(), environment={"NO_COLOR": "1"}).bold("x") == "x"
    assert Terminal(Tty(), environment={"TERM": "dumb"}).bold("x") == "x"


def test_a_failed_step_is_marked() -> None:
    out = io.StringIO()
    with pytest.raises(ValueError, match="why"), Terminal(out, environment={}).step("it"):
        raise ValueError("why")
    assert out.getvalue().startswith("  ! it")


def test_a_closed_terminal_is_no_error() -> None:
    terminal = Terminal(Gone(), environment={})
    terminal.line("one")
    with terminal.step("two"):
        pass


def test_an_error_is_one_line_with_its_cure() -> None:
    err = io.StringIO()
    complain(UserError("a is wrong", "do b"), err=err)
    assert err.getvalue() == "behest: a is wrong; do b\n"


def test_paths_are_shown_as_one_would_type_them() -> None:
    assert shown_path(Path("/a/b/c"), Path("/a")) == "b/c"
    assert shown_path(Path("/x/c"), Path("/a")) == "/x/c"


def test_the_command_is_named_by_its_path_where_path_does_not_lead_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "behest"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert own_command(tmp_path) == "bin/behest"
    monkeypatch.setenv("PATH", str(script.parent))
    assert own_command(tmp_path) == "behest"
