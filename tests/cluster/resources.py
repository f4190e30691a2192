"""The kinds of resource on the API server, for the tests that need them."""

from behest_operator.crds import KINDS, written
from cluster.control_plane import ControlPlane


def install_crds(plane: ControlPlane) -> None:
    """Apply the CustomResourceDefinitions and wait until the API server serves them. Again changes nothing."""
    for kind in KINDS:
        plane.apply(written(kind))
    for kind in KINDS:
        plane.kubectl("wait", "--for=condition=Established", f"crd/{kind.lower()}s.behest.ai", "--timeout=30s")
