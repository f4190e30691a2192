"""Manifests on their way into the ledger: those that come while one batch is written are the next batch.

For every change the ledger reads what is configured and takes one lock. One resource at a time, thousands of them at a
start would read it thousands of times. Each still gets a verdict of its own: what is refused is left out, and the
others are applied.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from behest_ledger.configuration.kinds import Manifest
from behest_ledger.configuration.plan import Action
from behest_ledger.configuration.problems import InvalidManifestsError, ManifestError
from behest_ledger.store.configuration import ApplyReport, apply_manifests
from behest_ledger.store.errors import LedgerError, LedgerRefusedError
from behest_ledger.store.pool import Connection

BATCH_MAX = 200
"""A batch is one transaction, which holds the windows of its budgets: live requests wait for it."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one manifest that was accepted."""

    action: Action
    warnings: tuple[str, ...] = ()


class _Asked:
    """One manifest that waits."""

    def __init__(self, manifest: Manifest, tenant: str) -> None:
        self.manifest = manifest
        self.tenant = tenant
        self.name = f"{manifest.kind} {manifest.qualified_name}"
        self.answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def succeed(self, verdict: Verdict) -> None:
        if not self.answer.done():
            self.answer.set_result(verdict)


class Batches:
    """Applies manifests in the order in which they come, several in one transaction."""

    def __init__(self, pool: Connection) -> None:
        self._pool = pool
        self._waiting: deque[_Asked] = deque()
        self._worker: asyncio.Task[Any] | None = None

    async def apply(self, manifest: Manifest, tenant: str) -> Verdict:
        """Apply a manifest of a namespace that belongs to this tenant, together with others that wait.

        Raises `InvalidManifestsError` with what is wrong with this one, and `LedgerError`.
        """
        asked = _Asked(manifest, tenant)
        self._waiting.append(asked)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="batches of manifests")
        return await asked.answer

    async def _work(self) -> None:
        while self._waiting:
            batch = self._next()
            try:
                await self._apply(batch)
            except asyncio.CancelledError:
                for asked in (*batch, *self._waiting):
                    asked.answer.cancel()
                raise
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the askers': nobody waits for ever
                for asked in batch:
                    asked.fail(error)

    def _next(self) -> list[_Asked]:
        """The next batch: each resource once, and each namespace of one tenant."""
        batch: dict[str, _Asked] = {}
        tenants: dict[str, str] = {}
        while self._waiting and len(batch) < BATCH_MAX:
            asked = self._waiting[0]
            if asked.name in batch or tenants.setdefault(asked.manifest.namespace, asked.tenant) != asked.tenant:
                break
            batch[asked.name] = self._waiting.popleft()
        return list(batch.values())

    async def _apply(self, batch: Sequence[_Asked]) -> None:
        """Apply a batch, without those that are refused."""
        left = [asked for asked in batch if not asked.answer.done()]
        while left:
            try:
                report = await apply_manifests(
                    self._pool,
                    [asked.manifest for asked in left],
                    tenants={asked.manifest.namespace: asked.tenant for asked in left},
                )
            except InvalidManifestsError as error:
                left = _refuse(left, error)
            except LedgerRefusedError as error:
                # The database took offence at one of them, and does not say at which.
                if len(left) == 1:
                    left[0].fail(error)
                    return
                for asked in left:
                    await self._apply([asked])
                return
            except LedgerError as error:
                for asked in left:
                    asked.fail(error)
                return
            else:
                _tell(left, report)
                return


def _refuse(asked: Sequence[_Asked], error: InvalidManifestsError) -> list[_Asked]:
    """Tell those that are wrong what is wrong with them; the others are still to be applied."""
    wrong: dict[str, list[ManifestError]] = {}
    for fault in error.errors:
        wrong.setdefault(fault.subject, []).append(fault)
    left = [item for item in asked if item.name not in wrong]
    refused = [item for item in asked if item.name in wrong]
    for item in refused or left:
        item.fail(InvalidManifestsError(wrong.get(item.name, error.errors)))
    return left if refused else []


def _tell(asked: Sequence[_Asked], report: ApplyReport) -> None:
    actions: dict[str, Action] = {f"{item.kind} {item.namespace}/{item.name}": item.action for item in report.outcomes}
    for item in asked:
        warnings = tuple(warning for warning in report.warnings if warning.startswith(f"{item.name}: "))
        item.succeed(Verdict(action=actions[item.name], warnings=warnings))
