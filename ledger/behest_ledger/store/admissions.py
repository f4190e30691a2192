"""Admissions of one sidecar in batches: one batch in flight, what comes meanwhile is the next one.

A commit costs the ledger the same for one admission as for thirty. So a lone request goes at once, and under load the
batches grow by themselves. A request that the ledger cannot take at all does not fail those beside it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

from behest_ledger.holds import Admission, Answer
from behest_ledger.store.errors import LedgerError, LedgerRefusedError, LedgerUnavailableError

logger = logging.getLogger(__name__)

BATCH_ITEMS_MAX = 32
"""The windows of a batch are locked for as long as all of it takes."""

AdmitCall = Callable[[Sequence[Admission]], Awaitable[dict[UUID, Answer]]]


class AdmissionDesk:
    """Asks the ledger to admit, on behalf of all requests of this process."""

    def __init__(self, admit: AdmitCall) -> None:
        self._admit = admit
        self._asks: deque[tuple[Admission, asyncio.Future[Answer]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def admit(self, admission: Admission) -> Answer:
        """See `store.holds.admit`, also for what is raised. Who stops waiting does not know whether he was admitted."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._asks.append((admission, answer))
        if self._task is None:
            self._task = loop.create_task(self._run(), name="admission desk")
        return await answer

    async def aclose(self) -> None:
        """Stop asking. Who still waits is told that the result is unknown."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for _, answer in self._asks:
            _deliver(answer, LedgerUnavailableError("the admission desk is closed"))
        self._asks.clear()

    async def _run(self) -> None:
        try:
            while self._asks:
                # A batch is one holder's: after a loss of the holder there are two for a moment.
                holder_id = self._asks[0][0].holder_id
                batch: list[tuple[Admission, asyncio.Future[Answer]]] = []
                while self._asks and len(batch) < BATCH_ITEMS_MAX and self._asks[0][0].holder_id == holder_id:
                    ask = self._asks.popleft()
                    if not ask[1].done():
                        batch.append(ask)
                try:
                    if batch:
                        await self._send(batch)
                except asyncio.CancelledError:
                    _deliver_all(batch, LedgerUnavailableError("the admission desk is closed"))
                    raise
        finally:
            self._task = None

    async def _send(self, batch: Sequence[tuple[Admission, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._admit([admission for admission, _ in batch])
        except LedgerRefusedError as error:
            if len(batch) == 1:
                _deliver(batch[0][1], error)
                return
            logger.warning("a batch of %d admissions was refused, asking one by one: %s", len(batch), error)
            for one in batch:
                await self._send([one])
        except LedgerError as error:
            _deliver_all(batch, error)
        except Exception as error:
            # Whatever it was, nobody is left without an answer.
            logger.exception("asking for %d admissions failed in an unknown way", len(batch))
            _deliver_all(batch, LedgerUnavailableError(f"{type(error).__name__}: {error}"))
        else:
            for admission, answer in batch:
                _deliver(answer, answers.get(admission.request_id, LedgerUnavailableError("there was no answer")))


def _deliver_all(batch: Sequence[tuple[Admission, asyncio.Future[Answer]]], error: LedgerError) -> None:
    for _, answer in batch:
        _deliver(answer, error)


def _deliver(answer: asyncio.Future[Answer], came: Answer | LedgerError) -> None:
    if answer.done():
        return
    if isinstance(came, LedgerError):
        # One exception an asker: a traceback grows with each raise.
        answer.set_exception(type(came)(*came.args))
    else:
        answer.set_result(came)
