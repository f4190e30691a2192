"""Every unit in every window, for every scope and subject; and all budgets that match, together."""

import itertools
import random
from typing import Any, Literal, NamedTuple

import pytest

from behest_ledger.holds import Granted, Refused
from behest_ledger.store.configuration import apply_text
from ledger.books import INPUT_RATE, OUTPUT_RATE, WHO, Books, granted, keep_books, refused, settlement

Unit = Literal["usd", "tokens", "requests", "concurrency"]

AT_ONCE: tuple[Unit, str] = ("concurrency", "both")
UNITS: list[tuple[Unit, str]] = [
    ("usd", "both"), ("tokens", "both"), ("tokens", "input"), ("tokens", "output"), ("requests", "both"),
]  # fmt: skip
WINDOWS = [("lifetime", "calendar")] + [
    (period, alignment)
    for period in ("minute", "hour", "day", "week", "month")
    for alignment in ("calendar", "rolling")
]


def in_unit(unit: str, kind: str, *, input: int, output: int) -> int:  # noqa: A002 - it is one
    """What so many tokens of one request are in a unit."""
    if unit == "usd":
        return input * INPUT_RATE + output * OUTPUT_RATE
    if unit == "tokens":
        return input * (kind != "output") + output * (kind != "input")
    return 1


@pytest.mark.parametrize(("unit", "kind"), UNITS, ids=lambda value: str(value))
def test_a_unit_counts_the_same_in_every_window_and_begins_anew_in_the_next(dsn: str, unit: Unit, kind: str) -> None:
    first = in_unit(unit, kind, input=7, output=5)
    spent = in_unit(unit, kind, input=6, output=4)
    limit = 2 * first

    async def work(books: Books) -> None:
        for period, alignment in WINDOWS:
            name = f"{period}-{alignment}"
            await books.budget(
                name, limit, unit=unit, kind=kind, period=period, alignment=alignment, zone="Asia/Kathmandu",
                scope={"user": name},
            )  # fmt: skip
            one, answer = await books.admit(user=name, input=7, need=5)
            granted(answer)
            assert (await books.window(name)).held == first, name
            await books.settle(settlement(one, input=6, output=4))
            granted((await books.admit(user=name, input=7, need=5))[1])
            no = refused((await books.admit(user=name, input=7, need=5))[1])
            told = (no.unit, no.limit, no.spent, no.held, no.remaining)
            assert told == (unit, limit, spent, first, limit - spent - first), name
            assert (no.resets_at is None, no.retry_after_s is None) == (period == "lifetime",) * 2, name
            if period == "lifetime":
                continue
            await books.age(name, f"1 {period}")
            granted((await books.admit(user=name, input=7, need=5))[1])
            assert [(window.spent, window.held) for window in await books.windows(name)] == [
                (spent, first), (0, first)
            ], name  # fmt: skip

    keep_books(dsn, work)


MANIFESTS = """
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: shop, namespace: demo}}
spec: {{tenant: acme}}
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: it, namespace: demo}}
spec:
  scope: {scope}
  per: [{per}]
  limit: {{requests: 1}}
  window: {{period: Lifetime}}
"""

WEB = {"labels": {"app": "web", "team": "a"}}

# A scope, who is bound, who is not. Who is told by what differs from demo/shop's ann in session s1.
SCOPES: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = [
    ("{tenant: acme}", [{}, {"namespace": "other", "project": "other/shop"}], [{"tenant": "else"}]),
    ("{namespace: demo}", [{}, {"user": "bob"}], [{"namespace": "other"}]),
    ("{tenant: acme, namespace: 'dem?'}", [{}, {"namespace": "demx"}], [{"namespace": "demos"}]),
    ("{project: shop}", [{}], [{"project": "demo/shop2"}, {"namespace": "other", "project": "other/shop"}]),
    ("{project: 'sh*'}", [{}, {"project": "demo/sh"}], [{"project": "demo/s"}]),
    ("{user: ann}", [{}, {"project": "demo/other"}], [{"user": "Ann"}, {"user": "anna"}, {"user": ""}]),
    ("{user: 'workload:*'}", [{"user": "workload:demo/web"}], [{}]),
    ("{session: s1}", [{}, {"user": "bob"}], [{"session": "s2"}]),
    ("{model: 'gpt-4o*'}", [{"model": "gpt-4o"}, {"model": "gpt-4o-mini"}], [{}, {"model": "gpt-4"}]),
    ("{tier: free}", [{}], [{"tier": "pro"}, {"tier": ""}]),
    ("{workloadSelector: {matchLabels: {app: web}}}", [WEB], [{}, {"labels": {"app": "api"}}]),
    ("{project: shop, user: ann, model: small, tier: free}", [{}], [{"user": "bob"}, {"model": "x"}, {"tier": "x"}]),
]


@pytest.mark.parametrize(("scope", "bound", "free"), SCOPES, ids=[scope for scope, *_ in SCOPES])
def test_a_scope_binds_whom_it_names_and_nobody_else(
    dsn: str, scope: str, bound: list[dict[str, Any]], free: list[dict[str, Any]]
) -> None:
    async def work(books: Books) -> None:
        await apply_text(dsn, MANIFESTS.format(scope=scope, per=""))
        granted((await books.admit(**bound[0]))[1])
        for who in bound:
            assert refused((await books.admit(**who))[1]).budget == "demo/it", who
        for who in free:
            assert isinstance((await books.admit(**who))[1], Granted), who
        assert (await books.window("it")).held == 1

    keep_books(dsn, work)


@pytest.mark.parametrize("number", [1, 2, 7])
def test_a_subject_is_every_combination_of_what_per_names(dsn: str, number: int) -> None:
    names = ("namespace", "project", "user", "session", "model", "tier", "workload")
    told = {**WHO, "workload": "demo/web"}

    async def work(books: Books) -> None:
        for per in itertools.combinations(names, number):
            await apply_text(
                dsn, MANIFESTS.format(scope="{tenant: acme}", per=",".join(reversed(per))).replace("it,", "b,")
            )
            granted((await books.admit(**told))[1])
            refused((await books.admit(**told))[1])
            for name in names:
                # A session belongs to its user and project.
                splits = name in per or (name in ("project", "user") and "session" in per)
                answer = (await books.admit(**{**told, name: "another"}))[1]
                assert isinstance(answer, Granted if splits else Refused), (per, name)
            await books.connection.execute("UPDATE ledger.budget SET deleted_at = now()")
            await books.connection.execute("DELETE FROM ledger.budget_subject")
            await books.connection.execute("UPDATE ledger.budget_window SET budget_id = window_id::text")

    keep_books(dsn, work, clean=False)


class Other(NamedTuple):
    """One of several budgets for the same requests, as a model of it counts."""

    name: str
    unit: Unit
    kind: str
    limit: int
    soft: bool

    def held(self, input: int, output: int) -> int:  # noqa: A002 - it is one
        return in_unit(self.unit, self.kind, input=input, output=output)

    def affords(self, left: int, input: int, want: int) -> int:  # noqa: A002 - it is one
        """The output that it can pay; -1: not even the input."""
        left -= self.held(input, 0)
        each = self.held(0, 1) - self.held(0, 0)
        if self.soft or (left >= 0 and not each):
            return want
        return min(want, left // each) if left >= 0 else -1


@pytest.mark.parametrize("seed", range(4))
def test_of_overlapping_budgets_the_one_that_can_pay_least_decides(dsn: str, seed: int) -> None:
    chance = random.Random(seed)

    async def work(books: Books) -> None:
        for turn in range(25):
            user = f"u{turn}"
            others = [
                Other(f"b{turn}-{number}", *chance.choice([*UNITS, AT_ONCE]), 0, chance.random() < 0.2)
                for number in range(chance.randrange(1, 6))
            ]
            others = [
                other._replace(limit=chance.choice([2, 5]) if other.held(1, 1) == 1 == other.held(9, 9)
                               else chance.randrange(20, 1000))
                for other in others
            ]  # fmt: skip
            for other in others:
                await books.budget(
                    other.name, other.limit, unit=other.unit, kind=other.kind, scope={"user": user},
                    enforcement="soft" if other.soft else "hard",
                )  # fmt: skip
            left = {other: other.limit for other in others}
            for _ in range(8):
                tokens, need, want = chance.randrange(20), chance.randrange(1, 20), chance.randrange(1, 60)
                want = max(need, want)
                possible = min(other.affords(left[other], tokens, want) for other in others)
                one, answer = await books.admit(user=user, input=tokens, need=need, want=want)
                if possible < need:
                    assert isinstance(answer, Refused), (others, left, tokens, need, want)
                    refuser = next(other for other in others if f"demo/{other.name}" == answer.budget)
                    assert refuser.affords(left[refuser], tokens, want) < need
                    assert answer.remaining == left[refuser]
                    continue
                # Never less than 16 where that can be paid: the share of one live request is everything.
                live = (await books.windows(others[0].name))[0].live
                output = granted(answer).output_tokens
                assert need <= output <= possible, (others, left, tokens, need, want)
                assert output == possible or live > 1
                for other in others:
                    left[other] -= other.held(tokens, output)
                if chance.random() < 0.5:
                    await books.settle(settlement(one, input=tokens, output=output))
                    for other in others:
                        left[other] += other.unit == "concurrency"
            for other in others:
                (window,) = await books.windows(other.name)
                assert other.limit - window.spent - window.held == left[other]

    keep_books(dsn, work)


def test_a_strict_and_a_loose_budget_are_both_charged_and_only_the_strict_one_refuses(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("a-loose", 10**9)
        await books.budget("b-strict", 100, per=["user"])
        one, answer = await books.admit(need=5, want=10**6)
        assert granted(answer).output_tokens == 10
        bound_by = granted(answer).bound_by
        assert bound_by is not None
        assert bound_by.budget == "demo/b-strict"
        assert refused((await books.admit(need=1))[1]).budget == "demo/b-strict"
        granted((await books.admit(need=1, user="bob"))[1])
        await books.settle(settlement(one, output=10))
        windows = {(window.budget, *window.subject): window.spent for window in await books.windows()}
        assert windows == {("demo/a-loose",): 100, ("demo/b-strict", "ann"): 100, ("demo/b-strict", "bob"): 0}

    keep_books(dsn, work)
