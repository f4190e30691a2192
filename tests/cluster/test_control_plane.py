"""The control plane of these tests is the real one."""

import pytest

from cluster.control_plane import CommandFailed, ControlPlane


def test_the_api_server_refuses_what_kubernetes_refuses(control_plane: ControlPlane) -> None:
    namespace = control_plane.namespace()
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": namespace},
        "spec": {"containers": [{"name": "a", "image": "a"}, {"name": "a", "image": "b"}]},
    }
    with pytest.raises(CommandFailed, match=r"spec.containers\[1\].name: Duplicate value"):
        control_plane.apply(pod)


def test_a_service_account_may_do_what_its_roles_say_and_no_more(control_plane: ControlPlane) -> None:
    namespace = control_plane.namespace()
    kubeconfig = control_plane.kubeconfig_of("default", namespace)
    with pytest.raises(CommandFailed, match="cannot list resource"):
        control_plane.kubectl("get", "secrets", kubeconfig=kubeconfig)


def test_helm_speaks_to_it(control_plane: ControlPlane) -> None:
    assert "NAME" in control_plane.helm("list", "--all-namespaces")
