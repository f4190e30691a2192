"""What one resource means for the ledger: apply it, or say in a condition what is wrong with it.

Nothing here knows kopf. Each call is whole: killed at any point and called again, it comes to the same end.
"""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from behest_ledger.configuration.kinds import KindName, Manifest, Project, Upstream
from behest_ledger.configuration.manifests import from_object
from behest_ledger.configuration.problems import InvalidManifestsError
from behest_ledger.store.configuration import remove
from behest_ledger.store.pool import Connection
from behest_ledger.store.roles import RoleError
from behest_operator.batches import Batches
from behest_operator.conditions import Finding
from behest_operator.namespace_secrets import NamespaceSecrets
from behest_operator.tenancy import TenancyError, tenant_of

logger = logging.getLogger(__name__)

_TENANT_PATHS = ("spec.tenant", "spec.scope.tenant", "metadata.namespace")


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one resource."""

    findings: tuple[Finding, ...]
    manifest: Manifest | None = None
    """None: it was not accepted."""
    tenant: str = ""
    changed: bool = False
    """Whether anything was written."""


def refused(reason: str, message: str) -> Applied:
    """The resource is not accepted; what the ledger had of it before goes on to count."""
    return Applied(
        findings=(
            Finding(type="Accepted", status="False", reason=reason, message=message),
            Finding(type="Programmed", status="False", reason="NotAccepted", message="the ledger was not changed"),
        )
    )


class Reconciler:
    """Carries resources into the ledger."""

    def __init__(self, pool: Connection, secrets: NamespaceSecrets) -> None:
        self._pool = pool
        self._secrets = secrets
        self._batches = Batches(pool)

    async def apply(self, body: Mapping[str, Any], namespace_labels: Mapping[str, str]) -> Applied:
        """Make the ledger say what the resource says.

        Raises `LedgerError` and `KubernetesError`: the call is to be repeated.
        """
        namespace = body["metadata"]["namespace"]
        try:
            tenant = tenant_of(namespace, namespace_labels)
            manifest = from_object(_without_defaults(body), namespace)
            verdict = await self._batches.apply(manifest, tenant)
        except TenancyError as error:
            return refused("NoTenant", str(error))
        except InvalidManifestsError as error:
            # Of a namespace that got another label, resources stay with the tenant that they belong to.
            tenant_is_wrong = any(problem.path in _TENANT_PATHS for problem in error.errors)
            reason = "TenantNotAllowed" if tenant_is_wrong else "Invalid"
            return refused(reason, "; ".join(f"{item.path}: {item.reason}".lstrip(": ") for item in error.errors))
        message = "; ".join(verdict.warnings)
        return Applied(
            findings=(
                Finding(type="Accepted", status="True", reason="Accepted", message=message),
                Finding(type="Programmed", status="True", reason="Programmed", message="the ledger has it"),
                *await self._secrets_of(manifest, tenant),
            ),
            manifest=manifest,
            tenant=tenant,
            changed=verdict.action != "unchanged",
        )

    async def _secrets_of(self, manifest: Manifest, tenant: str) -> list[Finding]:
        """What the resource needs beside the ledger's tables."""
        match manifest:
            case Project():
                try:
                    made = await self._secrets.ensure_for_sidecars(manifest.namespace, tenant, now=datetime.now(UTC))
                except RoleError as error:
                    made = Finding(type="SidecarReady", status="False", reason="NoLogin", message=str(error))
                key = await self._secrets.ensure_api_key(manifest, tenant)
                return [made] if key is None else [made, key]
            case Upstream():
                return [await self._secrets.take_provider_key(manifest, tenant)]
            case _:
                return []

    async def remove(self, kind: KindName, namespace: str, name: str, spec: Mapping[str, Any]) -> None:
        """Take the resource out of the ledger, and what was made for it. Raises `LedgerError` and `KubernetesError`."""
        outcome = await remove(self._pool, kind, namespace, name)
        if kind == "Project":
            await self._secrets.forget_project(namespace, name, spec.get("apiKeySecretName"))
        elif kind == "Upstream":
            await self._secrets.forget_upstream(f"{namespace}/{name}")
        logger.info("%s in namespace %s", outcome, namespace)


def _without_defaults(body: Mapping[str, Any]) -> dict[str, Any]:
    """The object as plain dictionaries; what the API server filled in is what `behest apply` assumes anyway."""
    return {key: _plain(body[key]) for key in ("apiVersion", "kind", "metadata", "spec") if key in body}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
