"""The two ASGI applications: the one that clients see, and the one for probes."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from behest_proxy.app.billing import BillingExport
from behest_proxy.app.border import Border
from behest_proxy.app.chat import ChatCompletions
from behest_proxy.app.endpoints import Endpoints
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.openapi import openapi_document
from behest_proxy.app.page import Page
from behest_proxy.app.thread_endpoints import ThreadEndpoints
from behest_proxy.app.usage import Usage


def client_app(gateway: Gateway, *, by_pod: bool = False) -> Any:
    """What clients see. Anything unknown is 404 with the envelope; nothing is ever a redirect.

    `by_pod`: on the pod's own loopback, where the workload needs no token.
    """
    endpoints = Endpoints(gateway)
    usage = Usage(gateway)
    threads = ThreadEndpoints(gateway)
    description = msgspec.json.encode(openapi_document())

    async def openapi(_request: Request) -> Response:
        return Response(description, media_type="application/json")

    app = Router(
        routes=[
            Route("/openapi.json", openapi, methods=["GET"]),
            Route("/v1/chat/completions", ChatCompletions(gateway), methods=["POST"]),
            Route("/v1/auth/mint", endpoints.mint, methods=["POST"]),
            Route("/auth/v1/auth/mint", endpoints.mint, methods=["POST"]),
            Route("/.well-known/jwks.json", endpoints.jwks, methods=["GET"]),
            Route("/v1/models", endpoints.models, methods=["GET"]),
            Route("/v1/budgets", endpoints.budgets, methods=["GET"]),
            Route("/v1/threads", threads.threads, methods=["GET"]),
            Route("/v1/threads/{rest:path}", threads.one, methods=["GET", "DELETE"]),
            Route("/v1/usage", usage.usage, methods=["GET"]),
            Route("/v1/billing/usage", usage.billing_usage, methods=["GET"]),
            Route("/v1/billing/export", BillingExport(gateway).export, methods=["GET"]),
        ],
        redirect_slashes=False,
    )
    gateway.telemetry.know_routes(route.path for route in app.routes if isinstance(route, Route))
    return Border(app, may_read=gateway.may_read, door=gateway.door, by_pod=by_pod, telling=gateway.telemetry)


def admin_app(gateway: Gateway) -> Any:
    """What probes and Prometheus see, and the built-in page."""

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        reason = gateway.not_ready
        return PlainTextResponse(f"{reason or 'ready'}\n", status_code=503 if reason else 200)

    async def metrics(_request: Request) -> Response:
        from behest_ledger.telemetry.prometheus import CONTENT_TYPE, page

        return Response(page(gateway.telemetry.meter), headers={"content-type": CONTENT_TYPE})

    async def leave(request: Request) -> Response:
        # Whoever can send signals to this process may do this too, and nobody else.
        if request.client is None or request.client.host not in ("127.0.0.1", "::1"):
            return PlainTextResponse("only from this machine\n", status_code=403)
        gateway.leaving = True
        return PlainTextResponse(f"{len(gateway.live)}\n")

    return Router(
        routes=[
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Route("/leave", leave, methods=["POST"]),
            *Page(gateway).routes(),
        ],
        redirect_slashes=False,
    )
