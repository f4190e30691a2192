"""The upstream client: finds or makes the pool of a request's origin and hands the call to it."""

import asyncio
import os
from collections.abc import Mapping
from typing import Literal

from behest_proxy.upstream.call import UpstreamCall, UpstreamHandler, UpstreamRequest
from behest_proxy.upstream.connector import Connector, TlsContextFactory, default_tls_context
from behest_proxy.upstream.live_call import LiveCall
from behest_proxy.upstream.moderation import Moderation
from behest_proxy.upstream.pool import Pool
from behest_proxy.upstream.prepared import Origin, prepare
from behest_proxy.upstream.proxies import Proxies

_CLOSE_TIMEOUT_S = 1.0


class UpstreamClient:
    """Sends requests to providers over HTTP/1.1 and HTTP/2, with connections shared per origin.

    It belongs to the event loop that is running when `send` is first called.
    """

    def __init__(
        self,
        *,
        tls_context_factory: TlsContextFactory = default_tls_context,
        environment: Mapping[str, str] | None = None,
        calls_per_origin_max: int = 4096,
        idle_connections_per_origin_max: int = 64,
        multiplexed_connections_per_origin_max: int = 32,
        idle_connection_timeout_s: float = 60.0,
        moderation: Moderation | None = None,
    ) -> None:
        """`environment` names the proxies; None means `os.environ`, read now. Raises ValueError for a bad one.

        `tls_context_factory` makes a new context at each call (custom trust, client certificates); versions below
        TLS 1.2 are switched off in it and ALPN is set.
        """
        self._connector = Connector(
            proxies=Proxies(os.environ if environment is None else environment),
            tls_context_factory=tls_context_factory,
        )
        self._calls_max = calls_per_origin_max
        self._idle_connections_max = idle_connections_per_origin_max
        self._multiplexed_connections_max = multiplexed_connections_per_origin_max
        self._idle_timeout_s = idle_connection_timeout_s
        self._pools: dict[tuple[Origin, Literal["auto", "http1", "http2"]], Pool] = {}
        self._moderation = moderation if moderation is not None else Moderation()
        self._closed = False

    def send(self, request: UpstreamRequest, handler: UpstreamHandler) -> UpstreamCall:
        """Start a call and return at once; the handler is told from the event loop, never before this returns.

        Raises ValueError for a request that must not reach a wire (CR or LF in a header, a relative URL ...).
        """
        prepared = prepare(request)
        call = LiveCall(prepared, handler, loop=asyncio.get_running_loop(), requeue=self._submit)
        self._submit(call)
        return call

    async def aclose(self) -> None:
        """Fail every live call with kind `closed`, close every connection and wait until the sockets are gone."""
        self._closed = True
        pools, self._pools = list(self._pools.values()), {}
        endings = [ending for pool in pools for ending in pool.close()]
        if not endings:
            return
        _, late = await asyncio.wait(endings, timeout=_CLOSE_TIMEOUT_S)
        if late:
            for pool in pools:
                pool.abort()
            await asyncio.wait(late, timeout=_CLOSE_TIMEOUT_S)

    def _submit(self, call: LiveCall) -> None:
        if self._closed:
            message = f"{call.request.origin}: this client is closed"
            asyncio.get_running_loop().call_soon(call.fail, "closed", message)
            return
        key = (call.request.origin, call.request.protocol)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = Pool(
                *key,
                connector=self._connector,
                calls_max=self._calls_max,
                idle_connections_max=self._idle_connections_max,
                multiplexed_connections_max=self._multiplexed_connections_max,
                idle_timeout_s=self._idle_timeout_s,
                moderation=self._moderation,
                on_empty=self._forget,
            )
        pool.submit(call)

    def _forget(self, pool: Pool) -> None:
        """A pool without calls and connections is not kept, so that origins come and go."""
        if self._pools.get(pool.key) is pool:
            del self._pools[pool.key]
