"""Admissions in batches: each is answered as if it had come alone, after those before it."""

import asyncio
import random

import msgspec
import pytest

from behest_ledger.holds import Gone, Granted, Refused
from behest_ledger.store import holds
from behest_ledger.store.admissions import AdmissionDesk
from behest_ledger.store.errors import LedgerConflictError, LedgerError, LedgerRefusedError
from ledger.books import TENANT, Books, admission, keep_books, new_id, settlement


def test_a_batch_grants_what_there_is_and_refuses_the_rest_each_for_itself(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        await books.budget("users", 500, per=["user"])
        await books.budget("stopped", 500, scope={"user": "eve"}, suspended=True)
        ids = sorted(new_id() for _ in range(6))  # the order in which a batch is served
        asked = [
            admission(id=ids[0], user="ann", need=40),
            admission(id=ids[1], user="ann", need=20),  # ann has 10 tokens left
            admission(id=ids[2], user="eve", need=1),
            admission(id=ids[3], user="bob", need=50),
            admission(id=ids[4], user="cid", need=11),  # all have 10 left
            admission(id=ids[5], user="cid", need=5, want=10, shares=1),
        ]
        answers = await holds.admit_batch(books.connection, asked)
        found = [answers[one.request_id] for one in asked]
        assert [type(answer) for answer in found] == [Granted, Refused, Refused, Granted, Refused, Granted]
        users, stopped, money = found[1], found[2], found[4]
        assert isinstance(users, Refused)
        assert (users.budget, users.spent, users.held, users.remaining) == ("demo/users", 0, 400, 100)
        assert isinstance(stopped, Refused)
        assert (stopped.reason, stopped.what, stopped.name) == ("suspended", "budget", "demo/stopped")
        assert isinstance(money, Refused)
        assert (money.budget, money.held, money.remaining) == ("demo/money", 900, 100)
        last = found[5]
        assert isinstance(last, Granted)
        assert (last.output_tokens, last.amounts) == (10, (100, 100))
        assert await books.balances("money") == (0, 1000, 0, 3)

    keep_books(dsn, work)


def test_a_request_that_comes_twice_in_one_batch_and_again_later_is_held_for_once(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        one = admission(need=10)
        ended = admission(need=10)
        await books.settle(settlement(ended.request_id, sent=False))
        other = msgspec.structs.replace(one, want_tokens=90, need_tokens=90)
        answers = await holds.admit_batch(books.connection, [one, ended, other, one])
        assert isinstance(first := answers[one.request_id], Granted)
        assert first.output_tokens in (10, 90)  # whichever: of one request id there is one hold
        assert answers[ended.request_id] == Gone()
        assert await holds.admit_batch(books.connection, [one, admission(need=1)]) != {}
        assert (await holds.admit_batch(books.connection, [one]))[one.request_id] == first
        assert await books.count("hold") == 3
        assert (await books.window("money")).held == 10 * first.output_tokens + 10

    keep_books(dsn, work)


def test_windows_are_opened_once_for_all_of_a_batch(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("sessions", 1000, per=["session"])
        await books.budget("tokens", 100, unit="tokens")
        await books.budget("calls", 10, unit="requests", per=["user"])
        asked = [admission(session=f"s{number % 3}", input=1, need=2) for number in range(7)]
        answers = await holds.admit_batch(books.connection, asked)
        assert all(isinstance(answer, Granted) for answer in answers.values())
        assert {window.subject[0][2]: window.live for window in await books.windows("sessions")} == {
            "s0": 3, "s1": 2, "s2": 2,
        }  # fmt: skip
        assert await books.balances("tokens") == (0, 21, 0, 7)
        assert await books.balances("calls") == (0, 7, 0, 7)
        first = answers[asked[0].request_id]
        assert isinstance(first, Granted)
        windows = {window.window_id: window.budget for window in await books.windows()}
        assert dict(zip((windows[one] for one in first.windows), first.amounts, strict=True)) == {
            "demo/sessions": 23, "demo/tokens": 3, "demo/calls": 1,
        }  # fmt: skip

    keep_books(dsn, work)


def test_an_empty_batch_is_nothing(dsn: str) -> None:
    async def work(books: Books) -> None:
        assert await books.connection.fetch("SELECT * FROM ledger.admit_batch_v1($1, '[]')", new_id()) == []

    keep_books(dsn, work)


@pytest.mark.parametrize(
    "poison",
    [{"want_tokens": 2**63}, {"input_amount_pico": -(10**9)}, {"input_tokens": 2**63}],
)
def test_a_request_that_cannot_be_written_fails_alone(dsn: str, poison: dict[str, int]) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        desk = AdmissionDesk(lambda batch: holds.admit_batch(books.connection, batch))
        asked = [admission(need=10), msgspec.structs.replace(admission(need=5), **poison), admission(need=20)]
        good, bad, last = await asyncio.gather(*(desk.admit(one) for one in asked), return_exceptions=True)
        assert isinstance(good, Granted)
        assert isinstance(bad, LedgerRefusedError)
        assert isinstance(last, Granted)
        assert await books.balances("money") == (0, 300, 0, 2)

    keep_books(dsn, work)


def test_batches_that_cross_never_deadlock_and_hold_no_more_than_there_is(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 20_000)
        await books.budget("sessions", 3000, per=["session"])
        await books.budget("users", 6000, per=["user"], period="minute", alignment="rolling")
        chance = random.Random(1)
        conflicts = 0

        async def crossing() -> None:
            nonlocal conflicts
            for _ in range(12):
                batch = [
                    admission(user=f"u{chance.randrange(4)}", session=f"s{chance.randrange(9)}", need=1, want=9)
                    for _ in range(chance.randrange(1, 20))
                ]
                chance.shuffle(batch)
                try:
                    answers = await holds.admit_batch(books.connection, batch)
                except LedgerConflictError:
                    conflicts += 1
                    continue
                some = [
                    settlement(one, output=3) for one, answer in answers.items()
                    if isinstance(answer, Granted) and chance.random() < 0.8
                ]  # fmt: skip
                chance.shuffle(some)
                await holds.settle(books.connection, some)

        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        before = await books.connection.fetchval(deadlocks)
        await asyncio.gather(*(crossing() for _ in range(6)))
        assert conflicts == 0
        assert await books.connection.fetchval(deadlocks) == before
        for window in await books.windows():
            assert window.spent + window.held <= window.limit

    keep_books(dsn, work, connections=6)


def test_the_same_batch_sent_twice_at_once_is_admitted_once(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 10_000)
        for _ in range(10):
            batch = [admission(need=3) for _ in range(8)]
            answers = await asyncio.gather(
                holds.admit_batch(books.connection, batch),
                holds.admit_batch(books.connection, batch[::-1]),
                holds.settle(books.connection, [settlement(one.request_id, sent=False) for one in batch[4:]]),
                return_exceptions=True,
            )
            for answer in answers:
                assert not isinstance(answer, BaseException) or isinstance(answer, LedgerError)
            await holds.settle(books.connection, [settlement(one.request_id, sent=False) for one in batch])
        assert await books.balances("money") == (0, 0, 0, 0)
        assert await books.connection.fetchval("SELECT count(*) FROM ledger.hold WHERE tenant_id = $1", TENANT) == 80

    keep_books(dsn, work, connections=3)
