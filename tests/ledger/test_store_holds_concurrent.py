"""Everything at once, from eight connections: the ceiling holds, no error escapes, nothing is lost."""

import asyncio
import random
import time
from typing import Any
from uuid import UUID

from behest_ledger.holds import Extension, Granted, Settlement
from behest_ledger.store import holds
from behest_ledger.store.errors import LedgerConflictError
from ledger.books import TENANT, Books, admission, keep_books, new_id, settlement

RUN_S = 4.0


class Traffic:
    """Requests that overlap in shared windows, and what an honest bookkeeper would have written down."""

    def __init__(self, books: Books, seed: int) -> None:
        self.books = books
        self.random = random.Random(seed)
        self.open: dict[UUID, int] = {}
        """Seq of the last extension, for holds that this task alone ends."""
        self.ended: list[Settlement] = []
        self.charged_pico = 0
        self.conflicts = 0

    async def run(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            await self.random.choice([self.admit, self.admit, self.extend, self.settle, self.repeat, self.race])()

    async def admit(self) -> None:
        choose = self.random
        asked = admission(
            input=choose.randrange(20), need=choose.randrange(1, 40), want=choose.randrange(100), shares=2,
            user=choose.choice(["ann", "bob"]), session=f"s{choose.randrange(4)}", model=choose.choice(["x", "y"]),
        )  # fmt: skip
        if isinstance(await holds.admit(self.books.connection, asked), Granted):
            self.open[asked.request_id] = 0

    async def extend(self) -> None:
        some = self.random.sample(sorted(self.open), min(len(self.open), self.random.randrange(1, 6)))
        for one in some:
            self.open[one] += 1
        asked = [
            Extension(tenant_id=TENANT, request_id=one, seq=self.open[one], need_tokens=5, want_tokens=30)
            for one in some
        ]
        answers = await self.retried(lambda: holds.extend(self.books.connection, asked, shares=2))
        assert set(answers) == set(some)

    async def settle(self) -> None:
        some = self.random.sample(sorted(self.open), min(len(self.open), self.random.randrange(1, 9)))
        batch = [
            settlement(one, input=self.random.randrange(30), output=self.random.randrange(80),
                       sent=self.random.random() < 0.9)
            for one in some
        ]  # fmt: skip
        for one in some:
            del self.open[one]
        await self.end(batch)
        self.charged_pico += sum(item.amount_pico for item in batch)

    async def repeat(self) -> None:
        """A batch whose answer was lost comes again, in another order, with another beside it."""
        again = self.random.sample(self.ended, min(len(self.ended), 5))
        await self.end([*again, *again[:1]])

    async def race(self) -> None:
        """A void overtakes its admission, or not."""
        asked = admission(id=new_id(), need=3)
        busy = [settlement(one, output=1) for one in list(self.open)[:1]]
        for item in busy:
            del self.open[item.request_id]
            self.charged_pico += item.amount_pico
        batch = [*busy, settlement(asked.request_id, sent=False)]
        await asyncio.gather(holds.admit(self.books.connection, asked), self.end(batch))

    async def end(self, batch: list[Settlement]) -> None:
        self.random.shuffle(batch)
        await self.retried(lambda: holds.settle(self.books.connection, batch))
        self.ended = [*self.ended, *batch][-50:]

    async def retried(self, call: Any) -> Any:
        """As the writer and the desk do: asked again where the database says so."""
        while True:
            try:
                return await call()
            except LedgerConflictError:
                # A void that meets its admission. Deadlocks are counted by the server.
                self.conflicts += 1


def test_the_ceiling_holds_while_everything_happens_at_once(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 20_000)
        await books.budget("users", 9_000, per=["user"], period="minute", alignment="rolling")
        await books.budget("sessions", 1_000, unit="tokens", per=["user", "session"])
        await books.budget("calls", 300, unit="requests", per=["model"], period="day", refusal="rate")

        async def deadlocks() -> int:
            found: int = await books.connection.fetchval(
                "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
            )
            return found

        before = await deadlocks()
        until_s = time.monotonic() + RUN_S
        tasks = [Traffic(books, seed) for seed in range(8)]

        async def sample() -> None:
            while time.monotonic() < until_s:
                for window in await books.windows():
                    assert window.spent + window.held + window.suspense <= (window.ceiling or 0)
                await asyncio.sleep(0.02)

        async def change() -> None:
            numbers = random.Random(1)
            while time.monotonic() < until_s:
                await asyncio.sleep(0.1)
                await books.budget("money", numbers.choice([15_000, 30_000, 60_000]))
                await books.budget("sessions", 1_000, unit="tokens", per=["user", "session"],
                                   suspended=numbers.random() < 0.2)  # fmt: skip

        async with asyncio.TaskGroup() as group:
            for task in tasks:
                group.create_task(task.run(until_s))
            group.create_task(sample())
            group.create_task(change())
        for task in tasks:
            await task.settle()
            while task.open:
                await task.settle()
        for window in await books.windows():
            assert (window.held, window.live) == (0, 0)
        money = await books.window("money")
        assert money.spent + money.overrun == sum(task.charged_pico for task in tasks)
        assert await books.connection.fetchval("SELECT sum(amount_pico)::bigint FROM ledger.request") == sum(
            task.charged_pico for task in tasks
        )
        assert await deadlocks() == before
        assert await books.count("request") > 20

    keep_books(dsn, work, connections=8)
