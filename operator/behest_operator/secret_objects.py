"""Secrets as the API server has them: whose they are, and their values as text."""

import base64
from collections.abc import Mapping

from behest_operator.kubernetes import Kubernetes, Object

_OWNER_LABEL = {"app.kubernetes.io/managed-by": "behest-operator"}


def path_of(namespace: str) -> str:
    """Where the Secrets of a namespace are."""
    return f"/api/v1/namespaces/{namespace}/secrets"


def is_ours(found: Object) -> bool:
    """Whether the operator made it; others are never touched."""
    labels = found["metadata"].get("labels") or {}
    return all(labels.get(name) == value for name, value in _OWNER_LABEL.items())


def data_of(found: Object | None) -> dict[str, str]:
    """The values of a Secret that are text."""
    values: dict[str, str] = {}
    for name, value in ((found or {}).get("data") or {}).items():
        try:
            values[name] = base64.b64decode(value).decode()
        except ValueError:
            continue
    return values


def annotation_of(found: Object | None, name: str) -> str:
    """An annotation; empty where there is none."""
    return str(((found or {}).get("metadata", {}).get("annotations") or {}).get(name, ""))


async def write_secret(
    kubernetes: Kubernetes,
    path: str,
    name: str,
    found: Object | None,
    data: Mapping[str, str],
    annotations: Mapping[str, str],
) -> None:
    """Create a Secret of ours, or replace the one that was found, if it is still that one. Raises `KubernetesError`."""
    document: Object = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": _OWNER_LABEL, "annotations": dict(annotations)},
        "type": "Opaque",
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
    }
    if found is None:
        await kubernetes.create(path, document)
    else:
        document["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
        await kubernetes.replace(f"{path}/{name}", document)
