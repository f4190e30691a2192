"""Holders on a real PostgreSQL: who is believed to live, what a fence does, and what the dead leave behind."""

import asyncio
import random
from typing import Any
from uuid import uuid4

import pytest

from behest_ledger.holds import Gone, UsageLine
from behest_ledger.store import holders
from behest_ledger.store.errors import LedgerRefusedError
from behest_ledger.store.holders import Checkpoint
from behest_ledger.store.reports import top
from ledger.books import TENANT, Books, granted, keep_books, new_id, refused, settlement
from ledger.sidecars import Sidecar, charge, checkpoint, reap, state
from ledger.test_store_reports import LONG_AGO

# Who lives


def test_a_holder_lives_as_long_as_it_renews(dsn: str) -> None:
    async def work(books: Books) -> None:
        one = uuid4()
        await holders.register(books.connection, one, "pod-1")
        row = await books.connection.fetchrow(
            "SELECT name, ttl = interval '120 s' AS ttl, expires_at - renewed_at > interval '119 s' AS long, fenced_at"
            " FROM ledger.holder"
        )
        assert tuple(row) == ("pod-1", True, True, None)
        assert await holders.renew(books.connection, one, 240.0)
        later = "SELECT expires_at > now() + interval '200 s' FROM ledger.holder"
        assert await books.connection.fetchval(later)
        # Registering again is a renewal, and what was promised is not shortened.
        await holders.register(books.connection, one, "pod-1", 1.0)
        assert await books.connection.fetchval(later)
        assert not await holders.renew(books.connection, uuid4())

    keep_books(dsn, work)


def test_who_was_silent_for_too_long_ends_and_never_comes_back(dsn: str) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        await sidecar.die()
        assert not await holders.renew(books.connection, sidecar.holder_id)
        with pytest.raises(LedgerRefusedError, match="has ended"):
            await holders.register(books.connection, sidecar.holder_id, "pod-1")
        assert await reap(books) == 0
        assert await books.connection.fetchval("SELECT fenced_at IS NOT NULL FROM ledger.holder")
        # Not even when its row is given time again.
        await sidecar.execute("UPDATE ledger.holder SET expires_at = now() + interval '1 day' WHERE holder_id = $1")
        assert not await holders.renew(books.connection, sidecar.holder_id)
        assert (await sidecar.admit())[1] == Gone()

    keep_books(dsn, work)


def test_nobody_is_dead_within_one_ttl_after_the_database_started(dsn: str) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        one = await sidecar.admitted()
        await sidecar.execute("UPDATE ledger.holder SET ttl = interval '100 years' WHERE holder_id = $1")
        await sidecar.die()
        assert await reap(books) == 0
        assert await state(books, one) == "open"
        await sidecar.admitted()
        # It could not renew before, so it may now.
        assert await holders.renew(books.connection, sidecar.holder_id)

    keep_books(dsn, work)


def test_nobody_is_dead_who_could_not_renew_for_one_ttl_since_the_keeper_looks(dsn: str) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        await sidecar.admitted()
        await sidecar.die()
        since = "SELECT fenced, holds, more FROM ledger.reap_v1(10, clock_timestamp() {} interval '1 s')"
        assert tuple(await books.connection.fetchrow(since.format("+"))) == ([], 0, False)
        row = await books.connection.fetchrow(since.format("-"))
        assert (row["fenced"], row["holds"], row["more"]) == ([f"pod-1 {sidecar.holder_id}"], 1, False)

    keep_books(dsn, work)


def test_who_is_fenced_gets_no_more_also_for_what_the_reap_has_not_come_to(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100_000)
        sidecar = await Sidecar.start(books)
        first, second = await sidecar.admitted(), await sidecar.admitted()
        await sidecar.die()
        assert await reap(books, limit=1) == 1
        left = first if await state(books, first) == "open" else second
        assert await state(books, left) == "open"
        assert await books.extend(left, 1, need=1) == Gone()

    keep_books(dsn, work)


def test_a_clean_end_needs_nothing_open(dsn: str) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        one = await sidecar.admitted()
        assert not await holders.unregister(books.connection, sidecar.holder_id)
        await books.settle(settlement(one))
        assert await holders.unregister(books.connection, sidecar.holder_id)
        assert await holders.unregister(books.connection, sidecar.holder_id)
        assert not await holders.renew(books.connection, sidecar.holder_id)
        assert (await sidecar.admit())[1] == Gone()

    keep_books(dsn, work)


def test_a_ledger_that_never_saw_a_holder_asks_nobody_for_one(dsn: str) -> None:
    async def work(books: Books) -> None:
        before, answer = await books.admit()
        granted(answer)
        await Sidecar.start(books)
        # From the first holder on everybody has to be one; what was admitted before goes on for a while.
        assert (await books.admit())[1] == Gone()
        granted((await books.admit(id=before))[1])
        assert await reap(books) == 0
        await books.connection.execute("UPDATE ledger.hold SET admitted_at = now() - interval '121 s'")
        assert await reap(books) == 1
        assert await books.settle(settlement(before)) == ["settled"]

    keep_books(dsn, work)


def test_without_any_holder_nothing_is_ever_reaped(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.admit()
        await books.connection.execute("UPDATE ledger.hold SET admitted_at = now() - interval '1 year'")
        assert await reap(books) == 0

    keep_books(dsn, work)


def test_old_holders_are_forgotten_but_for_the_newest_and_those_with_something_left(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100)
        gone, left, newest = [await Sidecar.start(books) for _ in range(3)]
        one = await left.admitted()
        for sidecar in (gone, left, newest):
            await sidecar.die()
        assert await reap(books) == 1
        prune = "SELECT ledger.prune_holders_v1($1::text::interval)"
        assert await books.connection.fetchval(prune, "1 day") == 0
        assert await books.connection.fetchval(prune, "0 s") == 1
        assert await books.connection.fetchval("SELECT count(*) FROM ledger.holder WHERE holder_id = $1",
                                               gone.holder_id) == 0  # fmt: skip
        await books.settle(settlement(one))
        assert await books.connection.fetchval(prune, "0 s") == 1
        assert await books.connection.fetchval("SELECT holder_id FROM ledger.holder") == newest.holder_id
        assert (await gone.admit())[1] == Gone()

    keep_books(dsn, work)


# What they leave behind


def test_what_a_dead_holder_held_goes_to_suspense_and_stays_unavailable(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("calls", 9, unit="requests")
        await books.budget("money", 100)
        await books.budget("tokens", 50, unit="tokens")
        dead, alive = await Sidecar.start(books), await Sidecar.start(books)
        one, two = await dead.admitted(input=5, need=2), await dead.admitted(need=1)
        granted(await books.extend(one, 1, need=1))
        other = await alive.admitted(need=2)
        await dead.die()
        assert await reap(books) == 2
        assert await reap(books) == 0
        assert [await state(books, each) for each in (one, two, other)] == ["suspense", "suspense", "open"]
        for name, held, suspense in (("calls", 1, 2), ("money", 20, 55), ("tokens", 2, 9)):
            window = await books.window(name)
            assert (window.held, window.suspense, window.live) == (held, suspense, 3)
        assert await books.findings() == []
        # It counts against the limit, and is shown as held.
        assert refused((await alive.admit(need=3))[1]).held == 75
        assert await books.extend(one, 2, need=1) == Gone()
        assert (await dead.admit(id=one))[1] == Gone()
        # Its journal comes back: settled from suspense, once.
        assert await books.settle(settlement(one, input=5, output=4)) == ["settled"]
        assert await books.settle(settlement(one, input=5, output=4)) == ["already"]
        assert await books.settle(settlement(two, sent=False)) == ["settled"]
        assert await books.balances("money") == (55, 20, 0, 1)
        assert (await books.window("money")).suspense == 0

    keep_books(dsn, work)


def test_a_reap_is_bounded_and_says_that_there_is_more(dsn: str) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        for _ in range(5):
            await sidecar.admitted()
        await sidecar.die()
        rounds = [tuple(await books.connection.fetchrow("SELECT holds, more FROM ledger.reap_v1(2)")) for _ in range(4)]
        assert rounds == [(2, True), (2, True), (1, False), (0, False)]

    keep_books(dsn, work)


def test_an_admission_that_passed_beside_the_fence_is_found_by_the_next_reap(dsn: str) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        async with books.connection.acquire() as late:
            transaction = late.transaction()
            await transaction.start()
            one, answer = await Sidecar(Books(dsn, late), sidecar.holder_id).admit()
            granted(answer)
            await sidecar.die()
            assert await reap(books) == 0
            await transaction.commit()
        assert await state(books, one) == "open"
        assert await reap(books) == 1

    keep_books(dsn, work, connections=2)


@pytest.mark.parametrize("seed", range(3))
def test_a_settlement_and_a_reap_at_the_same_time_move_everything_once(dsn: str, seed: int) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 4000)
        await books.budget("users", 700, per=["user"])
        choose = random.Random(seed)
        spent = 0
        results: set[str] = set()
        for _ in range(20):
            sidecar = await Sidecar.start(books)
            ids = [await sidecar.admitted(need=choose.randrange(1, 4), user=choose.choice("ab")) for _ in range(4)]
            await sidecar.die()
            batch = [settlement(one, output=1) for one in choose.sample(ids, 3)]
            spent += 10 * len(batch)
            acts: list[Any] = [
                books.settle(*batch),
                reap(books, 3),
                reap(books),
                books.extend(ids[0], 1, need=1),
                charge(books, "checkpoint", grace="1 day"),
                holders.checkpoint(books.connection, [checkpoint(one, output=1) for one in ids]),
            ]
            choose.shuffle(acts)
            for outcome in await asyncio.gather(*acts):
                if isinstance(outcome, list):
                    results |= {item for item in outcome if isinstance(item, str)}
            for window in await books.windows():
                assert window.spent + window.held + window.suspense <= window.limit
            await reap(books)
            await books.settle(*[settlement(one, output=1) for one in ids])
            spent += 10
            assert await books.balances("money") == (spent, 0, 0, 0)
        assert results == {"settled"}

    keep_books(dsn, work, connections=8)


# How far streams have come


def test_a_checkpoint_never_lowers_and_touches_only_open_holds(dsn: str) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        one, other, ended = [await sidecar.admitted(need=9) for _ in range(3)]
        await books.settle(settlement(ended))

        async def told(id: Any) -> tuple[int, int, int, bool]:  # noqa: A002 - it is one
            row = await books.connection.fetchrow(
                "SELECT checkpoint_input_tokens, checkpoint_output_tokens, checkpoint_amount_pico::bigint,"
                " checkpoint_at IS NOT NULL FROM ledger.hold WHERE request_id = $1", id,
            )  # fmt: skip
            return tuple(row)

        batch = [checkpoint(one, input=4, output=2), checkpoint(other, output=1), checkpoint(ended, output=1)]
        assert await holders.checkpoint(books.connection, [*batch, checkpoint(new_id(), output=1)]) == []
        assert await told(one) == (4, 2, 32, True)
        assert await told(other) == (0, 1, 10, True)
        assert await told(ended) == (0, 0, 0, False)
        cheap = UsageLine(class_="output", quantity=9, rate_pico=1, amount_pico=9, source="local")
        free = UsageLine(class_="input", quantity=4, rate_pico=0, amount_pico=0, source="local")
        for less in (
            checkpoint(one),
            checkpoint(one, input=99, output=1),
            checkpoint(one, input=3, output=9),
            Checkpoint(tenant_id=TENANT, request_id=one, lines=[free, cheap]),
        ):
            await holders.checkpoint(books.connection, [less])
            assert await told(one) == (4, 2, 32, True)
        # The last of two for one request counts.
        await holders.checkpoint(
            books.connection, [checkpoint(one, input=4, output=3), checkpoint(one, input=4, output=5)]
        )
        assert await told(one) == (4, 5, 62, True)
        await sidecar.die()
        await reap(books)
        await sidecar.checkpoint(one, input=4, output=6)
        assert await told(one) == (4, 5, 62, True)

    keep_books(dsn, work)


def test_a_checkpoint_does_not_wait_for_a_hold_that_is_busy(dsn: str) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        busy, free = await sidecar.admitted(), await sidecar.admitted()
        async with books.connection.acquire() as other, other.transaction():
            await other.execute("SELECT FROM ledger.hold WHERE request_id = $1 FOR UPDATE", busy)
            batch = [checkpoint(busy, output=1), checkpoint(free, output=1)]
            assert await holders.checkpoint(books.connection, batch) == [busy]
        assert await books.connection.fetchval("SELECT sum(checkpoint_output_tokens)::int FROM ledger.hold") == 1

    keep_books(dsn, work, connections=2)


def test_a_checkpoint_has_one_line_a_class() -> None:
    line = UsageLine(class_="output", quantity=1, rate_pico=1, amount_pico=1, source="local")
    with pytest.raises(ValueError, match="two lines"):
        Checkpoint(tenant_id=TENANT, request_id=new_id(), lines=[line, line])


def test_top_adds_what_running_requests_have_come_to(dsn: str) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        await books.settle(settlement(await sidecar.admitted(), output=3))
        one = await sidecar.admitted()
        dear = await sidecar.admitted(session="s2")
        await holders.checkpoint(
            books.connection, [checkpoint(one, input=2, output=1), checkpoint(dear, input=1, output=9)]
        )
        first, second = await top(books.connection, since=LONG_AGO)
        assert (first.session_id, first.amount_pico, first.live_amount_pico) == ("s2", 0, 93)
        assert (second.amount_pico, second.live, second.live_input_tokens, second.live_output_tokens) == (30, 1, 2, 1)
        assert second.live_amount_pico == 16

    keep_books(dsn, work)
