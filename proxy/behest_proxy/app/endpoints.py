"""The small endpoints: tokens, models and budgets."""

import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from behest_ledger.configuration.routing import served_models
from behest_ledger.configuration.status import shown_amount
from behest_ledger.store import reports
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.pool import asking
from behest_proxy.app.callers import caller_of, check_host, project_of
from behest_proxy.app.context import context_of
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.messages import ClientLeftError, json_response, read_body
from behest_proxy.errors import LedgerUnavailable
from behest_proxy.identity.bearer import bearer_of
from behest_proxy.identity.mint import BODY_BYTES_MAX, mint, parse_mint
from behest_proxy.identity.session import session_of

Endpoint = Callable[[Request], Awaitable[Response]]


class Endpoints:
    """One method an endpoint."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def mint(self, request: Request) -> Response:
        """`POST /v1/auth/mint`: an API key becomes a short-lived token for one user."""
        headers = request.scope["headers"]
        api_key = bearer_of([value for name, value in headers if name == b"authorization"])
        record = await self._gateway.api_keys.verify(api_key)
        check_host(context_of(request.scope), record.tenant_id, record.project_id)
        try:
            body = await read_body(request.receive, headers, bytes_max=BODY_BYTES_MAX)
        except ClientLeftError:
            return Response(status_code=400)
        answer = mint(
            parse_mint(body),
            record,
            signing_key=self._gateway.signing_keys.of(record.tenant_id),
            issuer=self._gateway.settings.issuer,
            now_s=time.time(),
            new_id=lambda: str(uuid4()),
        )
        return Response(answer.body(), media_type="application/json", headers={"cache-control": "no-store"})

    async def jwks(self, _request: Request) -> Response:
        """`GET /.well-known/jwks.json`: the public halves of our signing keys (RFC 7517)."""
        return Response(
            self._gateway.verifier.keys.jwks(),
            media_type="application/json",
            headers={"cache-control": "max-age=300"},
        )

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: what the caller's project may use, as OpenAI lists it."""
        gateway = self._gateway
        caller = caller_of(gateway, context_of(request.scope), request.scope["headers"], time.time())
        project = project_of(gateway, caller, context_of(request.scope))
        names = served_models(gateway.configuration, project)
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "behest"} for name in names]
        return json_response({"object": "list", "data": data})

    async def budgets(self, request: Request) -> Response:
        """`GET /v1/budgets`: the budgets that bind the caller, and what is left of them."""
        gateway = self._gateway
        headers = request.scope["headers"]
        caller = caller_of(gateway, context_of(request.scope), headers, time.time())
        project = project_of(gateway, caller, context_of(request.scope))
        session = session_of(caller, [value for name, value in headers if name == b"x-session-id"])
        tier = gateway.configuration.tier(project, caller.tier)
        attributes = {
            "namespace": project.namespace,
            "project": project.project_id,
            "user": caller.user_id,
            "session": session,
            "tier": tier.name if tier is not None else "",
        }
        try:
            async with asking(gateway.pool) as connection:
                states = await reports.budgets_of(connection, caller.tenant_id, attributes)
        except LedgerError:
            raise LedgerUnavailable("the ledger cannot be reached", retry_after_s=1) from None
        return json_response({"object": "list", "data": [_budget(state) for state in states]})


def _budget(state: reports.BudgetState) -> dict[str, Any]:
    def amount(text: str) -> str:
        return shown_amount(int(text), state.unit)

    return {
        "budget": state.budget,
        "unit": state.unit,
        "limit": amount(state.limit),
        "spent": amount(state.spent),
        "held": amount(state.held),
        "remaining": amount(state.remaining),
        "window": state.period,
        "enforcement": state.enforcement,
        "suspended": state.suspended,
        "phase": state.phase,
        "resets_at": state.resets_at,
    }
