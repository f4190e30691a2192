"""`behest operator`: the operator as a process of its own, until SIGTERM."""

import argparse
import asyncio
import logging
import os
import sys
from typing import Any

import kopf

from behest_ledger.store.errors import LedgerError, SchemaError
from behest_ledger.store.keeper import Keeper
from behest_ledger.store.migrate import check_schema
from behest_ledger.store.pool import open_pool
from behest_operator.handlers import Handlers, configure
from behest_operator.kubernetes import Credentials, Kubernetes, KubernetesError
from behest_operator.namespace_secrets import NamespaceSecrets
from behest_operator.reconciler import Reconciler
from behest_operator.settings import OperatorSettings, SettingsError, help_text
from behest_operator.status import BudgetBoard

logger = logging.getLogger(__name__)


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
    """Run until SIGTERM or SIGINT. Exit status 2: a mistake in the environment."""
    del arguments
    try:
        settings = OperatorSettings.read(os.environ)
        master_key = settings.master_key()
        credentials = Credentials.find()
    except (SettingsError, KubernetesError) as error:
        print(f"behest operator: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for library in ("kopf", "aiohttp.access"):
        logging.getLogger(library).setLevel(logging.WARNING)
    registry = kopf.OperatorRegistry()
    _Process(settings, master_key, credentials, registry).register()
    # kopf cancels every task of its loop at its end: this process has nothing else to do.
    kopf.run(
        registry=registry,
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=list(settings.namespaces),
        liveness_endpoint=f"http://{settings.liveness_bind}/healthz",
    )
    return 0


class _Process:
    """What lives as long as the operator does."""

    def __init__(
        self,
        settings: OperatorSettings,
        master_key: bytes,
        credentials: Credentials,
        registry: kopf.OperatorRegistry,
    ) -> None:
        self._settings = settings
        self._master_key = master_key
        self._kubernetes = Kubernetes(credentials)
        self._registry = registry
        self._tasks: list[asyncio.Task[None]] = []
        self._pool: Any = None

    def register(self) -> None:
        """Tell kopf when to begin and when to end."""
        kopf.on.login(registry=self._registry)(_log_in)
        kopf.on.startup(registry=self._registry)(self._start)
        kopf.on.cleanup(registry=self._registry)(self._stop)

    async def _start(self, *, settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        try:
            self._pool = await open_pool(self._settings.database_url, application_name="behest operator")
            await check_schema(self._pool)
        except SchemaError as error:
            raise kopf.PermanentError(str(error)) from None
        except LedgerError as error:
            raise kopf.TemporaryError(f"the ledger cannot be reached: {error}", delay=2) from None
        await self._kubernetes.__aenter__()
        board = BudgetBoard(self._pool, self._kubernetes)
        secrets = NamespaceSecrets(
            kubernetes=self._kubernetes,
            pool=self._pool,
            master_key=self._master_key,
            sidecar_dsn=self._settings.sidecar_database_url,
        )
        Handlers(Reconciler(self._pool, secrets), self._kubernetes, board).register(self._registry)
        keeper = Keeper(
            self._settings.database_url, grace_s=self._settings.grace_hours * 3600, policy=self._settings.policy
        )
        self._tasks = [
            asyncio.create_task(keeper.run(), name="keeper"),
            asyncio.create_task(board.run(), name="status of budgets"),
        ]
        webhook = self._settings.webhook
        if webhook is not None:
            looking = webhook.run(self._kubernetes)
            self._tasks.append(asyncio.create_task(looking, name="webhook's certificate"))

    async def _stop(self, **_: Any) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._kubernetes.__aexit__()
        if self._pool is not None:
            self._pool.terminate()


def _log_in(**arguments: Any) -> kopf.ConnectionInfo | None:
    """As the pod's service account, or outside a pod as KUBECONFIG says."""
    return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)
