"""The sidecar in a pod: one pure function from a pod, as it was sent, to the patch that adds the proxy.

The proxy is a native sidecar: an init container with `restartPolicy: Always`, put first, so that it runs before every
other container, also the pod's own init containers, and ends after them; Jobs complete. Patching twice changes nothing,
and what another webhook added in between gets what it lacks.
"""

import hashlib
import json
from typing import Any

import msgspec

from behest_operator.annotations import INJECT_LABEL, INJECTED, TEMPLATE_HASH, Wishes, wishes_of

CONTAINER = "behest"
SECRET = "behest-sidecar"  # noqa: S105 - the name of a Secret, not one
SECRET_VOLUME = "behest-credentials"  # noqa: S105 - the name of a volume
JOURNAL_VOLUME = "behest-journal"
SECRET_PATH = "/etc/behest"  # noqa: S105 - where it is mounted
JOURNAL_PATH = "/var/run/behest"
UID = 65532
"""Nobody in particular: the same number as in the image."""
POD_KEY = "behest-pod"
"""What the pod's own containers send as their API key: it says "the workload itself", and is no secret."""

Pod = dict[str, Any]
Patch = list[dict[str, Any]]


class PodRefused(ValueError):
    """The pod asked for a sidecar and cannot have one. The message is for whoever wrote it."""


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """What the chart says of every sidecar; a pod's annotations go before it."""

    image: str
    image_pull_policy: str = "IfNotPresent"
    port: int = 8080
    pod_port: int = 8079
    admin_port: int = 8081
    log_level: str = "info"
    log_format: str = "text"
    telemetry: dict[str, str] = {}
    """OpenTelemetry's variables (`OTEL_*`)."""
    telemetry_headers_secret: str = ""
    """A Secret in the pod's namespace with `OTEL_EXPORTER_OTLP_HEADERS`; where there is none, nothing is sent along."""
    telemetry_headers_key: str = "otlp-headers"
    cpu_request: str | None = "50m"
    cpu_limit: str | None = None
    memory_request: str | None = "192Mi"
    memory_limit: str | None = "512Mi"
    journal_size: str = "256Mi"
    drain_seconds: int = 25
    database_pooler: str = "none"
    """What is between sidecars and PostgreSQL: `none`, `transaction` or `session` (PgBouncer's `pool_mode`)."""
    default_project: str | None = None
    """Of pods that name none; absent: such a pod is refused."""

    @property
    def hash(self) -> str:
        """Changes with anything here: annotated, so that a changed template is seen on the pods made from it."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:16]


def patch(pod: Pod, *, namespace: str, template: Template) -> Patch:
    """The JSON patch (RFC 6902) that gives a pod its sidecar; empty where it has one or asked for none.

    Raises `PodRefused` and `AnnotationError`.
    """
    metadata, spec = pod.get("metadata", {}), pod.get("spec", {})
    if metadata.get("labels", {}).get(INJECT_LABEL) != "true":
        return []
    wishes = wishes_of(metadata.get("annotations") or {})
    _check(pod, wishes, namespace)
    settings = _Settings.of(template, wishes)
    wanted: dict[str, Any] = {
        "/metadata/annotations": _annotations(metadata, template),
        "/spec/volumes": _volumes(spec, settings),
        "/spec/initContainers": [
            _container(pod, namespace, settings),
            *(_with_environment(item, settings) for item in spec.get("initContainers") or [] if not _is_ours(item)),
        ],
        "/spec/containers": [_with_environment(item, settings) for item in spec.get("containers") or []],
    }
    found = {
        "/metadata/annotations": metadata.get("annotations"),
        "/spec/volumes": spec.get("volumes"),
        "/spec/initContainers": spec.get("initContainers"),
        "/spec/containers": spec.get("containers"),
    }
    if (metadata.get("annotations") or {}).get(INJECTED) == CONTAINER and any(
        _is_ours(item) for item in spec.get("initContainers") or []
    ):
        # What the API server added to our container since then is not undone.
        wanted["/spec/initContainers"][0] = next(item for item in spec["initContainers"] if _is_ours(item))
    return [{"op": "add", "path": path, "value": value} for path, value in wanted.items() if value != found[path]]


class _Settings(msgspec.Struct, frozen=True, kw_only=True):
    template: Template
    project: str
    by_workload: bool
    containers: tuple[str, ...] | None

    @classmethod
    def of(cls, template: Template, wishes: Wishes) -> "_Settings":
        given = {
            field: value for field in Template.__struct_fields__ if (value := getattr(wishes, field, None)) is not None
        }
        merged = msgspec.structs.replace(template, **given)
        project = wishes.project or template.default_project
        if project is None:
            raise PodRefused("the annotation behest.ai/project is missing: it names the Project that pays")
        if len({merged.port, merged.pod_port, merged.admin_port}) < 3:
            raise PodRefused("the ports of the sidecar must differ from each other")
        return cls(
            template=merged,
            project=project,
            by_workload=wishes.pod_auth == "workload",
            containers=wishes.containers,
        )


def _check(pod: Pod, wishes: Wishes, namespace: str) -> None:
    spec = pod.get("spec", {})
    if wishes.project is not None and wishes.project.rpartition("/")[0] not in ("", namespace):
        raise PodRefused(
            f"the annotation behest.ai/project must name a Project of this namespace ({namespace}),"
            f" not {wishes.project}"
        )
    if spec.get("hostNetwork"):
        raise PodRefused(
            "the pod uses the host's network, where every process of the node could spend its budget:"
            " remove hostNetwork, or the label behest.ai/inject"
        )
    system = (spec.get("os") or {}).get("name") or (spec.get("nodeSelector") or {}).get("kubernetes.io/os")
    if system not in (None, "linux"):
        raise PodRefused(f"the pod is for {system}, the sidecar for linux only: remove the label behest.ai/inject")
    annotated = (pod.get("metadata", {}).get("annotations") or {}).get(INJECTED) == CONTAINER
    everything = [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]
    if any(item.get("name") == CONTAINER for item in everything) and not annotated:
        raise PodRefused(
            f"the pod has a container named {CONTAINER} of its own: rename it, or remove the label behest.ai/inject"
        )
    names = {item.get("name") for item in everything}
    if wishes.containers is not None and (missing := sorted(set(wishes.containers) - names)):
        raise PodRefused(f"the annotation behest.ai/containers names {', '.join(missing)}, which the pod does not have")


def _is_ours(container: Pod) -> bool:
    return bool(container.get("name") == CONTAINER)


def _annotations(metadata: Pod, template: Template) -> dict[str, str]:
    found = dict(metadata.get("annotations") or {})
    # The hash stays that of the template that made the container.
    if found.get(INJECTED) != CONTAINER:
        found[TEMPLATE_HASH] = template.hash
    return {**found, INJECTED: CONTAINER}


def _volumes(spec: Pod, settings: _Settings) -> list[Pod]:
    ours: list[Pod] = [
        {"name": SECRET_VOLUME, "secret": {"secretName": SECRET, "defaultMode": 0o444}},
        {"name": JOURNAL_VOLUME, "emptyDir": {"sizeLimit": settings.template.journal_size}},
    ]
    found = list(spec.get("volumes") or [])
    names = {volume.get("name") for volume in found}
    return found + [volume for volume in ours if volume["name"] not in names]


def _with_environment(container: Pod, settings: _Settings) -> Pod:
    """The container with our variables, those excepted that it sets itself.

    A container with a base URL of its own goes to its own provider: it keeps its key too.
    """
    if not settings.by_workload or (settings.containers is not None and container["name"] not in settings.containers):
        return container
    url = f"http://127.0.0.1:{settings.template.pod_port}"
    found = list(container.get("env") or [])
    names = {item.get("name") for item in found}
    ours = [{"name": "BEHEST_BASE_URL", "value": url}]
    if "OPENAI_BASE_URL" not in names:
        ours += [{"name": "OPENAI_BASE_URL", "value": f"{url}/v1"}, {"name": "OPENAI_API_KEY", "value": POD_KEY}]
    elif any(item == {"name": "OPENAI_BASE_URL", "value": f"{url}/v1"} for item in found):
        ours.append({"name": "OPENAI_API_KEY", "value": POD_KEY})
    missing = [item for item in ours if item["name"] not in names]
    return {**container, "env": found + missing} if missing else container


def _owner(pod: Pod) -> str:
    """The workload's name: the controller's, a Deployment's instead of its ReplicaSet's; else the pod's own."""
    metadata = pod.get("metadata", {})
    owner = next((item for item in metadata.get("ownerReferences") or [] if item.get("controller")), None)
    if owner is None:
        return str(metadata.get("name") or (metadata.get("generateName") or "pod").rstrip("-"))
    name = str(owner.get("name", ""))
    suffix = "-" + str((metadata.get("labels") or {}).get("pod-template-hash", ""))
    if owner.get("kind") == "ReplicaSet" and len(suffix) > 1 and name.endswith(suffix):
        return name.removesuffix(suffix)
    return name


def _container(pod: Pod, namespace: str, settings: _Settings) -> Pod:
    template = settings.template
    labels = {key: value for key, value in (pod.get("metadata", {}).get("labels") or {}).items() if key != INJECT_LABEL}
    plain = {
        "BEHEST_DATABASE_URL_FILE": f"{SECRET_PATH}/database-url",
        "BEHEST_SIGNING_KEY_FILE": f"{SECRET_PATH}/signing-key.pem",
        "BEHEST_DATA_KEY_FILE": f"{SECRET_PATH}/data-key",
        "BEHEST_JOURNAL_DIR": JOURNAL_PATH,
        "BEHEST_BIND": f"0.0.0.0:{template.port}",
        "BEHEST_ADMIN_BIND": f"0.0.0.0:{template.admin_port}",
        "BEHEST_DRAIN_S": str(template.drain_seconds),
        "BEHEST_LOG_LEVEL": template.log_level,
        "BEHEST_LOG_FORMAT": template.log_format,
        "BEHEST_WORKLOAD_NAMESPACE": namespace,
        "BEHEST_WORKLOAD_NAME": _owner(pod),
        "BEHEST_WORKLOAD_PROJECT": settings.project,
        "BEHEST_WORKLOAD_LABELS": json.dumps(labels, sort_keys=True, separators=(",", ":")),
    }
    if template.database_pooler != "none":
        plain["BEHEST_DATABASE_POOLER"] = template.database_pooler
    plain |= template.telemetry
    if settings.by_workload:
        plain["BEHEST_POD_BIND"] = f"127.0.0.1:{template.pod_port}"
    environment: list[Pod] = [{"name": name, "value": value} for name, value in plain.items()]
    environment.append({"name": "BEHEST_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})
    if template.telemetry_headers_secret:
        reference = {"name": template.telemetry_headers_secret, "key": template.telemetry_headers_key, "optional": True}
        environment.append({"name": "OTEL_EXPORTER_OTLP_HEADERS", "valueFrom": {"secretKeyRef": reference}})
    requests = {"cpu": template.cpu_request, "memory": template.memory_request}
    limits = {"cpu": template.cpu_limit, "memory": template.memory_limit}

    def probe(path: str, **more: int) -> Pod:
        return {"httpGet": {"path": path, "port": "behest-admin"}, "timeoutSeconds": 2, **more}

    return {
        "name": CONTAINER,
        "image": template.image,
        "imagePullPolicy": template.image_pull_policy,
        "args": ["proxy"],
        "restartPolicy": "Always",
        "env": environment,
        "ports": [
            {"name": "behest", "containerPort": template.port, "protocol": "TCP"},
            {"name": "behest-admin", "containerPort": template.admin_port, "protocol": "TCP"},
        ],
        "resources": {
            name: values
            for name, given in (("requests", requests), ("limits", limits))
            if (values := {key: value for key, value in given.items() if value})
        },
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # The application starts once the proxy listens; whether the ledger answers is readiness.
        "startupProbe": probe("/healthz", periodSeconds=1, failureThreshold=60),
        "readinessProbe": probe("/readyz", periodSeconds=2, failureThreshold=3),
        "livenessProbe": probe("/healthz", periodSeconds=10, failureThreshold=6),
        "lifecycle": {"preStop": {"exec": {"command": ["behest", "drain"]}}},
        "volumeMounts": [
            {"name": SECRET_VOLUME, "mountPath": SECRET_PATH, "readOnly": True},
            {"name": JOURNAL_VOLUME, "mountPath": JOURNAL_PATH},
        ],
    }
