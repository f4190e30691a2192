"""What this process would have to know of its requests if it were killed: written down before it matters.

The order is the journal's (see `behest_ledger.journal`): a slot and a record before the ledger is asked, the count
before its chunk goes to the client, the end before the books are told. Without a folder for it nothing is remembered,
and the holds of a killed process wait for the ledger's keeper.
"""

import asyncio
import logging
from pathlib import Path
from typing import Protocol
from uuid import UUID

from behest_ledger.holds import Admission, Settlement
from behest_ledger.journal import (
    Acknowledged,
    Admitted,
    Ended,
    Extended,
    Journal,
    JournalError,
    Slot,
    settlement_of,
)
from behest_ledger.prices.rates import Rates
from behest_ledger.token_counts import TokenCounts
from behest_proxy.errors import LedgerUnavailable

logger = logging.getLogger(__name__)

SYNC_S = 1.0


class Trace(Protocol):
    """One request's traces. None of it raises: a full disk ends admissions, not streams."""

    def granted(self, total_tokens: int) -> None:
        """The ledger granted so many output tokens in all."""
        ...

    def sent(self) -> None:
        """The whole request is with the provider's connection."""
        ...

    def first_byte(self) -> None:
        """The provider's answer has begun."""
        ...

    def store(self, output: int, reasoning: int, chunks: int) -> None:
        """So many tokens are about to be handed to the client, all in all."""
        ...

    def ended(self, settlement: Settlement) -> None:
        """The request is over; this goes to the books."""
        ...

    def refused(self) -> None:
        """There is no hold: nothing has to be remembered."""
        ...


class Memory:
    """The journal of this process, or none."""

    def __init__(self, folder: Path | None) -> None:
        """Raises `JournalError` where the folder cannot be used, or another process uses it."""
        self._journal = Journal.open(folder) if folder is not None else None

    def begin(self, admission: Admission, *, input_counts: TokenCounts, rates: Rates) -> Trace:
        """Remember a request before the ledger is asked.

        Raises `LedgerUnavailable` where it cannot be remembered: then it may not be admitted.
        """
        journal = self._journal
        if journal is None:
            return _NoTrace()
        slot = journal.slot(admission.request_id)
        if not isinstance(slot, Slot):
            raise LedgerUnavailable("too many requests run here at once", retry_after_s=1)
        try:
            journal.append(Admitted.of(admission, input_counts=input_counts, rates=rates))
        except JournalError as error:
            slot.free()
            logger.warning("nothing can be admitted: %s", error)
            raise LedgerUnavailable("the journal cannot be written", retry_after_s=1) from None
        return _JournalTrace(journal, slot, admission.request_id)

    def acknowledged(self, request_id: UUID) -> None:
        """The books have the settlement."""
        if self._journal is not None:
            try:
                self._journal.append(Acknowledged(request_id=request_id))
            except JournalError as error:
                logger.warning("a settlement will be sent once more: %s", error)

    def put_aside(self, request_id: UUID) -> None:
        """The books refuse the settlement: it stays written down, for the next life of this process."""
        if self._journal is not None:
            self._journal.put_aside(request_id)

    def left(self) -> list[Settlement]:
        """The settlements of requests that an earlier life of this process left unfinished."""
        if self._journal is None:
            return []
        found: list[Settlement] = []
        for unfinished in self._journal.unfinished():
            settlement = settlement_of(unfinished)
            if settlement is not None:
                found.append(settlement)
            else:
                logger.warning("request %s: too little is left of it; its hold waits", unfinished.request_id)
                self.acknowledged(unfinished.request_id)
        return found

    async def run(self) -> None:
        """Make durable what was written, once a second, in a thread; find out when a full disk is full no more."""
        while self._journal is not None:
            await asyncio.sleep(SYNC_S)
            try:
                await asyncio.to_thread(self._journal.sync)
            except JournalError as error:
                logger.warning("the journal: %s", error)
            self._journal.probe()  # after a failed sync only a write can mend it

    def close(self) -> None:
        """Let go of the folder."""
        if self._journal is not None:
            self._journal.close()


class _JournalTrace:
    __slots__ = ("_journal", "_request_id", "_slot", "first_byte", "sent", "store")

    def __init__(self, journal: Journal, slot: Slot, request_id: UUID) -> None:
        self._journal = journal
        self._request_id = request_id
        self._slot = slot
        # The way of a chunk: one call less.
        self.store = slot.store
        self.sent = slot.mark_sent
        self.first_byte = slot.mark_first_byte

    def granted(self, total_tokens: int) -> None:
        self._append(Extended(request_id=self._request_id, granted_tokens=total_tokens))

    def ended(self, settlement: Settlement) -> None:
        self._append(Ended(settlement=settlement))

    def refused(self) -> None:
        self._append(Acknowledged(request_id=self._request_id))

    def _append(self, record: Extended | Ended | Acknowledged) -> None:
        try:
            self._journal.append(record)
        except JournalError as error:
            logger.warning("request %s: %s", self._request_id, error)


class _NoTrace:
    __slots__ = ()

    def granted(self, total_tokens: int) -> None: ...

    def sent(self) -> None: ...

    def first_byte(self) -> None: ...

    def store(self, output: int, reasoning: int, chunks: int) -> None: ...

    def ended(self, settlement: Settlement) -> None: ...

    def refused(self) -> None: ...
