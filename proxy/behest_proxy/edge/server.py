"""The server: Hypercorn's configuration, sockets, TLS and lifespan around the edge's own connections.

Hypercorn's worker (`hypercorn.asyncio.run.worker_serve`) ties its sockets to its `TCPServer`, whose HTTP/2
class cannot be exposed as it is: its send back-pressure lets a slow client buffer without bound, late body
bytes kill the connection, and its shutdown forgets GOAWAY. So `serve` does that worker's few steps itself,
in the same order and on Hypercorn's own classes: lifespan startup, sockets, accept, wait for the trigger,
stop accepting, drain, lifespan shutdown.

`serve` may run several times in one loop (a public port and an admin port), each with its own application.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import AF_UNIX, socket
from ssl import SSLContext
from typing import Any, cast

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.lifespan import Lifespan
from hypercorn.config import Config
from hypercorn.typing import ASGIFramework

from behest_proxy.edge.host import AsgiApplication, EdgeHost
from behest_proxy.edge.limits import EdgeLimits
from behest_proxy.edge.negotiate import Negotiation

log = logging.getLogger(__name__)

_BACKLOG = 1024
_TLS_HANDSHAKE_S = 10.0
_SETTLE_SHARE = 0.25
_SETTLE_AT_MOST_S = 2.0
_CANCEL_WAIT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files of the server's certificate. With them `binds` speak TLS (ALPN: h2, http/1.1)."""

    certificate: Path
    key: Path
    key_password: str | None = None


@dataclass(frozen=True)
class BoundAddress:
    """Where the server listens; port 0 has become the real one."""

    scheme: str
    host: str
    port: int

    @property
    def url(self) -> str:
        """Base URL without a slash at its end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


async def serve(
    app: AsgiApplication,
    *,
    binds: Sequence[str],
    shutdown_trigger: Callable[[], Awaitable[object]],
    graceful_timeout_s: float,
    insecure_binds: Sequence[str] = (),
    tls: TlsFiles | None = None,
    limits: EdgeLimits | None = None,
    on_refused: Callable[[], None] | None = None,
    on_bound: Callable[[Sequence[BoundAddress]], None] | None = None,
) -> None:
    """Serve `app` until `shutdown_trigger` returns, then end gracefully. Runs in the current event loop.

    - `binds`: `host:port` (port 0: any), `[v6]:port`, `unix:path` or `fd://n`; TLS when `tls` is given.
      `insecure_binds` stay clear text beside TLS. HTTP/1.1 and HTTP/2 are spoken on each.
    - `graceful_timeout_s`: from the trigger on, running requests may finish. A quarter of it (at most 2 s)
      is kept for the end: then streams that are left are reset, their applications are told (`on_gone`,
      `http.disconnect`) and may settle, and what still runs after that is cancelled.
    - `on_refused` is called for each connection that is closed because there are `limits.connections`.
    - `on_bound` is called once, when the sockets accept.

    Raises OSError when an address cannot be bound, `hypercorn.utils.LifespanFailureError` or
    `LifespanTimeoutError` when the application's startup fails. Cancelling it cuts all streams at once.
    """
    config = _hypercorn_config(binds=binds, insecure_binds=insecure_binds, tls=tls)
    loop = asyncio.get_running_loop()
    state: dict[str, Any] = {}
    lifespan = Lifespan(ASGIWrapper(cast("ASGIFramework", app)), config, loop, state)
    lifespan_task = loop.create_task(lifespan.handle_lifespan())
    servers: list[asyncio.Server] = []
    host = EdgeHost(app, limits=limits or EdgeLimits(), state=state, on_refused=on_refused)
    grace_s = 0.0
    try:
        await lifespan.wait_for_startup()
        if lifespan_task.done():
            lifespan_task.result()
        context = config.create_ssl_context()
        sockets = config.create_sockets()
        addresses: list[BoundAddress] = []
        for sock in sockets.secure_sockets:
            servers.append(await _accept(host, sock, context))
            addresses.append(_address(sock, "https"))
        for sock in sockets.insecure_sockets:
            servers.append(await _accept(host, sock, None))
            addresses.append(_address(sock, "http"))
        for address in addresses:
            log.info("listening on %s", address.url)
        if on_bound is not None:
            on_bound(addresses)
        await shutdown_trigger()
        grace_s = graceful_timeout_s
    finally:
        await _stop(host, servers, grace_s=grace_s)
        await _end_lifespan(lifespan, lifespan_task)


async def _accept(host: EdgeHost, sock: socket, context: SSLContext | None) -> asyncio.Server:
    if context is None:
        return await host.loop.create_server(lambda: Negotiation(host), sock=sock, backlog=_BACKLOG)
    return await host.loop.create_server(
        lambda: Negotiation(host),
        sock=sock,
        backlog=_BACKLOG,
        ssl=context,
        ssl_handshake_timeout=_TLS_HANDSHAKE_S,
        ssl_shutdown_timeout=host.limits.close_timeout_s,
    )


async def _stop(host: EdgeHost, servers: Sequence[asyncio.Server], *, grace_s: float) -> None:
    """Stop accepting, drain for the grace period, then cut. Ends within `grace_s` and a moment.

    `Server.wait_closed` is not awaited: from Python 3.12 on it waits for the clients, which is what the
    grace period is for, and has no limit.
    """
    for server in servers:
        server.close()
    settle_s = min(_SETTLE_AT_MOST_S, grace_s * _SETTLE_SHARE)
    host.drain()
    if await host.wait_until_idle(timeout_s=max(0.0, grace_s - settle_s)):
        return
    host.cut()
    if await host.wait_until_idle(timeout_s=settle_s):
        return
    host.abort()
    await host.cancel_tasks(timeout_s=_CANCEL_WAIT_S)


async def _end_lifespan(lifespan: Lifespan, task: asyncio.Task[None]) -> None:
    try:
        if not task.done():
            await lifespan.wait_for_shutdown()
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is not None:
            log.error("the application's shutdown failed", exc_info=task.exception())


def _hypercorn_config(*, binds: Sequence[str], insecure_binds: Sequence[str], tls: TlsFiles | None) -> Config:
    config = Config()
    config.bind = list(binds)
    config.insecure_bind = list(insecure_binds)
    if tls is not None:
        config.certfile = str(tls.certificate)
        config.keyfile = str(tls.key)
        config.keyfile_password = tls.key_password
    elif insecure_binds:
        raise ValueError("insecure_binds stand beside TLS binds; without tls use binds")
    return config


def _address(sock: socket, scheme: str) -> BoundAddress:
    name: Any = sock.getsockname()
    if sock.family == AF_UNIX:
        return BoundAddress(scheme, f"unix:{name}", 0)
    return BoundAddress(scheme, name[0], name[1])
