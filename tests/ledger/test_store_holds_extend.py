from typing import Any

import pytest

from behest_ledger.holds import Extension, Gone, Granted
from behest_ledger.store import holds
from ledger.books import TENANT, Books, granted, keep_books, new_id, refused, settlement


def test_an_extension_adds_to_every_window_that_output_moves(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 10_000)
        await books.budget("out", 500, unit="tokens", kind="output")
        await books.budget("in", 10, unit="tokens", kind="input")
        await books.budget("calls", 1, unit="requests")
        first, _ = await books.admit(input=10, need=5)
        assert granted(await books.extend(first, 1, need=7, want=20)).output_tokens == 20
        held = {window.budget: window.held for window in await books.windows()}
        assert held == {"demo/money": 280, "demo/out": 25, "demo/in": 10, "demo/calls": 1}

    keep_books(dsn, work)


def test_an_extension_is_given_in_all_windows_or_in_none(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("a", 10_000)
        await books.budget("m", 100)
        await books.budget("z", 10_000)
        first, _ = await books.admit(need=5)
        answer = refused(await books.extend(first, 1, need=6))
        assert (answer.budget, answer.limit, answer.held, answer.remaining) == ("demo/m", 100, 50, 50)
        assert {window.held for window in await books.windows()} == {50}
        assert granted(await books.extend(first, 2, need=1, want=100)).output_tokens == 5

    keep_books(dsn, work)


def test_the_same_extension_gets_the_same_answer_and_holds_once(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100)
        first, _ = await books.admit(need=1)
        once = granted(await books.extend(first, 1, need=5))
        assert await books.extend(first, 1, need=5) == once
        no = refused(await books.extend(first, 2, need=5))
        await books.budget("money", 1000)
        # The first answer, though there is room by now; whoever wants to know anew asks anew.
        assert await books.extend(first, 2, need=5) == no
        assert granted(await books.extend(first, 3, need=5)).output_tokens == 5
        assert await books.balances("money") == (0, 110, 0, 1)

    keep_books(dsn, work)


def test_an_ended_or_unknown_hold_is_not_extended(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100)
        settled, _ = await books.admit(need=1)
        voided, _ = await books.admit(need=1)
        await books.settle(settlement(settled, output=1), settlement(voided, sent=False))
        for one in (settled, voided, new_id()):
            assert await books.extend(one, 1, need=1) == Gone()
        assert await books.balances("money") == (10, 0, 0, 0)

    keep_books(dsn, work)


def test_a_batch_answers_each_of_its_extensions_apart(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("each", 100, per=["user"])
        ids = [(await books.admit(user=f"u{number}", need=number))[0] for number in range(1, 10)]
        asked = [
            Extension(tenant_id=TENANT, request_id=one, seq=1, need_tokens=4, want_tokens=4)
            for one in [*reversed(ids), new_id()]
        ]
        answers = await holds.extend(books.connection, asked, shares=1)
        assert [isinstance(answers[one], Granted) for one in ids] == [True] * 6 + [False] * 3
        assert answers[asked[-1].request_id] == Gone()

    keep_books(dsn, work)


@pytest.mark.parametrize("switch", ["budget", "project"])
def test_suspension_binds_live_requests_at_once(dsn: str, switch: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("a", 0, scope={"user": "bob"})
        await books.budget("money", 100)
        await books.connection.execute(
            "INSERT INTO ledger.project (tenant_id, project_id, namespace, name, spec)"
            " VALUES ('acme', 'demo/shop', 'demo', 'shop', '{}')"
        )
        first, _ = await books.admit(need=1)
        if switch == "budget":
            await books.budget("money", 100, suspended=True)
        else:
            await books.connection.execute("UPDATE ledger.project SET suspended = true")
        answer = refused(await books.extend(first, 1, need=1))
        assert (answer.reason, answer.what) == ("suspended", switch)
        assert await books.balances("money") == (0, 10, 0, 1)

    keep_books(dsn, work)


def test_a_raised_limit_is_there_for_live_requests_at_once(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100)
        first, _ = await books.admit(need=10)
        refused(await books.extend(first, 1, need=1))
        await books.budget("money", 200)
        assert granted(await books.extend(first, 2, need=1, want=50)).output_tokens == 10

    keep_books(dsn, work)


def test_a_balance_above_a_lowered_limit_may_only_fall(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        ids = [(await books.admit(need=25))[0] for _ in range(4)]

        async def state() -> tuple[int, int | None, int]:
            window = await books.window("money")
            return window.limit, window.ceiling, window.spent + window.held

        await books.budget("money", 300)
        assert await state() == (300, 1000, 1000)
        refused(await books.extend(ids[0], 1, need=1))
        refused((await books.admit(need=0))[1])
        # Each release lowers the ceiling; what is charged beyond its hold finds no room.
        assert await books.settle(settlement(ids[0], output=30)) == ["settled!"]
        assert await state() == (300, 1000, 1000)
        assert await books.settle(settlement(ids[1], output=5)) == ["settled"]
        assert await state() == (300, 800, 800)
        await books.budget("money", 900)
        assert await state() == (900, 900, 800)
        await books.budget("money", 100)
        await books.settle(settlement(ids[2], sent=False), settlement(ids[3], sent=False))
        assert await state() == (100, 300, 300)
        await books.budget("money", 300)
        assert await state() == (300, 300, 300)

    keep_books(dsn, work)


def test_a_budget_may_become_soft_and_hard_again_while_requests_run(dsn: str) -> None:
    async def work(books: Books) -> None:
        async def ceiling() -> int | None:
            return (await books.window("money")).ceiling

        await books.budget("money", 100)
        first, _ = await books.admit(need=10)
        await books.budget("money", 100, enforcement="soft")
        assert await ceiling() is None
        granted(await books.extend(first, 1, need=40))
        await books.budget("money", 100)
        assert await ceiling() == 500
        refused(await books.extend(first, 2, need=1))
        await books.settle(settlement(first, output=9))
        assert await ceiling() == 100

    keep_books(dsn, work)


def test_a_request_stays_in_the_windows_of_its_admission(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("day", 1000, period="day")
        first, _ = await books.admit(need=10)
        await books.age("day", "1 day")
        _, answer = await books.admit(need=3)
        assert len(granted(answer).windows) == 1
        granted(await books.extend(first, 1, need=20))
        await books.settle(settlement(first, output=40))
        old, new = await books.windows("day")
        assert (old.spent, old.held, old.live) == (400, 0, 0)
        assert (new.spent, new.held, new.live) == (0, 30, 1)
        # A closed window never takes a changed limit, and never gives money to the current one.
        await books.budget("day", 50, period="day")
        assert [(window.limit, window.ceiling) for window in await books.windows("day")] == [(1000, 1000), (50, 50)]

    keep_books(dsn, work)


def test_a_limit_that_falls_below_the_need_cuts_and_what_is_left_can_be_taken(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("tokens", 100, unit="tokens")
        ids = [(await books.admit(need=10))[0] for _ in range(5)]
        await books.budget("tokens", 60, unit="tokens")
        answers: list[Any] = [await books.extend(one, 1, need=1, want=100, shares=4) for one in ids]
        assert granted(answers[0]).output_tokens == 10
        assert [refused(answer).remaining for answer in answers[1:]] == [0, 0, 0, 0]

    keep_books(dsn, work)
