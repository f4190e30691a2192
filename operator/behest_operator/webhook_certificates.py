"""Keeps the webhook's Secret and the authority that the API server trusts for it in step with each other.

The authority is told to the API server before a leaf of it is served: first the webhook object, then the Secret.
"""

import asyncio
import base64
import logging
from datetime import UTC, datetime

import msgspec

from behest_operator.certificates import Certificates, renewed
from behest_operator.kubernetes import Kubernetes, KubernetesError, Object

logger = logging.getLogger(__name__)

INTERVAL_S = 60.0
_KEYS = {
    "ca_bundle": "ca.crt",
    "ca_key": "ca.key",
    "signing_ca": "signing-ca.crt",
    "signing_ca_key": "signing-ca.key",
    "leaf": "tls.crt",
    "leaf_key": "tls.key",
}


class WebhookCertificates(msgspec.Struct, frozen=True, kw_only=True):
    """Where the webhook's parts are. `names` of objects, and of the host that the API server calls."""

    namespace: str
    secret: str
    configuration: str
    """The MutatingWebhookConfiguration."""
    service: str

    @property
    def hosts(self) -> list[str]:
        """How the API server calls a webhook behind a Service."""
        return [f"{self.service}.{self.namespace}.svc", f"{self.service}.{self.namespace}.svc.cluster.local"]

    async def run(self, kubernetes: Kubernetes) -> None:
        """Look after them until cancelled."""
        while True:
            try:
                await self.look(kubernetes, now=datetime.now(UTC))
            except KubernetesError as error:
                logger.warning("the webhook's certificate could not be looked after, trying again: %s", error)
                await asyncio.sleep(2)
            else:
                await asyncio.sleep(INTERVAL_S)

    async def look(self, kubernetes: Kubernetes, *, now: datetime) -> None:
        """Renew what has to be renewed, and tell the API server. Raises `KubernetesError`."""
        path = f"/api/v1/namespaces/{self.namespace}/secrets"
        secret = await kubernetes.get(f"{path}/{self.secret}")
        found = _read(secret)
        wanted = renewed(found, names=self.hosts, now=now)
        await self._trust(kubernetes, wanted.ca_bundle)
        if wanted is found:
            return
        document: Object = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": self.secret, "labels": {"app.kubernetes.io/managed-by": "behest-operator"}},
            "type": "Opaque",
            "data": {key: _text(getattr(wanted, field)) for field, key in _KEYS.items()},
        }
        if secret is None:
            await kubernetes.create(path, document)
        else:
            document["metadata"]["resourceVersion"] = secret["metadata"]["resourceVersion"]
            await kubernetes.replace(f"{path}/{self.secret}", document)
        logger.info("wrote the webhook's certificate into Secret %s", self.secret)

    async def _trust(self, kubernetes: Kubernetes, bundle: bytes) -> None:
        path = f"/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/{self.configuration}"
        found = await kubernetes.get(path)
        if found is None:
            return  # the chart has no webhook yet, or none any more
        wanted = _text(bundle)
        webhooks = found.get("webhooks") or []
        if all(hook["clientConfig"].get("caBundle") == wanted for hook in webhooks):
            return
        for hook in webhooks:
            hook["clientConfig"]["caBundle"] = wanted
        version = found["metadata"]["resourceVersion"]
        await kubernetes.merge(path, {"metadata": {"resourceVersion": version}, "webhooks": webhooks})
        logger.info("the API server trusts the webhook's authority")


def _read(secret: Object | None) -> Certificates | None:
    data = (secret or {}).get("data") or {}
    try:
        return Certificates(**{field: base64.b64decode(data[key]) for field, key in _KEYS.items()})
    except (KeyError, ValueError):
        return None


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()
