"""CPU time of processes, to the nanosecond, and how busy the machine was beside them."""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_SCHED_CLOCK = 2
"""CPUCLOCK_SCHED, user and system time: what clock_getcpuclockid(3) puts into a clock's number on Linux."""


def cpu_s(pid: int) -> float:
    """User and system time that a process has used so far, with all its threads, also those that have ended.

    /proc/<pid>/stat tells the same in steps of 10 ms, which is a hundred requests' worth of rounding here.
    Raises `OSError` where there is no such process.
    """
    return time.clock_gettime((~pid << 3) | _SCHED_CLOCK)


def snapshot(pids: Iterable[int]) -> dict[int, float]:
    """`cpu_s` of each; PostgreSQL's short-lived workers that have ended meanwhile are left out."""
    found: dict[int, float] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            found[pid] = cpu_s(pid)
    return found


def used_since_s(before: dict[int, float]) -> float:
    """What these processes have used since their snapshot."""
    return sum(now_s - before[pid] for pid, now_s in snapshot(before).items())


def descendants(pid: int, name: str) -> list[int]:
    """The processes below `pid` whose command has this name."""
    parents: dict[int, list[tuple[int, str]]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = stat.read_text(encoding="ascii", errors="replace").rpartition(") ")
        except OSError:
            continue  # it ended while we looked
        parents.setdefault(int(rest.split()[1]), []).append((int(stat.parent.name), head.partition(" (")[2]))
    found: list[int] = []
    below = [pid]
    while below:
        for child, command in parents.get(below.pop(), []):
            below.append(child)
            if command == name:
                found.append(child)
    return found


@dataclass(frozen=True)
class MachineUse:
    """What all processors did since the start, in seconds of CPU."""

    busy_s: float
    total_s: float

    @classmethod
    def now(cls) -> "MachineUse":
        """The counters of /proc/stat: user nice system idle iowait irq softirq steal."""
        line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
        ticks = [int(field) for field in line.split()[1:9]]
        idle = ticks[3] + ticks[4]
        return cls((sum(ticks) - idle) / 100, sum(ticks) / 100)
