"""Settlements on their way to the books: batched, one batch in flight, repeated until acknowledged.

A settlement that was handed over is never forgotten while the process lives. A batch whose result is unknown is
sent again: settling twice moves nothing. A settlement that the database refuses for itself is found by halving the
batch, and put aside with an alarm, so that it cannot hold up the others.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from behest_ledger.holds import Settlement
from behest_ledger.store.errors import LedgerError, LedgerRefusedError
from behest_ledger.store.holds import Settled
from behest_ledger.store.outage import Outage

logger = logging.getLogger(__name__)

BATCH_ITEMS_MAX = 200
BATCH_INTERVAL_S = 0.01
"""Batches start at least this far apart, and so long after the first that wakes the writer: they grow instead of
multiplying. A client's next request comes right behind its last answer, and finds the database to itself."""
RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0
QUARANTINED_MAX = 1000

SettleCall = Callable[[Sequence[Settlement]], Awaitable[list[Settled]]]


class SettlementWriter:
    """The queue of settlements and the one task that empties it."""

    def __init__(
        self,
        settle: SettleCall,
        *,
        on_settled: Callable[[Settled], None],
        on_put_aside: Callable[[Settlement], None] | None = None,
    ) -> None:
        """`on_put_aside` is told of a settlement that the database refused for itself: nothing more comes of it."""
        self._settle = settle
        self._on_settled = on_settled
        self._on_put_aside = on_put_aside
        self._queue: deque[Settlement] = deque()
        self._submitted_s: deque[float] = deque()
        """When each of the queue came."""
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self._outage = Outage(logger, "settlements wait")
        self.quarantined: deque[Settlement] = deque(maxlen=QUARANTINED_MAX)
        """What the database refused for itself, the last of it. Somebody has to look: see `_put_aside`."""

    @property
    def backlog(self) -> int:
        """Settlements that are not acknowledged yet."""
        return len(self._queue)

    @property
    def lag_s(self) -> float:
        """How long the oldest of them has waited; 0 where none waits."""
        return time.monotonic() - self._submitted_s[0] if self._submitted_s else 0.0

    def start(self) -> None:
        """Begin to write. Call once, inside the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="settlement writer")

    def submit(self, settlement: Settlement) -> None:
        """Hand over one settlement; returns at once."""
        self._queue.append(settlement)
        self._submitted_s.append(time.monotonic())
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
                await asyncio.sleep(BATCH_INTERVAL_S)
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
                if isinstance(error, LedgerError):
                    self._outage.failed(error)
                else:
                    logger.exception("settling %d requests failed, trying again", len(batch))
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_MAX_S)
                continue
            else:
                self._outage.over()
                items_max = min(items_max * 2, BATCH_ITEMS_MAX)
                self._acknowledge(batch, results)
            retry_s = RETRY_FIRST_S
            await asyncio.sleep(max(0.0, started_s + BATCH_INTERVAL_S - loop.time()))

    def _put_aside(self, error: LedgerRefusedError) -> None:
        """Its hold stays open in the books on purpose: voiding it would give away what was spent.

        The journal keeps the settlement, and this process's next life sends it again; where the fault is still there
        then, the hold goes to suspense and is charged by policy after its grace period.
        """
        refused = self._queue.popleft()
        self._submitted_s.popleft()
        self.quarantined.append(refused)
        logger.critical(
            "settlement of request %s was refused and put aside: %s; its hold stays open; mend what the database says"
            " and restart this process, which sends it again from its journal: %s",
            refused.request_id,
            error,
            msgspec.json.encode(refused).decode(),
        )
        if self._on_put_aside is None:
            return
        try:
            self._on_put_aside(refused)
        except Exception:
            logger.exception("nobody could be told that request %s was put aside", refused.request_id)

    def _acknowledge(self, batch: Sequence[Settlement], results: Sequence[Settled]) -> None:
        charged = {item.request_id for item in batch if item.state == "settled"}
        for _ in batch:
            self._queue.popleft()
            self._submitted_s.popleft()
        for result in results:
            if result.overrun:
                logger.error("request %s cost more than its budget could pay", result.request_id)
            if result.result == "unknown" and result.request_id in charged:
                logger.critical("request %s was charged, but the books do not know it", result.request_id)
            try:
                self._on_settled(result)
            except Exception:
                logger.exception("nobody could be told that request %s is settled", result.request_id)
