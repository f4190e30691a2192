"""Virtual time: many processes, each with an event loop of its own, in one thread and in one order.

A process may be killed between any two steps and at any boundary to the world (`Process.boundary`), stopped and woken,
or put to sleep with its machine. Nothing waits: when all is done, the time of the next timer has come.
"""

import asyncio
import contextlib
import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple
from uuid import UUID

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

EPOCH_S = 1_790_000_000.0
"""The world begins at this time since 1970."""


class Killed(BaseException):
    """The process is gone: unwinds what it was doing. Nothing that it still does reaches the world."""


class WrongError(AssertionError):
    """What must never be."""


class Handle:
    """A callback that is due, of a process or of the world itself."""

    __slots__ = ("args", "callback", "due_s", "process")

    def __init__(self, process: "Process | None", due_s: float, callback: Callable[..., Any], args: Any) -> None:
        self.process = process
        self.due_s = due_s
        """On the clock of the process."""
        self.callback: Callable[..., Any] | None = callback
        self.args = args

    def cancel(self) -> None:
        """Do nothing when it is due."""
        self.callback = None
        self.args = ()

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self.callback is None

    def when(self) -> float:
        """When it is due, for asyncio."""
        return self.due_s


class World:
    """The clock, the one queue of everybody, and the record of what happened."""

    def __init__(self, seed: int, *, told: Callable[[str], None] | None = None) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.steps = 0
        self.is_over = False
        self.wrong: list[str] = []
        """What went wrong, in words."""
        self._told = told
        self._timers: list[tuple[float, int, Handle]] = []
        self._pushed = 0
        self.ready: deque[Handle] = deque()
        self.processes: list[Process] = []
        self._trace = hashlib.blake2b(digest_size=16)

    @property
    def trace(self) -> str:
        """A hash of all that happened: equal for equal runs."""
        return self._trace.hexdigest()

    @property
    def wall_s(self) -> float:
        """Seconds since 1970."""
        return EPOCH_S + self.now_s

    def note(self, text: str) -> None:
        """Something happened."""
        line = f"{self.now_s:.4f} {text}"
        self._trace.update(line.encode())
        if self._told is not None:
            self._told(f"{self.steps:7d} {line}")

    def new_id(self) -> UUID:
        """A new id that is no request's."""
        return UUID(int=self.random.getrandbits(128))

    def after(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> Handle:
        """Have the world do something."""
        handle = Handle(None, self.now_s + delay_s, callback, args)
        self.push(self.now_s + delay_s, handle)
        return handle

    def push(self, when_s: float, handle: Handle) -> None:
        """Put a handle into the queue."""
        self._pushed += 1
        heapq.heappush(self._timers, (when_s, self._pushed, handle))

    def run(self, until_s: float, *, steps_max: int | None = None, each: Callable[[], None] | None = None) -> None:
        """Go on until this time, or this step, or until something is wrong; `each` is called after every step."""
        running: Process | None = None
        try:
            while not (self.wrong or self.is_over) and (steps_max is None or self.steps < steps_max):
                if self.ready:
                    handle = self.ready.popleft()
                elif self._timers and self._timers[0][0] <= until_s:
                    when_s, _, handle = heapq.heappop(self._timers)
                    self.now_s = max(self.now_s, when_s)
                else:
                    break
                callback = handle.callback
                if callback is None:
                    continue
                process = handle.process
                if process is not None:
                    if not process.takes(handle):
                        continue
                    if process is not running:
                        running = process
                        asyncio._set_running_loop(process)
                self.steps += 1
                try:
                    callback(*handle.args)
                except Killed:
                    pass
                except WrongError as error:
                    self.wrong.append(str(error))
                except Exception as error:
                    if process is None:
                        raise
                    process.call_exception_handler({"message": "a callback failed", "exception": error})
                if each is not None:
                    each()
        finally:
            asyncio._set_running_loop(None)


class Process(asyncio.AbstractEventLoop):
    """One process: its event loop, its clocks, and its end."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        world.processes.append(self)
        self.name = name
        self.alive = True
        self.boundaries = 0
        self.kill_at = 0
        """The boundary at which it is killed; 0: none."""
        self.on_killed: Callable[[], None] | None = None
        self._frozen = False
        self._asleep_since_s: float | None = None
        self._slept_s = 0.0
        self._parked: list[Handle] = []
        self._tasks: list[tuple[asyncio.Task[Any], Any]] = []
        """Kept: a loop has only weak references, and what nobody else has would be gone with the next collection."""

    # --- its fate ----------------------------------------------------------------------------------------------

    def boundary(self) -> None:
        """Something of this process is about to reach the world, or just did. Raises `Killed`."""
        self.boundaries += 1
        if self.boundaries == self.kill_at:
            self.kill()
        if not self.alive:
            raise Killed

    def kill(self) -> None:
        """SIGKILL: nothing of it happens any more."""
        if self.alive:
            self.alive = False
            self._parked.clear()
            self.world.note(f"{self.name} is killed")
            if self.on_killed is not None:
                self.on_killed()

    def exit(self) -> None:
        """It ended by itself."""
        self.alive = False

    def freeze(self, for_s: float, *, asleep: bool) -> None:
        """SIGSTOP for a while; or its machine sleeps, and its monotonic clock with it."""
        if not self.alive or self._frozen:
            return
        self._frozen = True
        self._asleep_since_s = self.world.now_s if asleep else None
        self.world.note(f"{self.name} is stopped for {for_s:.2f} s{' with its clock' if asleep else ''}")
        self.world.after(for_s, self.wake)

    def wake(self) -> None:
        """SIGCONT. What came meanwhile is done now."""
        if not self._frozen:
            return
        self._frozen = False
        if self._asleep_since_s is not None:
            self._slept_s += self.world.now_s - self._asleep_since_s
            self._asleep_since_s = None
        if self.alive:
            self.world.note(f"{self.name} goes on")
            self.world.ready.extend(self._parked)
        self._parked.clear()

    def takes(self, handle: Handle) -> bool:
        """Whether it carries this out now; otherwise it is kept for later, or for nobody."""
        if not self.alive:
            return False
        if self._frozen:
            self._parked.append(handle)
            return False
        if self._slept_s and handle.due_s > self.time() + 1e-9:
            self.world.push(handle.due_s + self._slept_s, handle)
            return False
        return True

    # --- its clocks and its loop -------------------------------------------------------------------------------

    def time(self) -> float:
        """CLOCK_MONOTONIC."""
        return self.world.now_s - self._slept_s

    def boot_time_s(self) -> float:
        """CLOCK_BOOTTIME: the same with the time asleep."""
        return self.world.now_s

    def call_soon(self, callback: Callable[[*Ts], object], *args: *Ts, context: Any = None) -> Any:
        """See asyncio."""
        handle = Handle(self, 0.0, callback, args)
        self.world.ready.append(handle)
        return handle

    def call_later(self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Any = None) -> Any:
        """See asyncio."""
        return self.call_at(self.time() + max(delay, 0.0), callback, *args)

    def call_at(self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Any = None) -> Any:
        """See asyncio."""
        handle = Handle(self, when, callback, args)
        self.world.push(when + self._slept_s, handle)
        return handle

    def arrives(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> Handle:
        """Something comes from outside after so long in the world's time; a stopped process finds it when it wakes."""
        handle = Handle(self, 0.0, callback, args)
        self.world.push(self.world.now_s + delay_s, handle)
        return handle

    def create_future(self) -> "asyncio.Future[Any]":
        """See asyncio."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **named: Any) -> "asyncio.Task[Any]":
        """See asyncio."""
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=named.get("name"))
        self._tasks.append((task, coro))
        return task

    def close(self) -> None:
        """After the end of the world: nothing is left waiting."""
        self.alive = False
        for _, coroutine in self._tasks:
            with contextlib.suppress(Killed, RuntimeError):
                coroutine.close()
        self._tasks.clear()

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> "asyncio.Future[T]":
        """Another thread, as fast as can be."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it is handed on
            future.set_exception(error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What nobody caught is wrong, whatever it was; but not what a killed process leaves."""
        if self.alive and isinstance(context.get("exception"), WrongError):
            self.world.wrong.append(str(context["exception"]))
        elif self.alive:
            self.world.wrong.append(f"{self.name}: {context.get('message')}: {context.get('exception')!r}")

    def get_debug(self) -> bool:
        """No."""
        return False

    def is_running(self) -> bool:
        """Always."""
        return True

    def is_closed(self) -> bool:
        """Never."""
        return False
