"""Requests that ask for HTTP/2 with prior knowledge."""

from behest_proxy.upstream import UpstreamRequest
from proxy.upstream_servers import H2Server
from proxy.upstream_servers import a_request as any_request


def a_request(
    url: str,
    body: bytes = b"{}",
    *,
    connect_timeout_s: float = 5.0,
    first_byte_timeout_s: float = 10.0,
    idle_timeout_s: float = 10.0,
) -> UpstreamRequest:
    return any_request(
        url,
        body=body,
        protocol="http2",
        connect_timeout_s=connect_timeout_s,
        first_byte_timeout_s=first_byte_timeout_s,
        idle_timeout_s=idle_timeout_s,
    )


def any_ok(server: H2Server) -> UpstreamRequest:
    """A request to a server that from now on answers every one."""
    server.on_request = lambda peer, stream_id: peer.reply(stream_id)
    return a_request(server.url)
