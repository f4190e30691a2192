"""The Secrets that the operator writes: what the sidecars of a namespace need, and API keys; and those that it reads.

Everything here is made once, found again, and mended when it was lost. A Secret of our name that is not ours is never
touched. Database roles come in pairs, `...-a` and `...-b`: a rotation makes the other one and leaves the one that
running sidecars still use, until the rotation after.
"""

import base64
import hashlib
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlsplit, urlunsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from behest_ledger.api_key_hash import api_key_digest, new_api_key
from behest_ledger.configuration.kinds import Project, Upstream
from behest_ledger.sealing import SealingError, tenant_key
from behest_ledger.store.configuration import connected
from behest_ledger.store.identity import find_api_key, register_api_key
from behest_ledger.store.pool import Connection
from behest_ledger.store.provider_keys import delete_key, put_key, upstream_place
from behest_ledger.store.roles import TenantRole, create_role, drop_role, list_roles
from behest_operator.conditions import Finding
from behest_operator.kubernetes import Kubernetes, Object
from behest_operator.sidecar import SECRET

logger = logging.getLogger(__name__)

ROTATION = timedelta(days=30)
_OWNER_LABEL = {"app.kubernetes.io/managed-by": "behest-operator"}
_ROTATED_AT = "behest.ai/rotated-at"
_API_KEY = "api-key"


@dataclass(frozen=True, kw_only=True)
class NamespaceSecrets:
    """Writes and reads Secrets. Methods raise `KubernetesError` and `LedgerError`: come again."""

    kubernetes: Kubernetes
    pool: Connection
    master_key: bytes
    sidecar_dsn: str
    """The ledger as sidecars reach it; user and password are replaced by their role's."""

    async def ensure_for_sidecars(self, namespace: str, tenant: str, *, now: datetime) -> Finding:
        """Make or mend the Secret `behest-sidecar`."""
        path = f"/api/v1/namespaces/{namespace}/secrets"
        found = await self.kubernetes.get(f"{path}/{SECRET}")
        if found is not None and not _is_ours(found):
            return Finding(
                type="SidecarReady",
                status="False",
                reason="SecretTaken",
                message=f"the Secret {SECRET} is there and was not made by the operator: rename or delete it",
            )
        data = _data(found)
        rotated_at = _time(found)
        role = urlsplit(data.get("database-url", "")).username or ""
        known = {item.name: item for item in await self._roles()}
        usable = role in known and known[role].exists and known[role].tenants == (tenant,)
        due = rotated_at is None or now - rotated_at >= ROTATION
        wanted = {
            "tenant": tenant,
            "data-key": base64.b64encode(tenant_key(self.master_key, tenant)).decode(),
            "signing-key.pem": data.get("signing-key.pem") or _signing_key(),
            "database-url": data.get("database-url", ""),
        }
        if not usable or due:
            role, password = _other_role(namespace, role), secrets.token_urlsafe(24)
            async with connected(self.pool) as connection:
                if role in known:
                    await drop_role(connection, role)
                await create_role(connection, role, tenants=[tenant], password=password)
            wanted["database-url"] = _with_login(self.sidecar_dsn, role, password)
            rotated_at = now
        if found is None or wanted != data:
            await self._write(path, SECRET, found, wanted, rotated_at)
            logger.info("wrote the Secret %s of namespace %s", SECRET, namespace)
        return Finding(type="SidecarReady", status="True", reason="SecretWritten", message=f"see Secret {SECRET}")

    async def ensure_api_key(self, project: Project, tenant: str) -> Finding | None:
        """Make the Secret that the project asks for its API key; None: it asks for none."""
        name = project.spec.api_key_secret_name
        if name is None:
            return None
        path = f"/api/v1/namespaces/{project.namespace}/secrets"
        found = await self.kubernetes.get(f"{path}/{name}")
        if found is not None and not _is_ours(found):
            return Finding(
                type="ApiKeyReady",
                status="False",
                reason="SecretTaken",
                message=f"the Secret {name} is there and was not made by the operator: rename or delete it",
            )
        key = _data(found).get(_API_KEY)
        known = await find_api_key(self.pool, api_key_digest(key)) if key is not None else None
        if key is None or (known is not None and known.revoked_at is not None):
            key, known = new_api_key(), None
            await self._write(path, name, found, {_API_KEY: key, "project": project.qualified_name}, None)
        # The Secret first: a key that is known to the ledger and to nobody else could never be used.
        if known is None:
            async with connected(self.pool) as connection:
                await register_api_key(
                    connection,
                    tenant_id=tenant,
                    project_id=project.qualified_name,
                    key=key,
                    role="admin",
                    name=f"Secret {name}",
                )
        return Finding(type="ApiKeyReady", status="True", reason="SecretWritten", message=f"see Secret {name}")

    async def take_provider_key(self, upstream: Upstream, tenant: str) -> Finding:
        """Seal the key that an Upstream's Secret holds into the ledger."""
        reference = upstream.spec.credentials.secret_key_ref if upstream.spec.credentials is not None else None
        place = upstream_place(upstream.qualified_name)
        if reference is None:
            await delete_key(self.pool, tenant_id=tenant, place=place)
            return Finding(type="CredentialsReady", status="True", reason="NoneNeeded", message="")
        found = await self.kubernetes.get(f"/api/v1/namespaces/{upstream.namespace}/secrets/{reference.name}")
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

    async def _roles(self) -> list[TenantRole]:
        async with connected(self.pool) as connection:
            return await list_roles(connection)

    async def _write(
        self, path: str, name: str, found: Object | None, data: Mapping[str, str], rotated_at: datetime | None
    ) -> None:
        annotations = {_ROTATED_AT: rotated_at.strftime("%Y-%m-%dT%H:%M:%SZ")} if rotated_at is not None else {}
        document: Object = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "labels": _OWNER_LABEL, "annotations": annotations},
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


def _time(found: Object | None) -> datetime | None:
    text = ((found or {}).get("metadata", {}).get("annotations") or {}).get(_ROTATED_AT, "")
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def _other_role(namespace: str, role: str) -> str:
    """The role to make now: of the pair the one that is not in use. Long names of namespaces are cut and told apart."""
    base = namespace if len(namespace) <= 40 else namespace[:31] + hashlib.sha256(namespace.encode()).hexdigest()[:9]
    first, second = f"behest-{base}-a", f"behest-{base}-b"
    return second if role == first else first


def _with_login(dsn: str, user: str, password: str) -> str:
    parts = urlsplit(dsn)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(user)}:{quote(password)}@{host}"))


def _signing_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
