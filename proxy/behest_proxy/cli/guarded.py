"""The owner's end of one guardian: start a guarded process, know when it ended, stop it."""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from behest_proxy.cli import guard

_START_S = 20.0
_REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class GuardedStartError(Exception):
    """A process could not be started at all: no such program, no right to run it."""


@dataclass(frozen=True)
class Account:
    """An unprivileged account that a process of root runs as."""

    uid: int
    gid: int
    name: str


@dataclass(frozen=True)
class Stop:
    """How a process is asked to end: `first`, after `grace_s` seconds `last`, a second later SIGKILL."""

    first: signal.Signals = signal.SIGTERM
    last: signal.Signals = signal.SIGKILL
    grace_s: float = 3.0
    linger_s: float = 0.0
    """How long it goes on when its owner ended unasked, for others that still need it then."""


class Guarded:
    """A process that cannot outlive this one; see `guard`. Not thread-safe; `ended` needs a running loop."""

    def __init__(self, name: str, guardian: subprocess.Popen[bytes], *, pid: int, log: Path) -> None:
        self.name = name
        self.pid = pid
        """The process itself, not its guardian."""
        self.log = log
        self._guardian = guardian
        self._asked = 0

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        stop: Stop | None = None,
        account: Account | None = None,
        folder: Path | None = None,
    ) -> Self:
        """Start `command` under a guardian of its own; its output goes to `log`, the older part to `log`.1.

        Raises `GuardedStartError` when it cannot be executed. `folder`: its working folder.
        """
        stop = stop or Stop()
        # -I -S: the guardian needs nothing but the standard library, and starts in half the time.
        arguments = [sys.executable, "-I", "-S", guard.__file__]
        arguments += ["--stop-signal", stop.first.name, "--last-signal", stop.last.name]
        arguments += ["--grace-s", str(stop.grace_s), "--linger-s", str(stop.linger_s), "--log", str(log)]
        if account is not None:
            arguments += ["--uid", str(account.uid), "--gid", str(account.gid)]
        if folder is not None:
            arguments += ["--cwd", str(folder)]
        guardian = subprocess.Popen(  # noqa: S603 -- our own commands
            [*arguments, "--", *map(str, command)],
            stdin=subprocess.PIPE,  # the lifeline: the kernel closes it when we end
            stdout=subprocess.PIPE,
            env=None if environment is None else dict(environment),
            start_new_session=True,
        )
        word, _, rest = cls._first_line(guardian).partition(" ")
        if word != "started":
            cls._dispose(guardian)
            raise GuardedStartError(f"{name}: {rest or 'its guardian did not start'}")
        return cls(name, guardian, pid=int(rest), log=log)

    @staticmethod
    def _first_line(guardian: subprocess.Popen[bytes]) -> str:
        assert guardian.stdout is not None
        ready, _, _ = select.select([guardian.stdout], [], [], _START_S)
        return guardian.stdout.readline().decode("utf-8", "replace").strip() if ready else ""

    @staticmethod
    def _dispose(guardian: subprocess.Popen[bytes]) -> None:
        for pipe in (guardian.stdin, guardian.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            guardian.wait(_START_S)
        except subprocess.TimeoutExpired:
            guardian.kill()
            guardian.wait()

    @property
    def status(self) -> int | None:
        """The exit status (128 + n after signal n), or None while it runs."""
        return self._guardian.poll()

    @property
    def asked_to_stop(self) -> bool:
        """Whether we asked it to end: an end without that is a fault."""
        return self._asked > 0

    def stop(self) -> None:
        """Ask it to end, and return at once. Every further call takes the next step of `Stop`."""
        # Different numbers for the same request: two pending signals of one number arrive as one.
        number = _REQUESTS[min(self._asked, len(_REQUESTS) - 1)]
        self._asked += 1
        if self._guardian.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._guardian.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within the time; its pipes are closed then."""
        try:
            self._guardian.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        self._dispose(self._guardian)
        return True

    async def ended(self) -> int:
        """Wait for the end, without a thread; returns the exit status."""
        if self._guardian.poll() is None:
            await self._status_pipe_closed()
        return self._guardian.wait(5)  # it is closing its pipe by ending: this takes no time

    async def _status_pipe_closed(self) -> None:
        assert self._guardian.stdout is not None
        loop = asyncio.get_running_loop()
        descriptor = self._guardian.stdout.fileno()
        end = asyncio.Event()

        def readable() -> None:
            if not os.read(descriptor, 512):
                loop.remove_reader(descriptor)
                end.set()

        loop.add_reader(descriptor, readable)
        try:
            await end.wait()
        finally:
            loop.remove_reader(descriptor)

    def last_lines(self, count: int = 15) -> list[str]:
        """The end of its log, for a message."""
        return last_lines(self.log, count)


def last_lines(log: Path, count: int = 15) -> list[str]:
    """The last lines of a log file; none when there is no file."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 32_768, 0))
            return file.read().decode("utf-8", "replace").splitlines()[-count:]
    except OSError:
        return []
