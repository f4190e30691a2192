"""A tiny guardian: it runs one server as its child and never lets it outlive whoever asked for it.

    python guard.py [--stop-signal SIGINT] [--log FILE] ... -- postgres -D ...

The owner holds the other end of the guardian's standard input. When the owner ends, in whatever way (kill -9
included), the kernel closes that pipe, the guardian reads its end and stops the child: first with the stop
signal, after the grace period with the last signal, and a second later with SIGKILL. On Linux the kernel's
parent-death signal is a second belt, for the guardian and for the child. Guardian and child have sessions of
their own, so a Ctrl-C or a closing terminal reaches only the owner, which then decides.

What the guardian says on standard output: `started PID`, or `failed REASON`. It ends with the child's exit
status (128 + n after signal n). With `--log` it keeps the child's output in a file of bounded size.

Only the standard library is used, so that the owner may start it with `python -I -S`, in about 20 ms.
"""

import argparse
import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

LAST_STEP_S = 1.0
"""How long a child has between the last signal and SIGKILL."""

_READ_BYTES = 65_536
_PR_SET_PDEATHSIG = 1
_OWNER_DIED = signal.SIGUSR1


def parent_death_signal(number: int) -> Callable[[], None] | None:
    """A function that asks the kernel for signal `number` when the parent dies; None where unknown.

    Linux only (prctl(2)). The kernel means the parent *thread*, so a receiver must look at its parent before
    it believes the signal.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        import ctypes

        prctl = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)

    return ask


class RotatingLog:
    """A log file of bounded size: `FILE` and the part before it, `FILE.1`."""

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self._path = path
        self._half = max(limit_bytes // 2, 1)
        self._descriptor = -1
        self._size = 0
        self._open()

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1
            if self._path.exists():
                self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            self._size = 0

    def write(self, data: bytes) -> None:
        """Append; a full disk loses log lines, never the child."""
        if self._size and self._size + len(data) > self._half:
            self._open()
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, data)
                self._size += len(data)


class Guardian:
    """Watches the child, the lifeline and the signals; one thread, one selector."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        *,
        stops: Sequence[int],
        grace_s: float,
        linger_s: float,
        log: RotatingLog | None,
    ) -> None:
        self._child = child
        self._stops = list(stops)
        self._grace_s = grace_s
        self._linger_s = linger_s
        self._log = log
        self._step = 0
        self._deadline: float | None = None
        self._selector = selectors.DefaultSelector()
        self._parent = os.getppid()

    def watch(self, wakeup: int) -> int:
        """Until the child has ended; returns its exit status. `wakeup`: signals arrive there, as bytes."""
        self._selector.register(wakeup, selectors.EVENT_READ, self._on_signals)
        self._selector.register(0, selectors.EVENT_READ, self._on_lifeline)
        if self._child.stdout is not None:
            os.set_blocking(self._child.stdout.fileno(), False)
            self._selector.register(self._child.stdout.fileno(), selectors.EVENT_READ, self._on_output)
        while self._child.poll() is None:
            timeout = None if self._deadline is None else max(self._deadline - time.monotonic(), 0)
            for key, _ in self._selector.select(timeout):
                key.data(key.fd)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._next_step()
        if self._child.stdout is not None:
            self._drain(self._child.stdout.fileno())
        with contextlib.suppress(OSError):  # what the child itself left behind in its group
            os.killpg(self._child.pid, signal.SIGKILL)
        status = self._child.returncode
        return status if status >= 0 else 128 - status

    def _next_step(self) -> None:
        if self._step < len(self._stops):
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(self._stops[self._step])
            self._deadline = time.monotonic() + (self._grace_s if self._step == 0 else LAST_STEP_S)
            self._step += 1
        else:
            self._deadline = time.monotonic() + LAST_STEP_S

    def _on_signals(self, descriptor: int) -> None:
        for number in os.read(descriptor, 512):
            if number == _OWNER_DIED:
                if os.getppid() != self._parent:
                    self._owner_ended()
            elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                self._next_step()

    def _on_lifeline(self, descriptor: int) -> None:
        try:
            if os.read(descriptor, 512):
                return
        except OSError:
            pass
        self._selector.unregister(descriptor)
        self._owner_ended()

    def _owner_ended(self) -> None:
        if self._step == 0 and self._deadline is None:
            self._deadline = time.monotonic() + self._linger_s

    def _on_output(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._selector.unregister(descriptor)
        elif self._log is not None:
            self._log.write(data)

    def _drain(self, descriptor: int) -> None:
        for _ in range(64):  # bounded: a grandchild may hold the pipe and go on writing
            try:
                data = os.read(descriptor, _READ_BYTES)
            except OSError:
                return
            if not data:
                return
            if self._log is not None:
                self._log.write(data)


def _woken(_number: int, _frame: object) -> None:
    """The wakeup descriptor has told the loop already."""


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the owner may be gone already
        os.write(1, text.encode("utf-8", "replace") + b"\n")


def _start(options: argparse.Namespace, *, death_signal: int) -> subprocess.Popen[bytes]:
    ask = parent_death_signal(death_signal)
    guardian = os.getpid()

    def before_exec() -> None:
        if ask is not None:
            ask()
            if os.getppid() != guardian:  # it died between fork and prctl
                os._exit(1)

    user: int | None = options.uid
    return subprocess.Popen(  # noqa: S603 -- to run what it is told is its job
        options.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if options.log else 2,
        stderr=subprocess.STDOUT if options.log else 2,
        cwd=options.cwd,
        start_new_session=True,
        preexec_fn=before_exec,  # noqa: PLW1509 -- there is one thread only
        user=user,
        group=options.gid,
        extra_groups=None if user is None else [],
    )


def _signal_number(name: str) -> int:
    try:
        return int(signal.Signals[name])
    except KeyError:
        raise argparse.ArgumentTypeError(f"unknown signal {name!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="guard", description="Run a command; stop it when the owner ends.")
    parser.add_argument("--stop-signal", type=_signal_number, default=signal.SIGTERM, metavar="NAME")
    parser.add_argument("--last-signal", type=_signal_number, default=signal.SIGKILL, metavar="NAME")
    parser.add_argument("--grace-s", type=float, default=3.0, help="seconds between the signals (default 3)")
    parser.add_argument("--linger-s", type=float, default=0.0, help="seconds to wait when the owner ended")
    parser.add_argument("--log", help="file for the command's output; without it, standard error")
    parser.add_argument("--log-limit-bytes", type=int, default=8_000_000)
    parser.add_argument("--cwd", help="the command's working folder")
    parser.add_argument("--uid", type=int, help="run the command as this user")
    parser.add_argument("--gid", type=int, help="run the command as this group")
    parser.add_argument("command", nargs="+")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Guard one command to its end and return its exit status."""
    options = _parser().parse_args(argv)
    with contextlib.suppress(OSError):  # already the leader of a session
        os.setsid()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Handlers, not SIG_IGN: an ignored signal would stay ignored in the child.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD, _OWNER_DIED):
        signal.signal(number, _woken)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    ask = parent_death_signal(_OWNER_DIED)
    if ask is not None:
        ask()
    log = RotatingLog(Path(options.log), limit_bytes=options.log_limit_bytes) if options.log else None
    try:
        child = _start(options, death_signal=options.stop_signal)
    except (OSError, subprocess.SubprocessError) as error:
        _say(f"failed {error}")
        return 127
    _say(f"started {child.pid}")
    stops = [options.stop_signal, options.last_signal, signal.SIGKILL]
    guardian = Guardian(child, stops=stops, grace_s=options.grace_s, linger_s=options.linger_s, log=log)
    return guardian.watch(reader)


if __name__ == "__main__":
    sys.exit(main())
