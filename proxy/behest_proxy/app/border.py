"""The border: pure ASGI around the whole application, where ids and CORS come in and every error is mapped, once."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

from starlette.exceptions import HTTPException

from behest_ledger.telemetry.logs import FIELDS
from behest_proxy.app.context import RequestContext
from behest_proxy.app.door import Door
from behest_proxy.app.messages import send_answer, send_error
from behest_proxy.app.origins import project_allows
from behest_proxy.errors import MethodNotAllowed, NotFound, ShownError, our_bug

logger = logging.getLogger(__name__)

_PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
    (
        b"access-control-allow-headers",
        b", ".join(
            b"authorization content-type x-session-id x-thread-id x-end-user-id idempotency-key last-event-id"
            b" x-event-ids traceparent".split()
        ),
    ),
    (b"access-control-max-age", b"600"),
]
_NO_CORS = ("/v1/auth/mint", "/auth/v1/auth/mint")
"""Minting takes an API key, which belongs in no browser."""


class Telling(Protocol):
    """Who wants to know of requests that come and are over."""

    def arrived(self, context: RequestContext) -> None:
        """A request is here."""
        ...

    def answered(self, context: RequestContext, scope: Any) -> None:
        """It is over, whatever became of it."""
        ...


class Border:
    """Wraps an ASGI application."""

    def __init__(
        self,
        app: Any,
        *,
        may_read: Callable[[str], bool],
        door: Door,
        by_pod: bool = False,
        telling: Telling | None = None,
    ) -> None:
        """`may_read` tells whether any project allows an origin; the endpoint narrows it to the caller's project.

        `by_pod`: this border is on the pod's own loopback.
        """
        self._door = door
        self._by_pod = by_pod
        self._telling = telling
        self._app = app
        self._may_read = may_read

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(scope["headers"], by_pod=self._by_pod)
        scope["behest"] = context
        if self._telling is None:
            await self._serve(scope, receive, send, context)
            return
        self._telling.arrived(context)
        try:
            await self._serve(scope, receive, send, context)
        finally:
            self._telling.answered(context, scope)

    async def _serve(self, scope: Any, receive: Any, send: Any, context: RequestContext) -> None:
        scope["app"] = self  # with it the router raises what it cannot route, instead of answering itself
        if not self._by_pod:
            context.host_project = self._door.project_at(context.host)
        if context.origin and scope["path"] not in _NO_CORS:
            origin, project = context.origin.decode("latin-1"), context.host_project
            context.allow_origin = self._may_read(origin) if project is None else project_allows(project, origin)
        if scope["method"] == "OPTIONS":
            await self._preflight(scope, send, context)
            return
        begun = False

        async def send_with_headers(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                context.status = message["status"]
                # Read now, not before: whose answer it is may be known only by then. A stream brings them itself, for
                # under our own edge it does not pass here; twice, they would keep browsers from reading it.
                if not any(name == b"x-request-id" for name, _ in message["headers"]):
                    message = {**message, "headers": [*message["headers"], *context.headers()]}
            await send(message)

        try:
            await self._door.enter(scope, context)
            await self._app(scope, receive, send_with_headers)
        except ShownError as error:
            if begun:
                raise
            await send_error(send_with_headers, error)
        except HTTPException as error:
            await send_error(send_with_headers, _unknown(scope, error))
        except Exception:
            logger.exception("request %s failed", context.request_id, extra={FIELDS: context.log_fields})
            if begun:
                raise
            await send_error(send_with_headers, our_bug())

    async def _preflight(self, scope: Any, send: Any, context: RequestContext) -> None:
        headers = context.headers()
        if context.allow_origin:
            asked = next((value for name, value in scope["headers"] if name == b"access-control-request-headers"), b"")
            headers += _PREFLIGHT
            # The SDKs' own headers have a prefix, and a preflight answer knows no prefixes.
            names = asked.lower().replace(b" ", b"").split(b",")
            stainless = [name for name in names if name.startswith(b"x-stainless-")]
            if stainless:
                headers[-2] = (headers[-2][0], headers[-2][1] + b", " + b", ".join(sorted(stainless)[:32]))
        await send_answer(send, 204, b"", headers)


def _unknown(scope: Any, error: HTTPException) -> ShownError:
    if error.status_code == 405:
        return MethodNotAllowed(f"{scope['method']} is not a method of {scope['path']}")
    return NotFound(f"there is no {scope['path']} here")
