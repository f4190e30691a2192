"""Who calls, and for which project: the same first steps of every endpoint that wants a token."""

from collections.abc import Sequence

from behest_ledger.configuration.snapshot import ProjectEntry
from behest_proxy.app.context import RequestContext
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.origins import project_allows
from behest_proxy.errors import Forbidden
from behest_proxy.identity.bearer import bearer_of
from behest_proxy.identity.caller import Caller
from behest_proxy.identity.workload import is_token


def caller_of(
    gateway: Gateway, context: RequestContext, headers: Sequence[tuple[bytes, bytes]], now_s: float
) -> Caller:
    """The caller whom the Authorization header proves; on the pod's own loopback the workload, unless it is a token.

    Raises `InvalidToken` and `Forbidden`.
    """
    bearer = bearer_of([value for name, value in headers if name == b"authorization"])
    workload = gateway.workload
    if context.by_pod and workload is not None and not is_token(bearer):
        tenant_id = gateway.configuration.tenant_of(workload.project_id)
        if tenant_id is None:
            raise Forbidden(
                f"the project {workload.project_id} of this workload does not exist",
                details={"reason": "unknown_project"},
            )
        return workload.caller(tenant_id)
    host_project = context.host_project
    place = None if host_project is None else (host_project.tenant_id, host_project.project_id)
    caller = gateway.verifier.verify(bearer, now_s, place)
    check_host(context, caller.tenant_id, caller.project_id)
    return caller


def check_host(context: RequestContext, tenant_id: str, project_id: str) -> None:
    """A project's own host is for its own tokens and API keys. Raises `Forbidden`."""
    own = context.host_project
    if own is not None and (own.tenant_id, own.project_id) != (tenant_id, project_id):
        raise Forbidden("this host is another project's", details={"reason": "wrong_project"})


def project_of(gateway: Gateway, caller: Caller, context: RequestContext) -> ProjectEntry:
    """The caller's project. From here on only origins that this project allows may read the answer.

    Raises `Forbidden` for a project that is unknown or suspended.
    """
    project = gateway.configuration.project(caller.tenant_id, caller.project_id)
    if project is None:
        raise Forbidden("the token's project does not exist", details={"reason": "unknown_project"})
    if context.origin:
        context.allow_origin = project_allows(project, context.origin.decode("latin-1"))
    if project.suspended:
        raise Forbidden("the project is suspended", details={"reason": "suspended", "what": "project"})
    return project
