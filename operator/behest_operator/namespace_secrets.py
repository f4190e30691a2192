"""The Secrets that the operator writes: what the sidecars of a namespace need, and API keys; and those that it reads.

Everything here is made once, found again, and mended when it was lost. A Secret of our name that is not ours is never
touched. Every login has a name of its own, so that a Secret and its login always fit, whenever the operator is killed:
first the login, then the Secret that names it, then the logins that no Secret names any more are dropped. A rotation
leaves the one before it, which running sidecars still use, until the rotation after.

They stay while the namespace has a Project; with its last one the Secret and its logins go.
"""

import asyncio
import base64
import hashlib
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlsplit, urlunsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from behest_ledger.api_key_hash import api_key_digest, new_api_key
from behest_ledger.configuration.kinds import Project, Upstream
from behest_ledger.sealing import SealingError, tenant_key
from behest_ledger.store.configuration import connected, namespace_has_projects
from behest_ledger.store.identity import find_api_key, list_api_keys, register_api_key, revoke_api_key
from behest_ledger.store.pool import Connection
from behest_ledger.store.provider_keys import delete_key, load_keys, put_key, upstream_place
from behest_ledger.store.roles import TenantRole, create_role, drop_role, list_roles
from behest_operator.conditions import Finding
from behest_operator.kubernetes import Kubernetes, Object
from behest_operator.sidecar import SECRET

logger = logging.getLogger(__name__)

ROTATION = timedelta(days=30)
_OWNER_LABEL = {"app.kubernetes.io/managed-by": "behest-operator"}
_ROTATED_AT = "behest.ai/rotated-at"
_LOGIN_BEFORE = "behest.ai/login-before"
_API_KEY = "api-key"
_KEY_NAME = "Secret "
"""How the names of those API keys begin in the ledger that are in Secrets."""


@dataclass(frozen=True, kw_only=True)
class NamespaceSecrets:
    """Writes and reads Secrets. Methods raise `KubernetesError` and `LedgerError`: come again."""

    kubernetes: Kubernetes
    pool: Connection
    master_key: bytes
    sidecar_dsn: str
    """The ledger as sidecars reach it; user and password are replaced by their role's."""

    _busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Projects are looked at side by side, Secrets and logins are made one at a time: PostgreSQL refuses two that
    change the rights of one object at once."""

    async def ensure_for_sidecars(self, namespace: str, tenant: str, *, now: datetime) -> Finding:
        """Make or mend the Secret `behest-sidecar`."""
        async with self._busy:
            return await self._ensure_for_sidecars(namespace, tenant, now)

    async def _ensure_for_sidecars(self, namespace: str, tenant: str, now: datetime) -> Finding:
        path = _path(namespace)
        found = await self.kubernetes.get(f"{path}/{SECRET}")
        if found is not None and not _is_ours(found):
            return _taken("SidecarReady", SECRET)
        data = _data(found)
        login, before = urlsplit(data.get("database-url", "")).username or "", _annotation(found, _LOGIN_BEFORE)
        logins = await self._logins_of(namespace)
        rotated_at = _time(found)
        same_tenant = data.get("tenant") == tenant
        usable = same_tenant and _serves(logins.get(login), tenant)
        if not usable or rotated_at is None or now - rotated_at >= ROTATION:
            login, before, rotated_at = _new_login(namespace), login, now
            password = secrets.token_urlsafe(24)
            async with connected(self.pool) as connection:
                await create_role(connection, login, tenants=[tenant], password=password)
            data["database-url"] = _with_login(self.sidecar_dsn, login, password)
        wanted = {
            "tenant": tenant,
            "data-key": base64.b64encode(tenant_key(self.master_key, tenant)).decode(),
            # A key speaks for one tenant only.
            "signing-key.pem": (data.get("signing-key.pem") if same_tenant else None) or _signing_key(),
            "database-url": data["database-url"],
        }
        if found is None or wanted != _data(found):
            annotations = {_ROTATED_AT: rotated_at.strftime("%Y-%m-%dT%H:%M:%SZ"), _LOGIN_BEFORE: before}
            await self._write(path, SECRET, found, wanted, annotations)
            logger.info("wrote the Secret %s of namespace %s", SECRET, namespace)
        for name, role in logins.items():
            if name != login and not (name == before and _serves(role, tenant)):
                async with connected(self.pool) as connection:
                    await drop_role(connection, name)
        return Finding(type="SidecarReady", status="True", reason="SecretWritten", message=f"see Secret {SECRET}")

    async def forget_project(self, namespace: str, name: str, api_key_secret: str | None) -> None:
        """What is left of a Project that is not in the ledger any more: its API keys, and what its sidecars needed."""
        for key in await list_api_keys(self.pool, project_id=f"{namespace}/{name}"):
            if key.revoked_at is None and key.name.startswith(_KEY_NAME):
                await revoke_api_key(self.pool, key_id=key.key_id, tenant_id=key.tenant_id)
        async with self._busy:
            if api_key_secret is not None:
                found = await self.kubernetes.get(f"{_path(namespace)}/{api_key_secret}")
                if found is not None and _is_ours(found) and _data(found).get("project") == f"{namespace}/{name}":
                    await self.kubernetes.delete(f"{_path(namespace)}/{api_key_secret}")
            if await namespace_has_projects(self.pool, namespace):
                return
            found = await self.kubernetes.get(f"{_path(namespace)}/{SECRET}")
            if found is not None and _is_ours(found):
                await self.kubernetes.delete(f"{_path(namespace)}/{SECRET}")
            for login in await self._logins_of(namespace):
                async with connected(self.pool) as connection:
                    await drop_role(connection, login)

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
        path = _path(project.namespace)
        found = await self.kubernetes.get(f"{path}/{name}")
        if found is not None and not _is_ours(found):
            return _taken("ApiKeyReady", name)
        data = _data(found)
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
            await self._write(path, name, found, {_API_KEY: key, "project": project.qualified_name}, {})
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
        found = await self.kubernetes.get(f"{_path(upstream.namespace)}/{reference.name}")
        secret = _data(found).get(reference.key)
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

    async def _logins_of(self, namespace: str) -> dict[str, TenantRole]:
        async with connected(self.pool) as connection:
            roles = await list_roles(connection)
        ours = re.compile(re.escape(_login_prefix(namespace)) + r"[a-z2-7]{8}")
        return {role.name: role for role in roles if ours.fullmatch(role.name)}

    async def _write(
        self, path: str, name: str, found: Object | None, data: Mapping[str, str], annotations: Mapping[str, str]
    ) -> None:
        document: Object = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "labels": _OWNER_LABEL, "annotations": dict(annotations)},
            "type": "Opaque",
            "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
        }
        if found is None:
            await self.kubernetes.create(path, document)
        else:
            document["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
            await self.kubernetes.replace(f"{path}/{name}", document)


def _is_ours(found: Object) -> bool:
    labels = found["metadata"].get("labels") or {}
    return all(labels.get(name) == value for name, value in _OWNER_LABEL.items())


def _data(found: Object | None) -> dict[str, str]:
    """The values of a Secret that are text."""
    values: dict[str, str] = {}
    for name, value in ((found or {}).get("data") or {}).items():
        try:
            values[name] = base64.b64decode(value).decode()
        except ValueError:
            continue
    return values


def _annotation(found: Object | None, name: str) -> str:
    return str(((found or {}).get("metadata", {}).get("annotations") or {}).get(name, ""))


def _time(found: Object | None) -> datetime | None:
    try:
        return datetime.strptime(_annotation(found, _ROTATED_AT), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def _taken(condition: str, name: str) -> Finding:
    message = f"the Secret {name} is there and was not made by the operator: rename or delete it"
    return Finding(type=condition, status="False", reason="SecretTaken", message=message)


def _path(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/secrets"


def _serves(role: TenantRole | None, tenant: str) -> bool:
    return role is not None and role.exists and role.tenants == (tenant,)


def _login_prefix(namespace: str) -> str:
    """How logins of a namespace begin. Long names of namespaces are cut and told apart."""
    base = namespace if len(namespace) <= 40 else namespace[:31] + hashlib.sha256(namespace.encode()).hexdigest()[:9]
    return f"behest-{base}-"


def _new_login(namespace: str) -> str:
    return _login_prefix(namespace) + base64.b32encode(secrets.token_bytes(5)).decode().lower()


def _with_login(dsn: str, user: str, password: str) -> str:
    parts = urlsplit(dsn)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(user)}:{quote(password)}@{host}"))


def _signing_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
