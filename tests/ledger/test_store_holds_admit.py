import itertools
import json
from typing import Any

import pytest

from behest_ledger.holds import Gone, Granted, Refused
from behest_ledger.store import holds
from ledger.books import Books, admission, granted, keep_books, new_id, refused, settlement


def test_a_request_without_budgets_gets_all_it_wants(dsn: str) -> None:
    async def work(books: Books) -> None:
        _, answer = await books.admit(need=1, want=512)
        assert answer == Granted(output_tokens=512)
        assert await books.count("hold") == 1
        assert await books.count("posting") == 0

    keep_books(dsn, work)


def test_one_admission_holds_in_the_unit_of_each_budget(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 10_000)
        await books.budget("all", 500, unit="tokens")
        await books.budget("in", 500, unit="tokens", kind="input")
        await books.budget("out", 500, unit="tokens", kind="output")
        await books.budget("calls", 3, unit="requests")
        _, answer = await books.admit(input=50, need=20, want=100)
        assert granted(answer).output_tokens == 100
        assert len(granted(answer).windows) == 5
        held = {window.budget: window.held for window in await books.windows()}
        assert held == {
            "demo/money": 50 * 3 + 100 * 10, "demo/all": 150, "demo/in": 50, "demo/out": 100, "demo/calls": 1,
        }  # fmt: skip
        assert {window.live for window in await books.windows()} == {1}

    keep_books(dsn, work)


@pytest.mark.parametrize(
    "short", [("usd", 100, "both"), ("tokens", 20, "both"), ("tokens", 10, "output"), ("tokens", 9, "input"),
              ("requests", 0, "both")]
)  # fmt: skip
def test_a_request_holds_in_all_its_windows_or_in_none(dsn: str, short: tuple[Any, int, str]) -> None:
    unit, limit, kind = short

    async def work(books: Books) -> None:
        for name in ("a", "z"):
            await books.budget(name, 10**6)
        await books.budget("m", limit, unit=unit, kind=kind)
        _, answer = await books.admit(input=10, need=11)
        assert refused(answer).budget == "demo/m"
        assert {(window.held, window.live) for window in await books.windows()} == {(0, 0)}
        assert await books.count("hold") == 0

    keep_books(dsn, work)


def test_the_strict_budget_wins_whatever_its_name_and_whenever_it_was_used_first(dsn: str) -> None:
    async def work(books: Books) -> None:
        for number, order in enumerate(itertools.permutations([10_000, 150, 400])):
            user = f"user{number}"
            for name, limit in zip("abc", order, strict=True):
                await books.budget(f"{name}{number}", limit, scope={"user": user})
            # Windows get their ids on first use: let another order be the order of the ids.
            for name in "cab":
                await books.connection.fetchval(
                    "SELECT ledger.open_window_v1('acme', $1, '[]')", f"demo/{name}{number}"
                )
            _, answer = await books.admit(user=user, need=1, want=500)
            assert granted(answer).output_tokens == 15
            bound_by = granted(answer).bound_by
            assert bound_by is not None
            assert bound_by.limit == 150
            _, answer = await books.admit(user=user, need=1)
            assert refused(answer).limit == 150

    keep_books(dsn, work)


def test_a_budget_binds_whoever_matches_every_pattern_of_its_scope(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("models", 0, scope={"model": "gpt-4%", "user": "a__"})
        await books.budget("literal", 0, scope={"model": r"100\%\_sure"})
        await books.budget("team", 0, scope={"team": "x"})
        await books.budget("labelled", 0, labels={"app": "web"})
        allowed: list[dict[str, Any]] = [
            {"model": "gpt-3", "user": "ann"},
            {"model": "gpt-4o", "user": "anna"},
            {"model": "GPT-4", "user": "ann"},
            {"model": "100x_sure"},
            {"team": "y"},
            {"labels": {"app": "api"}},
        ]
        for who in allowed:
            assert isinstance((await books.admit(**who))[1], Granted), who
        bound: dict[str, dict[str, Any]] = {
            "demo/models": {"model": "gpt-4o", "user": "ann"},
            "demo/literal": {"model": "100%_sure"},
            "demo/team": {"team": "x"},
            "demo/labelled": {"labels": {"app": "web", "pod": "1"}},
        }
        for budget, who in bound.items():
            assert refused((await books.admit(**who))[1]).budget == budget

    keep_books(dsn, work)


def test_budgets_of_another_tenant_bind_nobody_here(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("none", 0, tenant="other")
        assert isinstance((await books.admit())[1], Granted)
        assert isinstance((await books.admit(tenant="other"))[1], Refused)

    keep_books(dsn, work)


def test_every_subject_has_a_window_of_its_own(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("each", 100, per=["user", "session", "model"])
        subjects: list[dict[str, Any]] = [{}, {"user": "bob"}, {"model": "large"}, {"session": "s2"}]
        for who in [*subjects, *subjects]:
            await books.admit(need=3, **who)
        found = {json.dumps(window.subject): window.held for window in await books.windows()}
        # A session belongs to its user and project: bob's "s1" is not ann's.
        assert found == {
            '["ann", ["demo/shop", "ann", "s1"], "small"]': 60,
            '["bob", ["demo/shop", "bob", "s1"], "small"]': 60,
            '["ann", ["demo/shop", "ann", "s1"], "large"]': 60,
            '["ann", ["demo/shop", "ann", "s2"], "small"]': 60,
        }

    keep_books(dsn, work)


def test_a_refusal_says_exactly_how_the_budget_stands(dsn: str) -> None:
    async def work(books: Books) -> None:
        big = 10**24  # more than a JSON reader's integers hold
        await books.budget("day", big + 1000, scope={"project": "demo/%"}, per=["user"], period="day")
        done, _ = await books.admit(input=10, need=1)
        await books.settle(settlement(done, input=10, output=1))
        await books.admit(need=7)
        _, answer = await books.admit(need=10**12, rate=10**13)
        ends_at, window_id = await books.connection.fetchrow("SELECT ends_at, window_id FROM ledger.budget_window")
        answer = refused(answer)
        assert answer.retry_after_s is not None
        assert 0 < answer.retry_after_s <= 90_000
        assert answer == Refused(
            reason="quota",
            budget="demo/day",
            scope={"project": "demo/%"},
            subject=["ann"],
            unit="usd",
            window_id=window_id,
            limit=big + 1000,
            spent=40,
            held=70,
            remaining=big + 890,
            resets_at=ends_at.isoformat(),
            retry_after_s=answer.retry_after_s,
        )

    keep_books(dsn, work)


def test_a_refusal_of_a_lifetime_budget_has_no_time_to_come_back(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("life", 90)
        answer = refused((await books.admit(need=10))[1])
        assert (answer.resets_at, answer.retry_after_s, answer.remaining) == (None, None, 90)

    keep_books(dsn, work)


def test_suspension_comes_before_money_and_money_before_rates(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("a-rate", 0, unit="requests", refusal="rate", period="minute")
        assert refused((await books.admit())[1]).reason == "rate"
        await books.budget("b-money", 0)
        assert refused((await books.admit())[1]).reason == "quota"
        await books.budget("c-rate", 0, unit="requests", refusal="rate", period="day")
        assert refused((await books.admit())[1]).budget == "demo/b-money"
        await books.budget("z-switch", 10**9, suspended=True)
        answer = refused((await books.admit())[1])
        assert (answer.reason, answer.what, answer.name) == ("suspended", "budget", "demo/z-switch")
        await books.connection.execute(
            "INSERT INTO ledger.project (tenant_id, project_id, namespace, name, spec, suspended)"
            " VALUES ('acme', 'demo/shop', 'demo', 'shop', '{}', true)"
        )
        answer = refused((await books.admit())[1])
        assert (answer.reason, answer.what, answer.name) == ("suspended", "project", "demo/shop")

    keep_books(dsn, work)


def test_a_soft_budget_counts_and_never_stops_anybody(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("soft", 10, enforcement="soft")
        first, answer = await books.admit(need=1, want=512)
        assert granted(answer).output_tokens == 512
        assert granted(await books.extend(first, 1, need=1, want=512)).output_tokens == 512
        assert await books.settle(settlement(first, output=2000)) == ["settled"]
        assert await books.balances("soft") == (20_000, 0, 0, 0)
        assert isinstance((await books.admit(need=100))[1], Granted)

    keep_books(dsn, work)


def test_the_same_admission_gets_the_same_answer_and_holds_once(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        asked = admission(need=5, want=50, shares=2)
        first = await holds.admit(books.connection, asked)
        assert await holds.admit(books.connection, asked) == first
        await books.extend(asked.request_id, 1, need=1)
        # Not the answer to the extension that came in between.
        assert await holds.admit(books.connection, asked) == first
        assert await books.balances("money") == (0, 510, 0, 1)

    keep_books(dsn, work)


def test_an_admission_that_is_repeated_after_its_end_is_no_grant(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        asked = admission(need=5)
        granted(await holds.admit(books.connection, asked))
        await books.settle(settlement(asked.request_id, output=5))
        assert await holds.admit(books.connection, asked) == Gone()
        assert await books.balances("money") == (50, 0, 0, 0)

    keep_books(dsn, work)


def test_an_admission_that_comes_after_its_void_does_nothing(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        late = new_id()
        assert await books.settle(settlement(late, sent=False)) == ["unknown"]
        assert (await books.admit(id=late, need=5))[1] == Gone()
        assert await books.settle(settlement(late, sent=False)) == ["already"]
        assert await books.windows() == []

    keep_books(dsn, work)


def test_a_grant_is_a_share_of_what_is_left_and_never_below_the_need(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("tokens", 1000, unit="tokens")
        first, answer = await books.admit(want=10_000, shares=4)
        assert granted(answer).output_tokens == 250
        assert granted((await books.admit(want=10_000, shares=4))[1]).output_tokens == 750 // (4 * 2)
        assert granted((await books.admit(need=400, want=500, shares=4))[1]).output_tokens == 400
        # 16 tokens are worth giving, even where the share is smaller.
        assert granted((await books.admit(want=500, shares=10**6))[1]).output_tokens == 16
        assert granted((await books.admit(need=30, want=20))[1]).output_tokens == 30
        assert granted(await books.extend(first, 1, need=30, want=20)).output_tokens == 30

    keep_books(dsn, work)


def test_a_name_with_the_character_nul_is_admitted_and_settled(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("sessions", 1000, per=["session"])
        first, answer = await books.admit(session="a\0b\\u0000", need=1)
        granted(answer)
        await books.settle(settlement(first, output=1, facts={"finish_reasons": ["\0", "\\\0", "\\u0000"]}))
        row = await books.connection.fetchrow(
            "SELECT session_id, facts ->> 'finish_reasons' AS told FROM ledger.request"
        )
        assert row["session_id"] == "a\ufffdb\\u0000"
        assert json.loads(row["told"]) == ["\ufffd", "\\\ufffd", "\\u0000"]

    keep_books(dsn, work)
