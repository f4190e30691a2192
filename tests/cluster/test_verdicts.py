"""Invalid manifests get one verdict: from the API server, or where it cannot see the fault from the operator."""

import copy
import json
from typing import Any

import pytest

from behest_ledger.configuration.manifests import InvalidManifestsError, from_object
from cluster.control_plane import CommandFailed, ControlPlane
from cluster.resources import install_crds
from ledger.sample_manifests import INVALID, VALID

LEFT_TO_THE_OPERATOR = (
    "must be an IANA time zone",
    "unless spec.scope.tenant is given",
    "must have at most 8 stars",
    "must be an absolute http or https URL",
    "is not among spec.allowedModels",
    "would allow a whole top-level domain",
)
"""What needs a list, another object or a parser: the condition `Accepted` says it in the words of `behest apply`."""


@pytest.fixture(scope="module")
def namespace(control_plane: ControlPlane) -> str:
    """The one that the manifests name. It stays: nobody here would bring its deletion to an end."""
    install_crds(control_plane)
    name = "demo"
    control_plane.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}},
    )
    return name


@pytest.mark.parametrize(("manifest", "reason"), INVALID, ids=[reason[:80] for _, reason in INVALID])
def test_what_behest_apply_refuses_the_api_server_refuses_or_leaves_to_the_operator(
    control_plane: ControlPlane, namespace: str, manifest: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidManifestsError):
        from_object(manifest)
    try:
        control_plane.kubectl("create", "--dry-run=server", "--filename", "-", stdin=json.dumps(manifest))
    except CommandFailed as error:
        verdict = str(error)
    else:
        verdict = ""
    if verdict:
        assert "internal error" not in verdict.lower()
        return
    assert any(words in reason for words in LEFT_TO_THE_OPERATOR), f"the API server takes it, though {reason}"


@pytest.mark.parametrize("manifest", VALID, ids=[str(number) for number in range(len(VALID))])
def test_what_behest_apply_takes_the_api_server_takes(
    control_plane: ControlPlane, namespace: str, manifest: dict[str, Any]
) -> None:
    from_object(manifest)
    control_plane.kubectl("create", "--dry-run=server", "--filename", "-", stdin=json.dumps(manifest))


def test_what_the_api_server_filled_in_means_the_same(control_plane: ControlPlane, namespace: str) -> None:
    for number, manifest in enumerate(VALID):
        given = copy.deepcopy(manifest)
        given["metadata"] = {"name": f"v{number}", "namespace": namespace}
        control_plane.apply(given)
        kind = given["kind"].lower()
        found = control_plane.get(kind, f"v{number}", namespace)
        stored = from_object({key: found[key] for key in ("apiVersion", "kind", "metadata", "spec")})
        assert stored.spec == from_object(given).spec
