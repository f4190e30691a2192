"""The Secrets that the operator writes: what the sidecars of a namespace need, and API keys; and those that it reads.

Everything here is made once, found again, and mended when it was lost. A Secret of our name that is not ours is never
touched. Logins have a module of their own, `logins.py`.

They stay while the namespace has a Project; with its last one the Secret and its logins go.
"""

import asyncio
import base64
import hashlib
import logging
from dataclasses import dataclass, field
from datetime import datetime

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from behest_ledger.api_key_hash import api_key_digest, new_api_key
from behest_ledger.configuration.kinds import Project, Upstream
from behest_ledger.sealing import SealingError, tenant_key
from behest_ledger.store.configuration import connected, namespace_has_projects
from behest_ledger.store.identity import find_api_key, list_api_keys, register_api_key, revoke_api_key
from behest_ledger.store.pool import Connection
from behest_ledger.store.provider_keys import delete_key, load_keys, put_key, upstream_place
from behest_operator.conditions import Finding
from behest_operator.kubernetes import Kubernetes
from behest_operator.logins import DSN_KEY, current_login, drop_logins, logins_of
from behest_operator.secret_objects import data_of, is_ours, path_of, write_secret
from behest_operator.sidecar import SECRET

logger = logging.getLogger(__name__)

_API_KEY = "api-key"
_KEY_NAME = "Secret "
"""How the names of those API keys begin in the ledger that are in Secrets."""


@dataclass(kw_only=True)
class NamespaceSecrets:
    """Writes and reads Secrets. Methods raise `KubernetesError` and `LedgerError`: come again."""

    kubernetes: Kubernetes
    pool: Connection
    master_key: bytes
    sidecar_dsn: str
    """The ledger as sidecars reach it; user and password are replaced by their role's."""

    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Projects are looked at side by side, Secrets and logins are made one at a time: PostgreSQL refuses two that
    change the rights of one object at once."""

    async def ensure_for_sidecars(self, namespace: str, tenant: str, *, now: datetime) -> Finding:
        """Make or mend the Secret `behest-sidecar`."""
        async with self.busy:
            return await self._ensure_for_sidecars(namespace, tenant, now)

    async def _ensure_for_sidecars(self, namespace: str, tenant: str, now: datetime) -> Finding:
        path = path_of(namespace)
        found = await self.kubernetes.get(f"{path}/{SECRET}")
        if found is not None and not is_ours(found):
            return _taken("SidecarReady", SECRET)
        data = data_of(found)
        login = await current_login(
            self.pool, found, prefix=_login_prefix(namespace), tenants=[tenant], dsn=self.sidecar_dsn, now=now
        )
        signing_key = data.get("signing-key.pem", "") if data.get("tenant") == tenant else ""
        wanted = {
            "tenant": tenant,
            "data-key": base64.b64encode(tenant_key(self.master_key, tenant)).decode(),
            # A key speaks for one tenant only.
            "signing-key.pem": signing_key or await asyncio.to_thread(_signing_key),
            DSN_KEY: login.dsn,
        }
        if found is None or wanted != data:
            await write_secret(self.kubernetes, path, SECRET, found, wanted, login.annotations)
            logger.info("wrote the Secret %s of namespace %s", SECRET, namespace)
        await drop_logins(self.pool, login.stale)
        return Finding(type="SidecarReady", status="True", reason="SecretWritten", message=f"see Secret {SECRET}")

    async def forget_project(self, namespace: str, name: str, api_key_secret: str | None) -> None:
        """What is left of a Project that is not in the ledger any more: its API keys, and what its sidecars needed."""
        for key in await list_api_keys(self.pool, project_id=f"{namespace}/{name}"):
            if key.revoked_at is None and key.name.startswith(_KEY_NAME):
                await revoke_api_key(self.pool, key_id=key.key_id, tenant_id=key.tenant_id)
        async with self.busy:
            if api_key_secret is not None:
                found = await self.kubernetes.get(f"{path_of(namespace)}/{api_key_secret}")
                if found is not None and is_ours(found) and data_of(found).get("project") == f"{namespace}/{name}":
                    await self.kubernetes.delete(f"{path_of(namespace)}/{api_key_secret}")
            if await namespace_has_projects(self.pool, namespace):
                return
            found = await self.kubernetes.get(f"{path_of(namespace)}/{SECRET}")
            if found is not None and is_ours(found):
                await self.kubernetes.delete(f"{path_of(namespace)}/{SECRET}")
            await drop_logins(self.pool, list(await logins_of(self.pool, _login_prefix(namespace))))

    async def forget_upstream(self, qualified_name: str) -> None:
        """The sealed key of an Upstream that is gone."""
        place = upstream_place(qualified_name)
        for key in await load_keys(self.pool, None):
            if key.place == place:
                await delete_key(self.pool, tenant_id=key.tenant_id, place=place)

    async def ensure_api_key(self, project: Project, tenant: str) -> Finding | None:
        """Make the Secret that the project asks for its API key; None: it asks for none."""
        name = project.spec.api_key_secret_name
        if name is None:
            return None
        path = path_of(project.namespace)
        found = await self.kubernetes.get(f"{path}/{name}")
        if found is not None and not is_ours(found):
            return _taken("ApiKeyReady", name)
        data = data_of(found)
        key = data.get(_API_KEY)
        if key is not None and data.get("project") != project.qualified_name:
            return Finding(
                type="ApiKeyReady",
                status="False",
                reason="SecretTaken",
                message=f"the Secret {name} holds the key of project {data.get('project')}: name another one",
            )
        known = await find_api_key(self.pool, api_key_digest(key)) if key is not None else None
        if key is None or (known is not None and known.revoked_at is not None):
            key, known = new_api_key(), None
            values = {_API_KEY: key, "project": project.qualified_name}
            await write_secret(self.kubernetes, path, name, found, values, {})
        # The Secret first: a key that is known to the ledger and to nobody else could never be used.
        if known is None:
            async with connected(self.pool) as connection:
                await register_api_key(
                    connection,
                    tenant_id=tenant,
                    project_id=project.qualified_name,
                    key=key,
                    role="admin",
                    name=_KEY_NAME + name,
                )
        return Finding(type="ApiKeyReady", status="True", reason="SecretWritten", message=f"see Secret {name}")

    async def take_provider_key(self, upstream: Upstream, tenant: str) -> Finding:
        """Seal the key that an Upstream's Secret holds into the ledger."""
        reference = upstream.spec.credentials.secret_key_ref if upstream.spec.credentials is not None else None
        place = upstream_place(upstream.qualified_name)
        if reference is None:
            await delete_key(self.pool, tenant_id=tenant, place=place)
            return Finding(type="CredentialsReady", status="True", reason="NoneNeeded", message="")
        found = await self.kubernetes.get(f"{path_of(upstream.namespace)}/{reference.name}")
        secret = data_of(found).get(reference.key)
        where = f"key {reference.key} of Secret {reference.name}"
        if secret is None:
            reason = "SecretMissing" if found is None else "KeyMissing"
            return Finding(
                type="CredentialsReady", status="False", reason=reason, message=f"there is no {where}: create it"
            )
        try:
            await put_key(
                self.pool,
                tenant_id=tenant,
                place=place,
                secret=secret.strip(),
                key=tenant_key(self.master_key, tenant),
            )
        except SealingError as error:
            return Finding(type="CredentialsReady", status="False", reason="Unusable", message=f"{where}: {error}")
        return Finding(type="CredentialsReady", status="True", reason="Sealed", message=f"from {where}")


def _taken(condition: str, name: str) -> Finding:
    message = f"the Secret {name} is there and was not made by the operator: rename or delete it"
    return Finding(type=condition, status="False", reason="SecretTaken", message=message)


def _login_prefix(namespace: str) -> str:
    """How logins of a namespace begin. Long names of namespaces are cut and told apart."""
    base = namespace if len(namespace) <= 40 else namespace[:31] + hashlib.sha256(namespace.encode()).hexdigest()[:9]
    return f"behest-{base}-"


def _signing_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
