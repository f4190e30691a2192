"""The admission desk: one batch in flight, and nobody is left without an answer."""

import asyncio
from collections.abc import Callable, Sequence
from uuid import UUID

import msgspec
import pytest

from behest_ledger.holds import Admission, Answer, Granted, Refused
from behest_ledger.store.admissions import BATCH_ITEMS_MAX, AdmissionDesk
from behest_ledger.store.errors import (
    LedgerConflictError,
    LedgerError,
    LedgerRefusedError,
    LedgerUnavailableError,
)
from ledger.books import admission

POISON = 666


class _Ledger:
    """Answers with the wish, when it is told to go on."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.failure: Callable[[Sequence[Admission]], Exception | None] = lambda batch: None
        self.forgets: set[int] = set()

    async def admit(self, batch: Sequence[Admission]) -> dict[UUID, Answer]:
        self.batches.append([one.want_tokens for one in batch])
        assert len({one.holder_id for one in batch}) == 1
        await self.may_go_on.wait()
        if failure := self.failure(batch):
            raise failure
        return {
            one.request_id: Granted(output_tokens=one.want_tokens)
            for one in batch
            if one.want_tokens not in self.forgets
        }


def _poisoned(batch: Sequence[Admission]) -> Exception | None:
    return LedgerRefusedError("22P02") if any(one.want_tokens == POISON for one in batch) else None


async def _ask(desk: AdmissionDesk, want: int, holder: int = 1) -> int | LedgerError:
    try:
        answer = await desk.admit(msgspec.structs.replace(admission(want=want), holder_id=UUID(int=holder)))
    except LedgerError as error:
        return error
    assert isinstance(answer, Granted)
    return answer.output_tokens


def test_a_lone_request_goes_at_once_and_what_comes_meanwhile_is_the_next_batch() -> None:
    async def main() -> None:
        ledger = _Ledger()
        desk = AdmissionDesk(ledger.admit)
        ledger.may_go_on.clear()
        asks = [asyncio.create_task(_ask(desk, 1))]
        await asyncio.sleep(0.01)
        asks += [asyncio.create_task(_ask(desk, want)) for want in range(2, BATCH_ITEMS_MAX + 5)]
        await asyncio.sleep(0.01)
        assert ledger.batches == [[1]]
        ledger.may_go_on.set()
        assert await asyncio.gather(*asks) == list(range(1, BATCH_ITEMS_MAX + 5))
        assert [len(batch) for batch in ledger.batches] == [1, BATCH_ITEMS_MAX, 3]
        assert await _ask(desk, 7) == 7

    asyncio.run(main())


def test_one_that_cannot_be_taken_fails_alone() -> None:
    async def main() -> None:
        ledger = _Ledger()
        ledger.failure = _poisoned
        desk = AdmissionDesk(ledger.admit)
        first, poison, last = await asyncio.gather(*(_ask(desk, want) for want in (1, POISON, 2)))
        assert (first, last) == (1, 2)
        assert isinstance(poison, LedgerRefusedError)
        assert ledger.batches == [[1, POISON, 2], [1], [POISON], [2]]

    asyncio.run(main())


@pytest.mark.parametrize(
    "failure", [LedgerUnavailableError("away"), LedgerConflictError("deadlock"), ValueError("a bug")]
)
def test_an_error_about_the_batch_is_everybodys(failure: Exception) -> None:
    async def main() -> None:
        ledger = _Ledger()
        ledger.failure = lambda batch: failure
        desk = AdmissionDesk(ledger.admit)
        answers = await asyncio.gather(*(_ask(desk, want) for want in (1, 2, 3)))
        expected = type(failure) if isinstance(failure, LedgerError) else LedgerUnavailableError
        assert [type(answer) for answer in answers] == [expected] * 3
        assert len({id(answer) for answer in answers}) == 3
        ledger.failure = lambda batch: None
        assert await _ask(desk, 4) == 4

    asyncio.run(main())


def test_who_got_no_answer_does_not_know() -> None:
    async def main() -> None:
        ledger = _Ledger()
        ledger.forgets = {2}
        desk = AdmissionDesk(ledger.admit)
        assert await _ask(desk, 1) == 1
        assert isinstance(await _ask(desk, 2), LedgerUnavailableError)

    asyncio.run(main())


def test_a_batch_is_of_one_holder() -> None:
    async def main() -> None:
        ledger = _Ledger()
        desk = AdmissionDesk(ledger.admit)
        answers = await asyncio.gather(*(_ask(desk, want, holder=1 + want // 3) for want in range(1, 6)))
        assert answers == [1, 2, 3, 4, 5]
        assert ledger.batches == [[1, 2], [3, 4, 5]]

    asyncio.run(main())


def test_who_does_not_wait_any_more_disturbs_nobody() -> None:
    async def main() -> None:
        ledger = _Ledger()
        desk = AdmissionDesk(ledger.admit)
        ledger.may_go_on.clear()
        gone = asyncio.create_task(_ask(desk, 1))
        stays = asyncio.create_task(_ask(desk, 2))
        await asyncio.sleep(0.01)
        gone.cancel()
        ledger.may_go_on.set()
        assert await stays == 2

    asyncio.run(main())


def test_closing_tells_everybody_that_the_result_is_unknown() -> None:
    async def main() -> None:
        ledger = _Ledger()
        desk = AdmissionDesk(ledger.admit)
        ledger.may_go_on.clear()
        in_flight = asyncio.create_task(_ask(desk, 1))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(_ask(desk, 2))
        await asyncio.sleep(0.01)
        await desk.aclose()
        assert [type(await one) for one in (in_flight, waiting)] == [LedgerUnavailableError] * 2

    asyncio.run(main())


def test_a_refusal_is_an_answer_like_another() -> None:
    async def main() -> None:
        refusal = Refused(reason="quota")

        async def admit(batch: Sequence[Admission]) -> dict[UUID, Answer]:
            return {one.request_id: refusal for one in batch}

        assert await AdmissionDesk(admit).admit(admission()) is refusal

    asyncio.run(main())
