"""The two ASGI applications: the one that clients see, and the one for probes."""

from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from behest_proxy.app.border import Border
from behest_proxy.app.chat import ChatCompletions
from behest_proxy.app.endpoints import Endpoints
from behest_proxy.app.gateway import Gateway


def client_app(gateway: Gateway) -> Any:
    """What clients see. Anything unknown is 404 with the envelope; nothing is ever a redirect."""
    endpoints = Endpoints(gateway)
    app = Router(
        routes=[
            Route("/v1/chat/completions", ChatCompletions(gateway), methods=["POST"]),
            Route("/v1/auth/mint", endpoints.mint, methods=["POST"]),
            Route("/auth/v1/auth/mint", endpoints.mint, methods=["POST"]),
            Route("/.well-known/jwks.json", endpoints.jwks, methods=["GET"]),
            Route("/v1/models", endpoints.models, methods=["GET"]),
            Route("/v1/budgets", endpoints.budgets, methods=["GET"]),
            Route("/v1/billing/usage", endpoints.billing_usage, methods=["GET"]),
        ],
        redirect_slashes=False,
    )
    return Border(app, may_read=gateway.may_read)


def admin_app(gateway: Gateway) -> Any:
    """What probes see."""

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        reason = gateway.not_ready
        return PlainTextResponse(f"{reason or 'ready'}\n", status_code=503 if reason else 200)

    return Router(routes=[Route("/healthz", healthz), Route("/readyz", readyz)], redirect_slashes=False)
