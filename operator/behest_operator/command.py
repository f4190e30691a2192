"""`behest operator`: the operator as a process of its own, until SIGTERM."""

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from typing import Any

import kopf

from behest_ledger.store.errors import LedgerError, SchemaError
from behest_ledger.store.keeper import Keeper
from behest_ledger.store.keeper_watch import KeeperWatch
from behest_ledger.store.migrate import check_schema
from behest_ledger.store.pool import UrlError, open_pool, use_dsn
from behest_ledger.telemetry import logs
from behest_ledger.telemetry.meter import Meter
from behest_ledger.telemetry.process import told
from behest_ledger.telemetry.settings import TelemetrySettingsError, telemetry_settings
from behest_operator.background import Background
from behest_operator.crds import GROUP, KINDS, VERSION
from behest_operator.gateway_login import GatewayLogin
from behest_operator.handlers import Handlers, configure
from behest_operator.kubernetes import Credentials, Kubernetes, KubernetesError
from behest_operator.namespace_secrets import NamespaceSecrets
from behest_operator.reconciler import Reconciler
from behest_operator.settings import OperatorSettings, SettingsError, help_text
from behest_operator.status import BudgetBoard
from behest_operator.watch import OperatorWatch

logger = logging.getLogger(__name__)

REREAD_S = 5.0
LOOK_S = 1.0
_NAME = "behest operator"


def add_parser(subparsers: Any) -> None:
    """Add `operator` to the commands of `behest`."""
    subparsers.add_parser(
        "operator",
        help="run the Kubernetes operator",
        description="Carry Projects, Upstreams, Tiers and Budgets into the ledger, and what it says back into their"
        " status; keep the ledger. Until SIGTERM.",
        epilog=help_text(OperatorSettings) + "\n  KUBECONFIG\n      outside a pod: how to reach the API server",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(arguments: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT. Exit status 2: a mistake in the environment; 1: a task of the operator's ended."""
    del arguments
    try:
        settings = OperatorSettings.read(os.environ)
        master_key = settings.master_key()
        credentials = Credentials.find()
        telemetry_settings(os.environ)
    except (SettingsError, KubernetesError, TelemetrySettingsError) as error:
        print(f"behest operator: {error}", file=sys.stderr)
        return 2
    logs.configure(settings.log_level)
    registry = kopf.OperatorRegistry()
    background = Background()
    _Process(settings, master_key, credentials, registry, background).register()
    # kopf cancels every task of its loop at its end: this process has nothing else to do.
    kopf.run(
        registry=registry,
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=list(settings.namespaces),
        liveness_endpoint=f"http://{settings.liveness_bind}/healthz",
        stop_flag=background.stopped,
    )
    return 1 if background.stopped.is_set() else 0


class _Process:
    """What lives as long as the operator does."""

    def __init__(
        self,
        settings: OperatorSettings,
        master_key: bytes,
        credentials: Credentials,
        registry: kopf.OperatorRegistry,
        background: Background,
    ) -> None:
        self._settings = settings
        self._master_key = master_key
        self._kubernetes = Kubernetes(credentials)
        self._registry = registry
        self._background = background
        self._pool: Any = None
        self._meter = Meter()
        self._keeper_watch = KeeperWatch(self._meter)
        self._told = contextlib.AsyncExitStack()

    def register(self) -> None:
        """Tell kopf when to begin and when to end."""
        kopf.on.login(registry=self._registry)(_log_in)
        kopf.on.startup(registry=self._registry)(self._start)
        kopf.on.cleanup(registry=self._registry)(self._stop)

    async def _start(self, *, settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings, some_namespaces=bool(self._settings.namespaces))
        try:
            self._pool = await open_pool(self._settings.database_url, application_name=_NAME)
            await check_schema(self._pool)
        except SchemaError as error:
            raise kopf.PermanentError(str(error)) from None
        except LedgerError as error:
            raise kopf.TemporaryError(f"the ledger cannot be reached: {error}", delay=2) from None
        try:
            await self._told.enter_async_context(
                told(self._meter, "operator", os.environ, bind=self._settings.metrics_bind)
            )
        except OSError as error:
            raise kopf.PermanentError(f"BEHEST_METRICS_BIND: {self._settings.metrics_bind}: {error}") from None
        await self._kubernetes.__aenter__()
        if self._settings.namespaces:
            await _kinds_are_served(self._kubernetes)
        board = BudgetBoard(self._pool, self._kubernetes)
        secrets = NamespaceSecrets(
            kubernetes=self._kubernetes,
            pool=self._pool,
            master_key=self._master_key,
            sidecar_dsn=self._settings.sidecar_url,
        )
        gateway = self._settings.gateway()
        handlers = Handlers(Reconciler(self._pool, secrets), self._kubernetes, board, OperatorWatch(self._meter))
        handlers.register(self._registry)
        self._background.begin("keeper", self._keep(self._settings))
        self._background.begin("status of budgets", board.run())
        self._background.begin("the ledger's login", self._reread(secrets, gateway))
        if gateway is not None:
            self._background.begin("the gateway's login", gateway.run(self._kubernetes, self._pool, secrets.busy))
        webhook = self._settings.webhook
        if webhook is not None:
            self._background.begin("the webhook's certificate", webhook.run(self._kubernetes))

    async def _keep(self, settings: OperatorSettings) -> None:
        keeper = Keeper(
            settings.database_url,
            grace_s=settings.grace_hours * 3600,
            policy=settings.policy,
            watch=self._keeper_watch,
        )
        await keeper.run()

    async def _reread(self, secrets: NamespaceSecrets, gateway: GatewayLogin | None) -> None:
        """Go on by another login, or with another ledger, when the mounted file says so."""
        settings = self._settings
        while True:
            await asyncio.sleep(REREAD_S)
            try:
                read = OperatorSettings.read(os.environ)
            except SettingsError as error:
                logger.warning("the ledger's login cannot be read, the last one serves: %s", error)
                continue
            if read.database_url == settings.database_url:
                continue
            try:
                await use_dsn(self._pool, read.database_url, application_name=_NAME)
            except UrlError as error:
                logger.warning("the ledger's login cannot be used, the last one serves: %s", error)
                continue
            settings = read
            logger.info("connecting to the ledger by the login of %s", settings.database_url_file)
            secrets.sidecar_dsn = settings.sidecar_url
            if gateway is not None:
                gateway.dsn = settings.database_url
            await self._background.end("keeper")
            self._background.begin("keeper", self._keep(settings))

    async def _stop(self, **_: Any) -> None:
        await self._background.end_all()
        await self._told.aclose()
        await self._kubernetes.__aexit__()
        if self._pool is not None:
            self._pool.terminate()


async def _kinds_are_served(kubernetes: Kubernetes) -> None:
    """Wait for the definitions of our kinds; which kinds there are, everybody may ask."""
    told = False
    while True:
        try:
            found = await kubernetes.get(f"/apis/{GROUP}/{VERSION}")
        except KubernetesError as error:
            logger.warning("the API server does not say which kinds there are, trying again: %s", error)
            found = None
        if set(KINDS) <= {item["kind"] for item in (found or {}).get("resources", [])}:
            return
        if not told:
            logger.warning("waiting for the definitions of %s", ", ".join(KINDS))
            told = True
        await asyncio.sleep(LOOK_S)


def _log_in(**arguments: Any) -> kopf.ConnectionInfo | None:
    """As the pod's service account, or outside a pod as KUBECONFIG says."""
    return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)
