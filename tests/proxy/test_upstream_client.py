"""The client as a whole: connecting and not connecting, limits of time, proxies, closing."""

import asyncio
import socket
from collections.abc import Generator
from contextlib import closing, contextmanager

import pytest

from behest_proxy.upstream import UpstreamClient
from proxy.upstream_servers import (
    CHUNKED_HEAD,
    LOOPS,
    Peer,
    Recorder,
    a_client,
    a_request,
    answering,
    chunk,
    eventually,
    fetch,
    http1_server,
    http2_server,
    run,
    start,
    tunnel,
)

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


@contextmanager
def full_listener() -> Generator[int]:
    """A port whose backlog is full: the kernel drops every further SYN."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = int(listener.getsockname()[1])
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        try:
            yield port
        finally:
            for filler in fillers:
                filler.close()


@contextmanager
def closed_port() -> Generator[int]:
    """A port on which nobody listens, nor can anybody else meanwhile."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


@pytest.mark.parametrize("loop", LOOPS)
def test_a_refused_connection_is_told(loop: str) -> None:
    async def main() -> None:
        with closed_port() as port:
            async with a_client() as client:
                for protocol in ("http1", "http2"):
                    url = f"http://127.0.0.1:{port}/"
                    handler = await fetch(client, a_request(url, protocol=protocol))
                    assert handler.failure is not None
                    assert (handler.kind, handler.failure.request_sent) == ("connect", False)

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("host", ["does-not-exist.invalid", "a" * 70 + ".invalid"])
def test_a_name_that_does_not_resolve_is_told(host: str, loop: str) -> None:
    async def main() -> None:
        async with a_client() as client:
            assert (await fetch(client, a_request(f"http://{host}/"))).kind in ("connect", "connect_timeout")

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_name_is_resolved(loop: str) -> None:
    async def main() -> None:
        async with http1_server(answering(OK)) as server, a_client() as client:
            assert (await fetch(client, a_request(f"http://localhost:{server.port}/"))).ended == 1

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("protocol", ["http1", "http2"])
def test_a_connection_that_is_not_accepted_times_out(loop: str, protocol: str) -> None:
    async def main() -> None:
        with full_listener() as port:
            async with a_client() as client:
                request = a_request(
                    f"http://127.0.0.1:{port}/",
                    protocol="http2" if protocol == "http2" else "http1",
                    connect_timeout_s=0.2,
                )
                handler = await fetch(client, request)
                assert handler.kind == "connect_timeout"

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_cancel_while_connecting_leaves_nothing(loop: str) -> None:
    async def main() -> None:
        with full_listener() as port:
            async with a_client() as client:
                handler, call = start(client, a_request(f"http://127.0.0.1:{port}/"))
                await asyncio.sleep(0.05)
                call.cancel()
                named, named_call = start(client, a_request("http://does-not-exist.invalid/"))
                named_call.cancel()
                await eventually(lambda: len(asyncio.all_tasks()) <= 2)
                await asyncio.sleep(0.05)
                assert not handler.over.is_set()
                assert not named.over.is_set()

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_cancel_in_the_tls_handshake_is_seen_by_the_peer(loop: str) -> None:
    async def main() -> None:
        hello, closed = asyncio.Event(), asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.reader.read(1)
            hello.set()
            await peer.sees_close()
            closed.set()

        async with http1_server(script) as server, a_client() as client:
            handler, call = start(client, a_request(f"https://127.0.0.1:{server.port}/"))
            await hello.wait()
            call.cancel()
            await closed.wait()
            assert not handler.over.is_set()

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_tls_handshake_without_an_answer_times_out(loop: str) -> None:
    async def main() -> None:
        async def script(peer: Peer) -> None:
            await peer.sees_close()

        async with http1_server(script) as server, a_client() as client:
            request = a_request(f"https://127.0.0.1:{server.port}/", connect_timeout_s=0.2)
            assert (await fetch(client, request)).kind == "connect_timeout"
            await eventually(lambda: not server.open_now)

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_silence_before_the_head_and_in_the_body_has_its_own_limit(loop: str) -> None:
    async def main() -> None:
        async def silent(peer: Peer) -> None:
            await peer.request()
            await peer.sees_close()

        async def stalled(peer: Peer) -> None:
            await peer.request()
            await peer.send(CHUNKED_HEAD + chunk(b"one"))
            await peer.sees_close()

        async with http1_server(silent) as server, a_client() as client:
            handler = await fetch(client, a_request(server.url, first_byte_timeout_s=0.1))
            assert handler.kind == "first_byte_timeout"
            await eventually(lambda: not server.open_now)
        async with http1_server(stalled) as server, a_client() as client:
            handler = await fetch(client, a_request(server.url, idle_timeout_s=0.1))
            assert (handler.kind, handler.body) == ("idle_timeout", b"one")
            assert handler.failure is not None
            assert handler.failure.head_received
            await eventually(lambda: not server.open_now)

    run(main, loop)


def test_a_slow_but_steady_body_is_not_idle() -> None:
    async def main() -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(CHUNKED_HEAD)
            for _ in range(9):
                await peer.send(chunk(b"x"))
                await asyncio.sleep(0.2)
            await peer.send(b"0\r\n\r\n")

        async with http1_server(script) as server, a_client() as client:
            handler = await fetch(client, a_request(server.url, idle_timeout_s=1.4))
            assert (handler.body, handler.ended) == (b"x" * 9, 1)

    run(main)


def test_a_request_that_the_peer_does_not_take_times_out_unsent() -> None:
    async def main() -> None:
        async def script(peer: Peer) -> None:
            assert isinstance(peer.writer.transport, asyncio.ReadTransport)
            peer.writer.transport.pause_reading()
            await asyncio.sleep(5)

        async with http1_server(script) as server, a_client() as client:
            body = b"x" * 64 * 1024 * 1024
            handler = await fetch(client, a_request(server.url, body=body, first_byte_timeout_s=0.3))
            assert handler.failure is not None
            assert (handler.kind, handler.failure.request_sent) == ("first_byte_timeout", False)

    run(main)


@pytest.mark.parametrize("loop", LOOPS)
def test_closing_fails_every_live_call_and_leaves_no_socket(loop: str) -> None:
    async def main() -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(CHUNKED_HEAD + chunk(b"one"))
            await peer.sees_close()

        with full_listener() as port:
            async with http1_server(script) as server, http2_server() as server2:
                server2.on_request = lambda peer, stream_id: peer.head(stream_id)
                client = UpstreamClient(environment={})
                live, _ = start(client, a_request(server.url))
                multiplexed, _ = start(client, a_request(server2.url, protocol="http2"))
                paused, paused_call = start(client, a_request(server.url))
                paused_call.pause()
                connecting, _ = start(client, a_request(f"http://127.0.0.1:{port}/"))
                await eventually(lambda: live.pieces and multiplexed.status)
                await client.aclose()
                for handler in (live, multiplexed, paused, connecting):
                    assert handler.kind == "closed"
                await eventually(lambda: not server.open_now and server2.peer.closed)
                assert server2.peer.goaway
                late = Recorder()
                client.send(a_request(server.url), late)
                assert not late.over.is_set()
                await late.over.wait()
                assert late.kind == "closed"
                await client.aclose()

    run(main, loop)


def test_calls_to_one_origin_are_bounded() -> None:
    async def main() -> None:
        async def script(peer: Peer) -> None:
            await peer.sees_close()

        async with http1_server(script) as server, a_client(calls_per_origin_max=3) as client:
            handlers = [start(client, a_request(server.url))[0] for _ in range(4)]
            await handlers[3].over.wait()
            assert handlers[3].kind == "connect"
            assert not any(handler.over.is_set() for handler in handlers[:3])

    run(main)


def test_a_plain_request_goes_to_the_proxy_in_absolute_form() -> None:
    async def main() -> None:
        seen: list[bytes] = []

        async def script(peer: Peer) -> None:
            seen.append((await peer.request())[0])
            await peer.send(OK)

        async with http1_server(script) as proxy:
            environment = {"HTTP_PROXY": f"http://user:pass@127.0.0.1:{proxy.port}"}
            async with a_client(environment=environment) as client:
                assert (await fetch(client, a_request("http://models.test:81/v1?a=b"))).ended == 1
        lines = seen[0].split(b"\r\n")
        assert lines[0] == b"POST http://models.test:81/v1?a=b HTTP/1.1"
        assert b"host: models.test:81" in lines
        assert b"proxy-authorization: Basic dXNlcjpwYXNz" in lines

    run(main)


@pytest.mark.parametrize("loop", LOOPS)
def test_prior_knowledge_http2_goes_through_a_tunnel(loop: str) -> None:
    async def main() -> None:
        seen: list[bytes] = []
        async with http2_server() as server:

            async def script(peer: Peer) -> None:
                seen.append((await peer.request())[0])
                await tunnel(peer, server.port)

            async with http1_server(script) as proxy:
                environment = {"http_proxy": f"http://127.0.0.1:{proxy.port}"}
                async with a_client(environment=environment) as client:
                    request = a_request("http://models.test:81/v1", protocol="http2")
                    assert (await fetch(client, request)).body == b"hello"
        assert seen[0].startswith(b"CONNECT models.test:81 HTTP/1.1\r\n")

    run(main, loop)


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", b"", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 O", b"a" * 99_999],
)
def test_a_proxy_that_opens_no_tunnel_is_a_failed_connection(answer: bytes) -> None:
    async def main() -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(answer)

        async with (
            http1_server(script) as proxy,
            a_client(environment={"https_proxy": f"http://127.0.0.1:{proxy.port}"}) as client,
        ):
            handler = await fetch(client, a_request("https://models.test/v1"))
            assert handler.kind == "connect"

    run(main)
