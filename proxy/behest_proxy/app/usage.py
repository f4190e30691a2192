"""What was used: `GET /v1/usage` by time, `GET /v1/billing/usage` by model, session and whose key paid."""

import asyncio
import re
import time
import zoneinfo
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, get_args
from zoneinfo import ZoneInfo

from starlette.requests import Request
from starlette.responses import Response

from behest_ledger.configuration.snapshot import ProjectEntry
from behest_ledger.money import usd_from_pico
from behest_ledger.store.errors import LedgerError, LedgerForbiddenError, LedgerRefusedError
from behest_ledger.store.pool import asking
from behest_ledger.store.usage import Granularity, UsageBin, UsageTotal, UsageTotals, usage_bins, usage_totals
from behest_proxy.app.callers import caller_of, project_of
from behest_proxy.app.context import context_of
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.messages import exact_number, json_response
from behest_proxy.errors import Forbidden, InvalidRequest, LedgerUnavailable
from behest_proxy.identity.caller import Caller, is_clean_text

WINDOW_DEFAULT = timedelta(days=30)
WINDOW_BY_MINUTE = timedelta(days=7)
"""Before `to`, where no `from` is asked for."""
BINS_MAX = 12_000
"""Pieces of time in one answer at most: eight days by the minute, sixteen months by the hour."""
_BINS_AT_ONCE = 500
"""Made into JSON before streams get their turn: two milliseconds."""

_GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
_LENGTH = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1), "day": timedelta(days=1)}
_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2500, 1, 1, tzinfo=UTC)


class Usage:
    """The two endpoints."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def usage(self, request: Request) -> Response:
        """`GET /v1/usage?from&to&user_id&granularity&tz`: one's own, or with a higher role anybody's of the project."""
        caller, project = self._asked_by(request)
        zone = _zone(request)
        granularity = _granularity(request)
        begin, end = _between(request, zone, WINDOW_BY_MINUTE if granularity == "minute" else WINDOW_DEFAULT)
        if (end - begin) / _LENGTH[granularity] > BINS_MAX:
            raise InvalidRequest(
                f"granularity: that would be more than {BINS_MAX} times a {granularity}: ask for less",
                param="granularity",
            )
        try:
            async with asking(self._gateway.pool) as connection:
                bins = await usage_bins(
                    connection,
                    tenant_id=caller.tenant_id,
                    project_id=project.project_id,
                    begin=begin,
                    end=end,
                    user_id=_user(request, caller),
                    granularity=granularity,
                    zone=zone.key,
                )
        except LedgerForbiddenError:
            raise ledger_away() from None
        except LedgerRefusedError:
            raise InvalidRequest(f"tz: the ledger has no time zone {zone.key!r}", param="tz") from None
        except LedgerError:
            raise ledger_away() from None
        breakdown: list[dict[str, Any]] = []
        for number, one in enumerate(bins, start=1):
            breakdown.append({"timestamp": one.begins_at.astimezone(zone), **_sums([one])})
            if number % _BINS_AT_ONCE == 0:
                await asyncio.sleep(0)
        return json_response({"totals": _sums(bins), "breakdown": breakdown})

    async def billing_usage(self, request: Request) -> Response:
        """`GET /v1/billing/usage?from&to`: totals by model and session; a user sees only their own."""
        caller, project = self._asked_by(request)
        begin, end = _between(request, ZoneInfo("UTC"), WINDOW_DEFAULT)
        try:
            async with asking(self._gateway.pool) as connection:
                totals = await usage_totals(
                    connection,
                    tenant_id=caller.tenant_id,
                    project_id=project.project_id,
                    begin=begin,
                    end=end,
                    user_id=None if caller.sees_every_user else caller.user_id,
                )
        except LedgerError:
            raise ledger_away() from None
        return json_response(
            {
                "project_id": project.project_id,
                "window": {"from": begin, "to": end},
                "platform": _summary(totals, byok=False),
                "byok": _summary(totals, byok=True),
            }
        )

    def _asked_by(self, request: Request) -> tuple[Caller, ProjectEntry]:
        context = context_of(request.scope)
        caller = caller_of(self._gateway, context, request.scope["headers"], time.time())
        return caller, project_of(self._gateway, caller, context)


def ledger_away() -> LedgerUnavailable:
    """What a caller is told of a ledger that did not answer."""
    return LedgerUnavailable("the ledger cannot be reached", retry_after_s=1)


def _summary(totals: UsageTotals, *, byok: bool) -> dict[str, Any]:
    models = [total for total in totals.models if total.byok == byok]
    return {
        **_costs(models),
        "by_model": [{"model": one.name, **_costs([one])} for one in sorted(models, key=lambda one: -one.amount_pico)],
        "by_session": [{"session_id": one.name, **_costs([one])} for one in totals.sessions if one.byok == byok],
        "sessions": totals.byok_sessions_number if byok else totals.sessions_number,
    }


def _costs(parts: Iterable[UsageTotal | UsageBin]) -> dict[str, Any]:
    parts = list(parts)
    return {
        "requests": sum(part.requests for part in parts),
        "input_tokens": sum(part.input_tokens for part in parts),
        "output_tokens": sum(part.output_tokens for part in parts),
        "cost_usd": exact_number(usd_from_pico(sum(part.amount_pico for part in parts))),
    }


def _sums(bins: Iterable[UsageBin]) -> dict[str, Any]:
    costs = _costs(bins)
    return {**costs, "tokens": costs["input_tokens"] + costs["output_tokens"]}


# What was asked. Each may raise `InvalidRequest`, naming the parameter.


def _user(request: Request, caller: Caller) -> str | None:
    """Whose usage; None: everybody's of the project."""
    asked = request.query_params.get("user_id")
    if not asked:
        return None if caller.sees_every_user else caller.user_id
    if not is_clean_text(asked):
        raise InvalidRequest("user_id: must be 1-255 characters without control characters", param="user_id")
    if asked != caller.user_id and not caller.sees_every_user:
        raise Forbidden("only a token with the role admin or dashboard-service sees the usage of others")
    return asked


def _granularity(request: Request) -> Granularity:
    asked = request.query_params.get("granularity") or "day"
    if asked not in _GRANULARITIES:
        raise InvalidRequest(f"granularity: must be {', '.join(_GRANULARITIES)}", param="granularity")
    return asked


@cache
def _zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones())


def _zone(request: Request) -> ZoneInfo:
    asked = request.query_params.get("tz") or "UTC"
    if asked not in _zones():
        raise InvalidRequest(f"tz: must be a time zone such as Europe/Berlin, not {asked[:64]!r}", param="tz")
    return ZoneInfo(asked)


def _between(request: Request, zone: ZoneInfo, window: timedelta) -> tuple[datetime, datetime]:
    end = moment_param(request, "to", zone) or datetime.now(UTC)
    begin = moment_param(request, "from", zone) or end - window
    if begin > end:
        raise InvalidRequest("from: must not be after to", param="from")
    return begin, end


# The published Python SDK does not percent-encode: the `+` of an offset arrives as a space.
_UNENCODED_OFFSET = re.compile(r" (\d\d:?\d\d)$")


def moment_param(request: Request, name: str, zone: ZoneInfo) -> datetime | None:
    """A query parameter as a time: RFC 3339, or without an offset, or a plain date, which are meant in the zone."""
    text = request.query_params.get(name)
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(_UNENCODED_OFFSET.sub(r"+\1", text))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=zone)
        moment = moment.astimezone(UTC)
    except (ValueError, OverflowError):
        moment = None
    if moment is None or not _EARLIEST <= moment < _LATEST:
        raise InvalidRequest(
            f"{name}: must be a time such as 2026-04-01T00:00:00Z or a date, not {text[:64]!r}", param=name
        )
    return moment
