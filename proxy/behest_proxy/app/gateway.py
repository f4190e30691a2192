"""What all requests share: the ledger's connections, the configuration in memory, the provider connections.

The configuration is polled by its version number twice a second; while the database is away the last good one
serves. Nothing here knows HTTP.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from uuid import UUID

from behest_ledger.charging import Outcome
from behest_ledger.configuration.snapshot import Configuration
from behest_ledger.holds import Admission, Answer, Extension, Refused, Settlement, void
from behest_ledger.prices.book import PriceBook
from behest_ledger.sealing import key_from_text
from behest_ledger.store import holds, identity, provider_keys
from behest_ledger.store.admissions import AdmissionDesk
from behest_ledger.store.configuration import load_configuration
from behest_ledger.store.credit import CreditDesk
from behest_ledger.store.errors import LedgerError, LedgerUnavailableError
from behest_ledger.store.holders import Checkpoint
from behest_ledger.store.holds import Settled
from behest_ledger.store.migrate import check_schema
from behest_ledger.store.outage import Outage
from behest_ledger.store.pool import Connection, asking, open_pool
from behest_ledger.store.prices import load_current_book, next_change
from behest_ledger.store.writer import SettlementWriter
from behest_ledger.telemetry.logs import FIELDS
from behest_ledger.telemetry.settings import TelemetrySettings
from behest_ledger.vault import Vault
from behest_proxy.app.conduct import Conduct
from behest_proxy.app.door import Door
from behest_proxy.app.holder import Holder
from behest_proxy.app.key_fetch import fetch_keys
from behest_proxy.app.leasing import Leasing
from behest_proxy.app.lent_keys import lent_keys_in
from behest_proxy.app.memory import Memory
from behest_proxy.app.mounted import MountedFiles
from behest_proxy.app.origins import project_allows
from behest_proxy.app.provider_keys import KeyOfTenant, ProviderKeys, every_tenants, one_tenants
from behest_proxy.app.replies import Replies
from behest_proxy.app.settings import Settings, secret_in
from behest_proxy.app.signing import SigningKeys
from behest_proxy.app.telemetry import Telemetry
from behest_proxy.app.turns import Turns
from behest_proxy.errors import Draining, LedgerUnavailable
from behest_proxy.holding import METERED_SHARES
from behest_proxy.identity.addresses import networks_in
from behest_proxy.identity.api_keys import ApiKeyVerifier
from behest_proxy.identity.external import Trust, Trusts
from behest_proxy.identity.issuer_keys import IssuerKeys
from behest_proxy.identity.keys import KeySet, RegisteredKey
from behest_proxy.identity.tokens import ISSUERS, TokenVerifier
from behest_proxy.refusals import shown
from behest_proxy.tokens import warm
from behest_proxy.upstream import UpstreamClient
from behest_proxy.upstream.moderation import Moderation

logger = logging.getLogger(__name__)

POLL_S = 0.5
LEDGER_SILENCE_S = 5.0
"""Not ready once the ledger was not heard of for so long."""
ADMISSION_TRIES_MAX = 3
RELEASE_S = 1.0
"""How long a refused admission waits for the settlement of what has ended here."""
STOP_FLUSH_S = 2.0


class Gateway:
    """The running sidecar without its sockets."""

    def __init__(self, settings: Settings, telemetry: TelemetrySettings | None = None) -> None:
        """Without `telemetry` nothing is pushed."""
        self.settings = settings
        self.telemetry = Telemetry(telemetry or TelemetrySettings(), name=settings.name)
        self.leasing = Leasing()
        self.holder = Holder(
            name=settings.name,
            on_lost=self.lose_all,
            checkpoints=self._checkpoints,
            on_busy=self._checkpoint_again,
            lease=self.leasing.renew,
            ttl_s=settings.holder_ttl_s,
        )
        self.signing_keys = SigningKeys(settings.signing_key_file.read_bytes())
        self.moderation = Moderation(settings.moderation_ms / 1000)
        self.upstream = UpstreamClient(moderation=self.moderation)
        self.configuration = Configuration(version=0)
        self.issuer_keys = IssuerKeys(lambda url: fetch_keys(self.upstream, url))
        self.verifier = TokenVerifier(
            self.signing_keys.key_set(),
            [*ISSUERS, settings.issuer],
            project_belongs=lambda tenant, project: self.configuration.project(tenant, project) is not None,
            external_key=self.issuer_keys.get,
        )
        self.door = Door(
            self._prepare,
            host_suffix=settings.host_suffix,
            address_rate=settings.address_rate,
            trusted_proxies=networks_in(settings.trusted_proxies),
            forwarded_header=settings.forwarded_header,
        )
        self.api_keys = ApiKeyVerifier(self._find_api_key)
        self.pool: Connection = None
        self.book: PriceBook | None = None
        self.admissions = AdmissionDesk(self._admit)
        self._prices_change: datetime | None = None
        """When the next price book begins to hold: no version number tells that."""
        self.desk = CreditDesk(self._extend)
        self.writer = SettlementWriter(self._settle, on_settled=self._on_settled, on_put_aside=self._on_put_aside)
        self.live: set[Conduct] = set()
        self.memory = Memory(settings.journal_dir)
        self.workload = settings.workload
        key_of_tenant = _key_of_tenant(settings)
        self.provider_keys = ProviderKeys(key_of_tenant, lent_keys_in(settings.provider_key_env))
        self.replies_pool: Connection = None
        """A connection of their own: what is said waits for money, never the other way round."""
        self.replies = Replies(Vault(key_of_tenant), lambda: self.holder.holder_id)
        self._replies_task: asyncio.Task[None] | None = None
        self.mounted = MountedFiles(settings)
        self.draining = False
        self.leaving = False
        """About to be asked to stop: not ready any more, and still taking what comes."""
        self._poll_task: asyncio.Task[None] | None = None
        self._memory_task: asyncio.Task[None] | None = None
        self._holder_task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._clock_s: Callable[[], float] = time.monotonic
        self._ledger_heard_s = 0.0
        self.telemetry.watch(
            live=lambda: [conduct.admission for conduct in self.live],
            backlog=lambda: self.writer.backlog,
            lag_s=lambda: self.writer.lag_s,
        )

    # --- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open everything, or nothing.

        Raises `LedgerError` where the ledger cannot be used, with what to do about it.
        """
        try:
            await self._open()
            await self.holder.register(self.pool)
            self._begin()
        except BaseException:
            await self.aclose()
            raise

    def _begin(self) -> None:
        self.writer.start()
        self.telemetry.start()
        left = self.memory.left()
        for settlement in left:
            self.writer.submit(settlement)
        if left:
            logger.warning("settling %d requests that an earlier life of this process left", len(left))
        self._memory_task = asyncio.create_task(self.memory.run(), name="journal sync")
        self._holder_task = asyncio.create_task(self.holder.run(self.pool), name="holder")
        self._replies_task = asyncio.create_task(self.replies.run(self.replies_pool), name="replies")
        self._poll_task = asyncio.create_task(self._poll(), name="configuration poll")

    async def _open(self) -> None:
        self.pool = await open_pool(
            self.settings.database_url, application_name=self.settings.name, pooler=self.settings.database_pooler
        )
        self.replies_pool = await open_pool(
            self.settings.database_url,
            size=1,
            application_name=self.settings.name,
            pooler=self.settings.database_pooler,
        )
        self.turns = Turns(self.replies, self.replies_pool)
        await check_schema(self.pool)
        await self.signing_keys.register(self.pool)
        await self._load()
        warm()

    async def drain(self) -> None:
        """Take no more requests, let live ones go on for a while, then end them with `draining`."""
        self.draining = True
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self.settings.drain_s
        while self.live and loop.time() < deadline_s:  # noqa: ASYNC110 - a drain is rare, an event is not
            await asyncio.sleep(0.02)
        for conduct in list(self.live):
            conduct.stop(Outcome.DRAINING, Draining("this process is going away; ask again", retry_after_s=1))

    async def aclose(self) -> None:
        """Write what is left to the books and close everything."""
        for task in (self._poll_task, self._memory_task, self._holder_task, self._replies_task):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.admissions.aclose()
        if not await self.writer.flush(STOP_FLUSH_S):
            logger.error("%d settlements could not be written before the end", self.writer.backlog)
        await self.replies.flush(STOP_FLUSH_S)
        await self.writer.aclose()
        await self.desk.aclose()
        if self.pool is not None and self.holder.deadline_s:
            await self.holder.unregister(self.pool)
        await self.issuer_keys.aclose()
        await self.upstream.aclose()
        await self.api_keys.aclose()
        for pool in (self.pool, self.replies_pool):
            if pool is not None:
                pool.terminate()
        self.memory.close()
        await self.telemetry.aclose()

    @property
    def not_ready(self) -> str | None:
        """Why no requests should come; None: all is well."""
        if self.draining or self.leaving:
            return "draining"
        if self._ledger_is_silent or not self.holder.lives:
            return "the ledger cannot be reached"
        if self.book is None and not self.configuration.upstreams:
            return "nothing is configured: see `behest apply`"
        return None

    # --- requests ----------------------------------------------------------------------------------------------

    async def admit(self, admission: Admission) -> Answer:
        """See `store.holds.admit`. Nobody waits for a ledger that is known to be away.

        Nobody is refused for what an answer that has ended here still holds: the client who got it may ask again before
        it is settled.
        """
        for _ in range(ADMISSION_TRIES_MAX - 1):
            since = self.desk.releasing
            answer = await self._asked(admission)
            if not isinstance(answer, Refused):
                return answer
            if not await self.desk.released(answer.window_id, RELEASE_S, since=since):
                return answer
        return await self._asked(admission)

    async def _asked(self, admission: Admission) -> Answer:
        if self._ledger_is_silent or not self.holder.lives:
            raise LedgerUnavailableError("the ledger was not heard of for some time")
        asked_s = time.monotonic()
        self.moderation.urgent += 1
        try:
            async with asyncio.timeout(LEDGER_SILENCE_S):
                answer = await self.admissions.admit(admission)
        except TimeoutError:
            raise LedgerUnavailableError("the ledger gave no answer in time") from None
        finally:
            self.moderation.urgent -= 1
        self.telemetry.admission_latency.record((), time.monotonic() - asked_s)
        self.leasing.answered(admission.tenant_id, answer)
        return answer

    def conduct(self, conduct: Conduct) -> None:
        """Run a request to its end, whatever becomes of the task that brought it."""
        self.live.add(conduct)
        task = asyncio.create_task(self._run(conduct), name="admission")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, conduct: Conduct) -> None:
        try:
            await conduct.admit()
        except Exception as error:
            logger.exception(
                "request %s failed at its admission",
                conduct.admission.request_id,
                extra={FIELDS: {"request_id": str(conduct.admission.request_id)}},
            )
            if not conduct.answered.done():
                conduct.failed(error)
            # Whether a hold exists is not known any more: voiding it moves nothing where there is none.
            self.live.discard(conduct)
            self.writer.submit(void(conduct.admission.tenant_id, conduct.admission.request_id, Outcome.CRASHED))

    def ended(self, conduct: Conduct) -> None:
        """The request was settled."""
        self.live.discard(conduct)

    def lose_all(self) -> None:
        """What this process holds is not its own any more: every stream ends."""
        for conduct in list(self.live):
            conduct.stop(
                Outcome.LEDGER_UNAVAILABLE,
                LedgerUnavailable("the ledger could not be reached for too long", retry_after_s=1),
            )

    def _checkpoints(self) -> list[Checkpoint]:
        return [found for conduct in self.live if (found := conduct.checkpoint()) is not None]

    def _checkpoint_again(self, requests: Collection[UUID]) -> None:
        for conduct in self.live:
            if conduct.admission.request_id in requests:
                conduct.checkpoint_again()

    async def _prepare(self, bearer: str, place: tuple[str, str] | None) -> None:
        """Fetch the external key that this bearer needs, if it needs one that is not there."""
        wanted = self.verifier.wanted_key(bearer, place)
        if wanted is not None:
            await self.issuer_keys.ensure(*wanted)

    def may_read(self, origin: str) -> bool:
        """Whether any project allows scripts of this origin."""
        return any(project_allows(project, origin) for project in self.configuration.projects.values())

    # --- the ledger --------------------------------------------------------------------------------------------

    @property
    def _ledger_is_silent(self) -> bool:
        return self._clock_s() - self._ledger_heard_s > LEDGER_SILENCE_S

    def _heard(self) -> None:
        self._ledger_heard_s = self._clock_s()

    async def _admit(self, admissions: Sequence[Admission]) -> dict[UUID, Answer]:
        asked_s = time.monotonic()
        answers = await holds.admit_batch(self.pool, admissions)
        self.telemetry.ledger_called("admit", items=len(admissions), seconds=time.monotonic() - asked_s)
        self._heard()
        return answers

    async def _extend(self, extensions: Sequence[Extension]) -> dict[UUID, Answer]:
        asked_s = time.monotonic()
        answers = await holds.extend(self.pool, extensions, shares=METERED_SHARES)
        self.telemetry.ledger_called("extend", items=len(extensions), seconds=time.monotonic() - asked_s)
        for extension in extensions:
            if (answer := answers.get(extension.request_id)) is not None:
                self.leasing.answered(extension.tenant_id, answer)
        return answers

    async def _settle(self, settlements: Sequence[Settlement]) -> list[Settled]:
        asked_s = time.monotonic()
        settled = await holds.settle(self.pool, settlements)
        self.telemetry.ledger_called("settle", items=len(settlements), seconds=time.monotonic() - asked_s)
        self._heard()
        return settled

    def _on_settled(self, settled: Settled) -> None:
        self.memory.acknowledged(settled.request_id)
        self.telemetry.settled(settled)
        self.desk.settled(settled.request_id)

    def _on_put_aside(self, refused: Settlement) -> None:
        self.memory.put_aside(refused.request_id)
        self.telemetry.put_aside(refused.request_id)
        self.desk.never_settled(refused.request_id)

    async def _find_api_key(self, sha256: bytes) -> identity.ApiKeyRecord | None:
        try:
            return await identity.find_api_key(self.pool, sha256)
        except LedgerError as error:
            logger.warning("looking up an API key: %s", error)
            raise LedgerUnavailable("the ledger cannot be reached", retry_after_s=1) from None

    # --- configuration -----------------------------------------------------------------------------------------

    async def _poll(self) -> None:
        outage = Outage(logger, "the configuration cannot be read, the last one serves")
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.mounted.reread(self.pool, self.signing_keys, self.replies_pool)
                async with asking(self.pool) as connection:
                    version = await connection.fetchval("SELECT version FROM ledger.configuration_version")
                self._heard()
                now = datetime.now(UTC)
                if version != self.configuration.version or (self._prices_change or now) < now:
                    await self._load()
                outage.over()
            except LedgerError as error:
                outage.failed(error)
            except Exception:
                logger.exception("the configuration cannot be read, the last one serves")

    async def _load(self) -> None:
        async with asking(self.pool) as connection:
            configuration = await load_configuration(connection, None)
            now = datetime.now(UTC)
            self.book = await load_current_book(connection, now, known=self.book)
            self._prices_change = await next_change(connection, now)
            keys = await identity.load_signing_keys(connection)
            sealed = await provider_keys.load_keys(connection, None)
            suspended = await holds.suspended_requests(connection, [conduct.admission for conduct in self.live])
        for problem in configuration.problems:
            logger.warning("left out of the configuration: %s", problem)
        self.configuration = configuration
        self.door.use(configuration.projects.values())
        trusts = Trusts(_trusts(configuration))
        self.verifier.use_trusts(trusts)
        self.issuer_keys.keep(trusts.keys_urls)
        key_set = KeySet.from_records(keys, _registered_keys(configuration))
        if self.verifier.use_keys(key_set):
            for kid, reason in key_set.refused.items():
                logger.warning("the signing key %s is not believed: %s", kid, reason)
        self.provider_keys.use(sealed)
        self.api_keys.clear()
        self._heard()
        for conduct in list(self.live):
            self._stop_suspended(conduct, suspended.get(conduct.admission.request_id))
        self.desk.limits_changed()

    def _stop_suspended(self, conduct: Conduct, budget: str | None) -> None:
        """The kill switch: what is suspended ends, also in the middle. `budget`: one that is, and binds it."""
        project_id = conduct.admission.attributes["project"]
        project = self.configuration.project(conduct.admission.tenant_id, project_id)
        if project is None or project.suspended:
            refusal = Refused(reason="suspended", what="project", name=project_id)
        elif budget is not None:
            refusal = Refused(reason="suspended", what="budget", name=budget)
        else:
            return
        conduct.stop(Outcome.KILLED, shown(refusal))


def _registered_keys(configuration: Configuration) -> Iterator[RegisteredKey]:
    """The public keys with which tenants sign locally."""
    for project in configuration.projects.values():
        for key in project.spec.signing_keys:
            yield RegisteredKey(tenant_id=project.tenant_id, kid=key.kid, public_pem=key.public_key)


def _trusts(configuration: Configuration) -> Iterator[Trust]:
    for project in configuration.projects.values():
        for item in project.spec.trusted_issuers:
            yield Trust(
                tenant_id=project.tenant_id,
                project_id=project.project_id,
                issuer=item.issuer,
                keys_url=item.jwks_url,
                audience=item.audience,
                claims=item.claims,
            )


def _key_of_tenant(settings: Settings) -> KeyOfTenant | None:
    """Raises `SettingsError` and `SealingError` for a key that cannot be read."""
    if settings.master_key_file is not None:
        return every_tenants(key_from_text(secret_in(settings.master_key_file, "BEHEST_MASTER_KEY_FILE")))
    if settings.data_key_file is not None:
        return one_tenants(key_from_text(secret_in(settings.data_key_file, "BEHEST_DATA_KEY_FILE")))
    return None
