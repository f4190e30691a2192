"""The replies that are kept: written to the ledger's store beside their streams, in batches, each half second at least.

Outside of the money's way: it has a connection of its own, a stream never waits for it, and what cannot be written
stays in memory within a bound. While the database is away streams go on; what is lost of a reply then is lost for
replay, and the reply says so (`cannot_continue`) instead of going on with a gap.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from uuid import UUID

import msgspec

from behest_ledger.charging import Outcome
from behest_ledger.store import replay, threads
from behest_ledger.store.errors import LedgerError, LedgerUnavailableError
from behest_ledger.store.outage import Outage
from behest_ledger.store.pool import Connection
from behest_ledger.store.replay import Piece, Verdict
from behest_ledger.store.threads import ThreadKey
from behest_ledger.vault import Vault
from behest_proxy.actions import Fail, Respond
from behest_proxy.app.generation import Generation
from behest_proxy.errors import Conflict, ShownError, our_bug
from behest_proxy.threads import encoded, reply_of

logger = logging.getLogger(__name__)

WRITE_S = 0.5
ASK_AGAIN_S = 0.05
LOOK_AGAIN_S = 0.005
"""For what is in this process, and is being written."""
PIECES_MAX = 200
PIECES_BYTES_MAX = 4 * 1024 * 1024
MEMORY_BYTES_MAX = 64 * 1024 * 1024
"""Of all replies that are not written yet."""

LOST = b"lost"
"""The ending of a reply of which events are missing."""


STREAM = b"stream:"
ANSWER = b"answer:"
"""How the ending of a reply with an idempotency key begins: what came behind its events, or an answer as a whole."""


class Held:
    """An idempotency key whose request this process has."""

    __slots__ = ("after", "generation", "opened", "request_sha256")

    def __init__(self, request_sha256: bytes, generation: Generation) -> None:
        self.request_sha256 = request_sha256
        self.generation = generation
        self.after = 0
        """The answer begins behind this event."""
        self.opened = asyncio.Event()
        """It is known by now what became of it."""


class StoredAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that was no stream, as it is stored for an idempotency key."""

    status: int
    body: str
    headers: list[tuple[str, str]] = []


class Replies:
    """All replies of this process that are kept, and the task that writes them."""

    def __init__(self, vault: Vault, holder_id: Callable[[], UUID]) -> None:
        self.vault = vault
        self.running: dict[UUID, Generation] = {}
        """By generation id: those whose end is not written yet."""
        self.keyed: dict[tuple[str, str, str, bytes], Held] = {}
        """By tenant, project, user and the hash of an idempotency key."""
        self.holder_id = holder_id
        self._pool: Connection = None
        self._dirty: dict[Generation, None] = {}
        """Not by their ids: the attempt that was taken over and the one that took it over have the same."""
        self._idle_due_s = 0.0
        self._wake = asyncio.Event()
        self._outage = Outage(logger, "replies cannot be written, they wait in memory")

    async def run(self, pool: Connection) -> None:
        """Write until cancelled."""
        self._pool = pool
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(WRITE_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            began_s = loop.time()
            try:
                await self._write_all()
                self._outage.over()
            except LedgerError as error:
                self._outage.failed(error)
                self._bound_memory()
                await asyncio.sleep(WRITE_S)
            except Exception:
                logger.exception("replies cannot be written")
                self._bound_memory()
                await asyncio.sleep(WRITE_S)
            # However many ends there are, they are written together.
            await asyncio.sleep(max(0.0, 0.01 - (loop.time() - began_s)))

    async def flush(self, timeout_s: float) -> None:
        """Write what is left, as far as that goes in time."""
        if self._pool is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                while self._dirty:
                    await self._write_all()
        except (TimeoutError, LedgerError) as error:
            logger.warning("%d replies could not be written before the end: %s", len(self._dirty), error)

    def begin(self, generation: Generation) -> None:
        """One more is given by this process."""
        if generation.is_kept:
            self.running[generation.generation_id] = generation

    def changed(self, generation: Generation) -> None:
        """There is something to write. Called in the way of a chunk: at most once between two writes."""
        self._dirty[generation] = None
        if _is_news(generation):
            self._wake.set()

    async def written(self, whose: ThreadKey, *, timeout_s: float) -> bool:
        """Wait until the store knows of each turn in this thread, and each end of a reply, of which this process does.

        Without a thread's id: in all threads of the user. It takes milliseconds. After `timeout_s` it is not waited
        for any longer: False.
        """
        deadline_s = time.monotonic() + timeout_s
        # What comes later is not waited for: somebody may speak all the time.
        waiting = [one for one in self._dirty if _is_news(one) and one.thread is not None and whose.covers(one.thread)]
        while waiting := [one for one in waiting if one in self._dirty and _is_news(one)]:
            if time.monotonic() >= deadline_s:
                break
            await asyncio.sleep(LOOK_AGAIN_S)
        return not waiting

    def given_up(self, generation: Generation, error: ShownError | None) -> None:
        """Its call failed before it was under way: a reply that goes on stays as broken as it was."""
        if generation.conduct is None:
            generation.finished(None, is_charged=False)
            generation.answer(Fail(error or our_bug()))

    def forget_key(self, generation: Generation) -> None:
        """Nothing came under the key that was taken for it."""
        if generation.state == "running" and generation.conduct is None:
            generation.finished(None, is_charged=False)

    def drop(self, generation: Generation) -> None:
        """Keep nothing of it: it came to nothing."""
        generation.is_kept = False
        self._ended(generation)

    def take_over(self, generation: Generation) -> None:
        """Somebody else gives this reply from here on."""
        if generation.conduct is not None:
            generation.conduct.stop(Outcome.CLIENT_CANCELLED, Conflict("another call has taken this reply over"))

    # --- writing -----------------------------------------------------------------------------------------------

    async def _write_all(self) -> None:
        batch: list[tuple[Generation, Piece]] = []
        size_bytes = 0
        idle: list[Generation] = []
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._idle_due_s:
            # Who waits for one that says nothing just now is heard too.
            self._idle_due_s = now_s + WRITE_S
            idle = [one for one in self.running.values() if one not in self._dirty and one.new_messages is None]
        for generation in [*self._dirty, *idle]:
            # A reply that went on was charged before, whatever became of this attempt.
            if (
                generation.has_key
                and generation.epoch == 1
                and generation.state != "running"
                and not generation.is_charged
            ):
                await replay.release_key(
                    self._pool, tenant_id=generation.tenant_id, generation_id=generation.generation_id
                )
                generation.is_kept = generation.is_kept and generation.thread is not None
            if not generation.is_kept:
                self.drop(generation)
                continue
            if generation.new_messages is not None and not await self._keep_turn(generation):
                continue
            piece = await self._piece(generation)
            batch.append((generation, piece))
            size_bytes += sum(map(len, piece.events))
            if len(batch) >= PIECES_MAX or size_bytes >= PIECES_BYTES_MAX:
                await self._write(batch)
                batch, size_bytes = [], 0
        if batch:
            await self._write(batch)

    async def _keep_turn(self, generation: Generation) -> bool:
        assert generation.thread is not None
        assert generation.new_messages is not None
        verdict = await threads.keep_turn(
            self._pool,
            generation.thread,
            self.vault,
            messages=generation.new_messages,
            generation_id=generation.generation_id,
            holder_id=self.holder_id(),
        )
        generation.new_messages = None
        if verdict == "kept":
            return True
        # The limits were looked at before; somebody else was faster since.
        logger.warning("a turn of thread %s is not kept: %s", generation.thread.key, verdict)
        self.drop(generation)
        return False

    async def _piece(self, generation: Generation) -> Piece:
        events: tuple[bytes, ...] = ()
        if not generation.is_lossy:
            events = tuple(generation.events_after(generation.stored, PIECES_BYTES_MAX))
        state = generation.state
        if generation.stored + len(events) < generation.count and not generation.is_lossy:
            state = "running"  # there is more: the end is written with the last of it
        message = ending = None
        if state != "running":
            ending = LOST if generation.is_lossy else _ending(generation)
            if generation.thread is not None:
                message = threads.closed_message(
                    self.vault,
                    generation.thread,
                    role="assistant",
                    content=encoded(reply_of(await self._all_events(generation, events))),
                )
        generation.is_dirty = False
        return Piece(
            tenant_id=generation.tenant_id,
            generation_id=generation.generation_id,
            epoch=generation.epoch,
            first_event=generation.stored + 1,
            events=events,
            state=state,
            message=message,
            ending=ending,
        )

    async def _all_events(self, generation: Generation, last: Sequence[bytes]) -> list[bytes]:
        if generation.first_event == 1 and not generation.is_lossy:
            return generation.events_after(0)
        stored, _ = await replay.load_events(
            self._pool, self.vault, tenant_id=generation.tenant_id, generation_id=generation.generation_id
        )
        return [*stored[: generation.stored], *last]

    async def _write(self, batch: Sequence[tuple[Generation, Piece]]) -> None:
        try:
            verdicts = await replay.write(self._pool, self.vault, [piece for _, piece in batch])
        except LedgerUnavailableError:
            raise
        except LedgerError as error:
            if len(batch) > 1:
                for one in batch:
                    await self._write([one])
                return
            logger.warning("a reply is not kept any further: %s", error)
            self.drop(batch[0][0])
            return
        for generation, piece in batch:
            self._written(generation, piece, verdicts.get(generation.generation_id, "gone"))

    def _written(self, generation: Generation, piece: Piece, verdict: Verdict) -> None:
        if verdict in ("kept", "wanted"):
            generation.forget_stored(piece.first_event + len(piece.events) - 1)
        if verdict == "kept" and piece.state != "running":
            self._ended(generation)
        elif verdict in ("gone", "lost"):
            self.drop(generation)
        elif not generation.is_dirty and generation.stored == generation.count and generation.state == "running":
            self._dirty.pop(generation, None)
        if verdict in ("wanted", "lost"):
            self.take_over(generation)

    def _ended(self, generation: Generation) -> None:
        self._dirty.pop(generation, None)
        if self.running.get(generation.generation_id) is generation:
            del self.running[generation.generation_id]
        if generation.has_key:
            for key, held in list(self.keyed.items()):
                if held.generation is generation:
                    del self.keyed[key]

    def _bound_memory(self) -> None:
        """While nothing can be written: the largest are given up first."""
        waiting = sorted(self._dirty, key=lambda one: -one.size_bytes)
        size_bytes = sum(one.size_bytes for one in waiting)
        for generation in waiting:
            if size_bytes <= MEMORY_BYTES_MAX:
                return
            size_bytes -= generation.size_bytes
            generation.give_up_keeping()


def _is_news(generation: Generation) -> bool:
    """The store lacks its turn, or its end."""
    return generation.new_messages is not None or generation.state != "running"


def _ending(generation: Generation) -> bytes | None:
    """What came behind the events, or the whole answer: for who asks again with the same key."""
    if not generation.has_key:
        return None
    answer = generation.answered.result() if generation.answered.done() else None
    if isinstance(answer, Respond):
        stored = StoredAnswer(
            status=answer.status,
            body=answer.body.decode("utf-8", "replace"),
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in answer.headers],
        )
    elif isinstance(answer, Fail):
        error = answer.error
        stored = StoredAnswer(
            status=error.status,
            body=error.envelope().decode(),
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in error.headers()],
        )
    else:
        return STREAM + generation.ending
    return ANSWER + msgspec.json.encode(stored)


def stored_answer(ending: bytes) -> Respond:
    """The whole answer in an ending."""
    stored = msgspec.json.decode(ending.removeprefix(ANSWER), type=StoredAnswer)
    headers = tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in stored.headers)
    return Respond(stored.status, stored.body.encode(), headers)
