import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_ledger.holds import Answer, Extension, Gone, Granted, Refused
from behest_ledger.store.credit import BATCH_ITEMS_MAX, LINE_WAIT_S, PATIENCE_S, Account, CreditDesk
from behest_ledger.store.errors import LedgerConflictError, LedgerError, LedgerUnavailableError
from ledger.books import TENANT, new_id
from ledger.clockwork import run


class Ledger:
    """Windows of tokens, and holds in them."""

    def __init__(self, limits: dict[int, int], delay_s: Callable[[], float] = lambda: 0.01) -> None:
        self.left = dict(limits)
        self.delay_s = delay_s
        self.held: dict[UUID, int] = {}
        self.windows: dict[UUID, tuple[int, ...]] = {}
        self.batches: list[list[Extension]] = []
        self.failures: list[Exception | None] = []
        self.in_flight = 0
        self.desk = CreditDesk(self.extend)

    def open(self, *windows: int, held: int = 0) -> Account:
        one = new_id()
        self.held[one] = held
        self.windows[one] = windows
        for window in windows:
            self.left[window] -= held
        return self.desk.open(TENANT, one, windows)

    async def extend(self, extensions: Sequence[Extension]) -> dict[UUID, Answer]:
        assert self.in_flight == 0
        self.in_flight += 1
        self.batches.append(list(extensions))
        ids = [extension.request_id for extension in extensions]
        assert len(ids) == len(set(ids)) <= BATCH_ITEMS_MAX
        await asyncio.sleep(self.delay_s())
        self.in_flight -= 1
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        return {extension.request_id: self._one(extension) for extension in extensions}

    def _one(self, extension: Extension) -> Answer:
        one = extension.request_id
        if one not in self.held:
            return Gone()
        for window in self.windows[one]:
            if self.left[window] < extension.need_tokens:
                return Refused(reason="quota", window_id=window, remaining=self.left[window])
        grant = min(extension.want_tokens, *(self.left[window] for window in self.windows[one]))
        for window in self.windows[one]:
            self.left[window] -= grant
        self.held[one] += grant
        return Granted(output_tokens=grant)

    def settle(self, account: Account, *, used: int = 0) -> None:
        """The database settles, and the desk hears of it."""
        for window in account.windows:
            self.left[window] += self.held[account.request_id] - used
        del self.held[account.request_id]
        self.desk.settled(account.request_id)


class Answers:
    """Whose answers came, in order."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.came: list[tuple[Account, Answer | LedgerError]] = []

    def ask(self, account: Account, need: int = 1, want: int = 1, *, may_wait: bool = True, ends: bool = False) -> None:
        def on_answer(answer: Answer | LedgerError) -> None:
            self.came.append((account, answer))
            if ends and not isinstance(answer, Granted):
                self.ledger.desk.ended(account)

        self.ledger.desk.ask(account, need_tokens=need, want_tokens=want, may_wait=may_wait, answer=on_answer)

    def ask_again(self, account: Account, on_answer: Callable[[Account, Answer | LedgerError], None]) -> None:
        self.ledger.desk.ask(
            account, need_tokens=1, want_tokens=1, may_wait=True, answer=lambda answer: on_answer(account, answer)
        )

    def of(self, account: Account) -> Answer | LedgerError:
        (answer,) = [answer for who, answer in self.came if who is account]
        return answer

    @property
    def verdicts(self) -> list[str]:
        return [type(answer).__name__ for _, answer in self.came]


def play(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    run(scenario())


def test_those_who_ask_together_are_one_batch_and_who_comes_later_is_the_next() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10**6})
        answers = Answers(ledger)
        accounts = [ledger.open(1) for _ in range(BATCH_ITEMS_MAX + 20)]
        for account in accounts[:-5]:
            answers.ask(account)
        await asyncio.sleep(0.005)
        for account in accounts[-5:]:
            answers.ask(account)
        await asyncio.sleep(0.1)
        assert [len(batch) for batch in ledger.batches] == [BATCH_ITEMS_MAX, 20]
        assert [account for account, _ in answers.came] == accounts

    play(scenario)


def test_a_second_ask_of_an_account_goes_into_the_next_batch_with_the_next_number() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 100})
        answers = Answers(ledger)
        one, other = ledger.open(1), ledger.open(1)
        for account, want in ((one, 1), (one, 2), (other, 3), (one, 4)):
            answers.ask(account, want=want)
        await asyncio.sleep(0.1)
        told = [[(item.request_id, item.seq, item.want_tokens) for item in batch] for batch in ledger.batches]
        assert told == [
            [(one.request_id, 1, 1), (other.request_id, 1, 3)],
            [(one.request_id, 2, 2)],
            [(one.request_id, 3, 4)],
        ]
        assert [answer for account, answer in answers.came if account is one] == [
            Granted(output_tokens=n) for n in (1, 2, 4)
        ]

    play(scenario)


def test_a_refusal_is_told_at_once_where_nobody_is_about_to_give_back() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 0, 2: 9})
        answers = Answers(ledger)
        elsewhere = ledger.open(2, held=9)
        ledger.desk.ended(elsewhere)
        answers.ask(ledger.open(1))
        await asyncio.sleep(0.1)
        assert answers.verdicts == ["Refused"]

    play(scenario)


def test_who_is_refused_may_wait_for_what_has_ended_and_is_not_settled_yet() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 0, 2: 0})
        desk = ledger.desk
        ended, aside, running = (ledger.open(1, held=1), ledger.open(2, held=1), ledger.open(1, held=1))
        assert not await desk.released(1, 60), "nothing has ended"
        desk.ended(ended)
        desk.ended(aside)
        assert not await desk.released(1, 0.01), "it is not settled in time"
        since = desk.releasing
        assert since == {1, 2}
        waiting = [asyncio.create_task(desk.released(window, 60)) for window in (1, 1, 2)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        ledger.settle(ended)
        desk.never_settled(aside.request_id)
        assert await asyncio.gather(*waiting) == [True, True, True]
        assert not await desk.released(1, 60), "the other one runs on"
        assert not await desk.released(1, 60, since=frozenset({2}))
        assert await desk.released(1, 60, since=since), "it was settled while the books were asked"
        ledger.settle(running)

    play(scenario)


def test_the_first_is_told_no_and_the_others_get_what_it_gives_back_one_after_the_other() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 40})
        answers = Answers(ledger)
        accounts = [ledger.open(1, held=10) for _ in range(4)]
        for account in accounts:
            answers.ask(account, need=4, want=4, ends=True)
        await asyncio.sleep(0.1)
        assert [account for account, _ in answers.came] == accounts[:1]
        ledger.settle(accounts[0], used=1)
        await asyncio.sleep(0.1)
        # Nine were free: enough for two, and one left for a third that needs four and ends as well.
        assert [account for account, _ in answers.came[1:]] == accounts[1:]
        assert answers.verdicts == ["Refused", "Granted", "Granted", "Refused"]

    play(scenario)


def test_who_may_not_wait_is_told_at_once() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10})
        answers = Answers(ledger)
        ledger.desk.ended(ledger.open(1, held=10))
        answers.ask(ledger.open(1), may_wait=False)
        await asyncio.sleep(0.02)
        assert answers.verdicts == ["Refused"]

    play(scenario)


def test_who_has_stood_in_line_long_enough_is_refused() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10})
        answers = Answers(ledger)
        ended, waiting = ledger.open(1, held=10), ledger.open(1)
        ledger.desk.ended(ended)
        answers.ask(waiting)
        await asyncio.sleep(LINE_WAIT_S - 0.1)
        assert answers.came == []
        await asyncio.sleep(0.2)
        assert answers.verdicts == ["Refused"]
        ledger.settle(ended)
        await asyncio.sleep(1)
        assert len(answers.came) == 1

    play(scenario)


def test_a_thousand_in_a_line_that_moves_are_all_served_however_long_it_takes() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 0})
        answers = Answers(ledger)
        loop = asyncio.get_running_loop()
        streams = [ledger.open(1) for _ in range(1000)]
        ledger.left[1] = 0
        for account in streams:
            ledger.held[account.request_id] = 8  # what each has left in reserve

        def on_answer(account: Account, answer: Answer | LedgerError) -> None:
            answers.came.append((account, answer))
            if isinstance(answer, Granted):
                answers.ask_again(account, on_answer)
            else:
                ledger.desk.ended(account)
                loop.call_later(0.02, ledger.settle, account)

        for account in streams:
            answers.ask_again(account, on_answer)
        async with asyncio.timeout(600):
            while len(ledger.held):
                await asyncio.sleep(1)
        assert loop.time() > 4 * LINE_WAIT_S, "too fast to prove anything"
        # Each was told no once, and all but the first got what others gave back before.
        refused = [account for account, answer in answers.came if isinstance(answer, Refused)]
        assert len(refused) == len(streams)
        granted = {account.request_id for account, answer in answers.came if isinstance(answer, Granted)}
        assert len(granted) >= len(streams) - BATCH_ITEMS_MAX
        assert not ledger.desk._moved_s  # pyright: ignore[reportPrivateUsage]

    play(scenario)


def test_a_line_whose_money_does_not_come_back_is_told_no() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10})
        answers = Answers(ledger)
        ended, *waiting = ledger.open(1, held=10), ledger.open(1), ledger.open(1)
        ledger.desk.ended(ended)
        for account in waiting:
            answers.ask(account)
        await asyncio.sleep(0.1)
        ledger.desk.never_settled(ended.request_id)
        await asyncio.sleep(0.1)
        # The first learns it at once; the next one as soon as the first has ended.
        assert answers.verdicts == ["Refused"]
        ledger.desk.ended(waiting[0])
        ledger.settle(waiting[0])
        await asyncio.sleep(0.1)
        assert answers.verdicts == ["Refused"] * 2

    play(scenario)


def test_a_limit_that_is_raised_reaches_everybody_in_line_in_their_order() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10, 2: 0})
        answers = Answers(ledger)
        ended = ledger.open(1, 2, held=0)
        ledger.desk.ended(ended)
        waiting = [ledger.open(1, 2) for _ in range(5)]
        for account in waiting:
            answers.ask(account, need=3, want=3)
        await asyncio.sleep(0.1)
        ledger.desk.limits_changed()
        await asyncio.sleep(0.1)
        assert answers.came == []
        ledger.left[2] = 7
        ledger.desk.limits_changed()
        await asyncio.sleep(0.1)
        assert [account for account, _ in answers.came] == waiting[:2]
        ledger.left = {1: 6, 2: 6}
        ledger.settle(ended)
        await asyncio.sleep(0.1)
        assert [account for account, _ in answers.came] == waiting
        assert answers.verdicts == ["Granted"] * 4 + ["Refused"]

    play(scenario)


def test_a_deadline_that_passes_while_the_ask_is_under_way_waits_for_its_answer() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10})
        answers = Answers(ledger)
        ended, waiting = ledger.open(1, held=10), ledger.open(1)
        ledger.desk.ended(ended)
        answers.ask(waiting)
        await asyncio.sleep(LINE_WAIT_S - 0.1)
        ledger.delay_s = lambda: 0.5
        ledger.settle(ended)
        await asyncio.sleep(2)
        assert answers.verdicts == ["Granted"]

    play(scenario)


def test_money_that_the_head_of_a_line_cannot_use_goes_to_the_next() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10, 2: 1})
        answers = Answers(ledger)
        ended = ledger.open(1, held=10)
        also_ended = ledger.open(2, held=1)
        ledger.desk.ended(ended)
        ledger.desk.ended(also_ended)
        both, only = ledger.open(1, 2), ledger.open(1)
        answers.ask(both)
        answers.ask(only)
        await asyncio.sleep(0.1)
        assert answers.came == []
        ledger.settle(ended)
        await asyncio.sleep(0.1)
        # `both` now stands in the line of window 2, and must not keep window 1 for itself.
        assert answers.came == [(only, Granted(output_tokens=1))]
        ledger.settle(also_ended)
        await asyncio.sleep(0.1)
        assert answers.of(both) == Granted(output_tokens=1)

    play(scenario)


def test_an_ended_account_is_neither_asked_for_nor_answered() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 30})
        answers = Answers(ledger)
        early, late, queued, other = (ledger.open(1) for _ in range(4))
        full = ledger.open(1, held=30)
        answers.ask(early)
        ledger.desk.ended(early)
        answers.ask(late)
        await asyncio.sleep(0.005)
        ledger.desk.ended(late)
        answers.ask(queued)
        answers.ask(other)
        await asyncio.sleep(0.1)
        assert [[item.request_id for item in batch] for batch in ledger.batches] == [
            [late.request_id], [queued.request_id, other.request_id],
        ]  # fmt: skip
        # Both stand in line; the first ends there, and the next takes its place.
        ledger.desk.ended(queued)
        ledger.desk.ended(full)
        ledger.settle(full)
        await asyncio.sleep(0.1)
        assert [account for account, _ in answers.came] == [other]

    play(scenario)


@pytest.mark.parametrize("failure", [LedgerUnavailableError("down"), RuntimeError("what?")])
def test_a_failure_is_told_to_all_of_its_batch_and_to_nobody_else(failure: Exception) -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10})
        answers = Answers(ledger)
        accounts = [ledger.open(1) for _ in range(3)]
        ledger.failures = [failure]
        answers.ask(accounts[0], may_wait=False)
        answers.ask(accounts[1], may_wait=False)
        await asyncio.sleep(0.005)
        answers.ask(accounts[2])
        await asyncio.sleep(0.1)
        assert answers.verdicts == ["LedgerUnavailableError", "LedgerUnavailableError", "Granted"]

    play(scenario)


def test_a_conflict_is_asked_again_with_the_same_number() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10})
        answers = Answers(ledger)
        ledger.failures = [LedgerConflictError("deadlock")] * 2
        answers.ask(ledger.open(1))
        await asyncio.sleep(1)
        assert answers.verdicts == ["Granted"]
        assert [batch[0].seq for batch in ledger.batches] == [1, 1, 1]
        ledger.failures = [LedgerConflictError("deadlock")] * 5
        answers.ask(ledger.open(1), may_wait=False)
        await asyncio.sleep(5)
        assert answers.verdicts == ["Granted", "LedgerConflictError"]

    play(scenario)


@pytest.mark.parametrize("failure", [LedgerUnavailableError("down"), LedgerConflictError("deadlock")])
def test_who_stands_still_is_asked_for_again_with_the_same_number_until_the_ledger_is_back(
    failure: LedgerError,
) -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10})
        answers = Answers(ledger)
        ledger.failures = [failure] * 20
        waiting, early = ledger.open(1), ledger.open(1)
        answers.ask(waiting)
        answers.ask(early, may_wait=False)
        await asyncio.sleep(1)
        assert [account for account, _ in answers.came] == [early]
        await asyncio.sleep(PATIENCE_S - 1)
        assert isinstance(answers.of(waiting), Granted)
        assert {batch[0].seq for batch in ledger.batches} == {1}

    play(scenario)


def test_a_ledger_that_never_answers_is_waited_for_no_longer_than_its_patience() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10}, lambda: PATIENCE_S * 0.9)
        answers = Answers(ledger)
        ledger.failures = [LedgerUnavailableError("down")] * 2
        one = ledger.open(1)
        answers.ask(one)
        await asyncio.sleep(PATIENCE_S + 0.1)
        assert isinstance(answers.of(one), LedgerUnavailableError)
        await asyncio.sleep(PATIENCE_S * 3)
        assert len(answers.came) == 1

    play(scenario)


def test_who_was_refused_and_asks_again_from_its_line_asks_another_question() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10})
        answers = Answers(ledger)
        full = ledger.open(1, held=10)
        ledger.desk.ended(full)
        one = ledger.open(1)
        answers.ask(one)
        await asyncio.sleep(0.1)
        assert answers.came == []
        ledger.settle(full)
        await asyncio.sleep(0.1)
        assert isinstance(answers.of(one), Granted)
        assert [batch[0].seq for batch in ledger.batches] == [1, 2]

    play(scenario)


def test_a_stream_that_fails_on_its_answer_takes_no_other_with_it() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10})
        answers = Answers(ledger)

        def fail(_: Answer | LedgerError) -> None:
            raise RuntimeError("broken stream")

        ledger.desk.ask(ledger.open(1), need_tokens=1, want_tokens=1, may_wait=True, answer=fail)
        answers.ask(ledger.open(1))
        await asyncio.sleep(0.1)
        assert answers.verdicts == ["Granted"]

    play(scenario)


def test_after_closing_nobody_is_answered() -> None:
    async def scenario() -> None:
        ledger = Ledger({1: 10})
        answers = Answers(ledger)
        ledger.desk.ended(ledger.open(1, held=10))
        answers.ask(ledger.open(1))
        await asyncio.sleep(0.1)
        answers.ask(ledger.open(1))
        await asyncio.sleep(0.001)
        await ledger.desk.aclose()
        await asyncio.sleep(LINE_WAIT_S * 2)
        assert answers.came == []

    play(scenario)


class Stream:
    """One stream that needs a token at a time, keeps a reserve, and ends when it is refused or has enough."""

    def __init__(self, ledger: Ledger, chance: random.Random, windows: tuple[int, ...]) -> None:
        self.ledger = ledger
        self.chance = chance
        self.account = ledger.open(*windows, held=3)
        self.credit, self.used = 3, 0
        self.asked = self.answered = 0
        self.wish = chance.randrange(1, 60)
        self.end_s = 0.0
        self.asked_s = 0.0

    def go_on(self) -> None:
        loop = asyncio.get_running_loop()
        while self.used < self.wish and self.used + 2 < self.credit:
            self.used += 1
        if self.used >= self.wish or self.chance.random() < 0.03:
            self.end()
            return
        self.asked += 1
        self.asked_s = loop.time()
        self.ledger.desk.ask(
            self.account, need_tokens=1, want_tokens=self.chance.randrange(1, 8), may_wait=True, answer=self.on_answer
        )
        if self.chance.random() < 0.05:
            loop.call_later(self.chance.random() * 0.05, self.end)

    def on_answer(self, answer: Answer | LedgerError) -> None:
        self.answered += 1
        assert self.answered == self.asked
        assert not self.account.ended
        assert asyncio.get_running_loop().time() - self.asked_s < LINE_WAIT_S + 3
        if isinstance(answer, Granted):
            self.credit += answer.output_tokens
            self.go_on()
        else:
            self.end()

    def end(self) -> None:
        if not self.account.ended:
            loop = asyncio.get_running_loop()
            self.ledger.desk.ended(self.account)
            self.end_s = loop.time()
            loop.call_later(self.chance.random() * 0.1, lambda: self.ledger.settle(self.account, used=self.used))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 40), st.integers(0, 600), st.floats(0, 0.2))
def test_every_ask_is_answered_exactly_once_and_all_streams_end(
    seed: int, streams: int, limit: int, failing: float
) -> None:
    async def scenario() -> None:
        chance = random.Random(seed)
        ledger = Ledger({1: streams * 3 + limit, 2: streams * 3 + limit // 2}, lambda: chance.random() * 0.1)
        errors = [LedgerUnavailableError("down"), LedgerConflictError("deadlock"), None]
        ledger.failures = [chance.choice(errors) if chance.random() < failing else None for _ in range(50)]
        running = [Stream(ledger, chance, chance.choice([(1,), (2,), (1, 2)])) for _ in range(streams)]
        for stream in running:
            stream.go_on()
        await asyncio.sleep(600)
        for stream in running:
            assert stream.account.ended
            assert stream.answered == stream.asked or stream.end_s > stream.asked_s
            assert stream.used <= stream.credit
        assert ledger.held == {}
        assert min(ledger.left.values()) >= 0

    play(scenario)
