"""The sidecar's ASGI application as other servers than our edge load it: `uvicorn servers:app`, `granian servers:app`.

It is configured by the sidecar's environment.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from behest_proxy.app.asgi import client_app
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.settings import from_environment

Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class Served:
    """The application with its gateway's life in ASGI's lifespan: that is where any server lets it be."""

    def __init__(self) -> None:
        self._app: Asgi | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "lifespan":
            assert self._app is not None, "a server that begins with requests"
            assert "behest.direct" not in scope.get("extensions", {})
            await self._app(scope, receive, send)
            return
        gateway = Gateway(from_environment())
        assert (await receive())["type"] == "lifespan.startup"
        await gateway.start()
        self._app = client_app(gateway)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await gateway.drain()
        await gateway.aclose()
        await send({"type": "lifespan.shutdown.complete"})


app = Served()
