"""The workload that a sidecar runs beside: who an application is that brings no token.

On the listener of the pod's own loopback, where only the pod's containers can connect, a bearer that is no token means
the workload itself. Everywhere else it means nothing.
"""

from collections.abc import Mapping

import msgspec

from behest_proxy.identity.caller import Caller, workload_caller

LABELS_BYTES_MAX = 16 * 1024


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What the pod said of itself when the sidecar was put into it."""

    namespace: str
    name: str
    """Of the controller that made the pod: a Deployment, a Job; or of the pod itself."""
    project_id: str
    """`<namespace>/<name>` of the project that pays for the workload's own requests."""
    labels: Mapping[str, str] = {}

    @property
    def qualified_name(self) -> str:
        """`<namespace>/<name>`."""
        return f"{self.namespace}/{self.name}"

    def caller(self, tenant_id: str) -> Caller:
        """The workload as a caller."""
        return workload_caller(
            tenant_id=tenant_id, project_id=self.project_id, namespace=self.namespace, owner=self.name
        )


def is_token(bearer: str) -> bool:
    """Whether a bearer has the form of a signed token (RFC 7515, section 7.1): then it must be a good one."""
    return bearer.count(".") == 2


def labels_from(text: str) -> dict[str, str]:
    """Labels written as a JSON object. Raises ValueError with what they must be."""
    try:
        labels = msgspec.json.decode(text, type=dict[str, str])
    except msgspec.DecodeError:
        labels = None
    if labels is None or len(text) > LABELS_BYTES_MAX:
        raise ValueError("must be a JSON object of strings, as a pod's labels are")
    return labels
