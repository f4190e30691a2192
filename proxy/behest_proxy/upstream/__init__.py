"""The way to the providers: one streaming HTTP client with two wire forms, HTTP/1.1 and HTTP/2.

- `call`: what goes in and what comes out: request, handler, call, failure.
- `client`: the client; it finds the pool of a request's origin.
- `prepared`: a request made safe to put on a wire, or refused.
- `proxies`, `connector`: from an origin to a connected transport, over the proxies of the environment.
- `pool`: one origin's connections, and the calls that wait for one.
- `live_call`: one call from `send` to its one end: phases, timers, pause, the handler's only caller.
- `http1`, `bodies`: an HTTP/1.1 connection and the three ways a body is framed on it.
- `http2`, `stream`, `frames`, `http2_settings`: an HTTP/2 connection; `h2` keeps its state, DATA is read by hand.

The way of a byte is one synchronous call chain, `data_received` to `UpstreamHandler.on_data`: no task, no queue,
no await. Only opening a connection is a task. Logs and failure messages name origins, never headers or bodies.
"""

from behest_proxy.upstream.call import (
    FailureKind,
    UpstreamCall,
    UpstreamFailure,
    UpstreamHandler,
    UpstreamRequest,
)
from behest_proxy.upstream.client import UpstreamClient
from behest_proxy.upstream.connector import default_tls_context

__all__ = [
    "FailureKind",
    "UpstreamCall",
    "UpstreamClient",
    "UpstreamFailure",
    "UpstreamHandler",
    "UpstreamRequest",
    "default_tls_context",
]
