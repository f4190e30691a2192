"""The built-in page: what is spent, at a glance, for people without a dashboard.

It shows what every tenant of this process spends, so it fails closed: it answers only on this machine's own loopback
(`kubectl port-forward` arrives there too), only under a name that means it (a page elsewhere could make a browser ask
here under another name), and not at all where other containers share that loopback. What it shows comes from clients:
it is data in JSON, put into the page as text, and no script runs but the page's own.
"""

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from behest_ledger.configuration.status import BudgetStatus, shown_amount
from behest_ledger.money import usd_from_pico
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.overview import Overview, SessionSpend, find_sessions, read_overview
from behest_ledger.store.pool import Connection, asking, open_pool
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.messages import json_response
from behest_proxy.identity.caller import TEXT_LENGTH_MAX

RANGES = {
    "1h": (timedelta(hours=1), timedelta(minutes=1)),
    "24h": (timedelta(hours=24), timedelta(minutes=20)),
    "7d": (timedelta(days=7), timedelta(hours=2)),
}
"""How far the page looks back, and the pieces of its plot."""

FRESH_S = 1.5
"""An answer is given to all who ask within so long."""
REST_FACTOR = 20
"""The ledger rests for so many times as long as an answer took: all pages together take a twentieth of a connection."""
IDLE_S = 60.0
"""After so long without anybody who looks, the connection is closed."""

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass
class _Answer:
    """What was told last for a range, and until when it is told again."""

    content: Any = None
    good_until_s: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Page:
    """The page and its data."""

    def __init__(self, gateway: Gateway, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._gateway = gateway
        self._clock_s = clock_s
        self._answers = {name: _Answer() for name in RANGES}
        self._searching = asyncio.Lock()
        self._pool: Connection = None
        self._closing: asyncio.TimerHandle | None = None

    def routes(self) -> list[Route]:
        """For the admin listener; none where the page is off."""
        if not self._gateway.settings.shows_page:
            return []
        routes = [Route(path, _guarded(_file(*file)), methods=["GET"]) for path, file in _FILES.items()]
        routes.append(Route("/page/now.json", _guarded(self.now), methods=["GET"]))
        routes.append(Route("/page/sessions.json", _guarded(self.sessions), methods=["GET"]))
        return routes

    async def now(self, request: Request) -> Response:
        """`GET /page/now.json?range=1h|24h|7d`: everything that the page shows."""
        name = request.query_params.get("range") or "1h"
        answer = self._answers.get(name)
        if answer is None:
            return _problem(f"range: must be {', '.join(RANGES)}", 400)
        async with answer.lock:
            if self._clock_s() >= answer.good_until_s:
                begun_s = self._clock_s()
                try:
                    answer.content = await self._read(name)
                except LedgerError:
                    answer.content = None
                taken_s = self._clock_s() - begun_s
                answer.good_until_s = begun_s + taken_s + max(FRESH_S, REST_FACTOR * taken_s)
            if answer.content is None:
                return _problem("the ledger gave no answer in time: look back less far, or wait", 503)
            return json_response(answer.content)

    async def sessions(self, request: Request) -> Response:
        """`GET /page/sessions.json?range&q`: sessions whose ids begin so. One search at a time."""
        name = request.query_params.get("range") or "1h"
        prefix = request.query_params.get("q") or ""
        if name not in RANGES or not 0 < len(prefix) <= TEXT_LENGTH_MAX or "\0" in prefix:
            return _problem(f"q: the beginning of a session's id; range: {', '.join(RANGES)}", 400)
        if self._searching.locked():
            return _problem("another search runs", 429)
        async with self._searching:
            try:
                async with asking(await self._connections()) as connection:
                    found = await find_sessions(connection, since=_since(name), prefix=prefix)
            except LedgerError:
                return _problem("the ledger gave no answer in time: look back less far", 503)
        return json_response({"sessions": [_session(one) for one in found]})

    async def _read(self, name: str) -> dict[str, Any]:
        since = _since(name)
        async with asking(await self._connections()) as connection:
            found = await read_overview(connection, since=since, piece=RANGES[name][1])
        return _told(found, since, RANGES[name][1])

    async def _connections(self) -> Connection:
        """A connection beside those that requests use, while somebody looks."""
        loop = asyncio.get_running_loop()
        if self._pool is None:
            settings = self._gateway.settings
            self._pool = await open_pool(
                self._gateway.mounted.database_url,
                size=1,
                application_name=f"{settings.name} page",
                pooler=settings.database_pooler,
            )
        if self._closing is not None:
            self._closing.cancel()
        self._closing = loop.call_later(IDLE_S, self._close)
        return self._pool

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()
        self._pool = self._closing = None


def _since(name: str) -> datetime:
    """The begin, at the edge of a piece: so that pieces stay where they are while time goes on."""
    length, piece = RANGES[name]
    now = datetime.now(UTC)
    return now - length + piece - timedelta(seconds=now.timestamp() % piece.total_seconds())


def _guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def guard(request: Request) -> Response:
        if not _is_local(request):
            response: Response = PlainTextResponse("only from this machine: kubectl port-forward\n", status_code=403)
        else:
            response = await endpoint(request)
        response.headers.update(_HEADERS)
        return response

    return guard


def _is_local(request: Request) -> bool:
    """Whether it comes over loopback and names it, and no page of another site sent it."""
    client = request.client.host if request.client is not None else ""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped  # on a listener for both families
    if not address.is_loopback:
        return False
    host = request.headers.get("host", "").lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name in _LOCAL_NAMES and request.headers.get("sec-fetch-site", "none") in ("none", "same-origin")


@cache
def _content(name: str) -> bytes:
    return files("behest_proxy.app").joinpath("page_files", name).read_bytes()


def _file(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def file(_request: Request) -> Response:
        return Response(_content(name), media_type=media_type)

    return file


def _problem(text: str, status: int) -> Response:
    response = json_response({"problem": text})
    response.status_code = status
    return response


def _told(found: Overview, since: datetime, piece: timedelta) -> dict[str, Any]:
    names = list(dict.fromkeys((one.model, one.is_others) for one in found.bins))
    totals = {name: sum(one.amount_pico for one in found.bins if (one.model, one.is_others) == name) for name in names}
    return {
        "at": datetime.now(UTC),
        "since": since,
        "piece_s": int(piece.total_seconds()),
        "live": found.live,
        "live_usd": usd_from_pico(found.live_pico),
        "spent_usd": usd_from_pico(sum(totals.values())),
        "requests_ended": sum(one.requests for one in found.bins),
        "tokens": sum(one.tokens for one in found.bins),
        "models": [
            {"model": model, "others": others, "usd": usd_from_pico(totals[model, others])}
            for model, others in sorted(names, key=lambda name: (name[1], -totals[name], name[0]))
        ],
        "bins": [
            {
                "begins_at": one.begins_at,
                "model": one.model,
                "others": one.is_others,
                "usd": usd_from_pico(one.amount_pico),
            }
            for one in found.bins
        ],
        "sessions": [_session(one) for one in found.sessions],
        "requests": [
            {
                "id": one.request_id,
                "project": one.project_id,
                "user": one.user_id,
                "session": one.session_id,
                "model": one.model,
                "outcome": one.outcome,
                "input": one.input_tokens,
                "output": one.output_tokens,
                "usd": usd_from_pico(one.amount_pico),
                "seconds": round((one.ended_at - one.admitted_at).total_seconds(), 1),
                "ended_at": one.ended_at,
            }
            for one in found.requests
        ],
        "budgets": [_budget(one) for one in found.budgets],
        "budgets_left_out": found.budgets_left_out,
    }


def _session(one: SessionSpend) -> dict[str, Any]:
    return {
        "tenant": one.tenant_id,
        "project": one.project_id,
        "user": one.user_id,
        "session": one.session_id,
        "requests": one.requests,
        "live": one.live,
        "tokens": one.tokens,
        "usd": usd_from_pico(one.amount_pico),
        "last_at": one.last_at,
    }


def _budget(status: BudgetStatus) -> dict[str, Any]:
    """A budget by its fullest subject: the one that ends first."""
    record = status.record
    fullest = status.biggest[0] if status.biggest else None
    spent, held = (fullest.spent, fullest.held) if fullest else (status.spent, status.held)
    return {
        "budget": record.budget_id,
        "tenant": record.tenant_id,
        "unit": record.unit,
        "limit": shown_amount(record.limit_amount, record.unit),
        "spent": shown_amount(spent, record.unit),
        "held": shown_amount(held, record.unit),
        "spent_share": _share(spent, record.limit_amount),
        "held_share": _share(held, record.limit_amount),
        "subject": fullest.subject if fullest else [],
        "subjects": status.active,
        "exhausted": status.exhausted,
        "period": record.period,
        "enforcement": record.enforcement,
        "phase": status.phase,
        "ends_at": status.window_ends_at,
    }


def _share(amount: int, limit: int) -> float:
    """For the length of a bar, where money may be a float: nobody adds bars up."""
    return round(amount / limit, 4) if limit else 1.0
