"""Leases: a slice of a window that is one holder's own, and is free again the moment that it should not be."""

import asyncio
import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
import pytest

from behest_ledger.holds import Extension, Granted, Refused
from behest_ledger.leases import Want
from behest_ledger.store import holds, leases
from behest_ledger.store.errors import LedgerConflictError
from behest_ledger.store.holders import unregister
from ledger.books import TENANT, Books, Window, admission, granted, keep_books, refused, settlement
from ledger.sidecars import Sidecar, reap


class _Lock:
    """A window's row, locked by somebody who takes his time."""

    def __init__(self, books: Books, window_id: int) -> None:
        self._books = books
        self._window_id = window_id

    async def __aenter__(self) -> None:
        self._connection = await asyncpg.connect(self._books.dsn)
        await self._connection.execute("BEGIN")
        await self._connection.execute(
            "SELECT FROM ledger.budget_window WHERE window_id = $1 FOR UPDATE", self._window_id
        )

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()


async def _leases(books: Books) -> list[tuple[int, int]]:
    rows = await books.connection.fetch("SELECT free, new_live FROM ledger.lease ORDER BY window_id, holder_id")
    return [(int(row["free"]), row["new_live"]) for row in rows]


async def _postings(books: Books) -> list[tuple[str, str, int, int]]:
    rows = await books.connection.fetch(
        "SELECT debit, credit, seq, amount FROM ledger.posting WHERE 'leased' IN (debit, credit) ORDER BY posted_at"
    )
    return [(row["debit"], row["credit"], row["seq"], int(row["amount"])) for row in rows]


async def _opened(books: Books, sidecar: Sidecar, name: str = "money") -> Window:
    """The window of a budget, opened by a request that came and went."""
    one = await sidecar.admitted(need=1)
    await books.settle(settlement(one, sent=False))
    return await books.window(name)


def test_what_is_leased_is_held_and_who_is_admitted_from_it_does_not_touch_the_window(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 10_000)
        sidecar = await Sidecar.start(books)
        window = await _opened(books, sidecar)
        assert await sidecar.lease({window.window_id: 1000}) == {window.window_id: 1000}
        assert (await books.window("money")).held == 1000
        async with _Lock(books, window.window_id):
            one = await sidecar.admitted(input=10, need=5, want=20)
            extended = granted(await books.extend(one, 1, need=5, want=30))
            assert (extended.windows, extended.amounts) == ((window.window_id,), (300,))
        assert await books.balances("money") == (0, 1000, 0, 0)
        assert await _leases(books) == [(470, 1)]
        assert await books.settle(settlement(one, input=10, output=40)) == ["settled"]
        # One is less than none, until the lease tells the window of whom it admitted.
        assert await books.balances("money") == (430, 470, 0, -1)
        assert await sidecar.lease({window.window_id: 1000}) == {window.window_id: 1000}
        assert await books.balances("money") == (430, 1000, 0, 0)
        assert await sidecar.lease({window.window_id: 0}) == {window.window_id: 0}
        assert await books.balances("money") == (430, 0, 0, 0)
        assert await _postings(books) == [
            ("available", "leased", 1, 1000),
            ("leased", "held", 0, 230),
            ("leased", "held", 1, 300),
            ("available", "leased", 2, 530),
            ("leased", "available", 3, 1000),
        ]

    keep_books(dsn, work, connections=2)


def test_a_lease_that_cannot_pay_the_whole_wish_leaves_it_to_the_window(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 10_000)
        sidecar = await Sidecar.start(books)
        window = await _opened(books, sidecar)
        await sidecar.lease({window.window_id: 100})
        one, answer = await sidecar.admit(need=5, want=11)
        assert granted(answer).output_tokens == 11
        assert await books.balances("money") == (0, 210, 0, 1)
        assert await _leases(books) == [(100, 0)]
        granted(await books.extend(one, 1, need=11))
        assert await _leases(books) == [(100, 0)]
        granted(await books.extend(one, 2, need=10))
        assert await _leases(books) == [(0, 0)]
        batch = [msgspec.structs.replace(admission(need=3), holder_id=sidecar.holder_id) for _ in range(4)]
        await sidecar.lease({window.window_id: 100})
        assert all(isinstance(one, Granted) for one in (await holds.admit_batch(books.connection, batch)).values())
        assert await _leases(books) == [(100, 0)]

    keep_books(dsn, work)


def test_one_request_may_be_paid_by_leases_here_and_by_windows_there(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 10_000)
        await books.budget("tokens", 200, unit="tokens", per=["user"])
        await books.budget("soft", 10, enforcement="soft")
        sidecar = await Sidecar.start(books)
        await sidecar.admitted(need=10)
        money, soft, tokens = [(await books.window(name)).window_id for name in ("money", "soft", "tokens")]
        # Of a soft window no more is leased than its limit, whatever it holds.
        assert await sidecar.lease({money: 1000, soft: 500}) == {money: 1000, soft: 10}
        _, answer = await sidecar.admit(input=1, need=7, want=90, shares=1)
        # The share of the tokens is less than the wish: as much as that is taken from the lease of the money.
        assert (granted(answer).output_tokens, granted(answer).amounts) == (90, (903, 903, 91))
        _, answer = await sidecar.admit(need=2, want=9, shares=1)
        assert granted(answer).windows == tuple(sorted([money, soft, tokens]))
        assert await _leases(books) == [(97 - 90, 2), (10, 0)]
        assert (await books.window("tokens")).live == 3

    keep_books(dsn, work)


def test_a_lease_is_a_quarter_of_a_fair_share_at_most_and_nothing_at_the_end_of_a_window(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1600)
        first, second = await Sidecar.start(books), await Sidecar.start(books)
        money = (await _opened(books, first)).window_id
        assert await first.lease({money: 300}) == {money: 300}
        assert await first.lease({money: 1600}) == {money: 400}
        assert await second.lease({money: 250}) == {money: 150}  # two share the 1200 that are left
        assert await first.lease({money: 500}) == {money: (1600 - 150) // 8}
        assert await first.lease({money: 726}) == {money: 0}  # a quarter of the wish is more than its share
        assert await second.lease({money: 0}) == {money: 0}
        assert (await books.window("money")).held == 0

    keep_books(dsn, work)


@pytest.mark.parametrize("want", ["0", "-5", "0.5", "NaN", "Infinity"])
def test_nothing_is_leased_for_a_want_that_is_none(dsn: str, want: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1600)
        await books.budget("soft", 1600, enforcement="soft")
        sidecar = await Sidecar.start(books)
        windows = [(await _opened(books, sidecar, name)).window_id for name in ("money", "soft")]
        with nullcontext() if want == "0" else pytest.raises(asyncpg.CheckViolationError):
            await books.connection.fetch(
                "SELECT * FROM ledger.lease_batch_v1($1, $2, $3, $4::text[]::numeric[])",
                sidecar.holder_id, [TENANT] * 2, windows, [want] * 2,
            )  # fmt: skip
        assert {free for free, _ in await _leases(books)} <= {0}

    keep_books(dsn, work)


def test_what_is_not_named_any_more_goes_back(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1600)
        await books.budget("users", 1600, per=["user"])
        sidecar = await Sidecar.start(books)
        money, users = [(await _opened(books, sidecar, name)).window_id for name in ("money", "users")]
        assert await sidecar.lease({money: 100, users: 50}) == {money: 100, users: 50}
        assert await sidecar.lease({users: 50}) == {money: 0, users: 50}
        other = await leases.lease(books.connection, sidecar.holder_id, [Want("other", users, 50)])
        assert other == {}
        assert await _leases(books) == [(0, 0), (50, 0)]

    keep_books(dsn, work)


def test_nobody_who_is_not_believed_to_live_is_given_a_lease_and_his_old_ones_are_free_when_he_is_fenced(
    dsn: str,
) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1600)
        sidecar = await Sidecar.start(books)
        window = await _opened(books, sidecar)
        await sidecar.lease({window.window_id: 100})
        one = await sidecar.admitted(need=2)
        await sidecar.die()
        assert await sidecar.lease({window.window_id: 200}) == {}
        assert await Sidecar(books, UUID(int=99)).lease({window.window_id: 200}) == {}
        assert await _leases(books) == [(80, 1)]
        assert await reap(books) == 1
        window = await books.window("money")
        # The hold waits for its journal; of the lease nothing does.
        assert (window.held, window.suspense, window.live) == (0, 20, 1)
        assert await books.count("lease") == 0
        assert await sidecar.lease({window.window_id: 200}) == {}
        assert await books.settle(settlement(one, output=1)) == ["settled"]

    keep_books(dsn, work)


def test_a_sidecar_that_ends_cleanly_leaves_no_lease(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1600)
        sidecar = await Sidecar.start(books)
        window = await _opened(books, sidecar)
        await sidecar.lease({window.window_id: 100})
        one = await sidecar.admitted(need=2)
        assert await unregister(books.connection, sidecar.holder_id) is False
        assert await books.balances("money") == (0, 20, 0, 1)
        assert await sidecar.lease({window.window_id: 40}) == {window.window_id: 40}
        await books.settle(settlement(one, output=2))
        assert await unregister(books.connection, sidecar.holder_id) is True
        assert await books.balances("money") == (20, 0, 0, 0)
        assert await books.count("lease") == 0

    keep_books(dsn, work)


def test_a_lease_ends_with_its_window_and_extensions_go_on_without_it(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1600, period="hour")
        sidecar, other = await Sidecar.start(books), await Sidecar.start(books)
        window = await _opened(books, sidecar)
        one = await sidecar.admitted(need=2)
        await sidecar.lease({window.window_id: 100})
        await other.lease({window.window_id: 100})
        await books.age("money", "1 hour")
        granted(await books.extend(one, 1, need=3))
        assert await _leases(books) == [(100, 0)] * 2
        await sidecar.admitted(need=4)
        assert len(await books.windows("money")) == 2
        assert await sidecar.lease({window.window_id: 100}) == {}
        (old, new) = await books.windows("money")
        assert (old.held, new.held) == (50 + 100, 40)
        await books.connection.execute("UPDATE ledger.budget_window SET ends_at = now() - interval '1 min'"
                                       " WHERE window_id = $1", window.window_id)  # fmt: skip
        assert await reap(books) == 0
        assert (await books.windows("money"))[0].held == 50
        assert await books.count("lease") == 0

    keep_books(dsn, work)


def test_a_lowered_limit_takes_leases_back_at_once(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1600)
        sidecars = [await Sidecar.start(books) for _ in range(3)]
        window = await _opened(books, sidecars[0])
        for sidecar in sidecars:
            await sidecar.lease({window.window_id: 90})
        await sidecars[0].admitted(need=1)
        await books.budget("money", 1000)
        assert await _leases(books) != [(0, 0)] * 3
        await books.budget("money", 200)
        assert await _leases(books) == [(0, 0)] * 3
        window = await books.window("money")
        assert (window.limit, window.ceiling, window.held, window.live) == (200, 200, 10, 1)
        await books.budget("money", 5)
        window = await books.window("money")
        assert (window.limit, window.ceiling) == (5, 10)
        assert await sidecars[1].lease({window.window_id: 90}) == {window.window_id: 0}
        refused((await sidecars[1].admit(need=1))[1])

    keep_books(dsn, work)


def test_nobody_is_refused_while_leases_have_what_is_lacking(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        await books.budget("few", 4, unit="requests")
        mine, others = await Sidecar.start(books), await Sidecar.start(books)
        window = await _opened(books, mine)
        for sidecar in (mine, others):
            assert await sidecar.lease({window.window_id: 100}) == {window.window_id: 100}
        # 800 are available, 200 leased: what no lease could mend is refused without taking them back.
        refusal = refused((await mine.admit(need=101))[1])
        assert (refusal.remaining, refusal.held) == (800, 200)
        assert await _leases(books) == [(100, 0)] * 2
        one, answer = await mine.admit(need=85, want=85)
        granted(answer)
        assert await _leases(books) == [(0, 0)] * 2
        assert await others.lease({window.window_id: 30}) == {window.window_id: 30}
        granted(await books.extend(one, 1, need=15))
        assert await books.balances("money") == (0, 1000, 0, 1)
        assert refused(await books.extend(one, 2, need=1)).remaining == 0

    keep_books(dsn, work)


def test_nothing_is_an_overrun_that_money_in_leases_can_pay(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 10_000)
        sidecar = await Sidecar.start(books)
        window = await _opened(books, sidecar)
        one = await sidecar.admitted(need=10)
        assert await sidecar.lease({window.window_id: 1000}) == {window.window_id: 1000}
        rest = await sidecar.admitted(need=890)
        assert (await books.window("money")).held == 10_000
        # 700 are free in the lease, and the provider counted 300 more than it was held for.
        assert await _leases(books) == [(1000, 0)]
        assert await books.settle(settlement(one, output=40)) == ["settled"]
        assert await _leases(books) == [(0, 0)]
        window = await books.window("money")
        assert (window.spent, window.held, window.overrun) == (400, 8900, 0)
        # What not even they can pay is one still.
        assert await books.settle(settlement(rest, output=970)) == ["settled!"]
        assert (await books.window("money")).overrun == 100

    keep_books(dsn, work)


def test_a_lease_in_use_at_this_moment_is_passed_over_and_never_waited_for(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 400)
        mine, others = await Sidecar.start(books), await Sidecar.start(books)
        window = await _opened(books, mine)
        await others.lease({window.window_id: 100})
        busy = await asyncpg.connect(dsn)
        await busy.execute("BEGIN")
        await busy.execute("SELECT FROM ledger.lease FOR UPDATE")
        try:
            assert refused((await mine.admit(need=31))[1]).remaining == 300
        finally:
            await busy.close()
        granted((await mine.admit(need=31))[1])

    keep_books(dsn, work)


class _Holder:
    """One sidecar of several on one window: admits, extends, settles and leases, all at once."""

    def __init__(self, books: Books, sidecar: Sidecar, windows: Sequence[int], seed: int) -> None:
        self.books = books
        self.sidecar = sidecar
        self.windows = windows
        self.random = random.Random(seed)
        self.open: dict[UUID, int] = {}
        self.spent = 0
        self.refusals = 0

    async def retried(self, call: Any) -> Any:
        while True:
            try:
                return await call()
            except LedgerConflictError:
                await asyncio.sleep(0.005)

    async def admit(self) -> None:
        batch = [
            msgspec.structs.replace(
                admission(input=self.random.randrange(3), need=1, want=self.random.randrange(1, 20), shares=4),
                holder_id=self.sidecar.holder_id,
            )
            for _ in range(self.random.randrange(1, 12))
        ]
        answers = await self.retried(lambda: holds.admit_batch(self.books.connection, batch))
        for one, answer in answers.items():
            if isinstance(answer, Granted):
                self.open[one] = 0
            else:
                self.refusals += 1

    async def extend(self) -> None:
        some = self.random.sample(sorted(self.open), min(len(self.open), 5))
        for one in some:
            self.open[one] += 1
        asked = [
            Extension(tenant_id=TENANT, request_id=one, seq=self.open[one], need_tokens=1, want_tokens=20)
            for one in some
        ]
        await self.retried(lambda: holds.extend(self.books.connection, asked, shares=4))

    async def settle(self, most: int = 6) -> None:
        some = self.random.sample(sorted(self.open), min(len(self.open), most))
        batch = [settlement(one, input=1, output=self.random.randrange(5)) for one in some]
        for item in batch:
            del self.open[item.request_id]
            self.spent += item.amount_pico
        await self.retried(lambda: holds.settle(self.books.connection, batch))

    async def lease(self) -> None:
        wants = {window: self.random.choice([0, 200, 2000]) for window in self.windows}
        await self.retried(lambda: self.sidecar.lease(wants))

    async def run(self) -> None:
        steps = [self.admit] * 4 + [self.extend, self.settle, self.lease]
        while self.refusals < 60:
            await self.random.choice(steps)()


def test_four_holders_on_one_window_spend_all_of_it_and_not_one_more(dsn: str) -> None:
    async def work(books: Books) -> None:
        limit = 60_000
        await books.budget("money", limit)
        await books.budget("tokens", 10**6, unit="tokens")
        sidecars = [await Sidecar.start(books) for _ in range(4)]
        await _opened(books, sidecars[0])
        windows = [window.window_id for window in await books.windows()]
        running = [_Holder(books, sidecar, windows, seed) for seed, sidecar in enumerate(sidecars)]

        async def change() -> None:
            for _ in range(8):
                await asyncio.sleep(0.1)
                await running[0].retried(lambda: books.budget("tokens", random.choice([10**6, 10**5]), unit="tokens"))

        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        before = await books.connection.fetchval(deadlocks)
        await asyncio.gather(*(holder.run() for holder in running), change())
        # Nobody uses a lease any more, so that none is passed over: the last piconit is found, wherever it is leased.
        asked = 0
        while isinstance((await sidecars[0].admit(need=1))[1], Granted):
            asked += 1
        assert limit - (await books.window("money")).held - (await books.window("money")).spent < 10
        assert sum(free for free, _ in (await _leases(books))[:4]) < 10 or asked == 0
        for holder in running:
            while holder.open:
                await holder.settle(50)
        money = await books.window("money")
        assert money.overrun == 0
        assert money.spent == sum(holder.spent for holder in running)
        uses = await books.connection.fetchval("SELECT count(*) FROM ledger.posting WHERE debit = 'leased'")
        assert uses > 50
        assert await books.connection.fetchval(deadlocks) == before

    keep_books(dsn, work, connections=8)


def test_a_window_without_a_lease_is_served_beside_one_with(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("sessions", 100, per=["session"])
        await books.budget("project", 10_000)
        sidecar = await Sidecar.start(books)
        await sidecar.admitted(need=1)
        project = (await books.window("project")).window_id
        await sidecar.lease({project: 1000})
        asked = [
            msgspec.structs.replace(admission(need=6, session=f"s{number % 2}"), holder_id=sidecar.holder_id)
            for number in range(4)
        ]
        answers = await holds.admit_batch(books.connection, asked)
        assert sorted(type(answer).__name__ for answer in answers.values()) == ["Granted"] * 2 + ["Refused"] * 2
        for answer in answers.values():
            assert not isinstance(answer, Refused) or answer.budget == "demo/sessions"
        assert await _leases(books) == [(880, 2)]

    keep_books(dsn, work)
