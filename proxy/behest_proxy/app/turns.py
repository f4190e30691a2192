"""What a call has to do with what was said before: its thread, the reply that it goes on with, the events it missed.

Looks things up and waits where somebody else has to stop first; what they mean `threads` decides.
"""

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, overload
from uuid import UUID

import msgspec

from behest_ledger.configuration.routing import Route
from behest_ledger.configuration.snapshot import Configuration, ProjectEntry
from behest_ledger.request_id import unix_ms_of
from behest_ledger.sealing import SealingError
from behest_ledger.store import replay, threads
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.pool import Connection
from behest_ledger.store.replay import Claimed
from behest_ledger.store.threads import StoredMessage, ThreadKey
from behest_proxy.app.generation import Generation
from behest_proxy.app.replies import ANSWER, ASK_AGAIN_S, LOST, STREAM, Held, Replies, stored_answer
from behest_proxy.error_codes import ErrorCode
from behest_proxy.errors import Conflict, InvalidRequest, LedgerUnavailable, ServerError
from behest_proxy.identity.caller import Caller, is_session_id
from behest_proxy.request import ChatRequest
from behest_proxy.sse import DONE
from behest_proxy.threads import (
    WINDOW_BYTES,
    WINDOW_MESSAGES,
    CannotContinue,
    EventId,
    Memory,
    Said,
    Turn,
    continued,
    encoded,
    event_id,
    reply_of,
    take_turn,
    text_of,
    with_messages,
    without_thread,
)
from behest_proxy.tokens import counter_for

TAKE_OVER_S = 2.0
"""A sidecar that lives stops within half of it when its reply is wanted; one that does not is not waited for longer."""
FRESH_S = 5.0
"""A reply so young may be under way in another sidecar, and not be written yet."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the headers of a call say about what was before."""

    thread_id: str | None = None
    last_event: EventId | None = None
    ids: bool = False
    """Events shall bear their ids."""
    key: str | None = None
    """The Idempotency-Key."""

    @property
    def after(self) -> int | None:
        """Behind which event it wants to read; None: it cannot say. Who asks for ids and has none, has read nothing."""
        if self.last_event is not None:
            return self.last_event.number
        return 0 if self.ids else None

    @property
    def is_plain(self) -> bool:
        """Nothing is kept, and nothing is looked up."""
        return self.thread_id is None and self.key is None and not self.ids


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """A call that was looked up."""

    request: ChatRequest
    """What the provider is asked."""
    generation: Generation
    after: int = 0
    """The number of the last event that the client has."""
    key_after: int = 0
    """For who asks again with the same key, without an id: the answer begins behind this event."""
    attempt: int = 1
    said: tuple[bytes, ...] = ()
    """The payloads of the events that the reply has already."""
    is_given: bool = False
    """The reply is there, or somebody else gives it already: nothing is asked of anybody."""


def asked_in(headers: Sequence[tuple[bytes, bytes]]) -> Asked:
    """What the headers say. Raises `InvalidRequest`."""
    last_event = _one(headers, "Last-Event-ID")
    return Asked(
        thread_id=_one(headers, "X-Thread-Id"),
        last_event=event_id(last_event) if last_event else None,
        key=_one(headers, "Idempotency-Key"),
        ids=last_event is not None or _one(headers, "X-Event-Ids") == "1",
    )


def _one(headers: Sequence[tuple[bytes, bytes]], name: str) -> str | None:
    found = [value for header, value in headers if header == name.lower().encode()]
    if not found:
        return None
    text = found[0].decode("latin-1")
    if len(found) > 1 or not (is_session_id(text) or (name == "Last-Event-ID" and not text)):
        raise InvalidRequest(f"{name} must be one value of 1-255 visible ASCII characters", param=name)
    return text


def thread_key(caller: Caller, thread_id: str) -> ThreadKey:
    """The caller's own thread of this name."""
    return ThreadKey(
        tenant_id=caller.tenant_id, project_id=caller.project_id, user_id=caller.user_id, thread_id=thread_id
    )


def memory_of(configuration: Configuration, project: ProjectEntry, caller: Caller) -> Memory:
    """How much of a thread goes to the provider, by the project and the caller's tier."""
    tier = configuration.tier(project, caller.tier)
    said = project.spec.memory
    return Memory(
        messages=said.window if said is not None and said.window is not None else WINDOW_MESSAGES,
        size_bytes=said.window_bytes if said is not None and said.window_bytes is not None else WINDOW_BYTES,
        system_prompt=(tier.spec.system_prompt if tier is not None else None) or project.spec.system_prompt,
    )


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A call that has to do with what was before."""

    asked: Asked
    caller: Caller
    request: ChatRequest
    request_id: UUID
    request_sha256: bytes
    """Of the body and the thread: another one is another request."""
    memory: Memory
    found: Route

    @property
    def thread(self) -> ThreadKey | None:
        """Its thread."""
        return thread_key(self.caller, self.asked.thread_id) if self.asked.thread_id is not None else None


class Turns:
    """Opens calls."""

    def __init__(self, replies: Replies, pool: Connection) -> None:
        self._replies = replies
        self._pool = pool

    async def open(self, call: Call) -> Opened:
        """Look up what a call is about.

        Raises `InvalidRequest`, `Conflict`, `CannotContinue`, and `LedgerUnavailable` where it cannot be looked up.
        """
        try:
            if call.asked.key is not None:
                return await self._of_key(call, call.asked.key)
            whose = call.thread
            fresh = self._fresh(call)
            return await self._of_thread(call, whose, fresh) if whose is not None else _alone(call, fresh)
        except LedgerError:
            raise LedgerUnavailable("the ledger cannot be reached, and with it the thread", retry_after_s=1) from None
        except SealingError as error:
            raise ServerError(f"the thread cannot be read here: {error}") from None

    def _fresh(self, call: Call) -> Generation:
        is_kept = call.asked.key is not None or call.asked.thread_id is not None
        generation = Generation(
            generation_id=call.request_id,
            tenant_id=call.caller.tenant_id,
            on_change=self._replies.changed if is_kept else None,
        )
        generation.has_key = call.asked.key is not None
        return generation

    # --- idempotency keys --------------------------------------------------------------------------------------

    async def _of_key(self, call: Call, key: str) -> Opened:
        """What became of the call that came with this key before; if none did, it is opened under it."""
        digest = hashlib.sha256(key.encode()).digest()
        place = (call.caller.tenant_id, call.caller.project_id, call.caller.user_id, digest)
        keyed = self._replies.keyed
        deadline_s = time.monotonic() + TAKE_OVER_S
        while (held := keyed.get(place)) is not None:
            if held.request_sha256 != call.request_sha256:
                raise _other_request()
            if held.opened.is_set() and held.generation.state != "broken":
                return self._attached(call, held)
            if not held.opened.is_set():
                await held.opened.wait()
            elif time.monotonic() < deadline_s:
                await asyncio.sleep(ASK_AGAIN_S)  # its end is being written
            else:
                raise _in_progress()
        fresh = self._fresh(call)
        held = keyed[place] = Held(call.request_sha256, fresh)
        try:
            opened = await self._claimed(call, digest, fresh)
            held.generation, held.after = opened.generation, opened.key_after
            if opened.is_given:
                self._replies.forget_key(fresh)
                del keyed[place]
            return opened
        except BaseException:
            if keyed.get(place) is held:
                del keyed[place]
            raise
        finally:
            held.opened.set()

    def _attached(self, call: Call, held: Held) -> Opened:
        last_event = call.asked.last_event
        after = held.after if last_event is None else _place(last_event, held.generation)
        return Opened(request=call.request, generation=held.generation, after=after, is_given=True)

    async def _claimed(self, call: Call, digest: bytes, fresh: Generation) -> Opened:
        caller, whose = call.caller, call.thread
        found = await replay.claim_key(
            self._pool,
            tenant_id=caller.tenant_id,
            project_id=caller.project_id,
            user_id=caller.user_id,
            key_sha256=digest,
            request_sha256=call.request_sha256,
            generation_id=fresh.generation_id,
            holder_id=self._replies.holder_id(),
        )
        if found.state == "new":
            try:
                return await self._of_thread(call, whose, fresh) if whose is not None else _alone(call, fresh)
            except BaseException:
                fresh.finished(None, is_charged=False)  # the key is free again
                raise
        if found.state == "conflict":
            raise _other_request()
        if found.state == "keys":
            raise _full("idempotency_keys", replay.KEYS_MAX, "a user has at most {} idempotency keys in 24 hours")
        is_reconnect = whose is not None and call.asked.last_event is not None
        if found.state == "running" and not is_reconnect:
            raise _in_progress()
        if found.state != "whole" and whose is not None:
            opened = await self._of_thread(call, whose, fresh, before=found)
            if opened is not None:
                return opened
        return await self._stored(call, found)

    async def _stored(self, call: Call, found: Claimed) -> Opened:
        """The outcome that is stored for a key."""
        assert found.generation_id is not None
        tenant_id, last_event = call.caller.tenant_id, call.asked.last_event
        events, ending = await replay.load_events(
            self._pool, self._replies.vault, tenant_id=tenant_id, generation_id=found.generation_id
        )
        generation = Generation(generation_id=found.generation_id, tenant_id=tenant_id, events=events)
        after = found.after if last_event is None else _place(last_event, generation)
        if ending is not None and ending.startswith(ANSWER):
            generation.replayed(b"", stored_answer(ending))
        elif not call.request.stream:
            raise _broken_off()
        else:
            # Stopped by its client, it has no ending of its own that another one could use.
            tail = (ending or b"").removeprefix(STREAM) if found.state == "whole" or ending != LOST else b""
            generation.replayed(tail or _broken_off().terminal_event())
        return Opened(request=call.request, generation=generation, after=after, is_given=True)

    # --- threads -----------------------------------------------------------------------------------------------

    @overload
    async def _of_thread(self, call: Call, whose: ThreadKey, fresh: Generation) -> Opened: ...
    @overload
    async def _of_thread(
        self, call: Call, whose: ThreadKey, fresh: Generation, *, before: Claimed
    ) -> Opened | None: ...

    async def _of_thread(
        self, call: Call, whose: ThreadKey, fresh: Generation, *, before: Claimed | None = None
    ) -> Opened | None:
        """What the call means in its thread. None: the reply `before` that its key stands for is not the last one."""
        request, last_event = call.request, call.asked.last_event
        deadline_s = time.monotonic() + TAKE_OVER_S
        while True:
            # Who lost its connection at the first words, or has the last ones, asks before they are written.
            await self._replies.written(whose, timeout_s=deadline_s - time.monotonic())
            messages = await threads.load_messages(
                self._pool, whose, self._replies.vault, limit=max(call.memory.messages, len(request.messages)) + 2
            )
            last = messages[-1] if messages else None
            turn = take_turn([await self._said(whose, one) for one in messages], request, call.memory)
            repeats = last is not None and turn.repeats
            if before is not None and not (repeats and last is not None and last.generation_id == before.generation_id):
                return None
            if last_event is not None and not (repeats and last is not None and _is_of(last_event, last)):
                if _is_fresh(last_event) and time.monotonic() < deadline_s:
                    await asyncio.sleep(ASK_AGAIN_S)
                    continue
                raise _nothing_to_resume(last_event)
            if last is not None and repeats and last.state == "whole" and (last_event or before):
                return await self._replayed(call, whose, last)
            if last is None or not repeats or last.state == "whole":
                await self._check_room(whose, last, turn)
                fresh.thread = whose
                fresh.new_messages = [(_role(raw), bytes(raw)) for raw in turn.new]
                return Opened(request=with_messages(request, turn.messages), generation=fresh)
            epoch = await self._claim(call, whose, last, fresh, force=time.monotonic() >= deadline_s)
            if epoch is not None:
                return await self._goes_on(call, whose, turn, last, epoch, before)
            await asyncio.sleep(ASK_AGAIN_S)

    async def _claim(
        self, call: Call, whose: ThreadKey, last: StoredMessage, fresh: Generation, *, force: bool
    ) -> int | None:
        """The epoch in which the reply is ours; None: not yet, or it is another one by now."""
        assert last.generation_id is not None
        running = self._replies.running.get(last.generation_id)
        if running is not None and running.state == "running":
            # Its client is gone, and nobody noticed: here it asks again.
            self._replies.take_over(running)
        claimed = await replay.claim(
            self._pool,
            tenant_id=whose.tenant_id,
            generation_id=last.generation_id,
            holder_id=self._replies.holder_id(),
            force=force,
            instead_of=fresh.generation_id if fresh.has_key else None,
            after=call.asked.after,
        )
        return claimed.epoch if claimed is not None and claimed.state == "claimed" else None

    async def _goes_on(
        self,
        call: Call,
        whose: ThreadKey,
        turn: Turn,
        last: StoredMessage,
        epoch: int,
        before: Claimed | None,
    ) -> Opened:
        """A reply that is ours now: what was said of it, and how it is asked for the rest."""
        assert last.generation_id is not None
        events, ending = await replay.load_events(
            self._pool, self._replies.vault, tenant_id=whose.tenant_id, generation_id=last.generation_id
        )
        first_event = 1
        if not events and last.events and last.content is not None:
            first_event = last.events + 1  # its events were forgotten, its text is there
        generation = Generation(
            generation_id=last.generation_id,
            tenant_id=whose.tenant_id,
            epoch=epoch,
            events=events,
            first_event=first_event,
            on_change=self._replies.changed,
        )
        generation.thread = whose
        generation.has_key = call.asked.key is not None
        self._replies.begin(generation)
        try:
            _check_whole(ending)
            after = generation.count if before is None else before.after
            if call.asked.last_event is not None:
                after = _place(call.asked.last_event, generation)
            elif call.asked.ids:
                after = 0
            after = max(after, first_event - 1)
            reply = reply_of(events) if events or last.content is None else _members(last.content)
            counter = counter_for(call.found.upstream_name)
            sent = continued(
                turn,
                reply,
                said_tokens=counter.count(text_of(reply)),
                request=call.request,
                continuation=call.found.upstream.spec.capabilities.continuation,
            )
        except BaseException:
            generation.finished(None, is_charged=False)  # it stays as broken as it was
            raise
        said = tuple(_payload(event) for event in events) or ((_spoken(reply),) if text_of(reply) else ())
        return Opened(
            request=sent,
            generation=generation,
            after=after,
            key_after=after if before is None else before.after,
            attempt=epoch,
            said=said,
        )

    async def _replayed(self, call: Call, whose: ThreadKey, last: StoredMessage) -> Opened:
        """The rest of a whole reply, from the store."""
        assert last.generation_id is not None
        events, _ = await replay.load_events(
            self._pool, self._replies.vault, tenant_id=whose.tenant_id, generation_id=last.generation_id
        )
        generation = Generation(
            generation_id=last.generation_id,
            tenant_id=whose.tenant_id,
            events=events,
            first_event=1 if events else last.events + 1,
        )
        generation.replayed(DONE)
        after = _place(call.asked.last_event, generation) if call.asked.last_event is not None else 0
        return Opened(request=call.request, generation=generation, after=after, is_given=True)

    async def _said(self, whose: ThreadKey, message: StoredMessage) -> Said:
        content = message.content
        if content is None and message.generation_id is not None:
            events, _ = await replay.load_events(
                self._pool, self._replies.vault, tenant_id=whose.tenant_id, generation_id=message.generation_id
            )
            content = encoded(reply_of(events))
        return Said(role=message.role, content=content or b"{}", is_whole=message.state == "whole")

    async def _check_room(self, whose: ThreadKey, last: StoredMessage | None, turn: Turn) -> None:
        """Raise `InvalidRequest` where a limit stands against keeping the turn."""
        found = await threads.find_thread(self._pool, whose) if last is not None else None
        if found is None:
            others = await threads.list_threads(self._pool, whose, limit=threads.THREADS_MAX)
            if len(others) >= threads.THREADS_MAX:
                raise _full("threads", threads.THREADS_MAX, "a user has at most {} threads: delete one")
            return
        if found.messages + len(turn.new) + 1 > threads.MESSAGES_MAX:
            raise _full("messages", threads.MESSAGES_MAX, "a thread has at most {} messages: begin another one")
        if found.size_bytes + sum(memoryview(raw).nbytes for raw in turn.new) > threads.THREAD_BYTES_MAX:
            raise _full("bytes", threads.THREAD_BYTES_MAX, "a thread has at most {} bytes: begin another one")


def _alone(call: Call, generation: Generation) -> Opened:
    """A call without a thread."""
    if call.asked.last_event is not None:
        raise CannotContinue("Last-Event-ID: a call without X-Thread-Id has no reply before it", param="Last-Event-ID")
    messages = without_thread(call.request, call.memory.system_prompt)
    request = call.request if messages is None else with_messages(call.request, messages)
    return Opened(request=request, generation=generation)


def _other_request() -> Conflict:
    return Conflict("Idempotency-Key: was used for another request: take a new one", param="Idempotency-Key")


def _in_progress() -> Conflict:
    return Conflict(
        "Idempotency-Key: its request is under way elsewhere: ask again",
        code=ErrorCode.IN_PROGRESS,
        param="Idempotency-Key",
        retry_after_s=1,
        may_retry=True,
    )


def _broken_off() -> CannotContinue:
    return CannotContinue(
        "Idempotency-Key: its request was broken off, and is charged as far as it came: take a new one",
        param="Idempotency-Key",
    )


def _full(limit: str, most: int, text: str) -> InvalidRequest:
    return InvalidRequest(text.format(most), param="X-Thread-Id", details={"limit": limit, "max": most})


def _place(asked: EventId, generation: Generation) -> int:
    """The number of the last event that the client has. Raises `CannotContinue` where the next ones are not there."""
    if asked.generation_id != generation.generation_id:
        raise _nothing_to_resume(asked)
    if generation.first_event - 1 <= asked.number <= generation.count:
        return asked.number
    raise CannotContinue(
        "Last-Event-ID: the events behind it are not kept: read the thread's messages, and ask without it",
        param="Last-Event-ID",
        details={"last_event_id": str(generation.last_id)},
    )


def _is_of(asked: EventId, reply: StoredMessage) -> bool:
    return asked.generation_id == reply.generation_id


def _is_fresh(asked: EventId) -> bool:
    return abs(time.time() - unix_ms_of(asked.generation_id) / 1000) < FRESH_S


def _check_whole(ending: bytes | None) -> None:
    if ending == LOST:
        raise CannotContinue("a part of the broken reply could not be kept: begin a new turn")


def _nothing_to_resume(asked: EventId) -> CannotContinue:
    return CannotContinue(
        f"Last-Event-ID: {asked} is no event of the thread's last reply, or another message was repeated",
        param="Last-Event-ID",
    )


def _role(raw: msgspec.Raw) -> str:
    return msgspec.json.decode(raw, type=_Role).role


class _Role(msgspec.Struct):
    role: str


def _members(content: bytes) -> Mapping[str, Any]:
    return msgspec.json.decode(content, type=dict[str, Any])


def _payload(event: bytes) -> bytes:
    return event.removeprefix(b"data: ").rstrip(b"\n")


def _spoken(reply: Mapping[str, Any]) -> bytes:
    """The text of a reply as the one event that would bring it."""
    delta = {"role": "assistant", "content": text_of(reply)}
    return encoded({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
