"""Plays the steps of an answer on a wire, each at its time, and stops at once when the client goes."""

import asyncio
import time
from collections.abc import Iterator
from typing import Protocol

from behest_proxy.sim.answers import Body, Finish, Head, Headers, Step
from behest_proxy.sim.records import RequestRecord

_TIMER_GRAIN_S = 0.0007
"""Event loops round timers to milliseconds: a step that is due within this is due."""
_STEPS_PER_TURN = 64
"""So many steps that are due at once go out before the loop may read sockets again."""


class Wire(Protocol):
    """One response on a connection. Nothing is raised when the client is gone."""

    def start(self, status: int, headers: Headers, length: int | None) -> None:
        """Sends the head; without `length` the body's end is told by the framing."""
        ...

    def send(self, data: bytes) -> bool:
        """Sends a piece of the body; False asks to wait for `Player.resume` before the next one."""
        ...

    def finish(self) -> None:
        """Ends the body cleanly."""
        ...

    def reset(self, code: int) -> None:
        """Breaks the response off."""
        ...


class Player:
    """One answer under way. The wire calls `resume` when it has room again, `gone` when the client went."""

    __slots__ = (
        "_due_s",
        "_loop",
        "_over",
        "_record",
        "_step",
        "_steps",
        "_timer",
        "_waits_for_room",
        "_wire",
    )

    def __init__(
        self,
        steps: Iterator[Step],
        wire: Wire,
        record: RequestRecord | None,
        *,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._steps = steps
        self._wire = wire
        self._record = record
        self._loop = loop
        self._due_s = time.monotonic()
        self._step: Step | None = None
        self._timer: asyncio.Handle | None = None
        self._waits_for_room = False
        self._over = False

    def play(self) -> None:
        """Does every step that is due, and asks the loop for the rest. Called once, then by itself."""
        self._timer = None
        for _ in range(_STEPS_PER_TURN):
            step = self._step
            if step is None:
                step = next(self._steps, None)
                if step is None:
                    return
                self._due_s += step.wait_ms / 1000
                self._step = step
            delay_s = self._due_s - time.monotonic()
            if delay_s > _TIMER_GRAIN_S:
                self._timer = self._loop.call_later(delay_s, self.play)
                return
            self._step = None
            if not self._perform(step):
                return
        self._timer = self._loop.call_soon(self.play)

    def resume(self) -> None:
        """The wire has room again."""
        if self._waits_for_room and not self._over:
            self._waits_for_room = False
            self._timer = self._loop.call_soon(self.play)

    def gone(self, reset_code: int | None = None) -> None:
        """The client reset the stream (with this HTTP/2 code) or closed the connection."""
        if self._over:
            return
        if self._record is not None:
            self._record.cancel(reset_code)
        self.drop()

    def drop(self) -> None:
        """Stops without a word, as when the server closes."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _perform(self, step: Step) -> bool:
        """Does one step; False where the next one has to wait."""
        if type(step) is Body:
            if self._record is not None:
                self._count(step, self._record)
            has_room = self._wire.send(step.data)
            if self._over:
                return False
            self._waits_for_room = not has_room
            if has_room and step.alone:
                self._timer = self._loop.call_soon(self.play)
                return False
            return has_room
        if isinstance(step, Head):
            if self._record is not None:
                self._record.status = step.status
            self._wire.start(step.status, step.headers, step.length)
            return not self._over
        assert isinstance(step, Finish)
        self._end(step)
        return False

    def _count(self, step: Body, record: RequestRecord) -> None:
        record.body_bytes_sent += len(step.data)
        if step.usage is not None:
            record.reported_usage = step.usage
        if step.chunks:
            record.chunks_sent += step.chunks
            record.output_tokens_sent += step.tokens
            now_ns = time.monotonic_ns()
            record.last_chunk_monotonic_ns = now_ns
            if record.first_chunk_monotonic_ns is None:
                record.first_chunk_monotonic_ns = now_ns

    def _end(self, step: Finish) -> None:
        if self._record is not None:
            self._record.end(step.outcome)
        if step.outcome == "stalled":
            return
        self._over = True
        if step.outcome == "reset":
            self._wire.reset(step.reset_code)
        else:
            self._wire.finish()
