"""The kinds of resource on the API server, for the tests that need them."""

from behest_operator.crds import KINDS, written
from cluster.control_plane import ControlPlane


def install_crds(plane: ControlPlane) -> None:
    """Apply the CustomResourceDefinitions and wait until the API server serves them. Again changes nothing."""
    for kind in KINDS:
        plane.apply(written(kind))
    for kind in KINDS:
        plane.kubectl("wait", "--for=condition=Established", f"crd/{kind.lower()}s.behest.ai", "--timeout=30s")


def forget_resources(plane: ControlPlane) -> None:
    """Take every resource of ours away, whoever still wanted to look after it: later operators do not meet them."""
    for kind in KINDS:
        if plane.client.get(plane.path(kind.lower())).status_code == 404:
            continue  # the kind was never defined
        for item in plane.items(kind.lower()):
            metadata = item["metadata"]
            path = f"{plane.path(kind.lower(), metadata['namespace'])}/{metadata['name']}"
            plane.client.patch(
                path,
                content='{"metadata": {"finalizers": null}}',
                headers={"Content-Type": "application/merge-patch+json"},
            )
            plane.client.delete(path)
