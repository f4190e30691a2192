"""This process's leases on busy windows: what it was granted goes into the policy, what that wants to the ledger."""

import asyncio
import logging
from uuid import UUID

from behest_ledger.holds import Answer, Granted, Refused
from behest_ledger.leases import LeasePolicy
from behest_ledger.store import leases
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.pool import Connection

logger = logging.getLogger(__name__)


class Leasing:
    """The policy with a clock and a ledger. Nothing depends on it but how fast the ledger answers."""

    def __init__(self) -> None:
        self._policy = LeasePolicy()
        self._holder_id: UUID | None = None

    def answered(self, tenant_id: str, answer: Answer) -> None:
        """The ledger answered an admission or an extension."""
        now_s = asyncio.get_running_loop().time()
        if isinstance(answer, Granted):
            self._policy.granted(tenant_id, list(zip(answer.windows, answer.amounts, strict=False)), now_s)
        elif isinstance(answer, Refused) and answer.window_id:
            self._policy.refused(tenant_id, answer.window_id, now_s)

    async def renew(self, pool: Connection, holder_id: UUID) -> None:
        """Bring the leases to what is wanted now. Once a second, beside the renewal of the holder."""
        if holder_id != self._holder_id:
            self._policy.forget_leases()  # they were the holder's before
            self._holder_id = holder_id
        wants = self._policy.wants(asyncio.get_running_loop().time())
        if not wants:
            return
        try:
            found = await leases.lease(pool, holder_id, wants)
        except LedgerError as error:
            logger.warning("renewing leases: %s", error)
        else:
            self._policy.leased(wants, found)
