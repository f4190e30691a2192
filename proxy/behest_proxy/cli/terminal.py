"""What a person at a terminal sees: short lines, steps with their times, and errors that name their cure."""

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import TextIO


class UserError(Exception):
    """Something the person can put right: `what` is wrong, `cure` is what to do. One line, exit status 2."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(f"{what}; {cure}")
        self.what = what
        self.cure = cure


def shown_path(path: Path, here: Path | None = None) -> str:
    """A path as a person would type it in the folder `here` (default: the working folder)."""
    try:
        return str(path.relative_to(Path.cwd() if here is None else here))
    except ValueError:
        return str(path)


def own_command(here: Path | None = None) -> str:
    """What to type for `behest`: the plain name where PATH leads to this installation, else the path."""
    script = Path(sys.executable).with_name("behest")
    found = shutil.which("behest")
    if not script.exists() or (found is not None and Path(found).absolute() == script):
        return "behest"
    return shlex.quote(shown_path(script, here))


class Step:
    """One visible step of a longer way; its label may become more exact while it runs."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.started = time.monotonic()


class Terminal:
    """Prints to `out`; colour and moving lines only on a terminal, and no colour where NO_COLOR is set.

    A closed terminal is no error: what is printed after that is dropped, so that a supervisor can still stop
    its processes in order.
    """

    def __init__(self, out: TextIO | None = None, *, environment: dict[str, str] | None = None) -> None:
        self._out = sys.stdout if out is None else out
        environment = dict(os.environ) if environment is None else environment
        self._moving = self._out.isatty() and environment.get("TERM") != "dumb"
        self._colour = self._moving and not environment.get("NO_COLOR")
        encoding = (getattr(self._out, "encoding", None) or "ascii").lower()
        self._done_mark, self._failed_mark = ("✓", "✗") if "utf" in encoding else ("*", "!")
        self._closed = False

    def paint(self, text: str, code: str) -> str:
        """`text` in an SGR colour (ECMA-48), or as it is where there is no colour."""
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def bold(self, text: str) -> str:
        """For what the eye should find first."""
        return self.paint(text, "1")

    def dim(self, text: str) -> str:
        """For what may be passed over."""
        return self.paint(text, "2")

    def line(self, text: str = "") -> None:
        """One line, at once."""
        self._write(text + "\n")

    def note(self, text: str) -> None:
        """A line that belongs to the step above it."""
        self.line("    " + self.dim(text))

    @contextlib.contextmanager
    def step(self, label: str) -> Generator[Step]:
        """Show a step while it runs, then with its time; an exception marks it as failed."""
        step = Step(label)
        if self._moving:
            self._write(f"  {self.dim('.')} {label} ...")
        try:
            yield step
        except BaseException:
            self._finish(step, self.paint(self._failed_mark, "31"))
            raise
        self._finish(step, self.paint(self._done_mark, "32"))

    def _finish(self, step: Step, mark: str) -> None:
        seconds = self.dim(f"{time.monotonic() - step.started:5.2f} s")
        over = "\r\x1b[K" if self._moving else ""
        self._write(f"{over}  {mark} {step.label:<52}{seconds}\n")

    def _write(self, text: str) -> None:
        if self._closed:
            return
        try:
            self._out.write(text)
            self._out.flush()
        except (OSError, ValueError):
            self._closed = True
            drop_output(self._out)


def drop_output(out: TextIO) -> None:
    """Let what is still buffered for a terminal or pipe that is gone go nowhere.

    Python flushes standard output once more at its end, and would fail on it then.
    """
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, out.fileno())
        os.close(nowhere)


def complain(error: UserError, *, err: TextIO | None = None) -> None:
    """Print `behest: <what>; <what to do>`."""
    with contextlib.suppress(OSError, ValueError):
        print(f"behest: {error.what}; {error.cure}", file=sys.stderr if err is None else err, flush=True)
