"""The books against a model of them: plain numbers, one step after the other, in any order; with a lease or without."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar
from uuid import UUID

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from behest_ledger.holds import Answer, Gone, Granted, Refused
from behest_ledger.leases import Want
from behest_ledger.store import holders, leases
from behest_ledger.store.pool import connect
from ledger.books import HOLDER, INPUT_RATE, OUTPUT_RATE, TENANT, Books, new_id, settlement

T = TypeVar("T")
USERS = ("ann", "bob")
UNITS: dict[str, Any] = {"money": "usd", "tokens": "tokens", "input": "tokens", "calls": "requests"}
KINDS = {"input": "input"}
LIMITS = {"money": 2000, "tokens": 300, "input": 200, "calls": 12}
TOKENS = st.integers(0, 30)
LEASED = st.sampled_from([0, 3, 70, 250, 500])


class Balance:
    """A window as plain numbers, with the one lease on it."""

    def __init__(self, limit: int) -> None:
        self.limit = self.ceiling = limit
        self.spent = self.held = self.overrun = self.live = 0
        self.free = self.new_live = 0

    @property
    def left(self) -> int:
        return self.limit - self.spent - self.held - self.free

    @property
    def told_live(self) -> int:
        """What the window's row counts: its lease tells it later of whom it admitted."""
        return self.live - self.new_live

    def release(self) -> None:
        self.ceiling = max(self.limit, self.spent + self.held + self.free)

    def lease(self, slice: int) -> None:  # noqa: A002 - it is one
        self.free, self.new_live = slice, 0
        self.release()

    def pays(self, wish: int) -> bool:
        """Whether the lease pays it, so that the window is not asked."""
        return 0 < self.free >= wish

    def find(self, lacking: int) -> None:
        """Take the lease back where that helps."""
        if 0 < lacking <= self.free:
            self.lease(0)


def in_unit(budget: str, input_tokens: int, output_tokens: int, requests: int) -> int:
    return {
        "money": input_tokens * INPUT_RATE + output_tokens * OUTPUT_RATE,
        "tokens": input_tokens + output_tokens,
        "input": input_tokens,
        "calls": requests,
    }[budget]


class Bookkeeping(RuleBasedStateMachine):
    """Two users, with a budget of money each and three budgets in common."""

    dsn = ""
    books_of: type[Books] = Books
    holds: Bundle[UUID] = Bundle("holds")
    past: Bundle[UUID] = Bundle("past")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.connection: Any = self.run(self.opened())
        self.books = self.books_of(self.dsn, self.connection)
        self.limits = dict(LIMITS)
        self.ids: dict[tuple[str, str], int] = {}
        self.suspended = False
        self.windows: dict[tuple[str, str], Balance] = {}
        self.held: dict[UUID, dict[tuple[str, str], int]] = {}
        self.seq: dict[UUID, int] = {}
        self.last: dict[UUID, Answer] = {}
        for name in UNITS:
            self.put(name)

    def run(self, work: Awaitable[T]) -> T:
        async def main() -> T:
            return await work

        return self.runner.run(main())

    async def opened(self) -> Any:
        connection = await connect(self.dsn)
        await connection.execute(
            "SET synchronous_commit = off; SET session_replication_role = replica;"
            " TRUNCATE ledger.budget, ledger.budget_subject, ledger.budget_window, ledger.hold, ledger.hold_line,"
            " ledger.posting, ledger.request, ledger.usage_line, ledger.holder, ledger.lease;"
            " RESET session_replication_role"
        )
        await holders.register(connection, HOLDER, "pod-1", 3600.0)
        return connection

    def put(self, name: str) -> None:
        self.run(
            self.books.budget(
                name,
                self.limits[name],
                unit=UNITS[name],
                kind=KINDS.get(name, "both"),
                per=["user"] if name == "money" else [],
                suspended=self.suspended and name == "tokens",
            )
        )

    def of(self, user: str) -> dict[tuple[str, str], Balance]:
        keys = [(name, user if name == "money" else "") for name in UNITS]
        return {key: self.windows.setdefault(key, Balance(self.limits[key[0]])) for key in keys}

    def expected(self, windows: dict[tuple[str, str], Balance], fixed: dict[str, int], need: int, want: int,
                 *, extending: bool) -> int | None:  # fmt: skip
        """The output tokens that are granted, None: refused. Whoever is refused somewhere has asked everywhere."""
        most: int | None = max(need, want)
        for (name, _), window in windows.items():
            rate = in_unit(name, 0, 1, 0)
            if (rate == 0 and extending) or window.pays(fixed.get(name, 0) + max(need, want) * rate):
                continue
            window.find(fixed.get(name, 0) + need * rate - window.left)
            left = window.left - fixed.get(name, 0)
            if left < 0 or left < need * rate:
                most = None
            elif rate and most is not None:
                sharing = max(window.told_live, 1) if extending else max(window.told_live, 0) + 1
                most = min(most, left // rate, max(need, 16, left // (rate * 2 * sharing)))
        return most

    @rule(target=holds, user=st.sampled_from(USERS), input_tokens=TOKENS, need=TOKENS, want=TOKENS, leased=LEASED)
    def admit(self, user: str, input_tokens: int, need: int, want: int, leased: int) -> UUID:
        if leased:
            self.lease({**dict.fromkeys(LIMITS, leased), "bob": leased})
        one, answer = self.run(self.books.admit(user=user, input=input_tokens, need=need, want=want, shares=2))
        if self.suspended:
            assert isinstance(answer, Refused)
            assert answer.reason == "suspended"
            return one
        windows = self.of(user)
        fixed = {name: in_unit(name, input_tokens, 0, 1) for name in UNITS}
        paid = {
            key for key, window in windows.items()
            if window.pays(fixed[key[0]] + max(need, want) * in_unit(key[0], 0, 1, 0))
        }  # fmt: skip
        grant = self.expected(windows, fixed, need, want, extending=False)
        if grant is None:
            assert isinstance(answer, Refused), answer
            return one
        assert isinstance(answer, Granted), answer
        assert answer.output_tokens == grant
        self.seq[one] = 0
        self.held[one] = {}
        for key, window in windows.items():
            amount = in_unit(key[0], input_tokens, grant, 1)
            self.held[one][key] = amount
            window.held += amount
            window.live += 1
            if key in paid:
                window.free -= amount
                window.new_live += 1
        return one

    @rule(one=holds, need=TOKENS, want=TOKENS)
    def extend(self, one: UUID, need: int, want: int) -> None:
        seq = self.seq.get(one, 0) + 1
        answer = self.run(self.books.extend(one, seq, need=need, want=want, shares=2))
        if one not in self.held:
            assert answer == Gone()
            return
        self.seq[one] = seq
        self.last[one] = answer
        windows = {key: self.windows[key] for key in self.held[one]}
        paid = {
            key for key, window in windows.items()
            if window.pays(max(need, want) * in_unit(key[0], 0, 1, 0)) and in_unit(key[0], 0, 1, 0)
        }  # fmt: skip
        if self.suspended:
            # Those that are looked at before it is seen have asked already.
            asked = {key: windows[key] for key in windows if self.ids[key] < self.ids["tokens", ""]}
            self.expected(asked, {}, need, want, extending=True)
            grant = None
        else:
            grant = self.expected(windows, {}, need, want, extending=True)
        if grant is None:
            assert isinstance(answer, Refused), answer
            return
        assert isinstance(answer, Granted), answer
        assert answer.output_tokens == grant
        for key, window in windows.items():
            amount = in_unit(key[0], 0, grant, 0)
            self.held[one][key] += amount
            window.held += amount
            if key in paid:
                window.free -= amount

    @rule(one=holds)
    def extend_again(self, one: UUID) -> None:
        if one in self.held and self.seq[one]:
            again = self.run(self.books.extend(one, self.seq[one], need=30, want=30))
            assert again == self.last[one]

    @rule(target=past, one=consumes(holds), input_tokens=TOKENS, output_tokens=st.integers(0, 60), sent=st.booleans())
    def settle(self, one: UUID, input_tokens: int, output_tokens: int, sent: bool) -> UUID:
        item = settlement(one, input=input_tokens, output=output_tokens, sent=sent)
        (result,) = self.run(self.books.settle(item))
        if one not in self.held:
            assert result == "unknown"
            return one
        overrun = 0
        for key, held in self.held.pop(one).items():
            window = self.windows[key]
            due = in_unit(key[0], input_tokens, output_tokens, 1) if sent else 0
            window.held -= held
            window.live -= 1
            if max(due - held, 0) > max(window.left - min(due, held), 0) and window.free > 0:
                window.lease(0)
            from_room = min(max(due - held, 0), max(window.left - min(due, held), 0))
            window.spent += min(due, held) + from_room
            window.overrun += max(due - held, 0) - from_room
            overrun += max(due - held, 0) - from_room
            window.release()
        assert result == ("settled!" if overrun else "settled")
        return one

    @rule(one=past)
    def come_back_after_the_end(self, one: UUID) -> None:
        (result,) = self.run(self.books.settle(settlement(one, output=9)))
        assert result.rstrip("!") == "already"
        assert self.run(self.books.admit(id=one))[1] == Gone()
        assert self.run(self.books.extend(one, 99, need=1)) == Gone()

    @rule(target=past)
    def void_first(self) -> UUID:
        late = new_id()
        assert self.run(self.books.settle(settlement(late, sent=False))) == ["unknown"]
        return late

    @rule(name=st.sampled_from(sorted(UNITS)), percent=st.sampled_from([0, 30, 100, 300]))
    def set_limit(self, name: str, percent: int) -> None:
        self.limits[name] = LIMITS[name] * percent // 100
        self.put(name)
        for key, window in self.windows.items():
            if key[0] == name:
                window.limit = self.limits[name]
                window.release()
                if window.left < 0 < window.free:
                    window.lease(0)

    @rule(wants=st.dictionaries(st.sampled_from([*LIMITS, "bob"]), LEASED, max_size=5))
    def lease(self, wants: dict[str, int]) -> None:
        named = {("money", "bob") if name == "bob" else (name, "ann" if name == "money" else ""): want
                 for name, want in wants.items()}  # fmt: skip
        asked = [Want(TENANT, self.ids.get(key, 4711), want) for key, want in named.items()]
        if not asked:
            return
        answer = self.run(leases.lease(self.connection, HOLDER, asked))
        for key, window in self.windows.items():
            want = named.get(key, 0) if key in self.ids else 0
            fair = max(window.left + window.free, 0) // 4
            slice_ = min(want, fair) if min(want, fair) * 4 >= want else 0
            assert answer.get((TENANT, self.ids.get(key, 0)), 0) == slice_, (key, want)
            window.lease(slice_)

    @rule(suspended=st.booleans())
    def suspend(self, suspended: bool) -> None:
        self.suspended = suspended
        self.put("tokens")

    @invariant()
    def the_balances_are_those_of_the_model(self) -> None:
        found = {
            (window.budget.removeprefix("demo/"), "".join(window.subject)): window
            for window in self.run(self.books.windows())
        }
        self.ids = {key: window.window_id for key, window in found.items()}
        assert found.keys() >= {key for key, window in self.windows.items() if window.live}
        for key, window in found.items():
            model = self.windows.get(key) or Balance(self.limits[key[0]])
            assert (window.limit, window.ceiling, window.spent, window.held, window.overrun, window.live) == (
                model.limit, model.ceiling, model.spent, model.held + model.free, model.overrun, model.told_live,
            ), key  # fmt: skip
            assert window.spent + window.held <= (window.ceiling or 0)

    def teardown(self) -> None:
        assert self.run(self.books.findings()) == []
        self.run(self.connection.close())
        self.runner.close()


def test_the_books_agree_with_a_model_whatever_is_done_in_whatever_order(dsn: str) -> None:
    here = type("Here", (Bookkeeping,), {"dsn": dsn})
    run_state_machine_as_test(
        here,
        settings=settings(
            max_examples=10,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            database=None,
        ),
    )
