"""The small endpoints: tokens, models, budgets and the bill."""

import re
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from behest_ledger.configuration.routing import served_models
from behest_ledger.configuration.status import shown_amount
from behest_ledger.money import usd_from_pico
from behest_ledger.store import reports
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.pool import asking
from behest_ledger.store.reports import UsageTotal
from behest_proxy.app.callers import caller_of, project_of
from behest_proxy.app.context import context_of
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.messages import ClientLeftError, read_body
from behest_proxy.errors import InvalidRequest, LedgerUnavailable
from behest_proxy.identity.bearer import bearer_of
from behest_proxy.identity.mint import BODY_BYTES_MAX, mint, parse_mint
from behest_proxy.identity.session import NO_SESSION, session_of

Endpoint = Callable[[Request], Awaitable[Response]]

_WINDOW_DEFAULT = timedelta(days=30)


class Endpoints:
    """One method an endpoint."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def mint(self, request: Request) -> Response:
        """`POST /v1/auth/mint`: an API key becomes a short-lived token for one user."""
        headers = request.scope["headers"]
        api_key = bearer_of([value for name, value in headers if name == b"authorization"])
        record = await self._gateway.api_keys.verify(api_key)
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
        return _json({"object": "list", "data": data})

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
            "session": session or NO_SESSION,
            "tier": tier.name if tier is not None else "",
        }
        try:
            async with asking(gateway.pool) as connection:
                states = await reports.budgets_of(connection, caller.tenant_id, attributes)
        except LedgerError:
            raise LedgerUnavailable("the ledger cannot be reached", retry_after_s=1) from None
        return _json({"object": "list", "data": [_budget(state) for state in states]})

    async def billing_usage(self, request: Request) -> Response:
        """`GET /v1/billing/usage?from&to`: totals by model and session; a user sees only their own."""
        gateway = self._gateway
        caller = caller_of(gateway, context_of(request.scope), request.scope["headers"], time.time())
        project = project_of(gateway, caller, context_of(request.scope))
        end = _moment(request, "to") or datetime.now(UTC)
        begin = _moment(request, "from") or end - _WINDOW_DEFAULT
        if begin > end:
            raise InvalidRequest("from: must not be after to", param="from")
        try:
            async with asking(gateway.pool) as connection:
                totals = await reports.usage_by_model_and_session(
                    connection,
                    tenant_id=caller.tenant_id,
                    project_id=project.project_id,
                    begin=begin,
                    end=end,
                    user_id=None if caller.sees_every_user else caller.user_id,
                )
        except LedgerError:
            raise LedgerUnavailable("the ledger cannot be reached", retry_after_s=1) from None
        return _json(
            {
                "project_id": project.project_id,
                "window": {"from": begin, "to": end},
                "platform": _summary([total for total in totals if not total.byok]),
                "byok": _summary([total for total in totals if total.byok]),
            }
        )


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _usd(amount_pico: int) -> msgspec.Raw:
    """USD as a JSON number with every digit: a float would round it."""
    return msgspec.Raw(usd_from_pico(amount_pico).encode())


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


def _summary(totals: list[UsageTotal]) -> dict[str, Any]:
    return {
        **_sums(totals),
        "by_model": _grouped(totals, "model", lambda total: total.model),
        "by_session": _grouped(totals, "session_id", lambda total: total.session_id),
    }


def _grouped(totals: list[UsageTotal], name: str, key: Callable[[UsageTotal], str]) -> list[dict[str, Any]]:
    groups: dict[str, list[UsageTotal]] = {}
    for total in totals:
        groups.setdefault(key(total), []).append(total)
    ordered = sorted(groups.items(), key=lambda item: -sum(total.amount_pico for total in item[1]))
    return [{name: value, **_sums(group)} for value, group in ordered]


def _sums(totals: Iterable[UsageTotal]) -> dict[str, Any]:
    totals = list(totals)
    return {
        "requests": sum(total.requests for total in totals),
        "input_tokens": sum(total.input_tokens for total in totals),
        "output_tokens": sum(total.output_tokens for total in totals),
        "cost_usd": _usd(sum(total.amount_pico for total in totals)),
    }


_UNENCODED_OFFSET = re.compile(r" (\d\d:\d\d)$")


def _moment(request: Request, name: str) -> datetime | None:
    """A query parameter as a time: RFC 3339, a plain date, or an offset whose `+` came as a space.

    Raises `InvalidRequest`.
    """
    text = request.query_params.get(name)
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(_UNENCODED_OFFSET.sub(r"+\1", text))
    except ValueError:
        raise InvalidRequest(
            f"{name}: must be a time such as 2026-04-01T00:00:00Z or a date, not {text[:64]!r}", param=name
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
