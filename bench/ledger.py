"""The figures of the ledger itself, without a proxy: admissions, holds on one hot window, settlements."""

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, Callable
from typing import Literal, get_args
from uuid import UUID

from bench.books import Sidecar, Spread, budgets, database, settings_line, settlement
from bench.cpu import snapshot, used_since_s

from behest_ledger.holds import Granted, Settlement
from behest_ledger.store import holds
from behest_ledger.store.pool import Connection, connect
from behest_ledger.store.writer import BATCH_ITEMS_MAX, SettlementWriter
from behest_proxy.app.holder import RENEW_S

ADMISSION_TARGET_MS = 2.0
SETTLE_TARGET_ROWS_S = 50_000
ADMISSIONS = 400
LOAD_PER_S = 100
LOAD_S = 4.0
HOT_ASKERS = 32
"""Requests that ask at the same time, in each sidecar."""
HOT_S = 2.5
HOT_WARM_S = 2.5
"""Before it is counted: a lease is taken where a window was busy for a second or two."""
SETTLED = 2000
REPETITIONS = 5


How = Literal["one by one", "in batches", "in batches, with leases"]


async def measure(dsn: str, say: Callable[[str], None]) -> AsyncGenerator[str]:
    """All of them: a line each."""
    books = await database(dsn, "figures")
    await budgets(books, sessions=True)
    yield f"ledger: {await settings_line(books)}"
    say("ledger: admissions")
    yield _admission_line("idle", "one after the other", await _admit_idle(books))
    yield _admission_line("load", f"{LOAD_PER_S} a second, settled 50 ms later", await _admit_load(books))
    for writers in (1, 4):
        say(f"ledger: settlements, {writers} writing")
        yield await _settle(books, writers)
    hot = await database(dsn, "hot")
    await budgets(hot, sessions=False)
    for sidecars in (1, 4):
        for how in get_args(How):
            say(f"ledger: holds on one window, {sidecars} asking {how}")
            held = await _hot(hot, sidecars, how)
            yield f"ledger-hot-{sidecars}: {held:,.0f} holds/s on one window, {sidecars} x {HOT_ASKERS} asking, {how}"


def _verdict(met: bool, target: str) -> str:
    return f"target {target}: {'met' if met else 'NOT met'}"


def _admission_line(name: str, what: str, spread: Spread) -> str:
    target = _verdict(spread.ms(0.99) <= ADMISSION_TARGET_MS, f"p99 <= {ADMISSION_TARGET_MS:.0f} ms")
    return f"ledger-admit-{name}: {spread}, two windows, {what} ({target})"


async def _admit_idle(dsn: str) -> Spread:
    sidecar = await Sidecar.start(dsn)
    times_s: list[float] = []
    for number in range(ADMISSIONS + 20):
        started_s = time.perf_counter()
        answer = await sidecar.desk.admit(sidecar.admission())
        if number >= 20:  # the first ones make the windows, and the plans
            times_s.append(time.perf_counter() - started_s)
        assert isinstance(answer, Granted), answer
    await sidecar.aclose()
    return Spread(times_s)


async def _admit_load(dsn: str) -> Spread:
    """Each is timed from when it was due, so that one slow admission is not forgotten by those that wait for it."""
    sidecar = await Sidecar.start(dsn)
    writer = SettlementWriter(lambda items: holds.settle(sidecar.pool, items), on_settled=lambda _: None)
    writer.start()
    times_s: list[float] = []
    begin_s = time.perf_counter()

    async def one(number: int) -> None:
        due_s = begin_s + number / LOAD_PER_S
        await asyncio.sleep(due_s - time.perf_counter())
        asked = sidecar.admission()
        assert isinstance(await sidecar.desk.admit(asked), Granted)
        times_s.append(time.perf_counter() - due_s)
        await asyncio.sleep(0.05)
        writer.submit(settlement(asked.request_id))

    await asyncio.gather(*(one(number) for number in range(int(LOAD_PER_S * LOAD_S))))
    assert await writer.flush(10.0)
    await writer.aclose()
    await sidecar.aclose()
    return Spread(times_s)


async def _hot(dsn: str, sidecars: int, how: How) -> float:
    """Holds a second, asked for without a pause."""
    asking = [await Sidecar.start(dsn) for _ in range(sidecars)]
    held = 0
    ended = False

    async def ask(sidecar: Sidecar) -> None:
        nonlocal held
        while not ended:
            asked = sidecar.admission()
            answer = await (holds.admit(sidecar.pool, asked) if how == "one by one" else sidecar.desk.admit(asked))
            assert isinstance(answer, Granted), answer
            sidecar.leasing.answered(asked.tenant_id, answer)
            held += 1

    async def renew(sidecar: Sidecar) -> None:
        while how == "in batches, with leases" and not ended:
            await sidecar.leasing.renew(sidecar.pool, sidecar.holder_id)
            await asyncio.sleep(RENEW_S)

    async with asyncio.TaskGroup() as group:
        for sidecar in asking:
            group.create_task(renew(sidecar))
            for _ in range(HOT_ASKERS):
                group.create_task(ask(sidecar))
        await asyncio.sleep(HOT_WARM_S)
        before, started_s = held, time.perf_counter()
        await asyncio.sleep(HOT_S)
        rate = (held - before) / (time.perf_counter() - started_s)
        ended = True
    for sidecar in asking:
        await sidecar.aclose()
    return rate


async def _settle(dsn: str, writers: int) -> str:
    """Batches of 200, one in flight for each writer. A row is one that is inserted: posting, usage line or request."""
    connection: Connection = await connect(dsn)
    writing: list[Connection] = [await connect(dsn) for _ in range(writers)]
    rates: list[float] = []
    cpus_s: list[float] = []
    rows_each = 0.0
    for _ in range(REPETITIONS):
        requests = await _admit_many(dsn, SETTLED)
        batches = [
            [settlement(request) for request in requests[first : first + BATCH_ITEMS_MAX]]
            for first in range(0, SETTLED, BATCH_ITEMS_MAX)
        ]

        async def write(number: int, *, mine: list[list[Settlement]] = batches) -> None:
            for batch in mine[number::writers]:
                answers = await holds.settle(writing[number], batch)
                assert all(answer.result == "settled" for answer in answers)

        before = await _rows(connection)
        cpu_before = snapshot(one.get_server_pid() for one in writing)
        started_s = time.perf_counter()
        await asyncio.gather(*(write(number) for number in range(writers)))
        rates.append(SETTLED / (time.perf_counter() - started_s))
        cpus_s.append(used_since_s(cpu_before) / SETTLED)
        rows_each = (await _rows(connection) - before) / SETTLED
    for one in (*writing, connection):
        await one.close()
    best, median, cpu_s = max(rates), statistics.median(rates), statistics.median(cpus_s)
    target = _verdict(median * rows_each >= SETTLE_TARGET_ROWS_S, f">= {SETTLE_TARGET_ROWS_S:,} rows/s")
    return (
        f"ledger-settle-{writers}: median {median * rows_each:,.0f} rows/s ({median:,.0f} settlements of"
        f" {rows_each:.0f} rows), best {best * rows_each:,.0f}; {REPETITIONS} x {SETTLED} settlements with two windows"
        f" each, {writers} writing batches of {BATCH_ITEMS_MAX} ({target}); {cpu_s * 1e6:.0f} us of PostgreSQL's CPU a"
        f" settlement, so {rows_each / cpu_s:,.0f} rows for a second of it"
    )


async def _rows(connection: Connection) -> int:
    found: int = await connection.fetchval(
        "SELECT (SELECT count(*) FROM ledger.posting) + (SELECT count(*) FROM ledger.usage_line)"
        " + (SELECT count(*) FROM ledger.request)"
    )
    return found


async def _admit_many(dsn: str, number: int) -> list[UUID]:
    """Open holds to settle. Nobody measures them."""
    sidecar = await Sidecar.start(dsn)
    asked = [sidecar.admission() for _ in range(number)]
    answers = await asyncio.gather(*(sidecar.desk.admit(admission) for admission in asked))
    assert all(isinstance(answer, Granted) for answer in answers)
    await sidecar.aclose()
    return [admission.request_id for admission in asked]
