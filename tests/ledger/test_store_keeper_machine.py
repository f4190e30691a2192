"""Holders, suspense, policies and corrections against a model of plain numbers, in any order."""

import asyncio
from collections.abc import Awaitable
from typing import Any, Literal, TypeVar
from uuid import UUID

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from behest_ledger.holds import Gone, Granted, Refused
from behest_ledger.store.pool import connect
from ledger.books import INPUT_RATE, OUTPUT_RATE, Books, new_id, settlement
from ledger.sidecars import Sidecar, charge, reap, state

T = TypeVar("T")
LIMITS = {"money": 1800, "tokens": 240, "calls": 12}
UNITS: dict[str, Any] = {"money": "usd", "tokens": "tokens", "calls": "requests"}
TOKENS = st.integers(0, 20)
PICK = st.integers(0, 10**6)


def in_unit(budget: str, input_tokens: int, output_tokens: int, requests: int) -> int:
    money = input_tokens * INPUT_RATE + output_tokens * OUTPUT_RATE
    return {"money": money, "tokens": input_tokens + output_tokens, "calls": requests}[budget]


class Balance:
    """A window as plain numbers, with its leases by holder."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.spent = self.held = self.suspense = self.overrun = self.live = 0
        self.free: dict[int, int] = {}
        self.new_live: dict[int, int] = {}

    @property
    def leased(self) -> int:
        return sum(self.free.values())

    @property
    def left(self) -> int:
        return self.limit - self.spent - self.held - self.suspense - self.leased

    def lease(self, holder: int, slice: int) -> None:  # noqa: A002 - it is one
        self.free[holder], self.new_live[holder] = slice, 0

    def pays(self, holder: int, wish: int) -> bool:
        """Whether the holder's lease pays it, so that the window is not asked."""
        return 0 < self.free.get(holder, 0) >= wish

    def has(self, need: int) -> bool:
        """Whether the window has it, with what its leases give back where that helps."""
        if 0 < need - self.left <= self.leased:
            for holder, free in self.free.items():
                if free:
                    self.lease(holder, 0)
        return need <= self.left

    def charge(self, more: int) -> None:
        """Spend as far as there is room; less comes out of the overrun first."""
        spend = min(more, self.left) if more >= 0 else more + min(self.overrun, -more)
        self.spent += spend
        self.overrun += more - spend


class Held:
    """A hold as the model sees it."""

    def __init__(self, holder: int, input_tokens: int, output_tokens: int) -> None:
        self.holder = holder
        self.state = "open"
        self.input, self.output = input_tokens, output_tokens
        self.checkpoint: tuple[int, int] = (0, 0)
        self.seq = 0
        self.charged: tuple[int, int, int] = (0, 0, 0)


class Keeping(RuleBasedStateMachine):
    """Two sidecars, replaced when they die; three budgets in common."""

    dsn = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.connection: Any = self.run(self.opened())
        self.books = Books(self.dsn, self.connection)
        self.windows = {name: Balance(limit) for name, limit in LIMITS.items()}
        for name, limit in LIMITS.items():
            self.run(self.books.budget(name, limit, unit=UNITS[name]))
        self.sidecars = [self.run(Sidecar.start(self.books)) for _ in range(2)]
        self.dead: set[int] = set()
        self.fenced: set[int] = set()
        self.holds: dict[UUID, Held] = {}

    def run(self, work: Awaitable[T]) -> T:
        async def main() -> T:
            return await work

        return self.runner.run(main())

    async def opened(self) -> Any:
        connection = await connect(self.dsn)
        await connection.execute(
            "SET synchronous_commit = off; SET session_replication_role = replica;"
            " TRUNCATE ledger.budget, ledger.budget_subject, ledger.budget_window, ledger.hold, ledger.hold_line,"
            " ledger.posting, ledger.request, ledger.usage_line, ledger.correction, ledger.holder, ledger.lease;"
            " RESET session_replication_role"
        )
        return connection

    def pick(self, number: int) -> tuple[UUID, Held]:
        return list(self.holds.items())[number % len(self.holds)]

    @rule(who=PICK, input_tokens=TOKENS, need=TOKENS, leased=st.sampled_from([0, 2, 20, 200]))
    def admit(self, who: int, input_tokens: int, need: int, leased: int) -> None:
        holder = who % len(self.sidecars)
        if leased:
            self.lease(who, dict.fromkeys(LIMITS, leased))
        one, answer = self.run(self.sidecars[holder].admit(input=input_tokens, need=need))
        if holder in self.dead:
            assert answer == Gone()
            return
        amounts = {name: in_unit(name, input_tokens, need, 1) for name in self.windows}
        paid = {name for name, window in self.windows.items() if window.pays(holder, amounts[name])}
        room = [window.has(amounts[name]) for name, window in self.windows.items() if name not in paid]
        assert isinstance(answer, Granted if all(room) else Refused)
        if all(room):
            self.holds[one] = Held(holder, input_tokens, need)
            for name, window in self.windows.items():
                window.held += amounts[name]
                window.live += 1
                if name in paid:
                    window.free[holder] -= amounts[name]
                    window.new_live[holder] += 1

    @precondition(lambda self: self.holds)
    @rule(number=PICK, need=TOKENS)
    def extend(self, number: int, need: int) -> None:
        one, hold = self.pick(number)
        hold.seq += 1
        answer = self.run(self.books.extend(one, hold.seq, need=need))
        if hold.state != "open" or hold.holder in self.fenced:
            assert answer == Gone()
            return
        amounts = {name: in_unit(name, 0, need, 0) for name in ("money", "tokens")}
        paid = {name for name, amount in amounts.items() if self.windows[name].pays(hold.holder, amount)}
        room = [self.windows[name].has(amount) for name, amount in amounts.items() if name not in paid]
        assert isinstance(answer, Granted if all(room) else Refused)
        if all(room):
            hold.output += need
            for name, amount in amounts.items():
                self.windows[name].held += amount
                if name in paid:
                    self.windows[name].free[hold.holder] -= amount

    @rule(who=PICK, wants=st.fixed_dictionaries({name: st.integers(0, limit // 2) for name, limit in LIMITS.items()}))
    def lease(self, who: int, wants: dict[str, int]) -> None:
        holder = who % len(self.sidecars)
        ids = {window.budget.removeprefix("demo/"): window.window_id for window in self.run(self.books.windows())}
        answer = self.run(self.sidecars[holder].lease({ids[name]: want for name, want in wants.items() if name in ids}))
        if holder in self.dead:
            assert answer == {}
            return
        for name, window_id in ids.items():
            window = self.windows[name]
            mine = window.free.get(holder, 0)
            others = sum(1 for other, free in window.free.items() if free and other != holder)
            fair = (window.left + mine) // (4 * (others + 1))
            slice_ = min(wants[name], fair) if min(wants[name], fair) * 4 >= wants[name] else 0
            assert answer.get(window_id, 0) == slice_
            window.lease(holder, slice_)

    @precondition(lambda self: self.holds)
    @rule(number=PICK, part=st.integers(0, 3))
    def checkpoint(self, number: int, part: int) -> None:
        one, hold = self.pick(number)
        seen = (hold.input, hold.output * part // 3)
        self.run(self.sidecars[hold.holder].checkpoint(one, input=seen[0], output=seen[1]))
        if hold.state == "open" and seen >= hold.checkpoint:
            hold.checkpoint = seen

    @rule(who=PICK)
    def die(self, who: int) -> None:
        alive = sorted(set(range(len(self.sidecars))) - self.dead)
        holder = alive[who % len(alive)]
        self.run(self.sidecars[holder].die())
        self.dead.add(holder)
        self.sidecars.append(self.run(Sidecar.start(self.books)))

    @rule(limit=st.sampled_from([1, 100]))
    def reap(self, limit: int) -> None:
        self.fenced |= self.dead
        for window in self.windows.values():
            for holder in self.dead:
                window.free.pop(holder, None)
                window.new_live.pop(holder, None)
        lost = sorted(one for one, hold in self.holds.items() if hold.state == "open" and hold.holder in self.fenced)
        assert self.run(reap(self.books, limit)) == min(limit, len(lost))
        for one in lost:
            if self.run(state(self.books, one)) == "suspense":
                hold = self.holds[one]
                hold.state = "suspense"
                for name, window in self.windows.items():
                    amount = in_unit(name, hold.input, hold.output, 1)
                    window.held -= amount
                    window.suspense += amount

    @rule(policy=st.sampled_from(["checkpoint", "hold"]))
    def charge_by_policy(self, policy: Literal["checkpoint", "hold"]) -> None:
        waiting = {one: hold for one, hold in self.holds.items() if hold.state == "suspense"}
        due = {one: (hold.input, hold.output) if policy == "hold" else hold.checkpoint for one, hold in waiting.items()}
        charged = self.run(charge(self.books, policy))
        assert charged == {one: in_unit("money", *tokens, 1) for one, tokens in due.items()}
        for one, (input_tokens, output_tokens) in due.items():
            self.end(waiting[one], "charged_by_policy", (input_tokens, output_tokens, 1))

    @precondition(lambda self: self.holds)
    @rule(number=PICK, input_tokens=TOKENS, output_tokens=st.integers(0, 40), sent=st.booleans())
    def settle(self, number: int, input_tokens: int, output_tokens: int, sent: bool) -> None:
        one, hold = self.pick(number)
        (result,) = self.run(self.books.settle(settlement(one, input=input_tokens, output=output_tokens, sent=sent)))
        used = (input_tokens, output_tokens, 1) if sent else (0, 0, 0)
        if hold.state in ("open", "suspense"):
            assert result.rstrip("!") == "settled"
            self.end(hold, "settled", used)
        elif hold.state == "charged_by_policy":
            assert result.rstrip("!") == "corrected"
            hold.state = "corrected"
            for name, window in self.windows.items():
                window.charge(in_unit(name, *used) - in_unit(name, *hold.charged))
        else:
            assert result.rstrip("!") == "already"

    def end(self, hold: Held, ended: str, used: tuple[int, int, int]) -> None:
        for name, window in self.windows.items():
            amount = in_unit(name, hold.input, hold.output, 1)
            if hold.state == "open":
                window.held -= amount
            else:
                window.suspense -= amount
            window.live -= 1
            if in_unit(name, *used) > max(window.left, 0):
                # Nothing is an overrun that money in leases could pay.
                for holder, free in window.free.items():
                    if free:
                        window.lease(holder, 0)
            window.charge(in_unit(name, *used))
        hold.state, hold.charged = ended, used

    @rule()
    def settle_what_nobody_knows(self) -> None:
        assert self.run(self.books.settle(settlement(new_id(), sent=False))) == ["unknown"]

    @invariant()
    def the_balances_are_those_of_the_model(self) -> None:
        for found in self.run(self.books.windows()):
            model = self.windows[found.budget.removeprefix("demo/")]
            assert (found.spent, found.held, found.suspense, found.overrun, found.live) == (
                model.spent, model.held + model.leased, model.suspense, model.overrun,
                model.live - sum(model.new_live.values()),
            ), found.budget  # fmt: skip
            assert found.spent + found.held + found.suspense <= found.limit

    def teardown(self) -> None:
        assert self.run(self.books.findings()) == []
        self.run(self.connection.close())
        self.runner.close()


def test_the_books_agree_with_a_model_whoever_dies_and_whoever_comes_back(dsn: str) -> None:
    run_state_machine_as_test(
        type("Here", (Keeping,), {"dsn": dsn}),
        settings=settings(
            max_examples=10,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            database=None,
        ),
    )
