"""While many streams speak, the loop takes up what they say together; who is alone or in a hurry never waits."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from behest_proxy.upstream.moderation import PERIOD_S, TOGETHER_MIN, Moderation

INTERVAL_S = 0.004
BUSY = int(TOGETHER_MIN * PERIOD_S / INTERVAL_S)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the thread slept, each time; it does not really."""
    times: list[float] = []
    monkeypatch.setattr(time, "sleep", times.append)
    return times


def on_a_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def read(moderation: Moderation) -> None:
    """What whoever reads does."""
    moderation.reads += 1
    if moderation.attentive:
        moderation.after_read()


async def watched(interval_s: float, reads: int) -> Moderation:
    found = Moderation(interval_s)
    for _ in range(reads):
        read(found)
    await asyncio.sleep(PERIOD_S * 1.3)
    return found


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("interval_s", "reads"), [(INTERVAL_S, BUSY - 1), (0.0, 100_000)])
def test_nothing_is_held_back_while_chunks_are_few_or_where_it_is_switched_off(interval_s: float, reads: int) -> None:
    async def work() -> None:
        assert not (await watched(interval_s, reads)).attentive

    on_a_loop(work)


def test_of_busy_streams_each_turn_is_held_back_until_an_interval_after_the_last(slept: list[float]) -> None:
    async def work() -> None:
        found = await watched(INTERVAL_S, BUSY)
        for expected in (0, 1, 2):  # the first one finds that nobody came for long
            assert found.attentive
            found.after_read()
            assert not found.attentive, "once a turn"
            await turns(4)
            assert len(slept) == expected
        assert all(0 < one_s <= 2 * INTERVAL_S for one_s in slept)

    on_a_loop(work)


def test_what_was_read_leaves_before_anybody_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        told: list[str] = []

        def sleep(_seconds: float) -> None:
            told.append("sleeps")

        monkeypatch.setattr(time, "sleep", sleep)
        found = await watched(INTERVAL_S, BUSY)
        found.after_read()
        await turns(4)
        loop = asyncio.get_running_loop()
        loop.call_soon(told.append, "frames go to the transport")
        found.after_read()
        loop.call_soon(loop.call_soon, told.append, "the transport writes")
        await turns(4)
        assert told[0] == "frames go to the transport"
        assert "sleeps" in told

    on_a_loop(work)


def test_nobody_sleeps_while_a_request_waits_for_the_ledger(slept: list[float]) -> None:
    async def work() -> None:
        found = await watched(INTERVAL_S, BUSY)
        found.urgent += 1
        for _ in range(3):
            found.after_read()
            await turns(4)
        assert slept == []
        found.urgent -= 1
        found.after_read()
        await turns(4)
        assert len(slept) == 1

    on_a_loop(work)


def test_after_a_silence_it_looks_no_more_until_the_next_read() -> None:
    async def work() -> None:
        found = await watched(INTERVAL_S, BUSY)
        await asyncio.sleep(2.3 * PERIOD_S)
        silent = len(asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]
        assert silent == 0, "nobody watches"
        for _ in range(BUSY):
            read(found)
        await asyncio.sleep(1.3 * PERIOD_S)
        assert found.attentive
        found.after_read()
        assert not found.attentive

    on_a_loop(work)
