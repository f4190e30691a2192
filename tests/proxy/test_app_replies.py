"""What is kept of replies while the ledger is away: nobody waits, and memory has a bound."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from behest_ledger.charging import Outcome
from behest_ledger.store import replay
from behest_ledger.store.errors import LedgerRefusedError, LedgerUnavailableError
from behest_ledger.store.replay import Piece, Verdict
from behest_ledger.store.threads import ThreadKey
from behest_ledger.vault import Vault
from behest_proxy.app import replies as module
from behest_proxy.app.generation import Generation
from behest_proxy.app.replies import LOST, Replies


class Ledger:
    """Keeps what it is given, unless it is away."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.refused: set[UUID] = set()
        self.pieces: list[Piece] = []
        self.verdict: Verdict = "kept"

    async def write(self, source: Any, vault: Vault, pieces: Sequence[Piece]) -> dict[UUID, Verdict]:
        if self.error is not None:
            raise self.error
        if any(piece.generation_id in self.refused for piece in pieces):
            raise LedgerRefusedError("not so")
        self.pieces += pieces
        return {piece.generation_id: self.verdict for piece in pieces}

    def events(self, generation: Generation) -> bytes:
        """What it has of one, in the order of their numbers."""
        found: dict[int, tuple[bytes, ...]] = {}
        for piece in self.pieces:
            if piece.generation_id == generation.generation_id and piece.events:
                found[piece.first_event] = piece.events
        return b"".join(event for first in sorted(found) for event in found[first])


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    found = Ledger()
    monkeypatch.setattr(replay, "write", found.write)
    monkeypatch.setattr(module, "WRITE_S", 0.01)
    return found


def play(work: Callable[[Replies], Awaitable[None]]) -> None:
    async def main() -> None:
        replies = Replies(Vault(None), uuid4)
        task = asyncio.create_task(replies.run(object()))
        try:
            async with asyncio.timeout(20):
                await work(replies)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


def a_generation(replies: Replies) -> Generation:
    one = Generation(generation_id=uuid4(), tenant_id="t", on_change=replies.changed)
    replies.begin(one)
    return one


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.005)


def test_events_are_written_in_batches_and_the_end_with_the_last(ledger: Ledger) -> None:
    async def work(replies: Replies) -> None:
        one, two = a_generation(replies), a_generation(replies)
        for number in range(100):
            one.add(b"data: %d\n\n" % number, 1)
        two.add(b"data: x\n\n", 1)
        await until(lambda: one.stored == 100 and two.stored == 1)
        one.add(b"data: last\n\n", 1)
        one.finished(Outcome.COMPLETED, is_charged=True)
        await until(lambda: one.generation_id not in replies.running)
        assert ledger.events(one) == b"".join(b"data: %d\n\n" % number for number in range(100)) + b"data: last\n\n"
        assert [piece.state for piece in ledger.pieces if piece.generation_id == one.generation_id][-1] == "whole"
        assert len([piece for piece in ledger.pieces if piece.events]) < 10

    play(work)


def test_that_a_reply_has_ended_is_written_at_once_whatever_else_waits(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_S", 3600)

    async def work(replies: Replies) -> None:
        one = a_generation(replies)
        one.add(b"data: 1\n\n", 1)
        await asyncio.sleep(0)
        assert not ledger.pieces
        one.finished(Outcome.COMPLETED, is_charged=True)
        await until(lambda: not replies.running)
        assert [piece.state for piece in ledger.pieces] == ["whole"]

    play(work)


def test_who_asks_waits_for_what_was_there_and_not_for_what_others_go_on_saying(ledger: Ledger) -> None:
    whose = ThreadKey(tenant_id="t", project_id="p", user_id="u", thread_id="")

    def speak(replies: Replies, number: int) -> Generation:
        one = a_generation(replies)
        one.thread = msgspec.structs.replace(whose, thread_id=f"t{number}")
        one.finished(Outcome.COMPLETED, is_charged=True)
        return one

    async def work(replies: Replies) -> None:
        ledger.error = LedgerUnavailableError("away")
        first = speak(replies, 0)
        other = msgspec.structs.replace(whose, user_id="v")
        assert await replies.written(other, timeout_s=0) is True
        assert await replies.written(whose, timeout_s=0) is False
        waiting = asyncio.create_task(replies.written(whose, timeout_s=2))
        await asyncio.sleep(0)
        speak(replies, 1)
        replies.drop(first)
        assert await waiting is True

    play(work)


def test_while_the_ledger_is_away_events_wait_and_come_in_their_order(ledger: Ledger) -> None:
    async def work(replies: Replies) -> None:
        one = a_generation(replies)
        ledger.error = LedgerUnavailableError("away")
        for number in range(50):
            one.add(b"data: %d\n\n" % number, 1)  # returns at once, whatever the ledger does
            await asyncio.sleep(0.001)
        assert (one.stored, one.count, one.is_lossy) == (0, 50, False)
        ledger.error = None
        await until(lambda: one.stored == 50)
        assert ledger.events(one) == b"".join(b"data: %d\n\n" % number for number in range(50))

    play(work)


def test_what_waits_has_a_bound_and_the_largest_is_given_up_and_says_so(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(replies: Replies) -> None:
        large, small = a_generation(replies), a_generation(replies)
        ledger.error = LedgerUnavailableError("away")
        for _ in range(20):
            large.add(b"data: " + b"x" * 100 + b"\n\n", 1)
        small.add(b"data: y\n\n", 1)
        await until(lambda: large.is_lossy)
        assert (large.size_bytes, small.is_lossy) == (0, False)
        ledger.error = None
        for one in (large, small):
            one.finished(Outcome.CLIENT_CANCELLED, is_charged=True)
        await until(lambda: not replies.running)
        endings = {piece.generation_id: piece.ending for piece in ledger.pieces if piece.state == "broken"}
        assert endings == {large.generation_id: LOST, small.generation_id: None}
        assert ledger.events(small) == b"data: y\n\n"

    monkeypatch.setattr(module, "MEMORY_BYTES_MAX", 1000)
    play(work)


def test_one_that_the_ledger_refuses_does_not_stop_the_others(ledger: Ledger) -> None:
    async def work(replies: Replies) -> None:
        bad, good = a_generation(replies), a_generation(replies)
        ledger.refused.add(bad.generation_id)
        for one in (bad, good):
            one.add(b"data: 1\n\n", 1)
        await until(lambda: good.stored == 1)
        await until(lambda: bad.generation_id not in replies.running)
        assert not bad.is_kept

    play(work)


@pytest.mark.parametrize("verdict", ["wanted", "lost"])
def test_one_that_somebody_else_wants_is_stopped(ledger: Ledger, verdict: Verdict) -> None:
    class Conduct:
        def __init__(self) -> None:
            self.outcomes: list[Outcome] = []

        def stop(self, outcome: Outcome, error: object) -> None:
            self.outcomes.append(outcome)

    async def work(replies: Replies) -> None:
        one = a_generation(replies)
        one.conduct = conduct = Conduct()
        ledger.verdict = verdict
        await until(lambda: bool(conduct.outcomes))  # also where nothing is said just now
        assert conduct.outcomes[0] is Outcome.CLIENT_CANCELLED

    play(work)
