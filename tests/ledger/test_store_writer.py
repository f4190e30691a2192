import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_ledger.holds import Settlement
from behest_ledger.store import holds
from behest_ledger.store.errors import (
    LedgerConflictError,
    LedgerError,
    LedgerRefusedError,
    LedgerUnavailableError,
    SchemaError,
)
from behest_ledger.store.holds import Settled
from behest_ledger.store.writer import BATCH_INTERVAL_S, BATCH_ITEMS_MAX, SettlementWriter
from ledger.books import Books, keep_books, new_id, settlement
from ledger.clockwork import run


class Ledger:
    """A ledger that settles everything, unless it was told to fail or cannot stand an item."""

    def __init__(self) -> None:
        self.batches: list[list[UUID]] = []
        self.started_s: list[float] = []
        self.in_flight = self.in_flight_max = 0
        self.delay_s = 0.0
        self.failures: list[Exception] = []
        self.poison: set[UUID] = set()
        self.settled: dict[UUID, int] = {}

    async def settle(self, settlements: Sequence[Settlement]) -> list[Settled]:
        self.started_s.append(asyncio.get_running_loop().time())
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight, self.in_flight_max)
        await asyncio.sleep(self.delay_s)
        self.in_flight -= 1
        if self.failures:
            raise self.failures.pop(0)
        ids = [item.request_id for item in settlements]
        self.batches.append(ids)
        if self.poison & set(ids):
            raise LedgerRefusedError("poison")
        for one in ids:
            self.settled[one] = self.settled.get(one, 0) + 1
        return [Settled(one, "settled" if self.settled[one] == 1 else "already", overrun=False) for one in ids]


class Desk:
    """Who is told."""

    def __init__(self) -> None:
        self.told: list[UUID] = []
        self.put_aside: list[UUID] = []

    def refused(self, settlement: Settlement) -> None:
        self.put_aside.append(settlement.request_id)

    def settled(self, settled: Settled) -> None:
        self.told.append(settled.request_id)


def writing(ledger: Ledger, work: Callable[[SettlementWriter, Desk], Awaitable[None]]) -> None:
    async def main() -> None:
        desk = Desk()
        one = SettlementWriter(ledger.settle, on_settled=desk.settled, on_put_aside=desk.refused)
        one.start()
        await work(one, desk)
        await one.aclose()

    run(main())


def test_what_comes_while_a_batch_is_in_flight_is_the_next_batch(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    ledger.delay_s = 0.02
    ids = [new_id() for _ in range(BATCH_ITEMS_MAX * 2 + 11)]

    async def work(one: SettlementWriter, desk: Desk) -> None:
        one.submit(settlement(ids[0]))
        await asyncio.sleep(0.005)
        for item in ids[1:]:
            one.submit(settlement(item))
        assert one.backlog == len(ids)
        assert await one.flush(60)
        assert one.backlog == 0
        assert desk.told == ids

    writing(ledger, work)
    assert [len(batch) for batch in ledger.batches] == [1, BATCH_ITEMS_MAX, BATCH_ITEMS_MAX, 10]
    assert ledger.in_flight_max == 1
    assert caplog.records == []


def test_batches_start_some_time_apart() -> None:
    ledger = Ledger()

    async def work(one: SettlementWriter, desk: Desk) -> None:
        for _ in range(100):
            one.submit(settlement(new_id()))
            await asyncio.sleep(0.0005)
        assert await one.flush(60)
        assert len(desk.told) == 100

    writing(ledger, work)
    gaps = [later - sooner for sooner, later in zip(ledger.started_s, ledger.started_s[1:], strict=False)]
    assert min(gaps) > BATCH_INTERVAL_S - 1e-9
    assert len(ledger.batches) == 6


def test_what_ends_together_after_a_silence_is_one_batch() -> None:
    ledger = Ledger()

    async def work(one: SettlementWriter, desk: Desk) -> None:
        await asyncio.sleep(1)
        for _ in range(8):
            one.submit(settlement(new_id()))
            await asyncio.sleep(BATCH_INTERVAL_S / 10)
        assert ledger.batches == [], "a client that asks again comes first"
        assert await one.flush(60)
        assert len(desk.told) == 8

    writing(ledger, work)
    assert [len(batch) for batch in ledger.batches] == [8]


@pytest.mark.parametrize(
    "error", [LedgerUnavailableError("down"), LedgerConflictError("deadlock"), SchemaError("old"), ValueError("what?")]
)
def test_a_batch_that_failed_is_written_again_with_what_has_come_meanwhile(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger()
    ledger.failures = [error] * 6
    ids = [new_id() for _ in range(5)]

    async def work(one: SettlementWriter, desk: Desk) -> None:
        for item in ids:
            one.submit(settlement(item))
            await asyncio.sleep(0.001)
        assert await one.flush(60)
        assert desk.told == ids

    writing(ledger, work)
    assert set(ledger.settled.values()) == {1}
    # What is unknown is told each time, with where it came from; an outage once, and once that it is over.
    assert len(caplog.records) == (2 if isinstance(error, LedgerError) else 6)


def test_a_settlement_that_is_refused_is_put_aside_and_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    ids = [new_id() for _ in range(150)]
    ledger.poison = {ids[0], ids[77], ids[149]}

    async def work(one: SettlementWriter, desk: Desk) -> None:
        for item in ids:
            one.submit(settlement(item))
        assert await one.flush(60)
        assert {item.request_id for item in one.quarantined} == ledger.poison
        assert desk.told == [item for item in ids if item not in ledger.poison]
        assert set(desk.put_aside) == ledger.poison

    writing(ledger, work)
    alarms = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert len(alarms) == 3
    # Whoever reads it knows what is to be charged, and what to do.
    assert all('"amount_pico":' in alarm and "restart this process" in alarm for alarm in alarms)
    # Halving and doubling: some calls for each level and item, not one for each settlement.
    assert len(ledger.batches) < 2 * 3 * 8


def test_a_failure_while_the_refused_one_is_looked_for_forgets_and_repeats_nothing() -> None:
    ledger = Ledger()
    ids = [new_id() for _ in range(16)]
    ledger.poison = {ids[0], ids[15]}
    real = ledger.settle

    async def sometimes(settlements: Sequence[Settlement]) -> list[Settled]:
        if len(ledger.batches) % 4 == 3:
            ledger.batches.append([])
            raise LedgerUnavailableError("down")
        return await real(settlements)

    ledger.settle = sometimes  # type: ignore[method-assign]

    async def work(one: SettlementWriter, desk: Desk) -> None:
        for item in ids:
            one.submit(settlement(item))
        assert await one.flush(60)
        assert [item.request_id for item in one.quarantined] == [ids[0], ids[15]]
        assert desk.told == ids[1:15]

    writing(ledger, work)
    assert set(ledger.settled.values()) == {1}


def test_flush_says_when_the_time_was_not_enough_and_closing_keeps_what_is_left() -> None:
    ledger = Ledger()
    ledger.delay_s = 5.0

    async def work(one: SettlementWriter, desk: Desk) -> None:
        assert await one.flush(0.0)
        one.submit(settlement(new_id()))
        assert not await one.flush(0.02)
        await one.aclose()
        assert one.backlog == 1
        assert desk.told == []

    writing(ledger, work)


def test_overruns_and_charges_that_the_books_do_not_know_are_told(caplog: pytest.LogCaptureFixture) -> None:
    results: dict[UUID, Settled] = {}

    async def settle(settlements: Sequence[Settlement]) -> list[Settled]:
        return [results[item.request_id] for item in settlements]

    def fail(_: Settled) -> None:
        raise RuntimeError("nobody there")

    async def main() -> None:
        one = SettlementWriter(settle, on_settled=fail)
        one.start()
        over, lost, void = new_id(), new_id(), new_id()
        results[over] = Settled(over, "settled", overrun=True)
        results[lost] = Settled(lost, "unknown", overrun=False)
        results[void] = Settled(void, "unknown", overrun=False)
        one.submit(settlement(over))
        one.submit(settlement(lost))
        one.submit(settlement(void, sent=False))
        # That nobody listens is no reason to stop writing.
        assert await one.flush(60)
        one.submit(settlement(over))
        assert await one.flush(60)
        await one.aclose()
        told = [record.getMessage() for record in caplog.records if "nobody could be told" not in record.getMessage()]
        assert told == [
            f"request {over} cost more than its budget could pay",
            f"request {lost} was charged, but the books do not know it",
            f"request {over} cost more than its budget could pay",
        ]

    run(main())


FAILURES = st.sampled_from([LedgerUnavailableError, LedgerConflictError, SchemaError])


@settings(max_examples=100, deadline=None)
@given(
    poison=st.sets(st.integers(0, 30), max_size=4),
    failing=st.dictionaries(st.integers(0, 20), FAILURES, max_size=8),
    pauses=st.lists(st.sampled_from([0.0, 0.001]), min_size=31, max_size=31),
)
def test_everybody_is_settled_or_put_aside_exactly_once(
    poison: set[int], failing: dict[int, type[LedgerError]], pauses: list[float]
) -> None:
    ledger = Ledger()
    ids = [new_id() for _ in range(31)]
    ledger.poison = {ids[number] for number in poison}
    real = ledger.settle
    calls = 0

    async def flaky(settlements: Sequence[Settlement]) -> list[Settled]:
        nonlocal calls
        calls += 1
        error = failing.get(calls)
        results = await real(settlements) if calls % 2 or error is None else []
        if error is not None:
            # Every other failure comes after the work was done: its result was unknown.
            raise error("flaky")
        return results

    ledger.settle = flaky  # type: ignore[method-assign]

    async def work(one: SettlementWriter, desk: Desk) -> None:
        for item, pause in zip(ids, pauses, strict=True):
            one.submit(settlement(item))
            if pause:
                await asyncio.sleep(pause)
        assert await one.flush(60)
        assert sorted(desk.told + [item.request_id for item in one.quarantined]) == sorted(ids)
        assert {item.request_id for item in one.quarantined} == ledger.poison

    writing(ledger, work)


def test_settlements_reach_the_real_books_in_spite_of_one_that_they_refuse(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 10**6)
        ids = [(await books.admit(need=5))[0] for _ in range(21)]
        told: list[UUID] = []
        one = SettlementWriter(
            lambda batch: holds.settle(books.connection, batch),
            on_settled=lambda settled: told.append(settled.request_id),
        )
        one.start()
        for number, item in enumerate(ids):
            made = settlement(item, output=3)
            if number == 13:
                made.lines.append(made.lines[0])
            one.submit(made)
        assert await one.flush(10)
        await one.aclose()
        assert [item.request_id for item in one.quarantined] == [ids[13]]
        assert len(told) == 20
        assert await books.balances("money") == (600, 50, 0, 1)

    keep_books(dsn, work)
    assert "refused and put aside" in caplog.text
