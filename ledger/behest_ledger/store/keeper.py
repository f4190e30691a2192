"""The keeper: one loop that ends what nobody else will end.

It fences holders that are dead and moves their holds to suspense, charges what stayed there beyond the period of grace,
seals what was written and adds it to the sums of usage, tells of budgets that reached a threshold, makes the partitions
of the months to come, and forgets holders of long ago. Many keepers may run, one works: the one that has an advisory
lock of its own session. The lock saves work and is no condition of being right: each step is one function of the
database that is whole, bounded, and may be called at any time; one that is refused keeps none of the others. Months
that are old enough are put away (`store/retention.py`).

True-up, the way from what is believed to what is true, has three steps, and the keeper takes only the middle one. A
journal that comes back settles its requests itself, out of suspense, and nothing has to be made good. What no journal
settled within the grace is charged by policy: here. And what is known later still (a journal after the grace, a
provider's invoice) is a correction of that charge: `store/corrections.py`.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar

import asyncpg
import msgspec

from behest_ledger.configuration.status import shown_amount
from behest_ledger.money import usd_from_pico
from behest_ledger.store.errors import (
    LedgerConflictError,
    LedgerError,
    LedgerForbiddenError,
    LedgerRefusedError,
    mapped,
)
from behest_ledger.store.keeper_watch import ROUNDS_A_LOOK, KeeperWatch
from behest_ledger.store.migrate import PARTITIONS_AHEAD_MONTHS, check_schema
from behest_ledger.store.pool import Connection, connect
from behest_ledger.store.retention import MONTH_TIMEOUT_S, RETENTION_MONTHS, put_old_months_away
from behest_ledger.store.seals import HeldUp, Sealed, Sealer, held_up
from behest_ledger.store.threads import RETENTION_DAYS
from behest_ledger.store.usage import Added, add_up

logger = logging.getLogger(__name__)

Policy = Literal["checkpoint", "hold"]
_DoneT = TypeVar("_DoneT")

INTERVAL_S = 5.0
GRACE_S = 24 * 3600.0
BATCH_HOLDS_MAX = 200
"""Holds moved in one commit: their windows are locked for so long."""
BATCHES_MAX = 20
"""Batches of one kind in one round."""
ADDED_BATCHES_MAX = 5
"""Batches that are added to the sums of usage in one round: each may take a second or two."""
HOUSEKEEPING_S = 3600.0
"""Partitions and old holders are looked at this often."""
HOLDERS_KEPT = timedelta(days=7)
SEAL_INTERVAL_S = 60.0
"""Each time, every tenant that wrote something gets a seal: seconds would make millions of them."""
SEAL_STALL_S = 600.0
"""A transaction that runs for so long is told of, and again after as long: behind it nothing is sealed."""
ROUND_TIMEOUT_S = 60.0
RETRY_FIRST_S = 0.5
RETRY_MAX_S = 15.0

_EVER = datetime.min.replace(tzinfo=UTC)
_LOCK_KEY = 0x6265_6B70  # "bekp"; a migration takes "behe"


class KeeperReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one round did."""

    working: bool
    """False: another keeper works, this one stands by."""
    fenced: tuple[str, ...] = ()
    """Name and id of each holder that was found dead."""
    holds_to_suspense: int = 0
    charged_requests: int = 0
    charged_pico: int = 0
    alerts: int = 0
    """Thresholds of budgets that were reached."""
    partitions_made: int = 0
    holders_pruned: int = 0
    seals: int = 0
    sealed_rows: int = 0
    usage_requests: int = 0
    """Requests that were added to the sums of usage."""
    months_put_away: int = 0
    threads_deleted: int = 0
    more: bool = False
    """There is more than one round may do."""
    failed: tuple[str, ...] = ()
    """The steps that the database refused. The others were done."""


class _Alert(msgspec.Struct, kw_only=True):
    """What `ledger.tell_alerts_v1` tells of one threshold."""

    tenant_id: str
    budget_id: str
    subject: list[Any]
    unit: str
    percent: int
    used: str
    limit: str

    def __str__(self) -> str:
        whose = f" of {msgspec.json.encode(self.subject).decode()}" if self.subject else ""
        unit = "USD" if self.unit == "usd" else self.unit
        used, limit = (shown_amount(int(amount), self.unit) for amount in (self.used, self.limit))
        return f"budget {self.budget_id}{whose} has reached {self.percent} %: {used} of {limit} {unit} are spent"


class Keeper:
    """One keeper on a connection of its own: the advisory lock belongs to the session.

    `grace_s` is how long a hold waits in suspense for its journal, `policy` what it is charged after that:
    "checkpoint" what its last checkpoint says, "hold" all that was held. `retention_months` whole months stay beside
    the current one (0: all); older ones are detached, and with `drop_months` dropped. Threads are deleted `thread_days`
    after their last message, where their project does not say otherwise. `watch` is told what becomes of it all.
    """

    def __init__(
        self,
        dsn: str,
        *,
        interval_s: float = INTERVAL_S,
        grace_s: float = GRACE_S,
        policy: Policy = "checkpoint",
        seal_interval_s: float = SEAL_INTERVAL_S,
        seal_stall_s: float = SEAL_STALL_S,
        retention_months: int = RETENTION_MONTHS,
        drop_months: bool = False,
        thread_days: int = RETENTION_DAYS,
        watch: KeeperWatch | None = None,
    ) -> None:
        self._dsn = dsn
        self._watch = watch
        self._interval_s = interval_s
        self._grace = timedelta(seconds=grace_s)
        self._policy: Policy = policy
        self._seal_interval_s = seal_interval_s
        self._sealer = Sealer()
        self._seal_due_s = 0.0
        self._more_to_add = True
        self._seal_stall_s = seal_stall_s
        self._held_up: HeldUp | None = None
        self._held_up_since_s = 0.0
        self._stall_told_s = -math.inf
        self._retention_months = retention_months
        self._drop_months = drop_months
        self._thread_days = thread_days
        self._threads_due_s = 0.0
        self._retention_due_s = 0.0
        self._connection: Connection | None = None
        self._writable_since: datetime | None = None
        """Since when this session sees the database take writes; None while another keeper works. A restart or a
        promotion ends the session, so nobody is reaped for renewals that could not be written meanwhile."""
        self._places_free_until = _EVER
        """All places of requests that came into suspense before are free already."""
        self._housekeeping_due_s = 0.0
        self._told_standby = False
        self._failed: list[str] = []

    async def run(self) -> None:
        """Work until cancelled. Whatever the database does, it is tried again, later and later up to 15 s."""
        retry_s = RETRY_FIRST_S
        try:
            while True:
                try:
                    report = await self._watched_round()
                except LedgerError as error:
                    logger.warning("keeping the ledger failed, trying again in %.1f s: %s", retry_s, error)
                    await asyncio.sleep(retry_s)
                    retry_s = min(retry_s * 2, RETRY_MAX_S)
                else:
                    retry_s = RETRY_FIRST_S
                    await asyncio.sleep(0 if report.more and not report.failed else self._interval_s)
        finally:
            await self.aclose()

    async def _watched_round(self) -> KeeperReport:
        begun_s = time.monotonic()
        try:
            report = await self.run_once()
        except LedgerError:
            if self._watch is not None:
                self._watch.failed()
            raise
        if self._watch is not None:
            self._watch.done(report, time.monotonic() - begun_s)
        return report

    async def run_once(self) -> KeeperReport:
        """One round. Raises `LedgerError`; the next round connects again where that is needed."""
        self._failed = []
        async with self._session() as connection:
            if not await self._has_lock(connection):
                if not self._told_standby:
                    logger.info("another keeper works; standing by")
                    self._told_standby = True
                return KeeperReport(working=False)
            fenced, suspended, more_to_reap = await self._step("reap", self._reap(connection), ((), 0, False))
            await self._step("free the places of the dead", self._free_places(connection), None)
            made, pruned = await self._step("keep house", self._keep_house(connection), (0, 0))
            charged, charged_pico, more_to_charge = await self._step(
                "charge by policy", self._charge(connection), (0, 0, False)
            )
            alerts, more_to_tell = await self._step("tell alerts", self._tell_alerts(connection), (0, False))
            sealed = await self._step("seal", self._seal(connection), Sealed(0, 0, more=False))
            added = await self._step("add up", self._add_up(connection, sealed), Added(0, more=False))
            threads_deleted = await self._step("forget threads", self._forget_threads(connection), 0)
            if self._watch is not None:
                look = self._watch.look(connection, interval_s=ROUNDS_A_LOOK * self._interval_s)
                await self._step("look", look, None)
        months_put_away = await self._step("put months away", self._put_months_away(), 0)
        return KeeperReport(
            working=True,
            fenced=fenced,
            holds_to_suspense=suspended,
            charged_requests=charged,
            charged_pico=charged_pico,
            alerts=alerts,
            partitions_made=made,
            holders_pruned=pruned,
            seals=sealed.seals,
            sealed_rows=sealed.rows,
            usage_requests=added.requests,
            months_put_away=months_put_away,
            threads_deleted=threads_deleted,
            more=more_to_reap or more_to_charge or more_to_tell or sealed.more or added.more,
            failed=tuple(self._failed),
        )

    async def _step(self, name: str, step: Awaitable[_DoneT], otherwise: _DoneT) -> _DoneT:
        """What a step answers; `otherwise` where the database refuses it: that must not stop what others are for."""
        try:
            with mapped():
                return await step
        except LedgerForbiddenError:
            raise  # a role that is not the owner's can do nothing
        except LedgerRefusedError as error:
            logger.error("the keeper could not %s: %s", name, error)  # noqa: TRY400 - where it was asked says nothing
            self._failed.append(name)
            return otherwise

    async def aclose(self) -> None:
        """Give the lock back. The keeper can be used again."""
        connection, self._connection, self._writable_since = self._connection, None, None
        if connection is not None:
            try:
                await connection.close(timeout=1.0)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection.terminate()

    @asynccontextmanager
    async def _session(self, timeout_s: float = ROUND_TIMEOUT_S) -> AsyncGenerator[Connection, None]:
        """The connection. It is dropped with its lock after any fault that may mean that the database was away."""
        try:
            with mapped():
                async with asyncio.timeout(timeout_s):
                    if self._connection is None:
                        self._connection = await self._connect()
                    yield self._connection
        except BaseException as error:
            if isinstance(error, (LedgerConflictError, LedgerRefusedError)) or isinstance(
                error.__cause__, asyncpg.LockNotAvailableError
            ):
                raise
            connection, self._connection, self._writable_since = self._connection, None, None
            if connection is not None:
                connection.terminate()
            raise

    async def _connect(self) -> Connection:
        connection = await connect(self._dsn, application_name="behest keeper")
        try:
            await check_schema(connection)
            # Waiting for a table's lock keeps everybody else waiting behind: rather come again.
            # And a keeper that lost its network gives the lock to another one soon.
            await connection.execute(
                "SELECT set_config('lock_timeout', '500ms', false), set_config('idle_session_timeout', $1, false),"
                " set_config('client_min_messages', 'warning', false)",
                f"{max(60, round(4 * self._interval_s))}s",
            )
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _has_lock(self, connection: Connection) -> bool:
        if self._writable_since is not None:
            return True
        since: datetime | None = await connection.fetchval(
            "SELECT CASE WHEN NOT pg_is_in_recovery() AND pg_try_advisory_lock($1) THEN clock_timestamp() END",
            _LOCK_KEY,
        )
        if since is None:
            return False
        self._writable_since = since
        self._housekeeping_due_s = 0.0
        self._seal_due_s = 0.0
        self._more_to_add = True
        self._retention_due_s = 0.0
        self._threads_due_s = 0.0
        self._told_standby = False
        logger.info("keeping the ledger: every %.1f s", self._interval_s)
        return True

    async def _reap(self, connection: Connection) -> tuple[tuple[str, ...], int, bool]:
        names: list[str] = []
        holds = 0
        more = True
        for _ in range(BATCHES_MAX):
            row = await connection.fetchrow(
                "SELECT fenced, holds, more FROM ledger.reap_v1($1, $2)", BATCH_HOLDS_MAX, self._writable_since
            )
            for name in row["fenced"]:
                names.append(name)
                logger.warning("holder %s is dead: fenced", name)
            holds += row["holds"]
            more = row["more"]
            if not more:
                break
        if holds:
            logger.warning("%d requests of dead holders went to suspense", holds)
        return tuple(names), holds, more

    async def _free_places(self, connection: Connection) -> None:
        """Give back the places of tiers' concurrency that dead sidecars' streams had."""
        begun: datetime = await connection.fetchval("SELECT clock_timestamp()")
        for _ in range(BATCHES_MAX):
            freed: int = await connection.fetchval(
                "SELECT ledger.free_concurrency_v1($1, $2)", BATCH_HOLDS_MAX, self._places_free_until
            )
            if freed < BATCH_HOLDS_MAX:
                # What another round wrote at the same time may bear an earlier time and come later.
                self._places_free_until = begun - timedelta(seconds=2 * ROUND_TIMEOUT_S)
                break

    async def _tell_alerts(self, connection: Connection) -> tuple[int, bool]:
        alerts = 0
        more = True
        for _ in range(BATCHES_MAX):
            row = await connection.fetchrow("SELECT told::text, more FROM ledger.tell_alerts_v1($1)", BATCH_HOLDS_MAX)
            for alert in msgspec.json.decode(row["told"], type=list[_Alert]):
                alerts += 1
                logger.warning("%s", alert)
            more = row["more"]
            if not more:
                break
        return alerts, more

    async def _charge(self, connection: Connection) -> tuple[int, int, bool]:
        requests = 0
        amount_pico = 0
        more = True
        for _ in range(BATCHES_MAX):
            rows: list[Any] = await connection.fetch(
                "SELECT request_id, amount_pico::text, problem FROM ledger.charge_by_policy_v1($1, $2, $3)",
                self._grace,
                self._policy,
                BATCH_HOLDS_MAX,
            )
            for request, amount, problem in rows:
                if problem is not None:
                    done = "stays in suspense for another grace" if amount is None else "was charged nothing"
                    logger.error("request %s cannot be charged by policy, and %s: %s", request, done, problem)
                if amount is not None:
                    requests += 1
                    amount_pico += int(amount)
            more = len(rows) == BATCH_HOLDS_MAX
            if not more:
                break
        if requests:
            logger.warning(
                "%d requests that no journal settled were charged by policy %s: %s USD",
                requests,
                self._policy,
                usd_from_pico(amount_pico),
            )
        return requests, amount_pico, more

    async def _seal(self, connection: Connection) -> Sealed:
        loop = asyncio.get_running_loop()
        if loop.time() < self._seal_due_s:
            return Sealed(0, 0, more=False)
        try:
            sealed = await self._sealer.seal(connection, calls_max=BATCHES_MAX)
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            # Somebody else seals.
            return Sealed(0, 0, more=False)
        if not sealed.more:
            self._seal_due_s = loop.time() + self._seal_interval_s
            self._tell_stall(await held_up(connection), loop.time())
        return sealed

    async def _add_up(self, connection: Connection, sealed: Sealed) -> Added:
        self._more_to_add = self._more_to_add or sealed.seals > 0
        if not self._more_to_add:
            return Added(0, more=False)
        try:
            added = await add_up(connection, calls_max=ADDED_BATCHES_MAX)
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            # Somebody else seals or adds.
            return Added(0, more=False)
        self._more_to_add = added.more
        return added

    def _tell_stall(self, oldest: HeldUp | None, now_s: float) -> None:
        """Sealing that waits says nothing by itself: a session that forgot its transaction would stop it for days."""
        if oldest is None or self._held_up is None or oldest.transaction != self._held_up.transaction:
            self._held_up_since_s = now_s
        self._held_up = oldest
        # Whose age this role may not see is as old as this keeper has known it.
        known_s = now_s - self._held_up_since_s
        age_s = 0.0 if oldest is None else known_s if oldest.age_s is None else oldest.age_s
        if self._watch is not None:
            self._watch.sealed(age_s)
        if oldest is None:
            return
        if age_s >= self._seal_stall_s and now_s - self._stall_told_s >= self._seal_stall_s:
            self._stall_told_s = now_s
            logger.warning("nothing newer can be sealed: %s, %d s old; end it (pg_terminate_backend)", oldest, age_s)

    async def _put_months_away(self) -> int:
        loop = asyncio.get_running_loop()
        if loop.time() < self._retention_due_s:
            return 0
        # A time of its own: to add up a month may take longer than a round.
        async with self._session(MONTH_TIMEOUT_S) as connection:
            months = await put_old_months_away(connection, kept_months=self._retention_months, drop=self._drop_months)
        self._retention_due_s = loop.time() + HOUSEKEEPING_S
        return sum(month.done for month in months)

    async def _forget_threads(self, connection: Connection) -> int:
        """Delete threads that nobody used for long, and what was kept of replies for those who ask again."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._threads_due_s:
            return 0
        threads = 0
        for _ in range(BATCHES_MAX):
            row = await connection.fetchrow(
                "SELECT threads, keys, generations FROM ledger.prune_threads_v1($1, $2)",
                self._thread_days,
                BATCH_HOLDS_MAX,
            )
            threads += row["threads"]
            if max(row["threads"], row["keys"], row["generations"]) < BATCH_HOLDS_MAX:
                self._threads_due_s = loop.time() + HOUSEKEEPING_S
                break
        if threads:
            logger.info("deleted %d threads that were not used for their time", threads)
        return threads

    async def _keep_house(self, connection: Connection) -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        if loop.time() < self._housekeeping_due_s:
            return 0, 0
        try:
            made: int = await connection.fetchval(
                "SELECT ledger.make_partitions_v1((clock_timestamp() AT TIME ZONE 'UTC')::date, $1)",
                PARTITIONS_AHEAD_MONTHS,
            )
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            # Months ahead of time: the next round is soon enough.
            return 0, 0
        pruned: int = await connection.fetchval("SELECT ledger.prune_holders_v1($1)", HOLDERS_KEPT)
        self._housekeeping_due_s = loop.time() + HOUSEKEEPING_S
        if made:
            logger.info("made %d partitions for the months to come", made)
        if pruned:
            logger.info("forgot %d holders that ended more than %d days ago", pruned, HOLDERS_KEPT.days)
        return made, pruned
