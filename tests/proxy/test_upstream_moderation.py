"""While many streams speak, the loop takes up what they say together; who is alone or in a hurry never waits."""

import asyncio
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from behest_proxy.upstream.moderation import PERIOD_S, TOGETHER_MIN, Moderation
from proxy.upstream_servers import LOOPS, run

INTERVAL_S = 0.004
BUSY = int(TOGETHER_MIN * PERIOD_S / INTERVAL_S)


class Clock:
    """The time of the loop and of whoever sleeps: a machine that is busy meanwhile would hold its turns back itself."""

    def __init__(self) -> None:
        self._now_s = 1000.0
        self.slept: list[float] = []
        """How long the loop's thread slept, each time."""

    def monotonic(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._now_s += seconds

    async def passes(self, seconds: float) -> None:
        self._now_s += seconds
        await turns(2)  # timers that are due are found, and run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("behest_proxy.upstream.moderation.time", found)
    return found


def on_a_loop(clock: Clock, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        cast(Any, asyncio.get_running_loop()).time = clock.monotonic
        await work()

    asyncio.run(main())


def read(moderation: Moderation) -> None:
    """What whoever reads does."""
    moderation.reads += 1
    if moderation.attentive:
        moderation.after_read()


async def watched(clock: Clock, interval_s: float, reads: int) -> Moderation:
    found = Moderation(interval_s)
    for _ in range(reads):
        read(found)
    await clock.passes(PERIOD_S)
    return found


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("interval_s", "reads"), [(INTERVAL_S, BUSY - 1), (0.0, 100_000)])
def test_nothing_is_held_back_while_chunks_are_few_or_where_it_is_switched_off(
    interval_s: float, reads: int, clock: Clock
) -> None:
    async def work() -> None:
        assert not (await watched(clock, interval_s, reads)).attentive

    on_a_loop(clock, work)


def test_of_busy_streams_each_turn_is_held_back_until_an_interval_after_the_last(clock: Clock) -> None:
    async def work() -> None:
        found = await watched(clock, INTERVAL_S, BUSY)
        for expected in (0, 1, 2):  # the first one finds that nobody came for long
            assert found.attentive
            found.after_read()
            assert not found.attentive, "once a turn"
            await turns(4)
            assert clock.slept == pytest.approx([INTERVAL_S] * expected)
        found.after_read()
        await clock.passes(INTERVAL_S / 4)
        await turns(4)
        assert clock.slept[2:] == pytest.approx([INTERVAL_S * 3 / 4])
        found.after_read()
        await clock.passes(INTERVAL_S)
        await turns(4)
        assert len(clock.slept) == 3, "what was done took as long already"

    on_a_loop(clock, work)


def test_what_was_read_leaves_before_anybody_sleeps(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        told: list[str] = []

        def sleep(_seconds: float) -> None:
            told.append("sleeps")

        monkeypatch.setattr(clock, "sleep", sleep)
        found = await watched(clock, INTERVAL_S, BUSY)
        found.after_read()
        await turns(4)
        loop = asyncio.get_running_loop()
        loop.call_soon(told.append, "frames go to the transport")
        found.after_read()
        loop.call_soon(loop.call_soon, told.append, "the transport writes")
        await turns(4)
        assert told[0] == "frames go to the transport"
        assert "sleeps" in told

    on_a_loop(clock, work)


def test_nobody_sleeps_while_a_request_waits_for_the_ledger(clock: Clock) -> None:
    async def work() -> None:
        found = await watched(clock, INTERVAL_S, BUSY)
        found.urgent += 1
        for _ in range(3):
            found.after_read()
            await turns(4)
        assert clock.slept == []
        found.urgent -= 1
        found.after_read()
        await turns(4)
        assert len(clock.slept) == 1

    on_a_loop(clock, work)


def test_after_a_silence_it_looks_no_more_until_the_next_read(clock: Clock) -> None:
    async def work() -> None:
        found = await watched(clock, INTERVAL_S, BUSY)
        await clock.passes(PERIOD_S)
        await clock.passes(PERIOD_S)
        silent = len(asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]
        assert silent == 0, "nobody watches"
        for _ in range(BUSY):
            read(found)
        await clock.passes(PERIOD_S)
        assert found.attentive
        found.after_read()
        assert not found.attentive

    on_a_loop(clock, work)


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels cannot be asked to acknowledge later")
@pytest.mark.parametrize(("reads", "is_at_once"), [(BUSY - 1, 1), (BUSY, 0)])
def test_acknowledgements_of_an_answer_are_put_off_while_streams_are_busy(
    reads: int, is_at_once: int, clock: Clock
) -> None:
    async def work() -> None:
        found = await watched(clock, INTERVAL_S, reads)
        with socket.create_server(("127.0.0.1", 0)) as server:
            transport, _ = await asyncio.get_running_loop().create_connection(
                asyncio.Protocol, *server.getsockname()[:2]
            )
            found.answer_begins(transport)
            ours: socket.socket = transport.get_extra_info("socket")
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK) == is_at_once
            transport.abort()

    on_a_loop(clock, work)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_answer_whose_connection_is_gone_already_is_no_error(loop: str) -> None:
    async def work() -> None:
        found = Moderation(INTERVAL_S)
        found.reads = BUSY
        found.after_read()
        await asyncio.sleep(PERIOD_S * 1.5)
        with socket.create_server(("127.0.0.1", 0)) as server:
            transport, _ = await asyncio.get_running_loop().create_connection(
                asyncio.Protocol, *server.getsockname()[:2]
            )
            transport.abort()
            await turns(4)
            found.answer_begins(transport)

    run(work, loop)
