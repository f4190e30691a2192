"""The chart as Helm renders it, and the sets of values that it must render well."""

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from cluster.control_plane import ControlPlane

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "behest"
_DIGEST = "sha256:" + "0" * 64
_EXTERNAL = ("database.trial.enabled=false", "database.external.secretName=ledger")
_GATEWAY = ("gateway.enabled=true",)

MATRIX: dict[str, tuple[str, ...]] = {
    "trial database": (),
    "trial database without a volume": ("database.trial.storage=",),
    "trial database on a storage class": ("database.trial.storageClassName=fast",),
    "external database": _EXTERNAL,
    "external database behind PgBouncer": (
        *_EXTERNAL,
        "database.external.sidecarURL=postgresql://pgbouncer.db.svc:6432/behest",
        "database.external.sidecarPooler=transaction",
        "database.external.secretKey=dsn",
    ),
    "gateway": (
        *_GATEWAY,
        "gateway.providerKeysSecretName=null",
        "gateway.providerKeysFor={OPENAI_API_KEY=https://api.openai.com,ACME_KEY=acme}",
        "gateway.service.annotations.a/b=c",
    ),
    "gateway only": (*_GATEWAY, "webhook.enabled=false"),
    "gateway that scales": (*_GATEWAY, "gateway.autoscaling.enabled=true"),
    "cert-manager": ("webhook.certificates.from=cert-manager", "webhook.failurePolicy=Ignore"),
    "no webhook": ("webhook.enabled=false",),
    "some namespaces": ("namespaces={default,kube-public}", "serviceMonitor.enabled=true", "webhook.replicas=1"),
    "some namespaces without a webhook": ("namespaces={default}", "webhook.enabled=false"),
    "image by digest": (f"image.digest={_DIGEST}", "image.pullSecrets={true,registry}", "image.pullPolicy=Always"),
    "image from elsewhere": ("image.repository=localhost:5000/behest", "image.tag=main"),
    "another name": ("fullnameOverride=ledger", "masterKey.secretName=null", "masterKey.secretKey=yes"),
    "without policies": ("networkPolicies.enabled=false",),
    "monitors": (
        *_GATEWAY,
        "serviceMonitor.enabled=true",
        "serviceMonitor.labels.release=prometheus",
        "networkPolicies.prometheusNamespaces={monitoring}",
    ),
    "dashboards": ("dashboards.enabled=true", "dashboards.namespace=default"),
    "alerts": ("alerts.enabled=true", "alerts.labels.release=prometheus"),
    "telemetry": (
        *_GATEWAY,
        "telemetry.logFormat=json",
        "telemetry.environment.OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318",
        "telemetry.headers.secretName=collector",
        "telemetry.headers.secretKey=yes",
    ),
    "without definitions": ("crds.install=false",),
    "sidecars without limits": (
        "sidecar.resources.limits.memory=null",
        "sidecar.resources.requests.cpu=1",
        "sidecar.defaultProject=shop",
    ),
    "placed pods": (
        *_GATEWAY,
        *(f"{part}.nodeSelector.disk=ssd" for part in ("operator", "webhook", "gateway")),
        *(f"{part}.tolerations[0].operator=Exists" for part in ("operator", "webhook", "gateway")),
    ),
}
"""What `--set-string` or `--set` gets, by a name for people. Where a value could be read as null or a number, it is."""
_LITERAL = {
    "gateway.providerKeysSecretName",
    "masterKey.secretName",
    "masterKey.secretKey",
    "image.pullSecrets",
    "telemetry.headers.secretKey",
}

WRONG: dict[tuple[str, ...], str] = {
    ("database.external.secretName=ledger",): "set trial.enabled to false, or leave external.secretName empty",
    ("database.trial.enabled=false",): "name the Secret with the ledger's DSN in database.external.secretName, or set",
    (*_EXTERNAL, "database.external.sidecarPooler=session"): "set database.external.sidecarURL too",
    ("database.external.sidecarURL=postgresql://db/behest",): "set database.external.secretName too",
    (*_EXTERNAL, "database.external.sidecarURL=postgresql://u:p@db/behest"): "/database/external/sidecarURL",
    ("namespaces={shop,kube-system}",): "kube-system is never looked after: take it out of the list",
    ("namespaces={Shop}",): "at '/namespaces/0'",
    ("namespaces=shop",): "at '/namespaces': got string, want array",
    ("sidecar.port=8079",): "port, podPort and adminPort must differ",
    ("sidecar.port=80",): "at '/sidecar/port'",
    (
        "sidecar.resources.limits.nvidia=1",
    ): "at '/sidecar/resources/limits': additional properties 'nvidia' not allowed",
    ("webhook.enabled=false", "webhook.certificates.from=cert-manager"): "there is no webhook to certify",
    ("webhook.enabled=false", "sidecar.defaultProject=shop"): "nobody adds sidecars: set webhook.enabled",
    ("webhook.certificates.from=vault",): "at '/webhook/certificates/from': value must be one of 'operator'",
    ("gateway.autoscaling.enabled=true",): "are for a gateway: set gateway.enabled",
    (*_GATEWAY, "gateway.providerKeysSecretName=keys"): "say who may use which key of providerKeysSecretName",
    (*_GATEWAY, "gateway.providerKeysFor={ACME_KEY=acme}"): "name the Secret with these keys",
    (
        *_GATEWAY,
        "gateway.providerKeysSecretName=keys",
        "gateway.providerKeysFor={*}",
    ): "at '/gateway/providerKeysFor/0'",
    (*_GATEWAY, "gateway.autoscaling.enabled=true", "gateway.autoscaling.minReplicas=20"): "must not be above",
    ("imagee.tag=1",): "additional properties 'imagee' not allowed",
    ("image.digest=latest",): "at '/image/digest': 'latest' does not match pattern",
    ("operator.policy=guess",): "at '/operator/policy': value must be one of 'checkpoint', 'hold'",
    ("telemetry.environment.PATH=/tmp",): "invalid propertyName 'PATH'",
    ("telemetry.environment.OTEL_SDK_DISABLED=true",): "at '/telemetry/environment/OTEL_SDK_DISABLED': got boolean",
    (
        "telemetry.environment.OTEL_EXPORTER_OTLP_HEADERS=a=b",
        "telemetry.headers.secretName=collector",
    ): "the headers stand in headers.secretName or in environment.OTEL_EXPORTER_OTLP_HEADERS, not in both",
    ("operator.replicas=2",): "at '/operator': additional properties 'replicas' not allowed",
}
"""Values that are refused, and what the message says."""


def flags(settings: tuple[str, ...]) -> list[str]:
    """The values as arguments of Helm."""
    return [
        part for item in settings for part in ("--set-string" if item.partition("=")[0] in _LITERAL else "--set", item)
    ]


def rendered(plane: ControlPlane, settings: tuple[str, ...], *, release: str = "b", namespace: str = "behest") -> str:
    """What `helm template` makes of the chart. Raises `CommandFailed` with Helm's message."""
    return plane.helm("template", release, str(CHART), "--namespace", namespace, *flags(settings))


def documents(text: str) -> list[dict[str, Any]]:
    """The objects of a rendered chart."""
    return [item for item in yaml.safe_load_all(text) if item]


def as_list(objects: list[dict[str, Any]]) -> str:
    """The objects as one JSON document for kubectl."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})


def pod_templates(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pods that these objects make, by their owners; with the volumes that a StatefulSet's controller adds."""
    found: dict[str, dict[str, Any]] = {}
    for item in objects:
        name = f"{item['kind'].lower()}/{item['metadata']['name']}"
        if item["kind"] == "Pod":
            found[name] = item
        elif item["kind"] in ("Deployment", "StatefulSet"):
            found[name] = template = copy.deepcopy(item["spec"]["template"])
            for claim in item["spec"].get("volumeClaimTemplates", []):
                volume = claim["metadata"]["name"]
                template["spec"]["volumes"].append(
                    {"name": volume, "persistentVolumeClaim": {"claimName": f"{volume}-{item['metadata']['name']}-0"}}
                )
    return found
