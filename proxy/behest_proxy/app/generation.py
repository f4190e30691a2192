"""One reply with its events, and everybody who reads it: what stands between an exchange and a kept reply's clients.

To whoever conducts the exchange this is one client. Behind it there may be several, each at a place of its own: who
asked with the same idempotency key, or who lost a connection and wants what it missed. An event's synchronous way gets
an append to a list; the rest is done beside it (`replies`).
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol
from uuid import UUID

from behest_ledger.charging import Outcome
from behest_ledger.store.replay import State, split_events
from behest_ledger.store.threads import ThreadKey
from behest_proxy.actions import Fail, Respond
from behest_proxy.app.client_stream import STREAM_HEADERS, ClientStream
from behest_proxy.app.context import RequestContext
from behest_proxy.edge.direct import Header
from behest_proxy.errors import ShownError
from behest_proxy.sse import DONE
from behest_proxy.threads import CannotContinue, EventId

EVENTS_BYTES_MAX = 4 * 1024 * 1024
"""Of one reply: what comes beyond reaches the client, and is not kept."""
PUMPED_BYTES = 32 * 1024
"""Written to a client that is behind, before it is looked whether it can take more."""


_LEFT = CannotContinue("the call that this one had joined was broken off: ask again", may_retry=True)


class Conducted(Protocol):
    """Who gives the reply."""

    def stop(self, outcome: Outcome, error: ShownError) -> None:
        """End it from outside."""


class Follower:
    """One client at its place in the reply."""

    def __init__(
        self,
        generation: "Generation",
        stream: ClientStream,
        context: RequestContext,
        *,
        after: int,
        ids: bool,
        stall_s: float,
    ) -> None:
        """`after` is the number of the last event that the client has; `ids`: it asked for the numbers.

        Where it takes nothing of what it lacks for `stall_s` it is cut: nobody else looks after one that is behind.
        """
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()
        self.stream = stream
        self.position = after
        self._generation = generation
        self._context = context
        self._ids = ids
        self._stall_s = stall_s
        self._stall_timer: asyncio.TimerHandle | None = None
        self._begun = False
        self._ending_sent = False
        stream.on_gone = self._on_gone
        stream.on_resume = self._on_resume

    @property
    def is_over(self) -> bool:
        """Nothing more is written to it."""
        return self.done.done()

    def pump(self) -> None:
        """Write what it lacks, as far as it takes it."""
        generation, stream = self._generation, self.stream
        if self.is_over or not generation.begun:
            return
        if not self._begun:
            self._begun = True
            stream.begin(200, [*STREAM_HEADERS, *self._context.headers()])
        while self.position < generation.count and not stream.paused and not self.is_over:
            events = generation.events_after(self.position, PUMPED_BYTES)
            if not events:
                self.cut()  # what it lacks is not in memory any more: never a gap
                return
            self._write(events)
        if self.position < generation.count and not self.is_over:
            if self._stall_timer is None:
                self._stall_timer = self._loop.call_later(self._stall_s, self._on_stall)
            return
        if self.is_over or not generation.ended:
            return
        if generation.ending and not self._ending_sent:
            self._ending_sent = True
            stream.write(generation.ending)
        stream.end()
        self._finish()

    def keep_alive(self, data: bytes) -> None:
        """A sign of life between two events."""
        if self._begun and not self.is_over and not self.stream.paused and self.position >= self._generation.count:
            self.stream.write(data)

    def reset(self) -> None:
        """Break it visibly."""
        if not self.is_over:
            self.stream.reset()
            self._finish()

    def cut(self) -> None:
        """Break it, and say that it is gone: not from inside of the event's way, which found it too far behind."""
        self.reset()
        self._loop.call_soon(self._generation.follower_gone)

    def _write(self, events: Sequence[bytes]) -> None:
        first = self.position + 1
        self.position += len(events)
        if self._ids:
            prefix = b"id: %b-" % self._generation.generation_id.hex.encode()
            events = [b"%b%d\n%b" % (prefix, first + at, event) for at, event in enumerate(events)]
        self.stream.write(events[0] if len(events) == 1 else b"".join(events))

    def leave(self) -> None:
        """The client was gone before it could be told to anybody."""
        self._finish()

    def _on_gone(self) -> None:
        self._finish()
        self._generation.follower_gone()

    def _on_resume(self) -> None:
        self._stop_timer()
        self.pump()
        self._generation.follower_resumed()

    def _on_stall(self) -> None:
        self.stream.reset()
        self._on_gone()

    def _stop_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _finish(self) -> None:
        self._stop_timer()
        if not self.done.done():
            self.done.set_result(None)


class Generation:
    """A reply while it is given, or as it was stored. A `ClientStream` for its exchange."""

    def __init__(
        self,
        *,
        generation_id: UUID,
        tenant_id: str,
        epoch: int = 1,
        events: Sequence[bytes] = (),
        first_event: int = 1,
        on_change: "Callable[[Generation], None] | None" = None,
    ) -> None:
        """`events` are known already, the first of them has the number `first_event`; `on_change` is told when there is
        something to write, and may be called as often as there are events.
        """
        self.generation_id = generation_id
        self.tenant_id = tenant_id
        self.epoch = epoch
        self.thread: ThreadKey | None = None
        self.new_messages: Sequence[tuple[str, bytes]] | None = None
        """Role and text of what its thread has to keep before it; None: nothing is left to be kept."""
        self.has_key = False
        """Others may come and ask for all of it: its events stay in memory until its end."""
        self.begun = False
        self.ended = False
        self.ending = b""
        """What comes behind the events: `[DONE]`, or the terminal event."""
        self.state: State = "running"
        self.is_charged = False
        self.conduct: Conducted | None = None
        self.answered: asyncio.Future[Respond | Fail | None] = asyncio.get_running_loop().create_future()
        """For everybody who follows: what their endpoints have to send; None: it was streamed."""
        self.on_gone: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None
        self.is_dirty = False
        """Somebody was told that there is something to write."""
        self.is_kept = on_change is not None
        self.is_lossy = False
        """Not all of its events could be kept: of these the ledger has no more than `stored`."""
        self.stored = first_event - 1 + len(events)
        """So many of its events the ledger has."""
        self._on_change = on_change
        self._events = list(events)
        self._offset = first_event - 1
        self._size_bytes = sum(map(len, self._events))
        self._total_bytes = self._size_bytes
        self._followers: list[Follower] = []

    # --- events ------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """The number of its last event."""
        return self._offset + len(self._events)

    @property
    def first_event(self) -> int:
        """The number of the first event that is in memory."""
        return self._offset + 1

    @property
    def last_id(self) -> EventId:
        """The id of its last event."""
        return EventId(self.generation_id, self.count)

    def events_after(self, number: int, bytes_max: int | None = None) -> list[bytes]:
        """Events behind this one, at least one where there is one in memory."""
        begin = number - self._offset
        if begin < 0:
            return []
        if bytes_max is None:
            return self._events[begin:]
        end, size_bytes = begin, 0
        while end < len(self._events) and (end == begin or size_bytes + len(self._events[end]) <= bytes_max):
            size_bytes += len(self._events[end])
            end += 1
        return self._events[begin:end]

    def add(self, data: bytes, events: int) -> None:
        """Events of the answer, and what may come behind the last of them. They are paid for."""
        if events == 1 and data.find(b"\n\n") == len(data) - 2:
            self._append([data])
        elif events:
            parts = split_events(data)
            self._append(parts[:events])
            self.ending += b"".join(parts[events:])
        else:
            self.ending += data
        for follower in self._followers:
            follower.pump()
        if self.is_lossy:
            self._shed()

    def forget_stored(self, number: int) -> None:
        """The ledger has its events up to this one."""
        self.stored = max(self.stored, number)
        if not self.has_key and not self.is_lossy:
            self._forget(self.stored)

    def give_up_keeping(self) -> None:
        """Keep no more of its events: there is no room for them."""
        self.is_lossy = True
        self._shed()

    @property
    def size_bytes(self) -> int:
        """Of its events in memory."""
        return self._size_bytes

    def _forget(self, number: int) -> None:
        needed = min([number, *(one.position for one in self._followers if not one.is_over)])
        if needed > self._offset:
            self._size_bytes -= sum(map(len, self._events[: needed - self._offset]))
            del self._events[: needed - self._offset]
            self._offset = needed

    def _shed(self) -> None:
        """Nothing but what its clients lack stays, and that not without bound."""
        self._forget(self.count)
        if self._size_bytes > EVENTS_BYTES_MAX:
            for follower in self._followers:
                if follower.position < self.count:
                    follower.cut()
            self._forget(self.count)

    def _append(self, events: list[bytes]) -> None:
        self._events += events
        size_bytes = sum(map(len, events))
        self._size_bytes += size_bytes
        self._total_bytes += size_bytes
        if self._total_bytes > EVENTS_BYTES_MAX:
            self.is_lossy = True
        self._changed()

    def _changed(self) -> None:
        if not self.is_dirty and self._on_change is not None:
            self.is_dirty = True
            self._on_change(self)

    # --- the exchange's client ---------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Nobody who is there takes more."""
        there = [follower for follower in self._followers if not follower.is_over]
        return bool(there) and all(follower.stream.paused for follower in there)

    @property
    def gone(self) -> bool:
        """Nobody is there."""
        return all(follower.is_over for follower in self._followers)

    def begin(self, status: int, headers: Sequence[Header]) -> None:  # noqa: ARG002 - each client has its own headers
        """The provider answers."""
        self.begun = True
        for follower in self._followers:
            follower.pump()

    def write(self, data: bytes) -> None:
        """A sign of life."""
        for follower in self._followers:
            follower.keep_alive(data)

    def end(self) -> None:
        """All was written."""
        self.ended = True
        for follower in self._followers:
            follower.pump()

    def reset(self) -> None:
        """Nobody reads."""
        for follower in self._followers:
            follower.reset()

    # --- its clients -------------------------------------------------------------------------------------------

    def follow(
        self, stream: ClientStream, context: RequestContext, *, after: int, ids: bool, stall_s: float
    ) -> Follower:
        """One more client, which has the events up to `after`. See `Follower`."""
        follower = Follower(self, stream, context, after=after, ids=ids, stall_s=stall_s)
        self._followers = [one for one in self._followers if not one.is_over]
        self._followers.append(follower)
        if stream.gone:
            follower.leave()
        follower.pump()
        self.follower_resumed()
        return follower

    def follower_gone(self) -> None:
        """A client left."""
        if self.gone and self.on_gone is not None and not self.ended:
            self.on_gone()

    def follower_resumed(self) -> None:
        """A client takes more again, or a new one is there. It may be full anew with what it lacked."""
        if self.on_resume is not None and not self.ended:
            self.on_resume()

    def replayed(self, ending: bytes, answer: Respond | None = None) -> None:
        """It is as it was stored: whoever follows gets the rest of it, or the answer that it was."""
        self.begun = self.ended = answer is None
        self.ending = ending
        self.state = "whole"
        self.answer(answer)

    # --- its end -----------------------------------------------------------------------------------------------

    def granted(self) -> None:
        """The call was admitted: its turn is kept."""
        if self.new_messages is not None:
            self._changed()

    def finished(self, outcome: Outcome | None, *, is_charged: bool) -> None:
        """It is over; None: it was refused before it began."""
        if self.state != "running":
            return
        if outcome is None and self.new_messages is not None:
            self.is_kept = False  # a call that was refused leaves nothing
        self.state = "whole" if outcome is Outcome.COMPLETED else "broken"
        self.is_charged = is_charged
        if self.begun and not self.ending:
            # Its client had all of it and left before it was said so.
            self.ending = DONE if self.state == "whole" else _LEFT.terminal_event()
        self.ended = True
        self.is_dirty = False  # that it has ended is news, whatever else is to be written already
        self._changed()
        for follower in self._followers:
            follower.pump()

    def answer(self, answer: Respond | Fail | None) -> None:
        """What everybody who follows is to be sent."""
        if answer is None and not self.begun and not self.gone:
            answer = Fail(_LEFT)  # who joined it too late to keep it from being broken off
        if not self.answered.done():
            self.answered.set_result(answer)
