"""`behest operator`: the operator as a process of its own, until SIGTERM."""

import argparse
import asyncio
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import kopf
import msgspec

from behest_ledger.sealing import SealingError, key_from_text
from behest_ledger.store.errors import LedgerError, SchemaError
from behest_ledger.store.keeper import Keeper, Policy
from behest_ledger.store.migrate import check_schema
from behest_ledger.store.pool import open_pool
from behest_operator.handlers import Handlers, configure
from behest_operator.kubernetes import Credentials, Kubernetes, KubernetesError
from behest_operator.namespace_secrets import NamespaceSecrets
from behest_operator.reconciler import Reconciler
from behest_operator.status import BudgetBoard
from behest_operator.webhook_certificates import WebhookCertificates

logger = logging.getLogger(__name__)


class OperatorSettingsError(ValueError):
    """A setting is missing or malformed; the message names it."""


_WEBHOOK_PARTS = ("namespace", "secret", "service")


class OperatorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Each member is the environment variable `BEHEST_<MEMBER IN CAPITALS>`."""

    database_url: str
    """The ledger, by its owner's role. Or `BEHEST_DATABASE_URL_FILE`."""
    master_key: bytes
    """32 bytes; in the environment `BEHEST_MASTER_KEY_FILE`, a file with them in base64."""
    sidecar_database_url: str
    """The ledger as sidecars reach it; their own logins are put in. Absent: as the operator reaches it."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged."""
    grace_hours: float = 24.0
    """How long a request of a lost sidecar waits for its journal."""
    policy: Policy = "checkpoint"
    """What it is charged then: its last `checkpoint`, or all that was on `hold`."""
    webhook: WebhookCertificates | None = None
    """What the certificate is for that the operator looks after; None: somebody else does, or there is no webhook."""
    namespaces: tuple[str, ...] = ()
    """Those that are looked after, with commas between them; empty: all."""
    liveness_bind: str = "0.0.0.0:8081"
    """Where probes connect: /healthz."""

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "OperatorSettings":
        """The settings in an environment. Raises `OperatorSettingsError`."""
        given: dict[str, Any] = {}
        url, file = environment.get("BEHEST_DATABASE_URL"), environment.get("BEHEST_DATABASE_URL_FILE")
        if file and not url:
            try:
                url = Path(file).read_text().strip()
            except OSError as error:
                raise OperatorSettingsError(f"BEHEST_DATABASE_URL_FILE: {file}: {error.strerror}") from None
        if not url:
            raise OperatorSettingsError("BEHEST_DATABASE_URL is not set: the ledger, by its owner's role")
        given["database_url"] = url
        given["sidecar_database_url"] = environment.get("BEHEST_SIDECAR_DATABASE_URL") or url
        key_file = environment.get("BEHEST_MASTER_KEY_FILE")
        if not key_file:
            raise OperatorSettingsError("BEHEST_MASTER_KEY_FILE is not set: a file with 32 bytes in base64")
        try:
            given["master_key"] = key_from_text(Path(key_file).read_text())
        except (OSError, SealingError) as error:
            raise OperatorSettingsError(f"BEHEST_MASTER_KEY_FILE: {key_file}: {error}") from None
        if names := environment.get("BEHEST_NAMESPACES", "").strip():
            given["namespaces"] = tuple(name.strip() for name in names.split(",") if name.strip())
        if configuration := environment.get("BEHEST_WEBHOOK_CONFIGURATION"):
            parts = {part: environment.get(f"BEHEST_WEBHOOK_{part.upper()}", "") for part in _WEBHOOK_PARTS}
            if missing := [f"BEHEST_WEBHOOK_{part.upper()}" for part, name in parts.items() if not name]:
                raise OperatorSettingsError(f"{missing[0]} is not set: BEHEST_WEBHOOK_CONFIGURATION needs it")
            given["webhook"] = WebhookCertificates(configuration=configuration, **parts)
        for name, choices in (("log_level", ("debug", "info", "warning", "error")), ("policy", ("checkpoint", "hold"))):
            variable = f"BEHEST_{name.upper()}"
            if text := environment.get(variable):
                if text not in choices:
                    raise OperatorSettingsError(f"{variable} must be one of {', '.join(choices)}, not {text!r}")
                given[name] = text
        if text := environment.get("BEHEST_GRACE_HOURS"):
            if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]+)?", text):
                raise OperatorSettingsError(f"BEHEST_GRACE_HOURS must be a number of hours, not {text!r}")
            given["grace_hours"] = float(text)
        if bind := environment.get("BEHEST_LIVENESS_BIND"):
            given["liveness_bind"] = bind
        return cls(**given)


def add_parser(subparsers: Any) -> None:
    """Add `operator` to the commands of `behest`."""
    subparsers.add_parser(
        "operator",
        help="run the Kubernetes operator",
        description="Carry Projects, Upstreams, Tiers and Budgets into the ledger, and what it says back into their"
        " status; keep the ledger. Until SIGTERM.",
        epilog="environment:\n"
        "  BEHEST_DATABASE_URL   the ledger, by its owner's role; or BEHEST_DATABASE_URL_FILE\n"
        "  BEHEST_SIDECAR_DATABASE_URL  the ledger as sidecars reach it (default: as the operator does)\n"
        "  BEHEST_MASTER_KEY_FILE  a file with 32 bytes in base64, under which providers' keys are sealed\n"
        "  BEHEST_WEBHOOK_CONFIGURATION, _NAMESPACE, _SECRET, _SERVICE\n"
        "                        the webhook's object, and where its certificate belongs (default: it is not ours)\n"
        "  BEHEST_NAMESPACES     those that are looked after, with commas between them (default: all)\n"
        "  BEHEST_GRACE_HOURS, BEHEST_POLICY  as --grace-hours and --policy of `behest ledger keep`\n"
        "  BEHEST_LOG_LEVEL      debug, info, warning or error (default: info)\n"
        "  BEHEST_LIVENESS_BIND  where probes connect (default: 0.0.0.0:8081)\n"
        "  KUBECONFIG            outside a pod: how to reach the API server",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(arguments: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT. Exit status 2: a mistake in the environment."""
    del arguments
    try:
        settings = OperatorSettings.read(os.environ)
        credentials = Credentials.find()
    except (OperatorSettingsError, KubernetesError) as error:
        print(f"behest operator: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("kopf").setLevel(logging.WARNING)
    registry = kopf.OperatorRegistry()
    _Process(settings, credentials, registry).register()
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

    def __init__(self, settings: OperatorSettings, credentials: Credentials, registry: kopf.OperatorRegistry) -> None:
        self._settings = settings
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
            master_key=self._settings.master_key,
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
        if self._settings.webhook is not None:
            looking = self._settings.webhook.run(self._kubernetes)
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
