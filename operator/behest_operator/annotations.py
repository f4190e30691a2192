"""What people may write on a pod, in one table: the label that asks for a sidecar and the annotations that shape it.

Everything is a string in Kubernetes; here each has a type, and a value that is not of it is refused with a sentence
that names the annotation. Annotations under our prefix that are not in the table are refused too: a misspelt one would
otherwise be ignored.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from behest_ledger.configuration.rules import DNS_SUBDOMAIN

PREFIX = "behest.ai/"
INJECT_LABEL = "behest.ai/inject"
"""On a pod, with the value "true": asks for a sidecar. A label, because webhooks select by labels."""
TENANT_LABEL = "behest.ai/tenant"
"""On a Namespace, set by cluster administrators: the tenant that its projects belong to, instead of its own name."""
TEMPLATE_HASH = "behest.ai/template-hash"
"""Written by the injector: which template the sidecar was made from. It changes with the chart's settings."""
INJECTED = "behest.ai/injected"
"""Written by the injector: the name of the container that it added."""

_WRITTEN_BY_US = frozenset({TEMPLATE_HASH, INJECTED})


class AnnotationError(ValueError):
    """A value is not what its annotation takes. The message is for whoever wrote the pod."""


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What a pod's annotations say; None: the template's default."""

    project: str | None = None
    pod_auth: str = "workload"
    port: int | None = None
    pod_port: int | None = None
    admin_port: int | None = None
    image: str | None = None
    image_pull_policy: str | None = None
    log_level: str | None = None
    cpu_request: str | None = None
    cpu_limit: str | None = None
    memory_request: str | None = None
    memory_limit: str | None = None
    journal_size: str | None = None
    drain_seconds: int | None = None
    containers: tuple[str, ...] | None = None


class Annotation(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table."""

    name: str
    """Behind the prefix."""
    field: str
    """The member of `Wishes` that it sets."""
    read: Callable[[str], Any]
    """Raises ValueError, whose message says what the value must be."""
    meaning: str


def _project(text: str) -> str:
    parts = text.split("/")
    if len(parts) > 2 or not all(DNS_SUBDOMAIN.fullmatch(part) for part in parts):
        raise ValueError("must be the name of a Project of this namespace")
    return text


def _one_of(*values: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in values:
            raise ValueError(f"must be {' or '.join(values)}")
        return text

    return read


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1024 <= int(text) <= 65535:
        raise ValueError("must be a port from 1024 to 65535")
    return int(text)


def _quantity(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?", text) or not text.strip("0.mkMGTi"):
        raise ValueError('must be a quantity such as "100m" or "128Mi"')
    return text


def _image(text: str) -> str:
    if len(text) > 500 or not re.fullmatch(r"[a-z0-9][-a-zA-Z0-9._:/@]*", text):
        raise ValueError('must be an image such as "registry.example.com/behest:0.1.0"')
    return text


def _drain_seconds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 0 <= int(text) <= 3600:
        raise ValueError("must be whole seconds from 0 to 3600")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in names):
        raise ValueError("must be names of containers with commas between them")
    return names


TABLE = (
    Annotation(name="project", field="project", read=_project, meaning="The Project that pays; of this namespace."),
    Annotation(
        name="pod-auth",
        field="pod_auth",
        read=_one_of("workload", "jwt"),
        meaning="`workload`: the pod's own containers need no token, they are the workload. `jwt`: they need one too.",
    ),
    Annotation(name="port", field="port", read=_port, meaning="Where Services and browsers connect, with tokens."),
    Annotation(name="pod-port", field="pod_port", read=_port, meaning="Where the pod's own containers connect."),
    Annotation(name="admin-port", field="admin_port", read=_port, meaning="Probes and metrics."),
    Annotation(name="image", field="image", read=_image, meaning="Another image than the chart's."),
    Annotation(
        name="image-pull-policy",
        field="image_pull_policy",
        read=_one_of("Always", "IfNotPresent", "Never"),
        meaning="When the image is pulled.",
    ),
    Annotation(
        name="log-level",
        field="log_level",
        read=_one_of("debug", "info", "warning", "error"),
        meaning="How much the sidecar logs.",
    ),
    Annotation(name="cpu-request", field="cpu_request", read=_quantity, meaning="CPU that is reserved for it."),
    Annotation(name="cpu-limit", field="cpu_limit", read=_quantity, meaning="CPU that it may use at most."),
    Annotation(name="memory-request", field="memory_request", read=_quantity, meaning="Memory that is reserved."),
    Annotation(name="memory-limit", field="memory_limit", read=_quantity, meaning="Memory that it may use at most."),
    Annotation(name="journal-size", field="journal_size", read=_quantity, meaning="Size of the journal's folder."),
    Annotation(
        name="drain-seconds",
        field="drain_seconds",
        read=_drain_seconds,
        meaning="How long live streams may go on when the pod stops.",
    ),
    Annotation(
        name="containers",
        field="containers",
        read=_names,
        meaning="The containers that get the environment variables; absent: all.",
    ),
)
_BY_NAME = {PREFIX + row.name: row for row in TABLE}


def wishes_of(annotations: Mapping[str, str]) -> Wishes:
    """The typed values of a pod's annotations. Raises `AnnotationError`."""
    values: dict[str, Any] = {}
    for name, text in sorted(annotations.items()):
        if not name.startswith(PREFIX) or name in _WRITTEN_BY_US:
            continue
        row = _BY_NAME.get(name)
        if row is None:
            known = ", ".join(_BY_NAME)
            raise AnnotationError(f"there is no annotation {name}; there are {known}")
        try:
            values[row.field] = row.read(text)
        except ValueError as error:
            raise AnnotationError(f"annotation {name} {error}, not {text[:100]!r}") from None
    ports = {name: values[name] for name in ("port", "pod_port", "admin_port") if name in values}
    if len(set(ports.values())) < len(ports):
        raise AnnotationError("the annotations behest.ai/port, pod-port and admin-port must name different ports")
    return Wishes(**values)
