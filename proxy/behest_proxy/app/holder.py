"""This process's word to the ledger that it lives, and what it may still do when the ledger does not answer.

A holder renews itself each second and is believed for a TTL. Its own deadline is reckoned from when a renewal was
*sent*, a second short, on a clock that does not stop while the machine sleeps: so it ends its streams before anybody
else may take what they hold. Streams outlive a shorter outage on the credit they have.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from uuid import UUID, uuid4

from behest_ledger.store import holders
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.holders import TTL_S, Checkpoint
from behest_ledger.store.outage import Outage
from behest_ledger.store.pool import Connection

logger = logging.getLogger(__name__)

RENEW_S = 1.0
MARGIN_S = 1.0
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_time_s() -> float:
    """Seconds since the machine started, its sleep included where the system can tell."""
    return time.clock_gettime(_CLOCK)


class Holder:
    """One holder after the other: an id that was lost is never used again."""

    def __init__(
        self,
        *,
        name: str,
        on_lost: Callable[[], None],
        checkpoints: Callable[[], Iterable[Checkpoint]],
        on_busy: Callable[[Collection[UUID]], None],
        lease: Callable[[Connection, UUID], Awaitable[None]] | None = None,
        ttl_s: float = TTL_S,
        clock_s: Callable[[], float] = boot_time_s,
        new_id: Callable[[], UUID] = uuid4,
    ) -> None:
        """`on_lost` is called when what this process holds is no longer its own: its streams must end; `on_busy` with
        the requests whose checkpoint could not be written now and should come again; `lease` with the holder's id after
        each renewal.
        """
        self.holder_id: UUID = new_id()
        self.deadline_s = 0.0
        """On the clock given, `boot_time_s`: until then what this process holds is its own."""
        self._ttl_s = ttl_s
        self._clock_s = clock_s
        self._new_id = new_id
        self._name = name
        self._on_lost = on_lost
        self._checkpoints = checkpoints
        self._on_busy = on_busy
        self._lease = lease

    @property
    def lives(self) -> bool:
        """Whether what this process holds is its own. Asked once per read of a provider's stream."""
        return self._clock_s() < self.deadline_s

    async def register(self, pool: Connection) -> None:
        """Begin to live. Raises `LedgerError`."""
        sent_s = self._clock_s()
        await holders.register(pool, self.holder_id, self._name, self._ttl_s)
        self.deadline_s = sent_s + self._ttl_s - MARGIN_S

    async def run(self, pool: Connection) -> None:
        """Renew each second, and write how far streams have come."""
        outage = Outage(logger, "this process cannot renew itself in the ledger")
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await self._renew(pool)
                await self._write(pool, list(self._checkpoints()))
                outage.over()
                if self._lease is not None and self.lives:
                    await self._lease(pool, self.holder_id)
            except LedgerError as error:
                outage.failed(error)
            except Exception:
                # Whatever it was: who does not renew himself has to end his streams, and this loop says so.
                logger.exception("this process could not renew itself in the ledger, trying again")
            if not self.lives:
                self._on_lost()

    async def unregister(self, pool: Connection) -> None:
        """End cleanly, where nothing is open any more."""
        try:
            await holders.unregister(pool, self.holder_id)
        except LedgerError as error:
            logger.warning("the holder is left to expire: %s", error)

    async def _renew(self, pool: Connection) -> None:
        sent_s = self._clock_s()
        if await holders.renew(pool, self.holder_id, self._ttl_s):
            self.deadline_s = sent_s + self._ttl_s - MARGIN_S
            return
        logger.error("this process was silent for too long: what it held is not its own any more")
        self.deadline_s = 0.0
        self._on_lost()
        self.holder_id = self._new_id()
        await self.register(pool)

    async def _write(self, pool: Connection, checkpoints: Sequence[Checkpoint]) -> None:
        if checkpoints:
            self._on_busy(await holders.checkpoint(pool, checkpoints))
