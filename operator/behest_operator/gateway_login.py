"""The Secret with the gateway's login: it acts for every tenant as their sidecars do, and owns nothing."""

import asyncio
import logging
from datetime import UTC, datetime

import msgspec

from behest_ledger.store.errors import LedgerError
from behest_ledger.store.pool import Connection
from behest_operator.kubernetes import Kubernetes, KubernetesError
from behest_operator.logins import DSN_KEY, current_login, drop_logins
from behest_operator.secret_objects import data_of, is_ours, path_of, write_secret

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
PREFIX = "behest_gateway-"
"""No login of a namespace begins so: names of namespaces have no underscore."""


class GatewayLogin(msgspec.Struct, kw_only=True):
    """Where the Secret is, and where the ledger."""

    namespace: str
    secret: str
    dsn: str

    async def run(self, kubernetes: Kubernetes, pool: Connection, busy: asyncio.Lock) -> None:
        """Look after it until cancelled; `busy` is whose turn it is to make logins."""
        while True:
            try:
                async with busy:
                    await self.look(kubernetes, pool, now=datetime.now(UTC))
            except (KubernetesError, LedgerError) as error:
                logger.warning("the gateway's login could not be looked after, trying again: %s", error)
                await asyncio.sleep(2)
            else:
                await asyncio.sleep(INTERVAL_S)

    async def look(self, kubernetes: Kubernetes, pool: Connection, *, now: datetime) -> None:
        """Make, mend or rotate it. Raises `KubernetesError` and `LedgerError`."""
        path = path_of(self.namespace)
        found = await kubernetes.get(f"{path}/{self.secret}")
        if found is not None and not is_ours(found):
            logger.warning("the Secret %s is there and was not made by the operator: rename or delete it", self.secret)
            return
        login = await current_login(pool, found, prefix=PREFIX, tenants=None, dsn=self.dsn, now=now)
        data = {DSN_KEY: login.dsn}
        if found is None or data_of(found) != data:
            await write_secret(kubernetes, path, self.secret, found, data, login.annotations)
            logger.info("wrote the gateway's login into Secret %s", self.secret)
        await drop_logins(pool, login.stale)
