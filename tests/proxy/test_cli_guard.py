"""The guardian: what it guards never outlives its owner, and ends in the way it was asked to."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from behest_proxy.cli import guard
from behest_proxy.cli.guarded import Guarded, GuardedStartError, Stop
from proxy.processes import alive, eventually

_POLITE = """
import signal, sys, time
def end(number, frame):
    print("asked by", signal.Signals(number).name, flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
print("up", flush=True)
time.sleep(600)
"""
_DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""
_OWNER = """
import sys, time
from pathlib import Path
from behest_proxy.cli.guarded import Guarded, Stop
stop = Stop(linger_s=float(sys.argv[3]))
child = Guarded.start("child", [sys.executable, "-c", sys.argv[2]], log=Path(sys.argv[1]), stop=stop)
print(child.pid, flush=True)
time.sleep(600)
"""


def python(code: str) -> list[str | Path]:
    return [sys.executable, "-c", code]


def start(code: str, log: Path, stop: Stop | None = None, *, until: str | None = "up\n") -> Guarded:
    child = Guarded.start("child", python(code), log=log, stop=stop)
    assert until is None or eventually(lambda: until in log.read_text())
    return child


def test_the_exit_status_of_the_child_comes_through(tmp_path: Path) -> None:
    child = start("raise SystemExit(5)", tmp_path / "log", until=None)
    assert child.wait(60)
    assert child.status == 5
    assert not child.asked_to_stop


def test_a_child_killed_by_a_signal_ends_with_128_and_its_number(tmp_path: Path) -> None:
    child = start(_POLITE, tmp_path / "log")
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(60)
    assert child.status == 128 + signal.SIGKILL


def test_a_child_is_asked_with_its_own_stop_signal(tmp_path: Path) -> None:
    child = start(_POLITE, tmp_path / "log", Stop(signal.SIGINT))
    child.stop()
    assert child.wait(60)
    assert child.status == 7
    assert child.last_lines() == ["up", "asked by SIGINT"]


def test_a_child_that_does_not_listen_is_killed_after_its_grace(tmp_path: Path) -> None:
    child = start(_DEAF, tmp_path / "log", Stop(grace_s=0.2))
    child.stop()
    assert child.wait(60)
    assert child.status == 128 + signal.SIGKILL


def test_a_second_request_hurries(tmp_path: Path) -> None:
    child = start(_DEAF, tmp_path / "log", Stop(grace_s=600.0))
    child.stop()
    child.stop()
    assert child.wait(60)


def test_a_program_that_does_not_exist_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(GuardedStartError, match="No such file"):
        Guarded.start("ghost", [tmp_path / "no-such-program"], log=tmp_path / "log")


def test_kill_9_of_the_owner_stops_the_child_politely(tmp_path: Path) -> None:
    log = tmp_path / "log"
    owner = subprocess.Popen([sys.executable, "-c", _OWNER, str(log), _POLITE, "0"], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    assert eventually(lambda: "up\n" in log.read_text())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert eventually(lambda: not alive(child))
    # The guardian writes what the child said last once it has seen the child's end, not before it.
    assert eventually(lambda: "asked by SIGTERM" in log.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals exist on Linux only")
def test_kill_9_of_the_guardian_stops_the_child_too(tmp_path: Path) -> None:
    child = start(_POLITE, tmp_path / "log")
    os.kill(_parent(child.pid), signal.SIGKILL)
    assert eventually(lambda: not alive(child.pid))
    assert child.wait(60)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_terminal_cannot_reach_guardian_and_child(tmp_path: Path) -> None:
    """Ctrl-C and a hangup go to sessions and groups of the terminal: both have others."""
    child = start(_POLITE, tmp_path / "log")
    assert os.getsid(child.pid) != os.getsid(0)
    assert os.getpgid(child.pid) != os.getpgid(0)
    child.stop()
    assert child.wait(60)


def test_what_the_child_left_in_its_group_ends_with_it(tmp_path: Path) -> None:
    code = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
"""
    child = start(code, tmp_path / "log", until=None)
    assert child.wait(60)
    grandchild = int((tmp_path / "log").read_text())
    assert eventually(lambda: not alive(grandchild))


def test_the_last_words_of_a_child_are_in_the_log(tmp_path: Path) -> None:
    child = start("print('x' * 200_000); print('bye'); raise SystemExit(1)", tmp_path / "log", until=None)
    assert child.wait(60)
    assert child.last_lines(1) == ["bye"]


def test_a_log_is_bounded_and_keeps_the_part_before(tmp_path: Path) -> None:
    log = guard.RotatingLog(tmp_path / "log", limit_bytes=1_000)
    for number in range(100):
        log.write(b"%04d" % number + b"." * 95 + b"\n")
    sizes = [(tmp_path / name).stat().st_size for name in ("log", "log.1")]
    assert sum(sizes) <= 1_000
    assert (tmp_path / "log").read_bytes().splitlines()[-1].startswith(b"0099")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]


def test_a_new_start_keeps_the_log_of_the_last_one(tmp_path: Path) -> None:
    for word in ("first", "second"):
        assert start(f"print({word!r})", tmp_path / "log", until=None).wait(60)
    assert (tmp_path / "log").read_text() == "second\n"
    assert (tmp_path / "log.1").read_text() == "first\n"


def test_an_event_loop_learns_of_the_end_without_a_thread(tmp_path: Path) -> None:
    async def main() -> tuple[int, int]:
        child = start(_POLITE, tmp_path / "log")
        ended = asyncio.ensure_future(child.ended())
        await asyncio.sleep(0.05)
        assert not ended.done()
        child.stop()
        status = await asyncio.wait_for(ended, 10)
        again = await child.ended()
        child.wait(1)
        return status, again

    assert asyncio.run(main()) == (7, 7)


def test_an_unknown_signal_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        guard.main(["--stop-signal", "SIGNONSENSE", "--", "true"])
    assert "unknown signal 'SIGNONSENSE'" in capfd.readouterr().err


def test_a_child_that_others_still_need_lingers_when_its_owner_ends(tmp_path: Path) -> None:
    """The owner's end is told to all guardians at once; a database must outlive what settles into it."""
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(tmp_path / "log"), _POLITE, "0.7"], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    assert eventually(lambda: "up\n" in (tmp_path / "log").read_text())
    killed_s = time.monotonic()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert eventually(lambda: not alive(child))
    assert time.monotonic() - killed_s >= 0.7
