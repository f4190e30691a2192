"""Settlements on their way to the books: batched, one batch in flight, repeated until acknowledged.

A settlement that was handed over is never forgotten while the process lives. A batch whose result is unknown is
sent again: settling twice moves nothing. A settlement that the database refuses for itself is found by halving the
batch, and put aside with an alarm, so that it cannot hold up the others.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from behest_ledger.holds import Settlement
from behest_ledger.store.errors import LedgerError, LedgerRefusedError
from behest_ledger.store.holds import Settled

logger = logging.getLogger(__name__)

BATCH_ITEMS_MAX = 200
BATCH_INTERVAL_S = 0.005
"""Batches start at least this far apart: under load they grow instead of multiplying."""
RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0

SettleCall = Callable[[Sequence[Settlement]], Awaitable[list[Settled]]]


class SettlementWriter:
    """The queue of settlements and the one task that empties it."""

    def __init__(self, settle: SettleCall, *, on_settled: Callable[[Settled], None]) -> None:
        self._settle = settle
        self._on_settled = on_settled
        self._queue: deque[Settlement] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self.quarantined: list[Settlement] = []
        """What the database refused for itself. Somebody has to look; `verify` names the holds that stay open."""

    @property
    def backlog(self) -> int:
        """Settlements that are not acknowledged yet."""
        return len(self._queue)

    def start(self) -> None:
        """Begin to write. Call once, inside the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="settlement writer")

    def submit(self, settlement: Settlement) -> None:
        """Hand over one settlement; returns at once."""
        self._queue.append(settlement)
        self._idle.clear()
        self._wake.set()

    async def flush(self, timeout_s: float) -> bool:
        """Wait until everything handed over is acknowledged. False: the time was not enough."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def aclose(self) -> None:
        """Stop. What is not acknowledged stays in the queue, and its holds stay open in the books."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        retry_s = RETRY_FIRST_S
        items_max = BATCH_ITEMS_MAX
        while True:
            if not self._queue:
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            started_s = loop.time()
            batch = [self._queue[index] for index in range(min(len(self._queue), items_max))]
            try:
                results = await self._settle(batch)
            except LedgerRefusedError as error:
                # Halve until the one is alone; what is before it is written on the way.
                items_max = max(1, len(batch) // 2)
                if len(batch) == 1:
                    self._put_aside(error)
            except Exception as error:
                # Whatever it was: nothing is forgotten, and only a refusal is about a settlement itself.
                known = isinstance(error, LedgerError)
                logger.warning("settling %d requests failed, trying again: %s", len(batch), error, exc_info=not known)
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_MAX_S)
                continue
            else:
                items_max = min(items_max * 2, BATCH_ITEMS_MAX)
                self._acknowledge(batch, results)
            retry_s = RETRY_FIRST_S
            await asyncio.sleep(max(0.0, started_s + BATCH_INTERVAL_S - loop.time()))

    def _put_aside(self, error: LedgerRefusedError) -> None:
        refused = self._queue.popleft()
        self.quarantined.append(refused)
        logger.critical("settlement of request %s was refused and put aside: %s", refused.request_id, error)

    def _acknowledge(self, batch: Sequence[Settlement], results: Sequence[Settled]) -> None:
        charged = {item.request_id for item in batch if item.state == "settled"}
        for _ in batch:
            self._queue.popleft()
        for result in results:
            if result.overrun:
                logger.error("request %s cost more than its budget could pay", result.request_id)
            if result.result == "unknown" and result.request_id in charged:
                logger.critical("request %s was charged, but the books do not know it", result.request_id)
            try:
                self._on_settled(result)
            except Exception:
                logger.exception("nobody could be told that request %s is settled", result.request_id)
