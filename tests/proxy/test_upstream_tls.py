"""TLS: ALPN decides the wire, certificates and names are verified, also through a proxy's tunnel."""

import asyncio
import ssl
from pathlib import Path

import pytest

from proxy.certificates import Certificate
from proxy.upstream_servers import (
    CHUNKED_HEAD,
    LOOPS,
    Peer,
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


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("loop", LOOPS)
def test_alpn_agrees_on_http2(certificate: Certificate, loop: str) -> None:
    async def main() -> None:
        tls = certificate.server("h2", "http/1.1")
        async with http2_server(tls=tls) as server, a_client(tls_context_factory=certificate.client) as client:
            handlers = [start(client, a_request(server.url))[0] for _ in range(5)]
            for handler in handlers:
                await handler.over.wait()
                assert (handler.body, handler.ended) == (b"hello", 1)
            assert len(server.peers) == 1
            assert server.peer.requests[1].headers[b":scheme"] == b"https"

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("alpn", [["http/1.1"], []])
def test_a_server_without_http2_is_spoken_to_in_http1(certificate: Certificate, alpn: list[str], loop: str) -> None:
    async def main() -> None:
        tls = certificate.server(*alpn)
        async with http1_server(answering(OK), tls=tls) as server:
            url = f"https://localhost:{server.port}/v1"
            async with a_client(tls_context_factory=certificate.client) as client:
                handlers = [start(client, a_request(url))[0] for _ in range(3)]
                for handler in handlers:
                    await handler.over.wait()
                    assert (handler.body, handler.ended) == (b"hello", 1)
                before = server.connections
                assert (await fetch(client, a_request(url))).ended == 1
                assert server.connections == before
                assert (await fetch(client, a_request(url, protocol="http1"))).ended == 1
                assert (await fetch(client, a_request(url, protocol="http2"))).kind in ("protocol", "tls")

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_certificate_that_is_not_trusted_is_refused(certificate: Certificate, loop: str) -> None:
    async def main() -> None:
        async with http1_server(answering(OK), tls=certificate.server()) as server, a_client() as client:
            handler = await fetch(client, a_request(f"https://localhost:{server.port}/"))
            assert handler.failure is not None
            assert handler.kind == "tls"
            assert "certificate" in handler.failure.message

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_certificate_for_another_host_is_refused(tmp_path: Path, loop: str) -> None:
    async def main() -> None:
        other = Certificate(tmp_path, host="other.test")
        async with (
            http1_server(answering(OK), tls=other.server()) as server,
            a_client(tls_context_factory=other.client) as client,
        ):
            assert (await fetch(client, a_request(f"https://localhost:{server.port}/"))).kind == "tls"
            assert (await fetch(client, a_request(f"https://127.0.0.1:{server.port}/"))).kind == "tls"

    run(main, loop)


def test_a_server_that_speaks_no_tls_is_a_tls_failure(certificate: Certificate) -> None:
    async def main() -> None:
        async def script(peer: Peer) -> None:
            await peer.reader.read(10)
            await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        async with http1_server(script) as server, a_client(tls_context_factory=certificate.client) as client:
            assert (await fetch(client, a_request(f"https://localhost:{server.port}/"))).kind == "tls"

    run(main)


def test_versions_below_tls_1_2_are_switched_off(certificate: Certificate) -> None:
    made: list[ssl.SSLContext] = []

    def factory() -> ssl.SSLContext:
        context = certificate.client()
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        made.append(context)
        return context

    async def main() -> None:
        async with (
            http1_server(answering(OK), tls=certificate.server()) as server,
            a_client(tls_context_factory=factory) as client,
        ):
            assert (await fetch(client, a_request(f"https://localhost:{server.port}/"))).ended == 1

    run(main)
    assert [context.minimum_version for context in made] == [ssl.TLSVersion.TLSv1_2]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_cancel_under_tls_closes_the_socket(certificate: Certificate, loop: str) -> None:
    async def main() -> None:
        closed = asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(CHUNKED_HEAD + chunk(b"one"))
            await peer.sees_close()
            closed.set()

        async with (
            http1_server(script, tls=certificate.server()) as server,
            a_client(tls_context_factory=certificate.client) as client,
        ):
            handler, call = start(client, a_request(f"https://localhost:{server.port}/"))
            await eventually(lambda: handler.pieces)
            call.cancel()
            await closed.wait()

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_large_body_under_tls_goes_both_ways_and_can_be_paused(certificate: Certificate, loop: str) -> None:
    async def main() -> None:
        size = 8 * 1024 * 1024
        sent = 0
        received: list[int] = []

        async def script(peer: Peer) -> None:
            nonlocal sent
            received.append(len((await peer.request())[1]))
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            while sent < size:
                await peer.send(b"x" * 65536)
                sent += 65536
            await peer.sees_close()

        async with (
            http1_server(script, tls=certificate.server()) as server,
            a_client(tls_context_factory=certificate.client) as client,
        ):
            handler, call = start(client, a_request(f"https://localhost:{server.port}/", body=b"y" * size))
            handler.on_piece = lambda data: call.pause()
            await eventually(lambda: handler.pieces)
            await asyncio.sleep(0.2)
            assert len(handler.pieces) == 1
            handler.on_piece = lambda data: None
            call.resume()
            await handler.over.wait()
            assert (len(handler.body), handler.ended, handler.sent) == (size, 1, 1)
        assert received == [size]

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_https_goes_through_the_proxys_tunnel(certificate: Certificate, loop: str) -> None:
    async def main() -> None:
        seen: list[bytes] = []
        async with http2_server(tls=certificate.server("h2")) as server:

            async def script(peer: Peer) -> None:
                seen.append((await peer.request())[0])
                await tunnel(peer, server.port)

            async with http1_server(script) as proxy:
                options = {
                    "tls_context_factory": lambda: ssl.create_default_context(cafile=certificate.file),
                    "environment": {"HTTPS_PROXY": f"http://u:p@127.0.0.1:{proxy.port}"},
                }
                async with a_client(**options) as client:
                    # The proxy leads there; the name is not that of the certificate, which is seen inside.
                    handler = await fetch(client, a_request("https://models.test/v1"))
                    assert handler.kind == "tls"
        assert seen[0].startswith(b"CONNECT models.test:443 HTTP/1.1\r\n")
        assert b"proxy-authorization: Basic dTpw\r\n" in seen[0]

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_call_works_inside_the_tunnel(tmp_path: Path, loop: str) -> None:
    async def main() -> None:
        models = Certificate(tmp_path, host="models.test")
        async with http2_server(tls=models.server("h2")) as server:

            async def script(peer: Peer) -> None:
                await peer.request()
                await tunnel(peer, server.port)

            async with http1_server(script) as proxy:
                environment = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}"}
                async with a_client(tls_context_factory=models.client, environment=environment) as client:
                    assert (await fetch(client, a_request("https://models.test/v1"))).body == b"hello"

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_new_connection_takes_up_the_session_of_the_last_one(
    certificate: Certificate, version: ssl.TLSVersion, loop: str
) -> None:
    resumed: list[bool] = []
    tls = certificate.server()
    tls.maximum_version = version

    async def script(peer: Peer) -> None:
        await peer.request()
        resumed.append(peer.writer.get_extra_info("ssl_object").session_reused)
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello")

    async def main() -> None:
        async with (
            http1_server(script, tls=tls) as server,
            a_client(tls_context_factory=certificate.client) as client,
        ):
            url = f"https://localhost:{server.port}/"
            for _ in range(3):
                assert (await fetch(client, a_request(url, protocol="http1"))).ended == 1
            assert resumed == [False, True, True]
            other = a_request(f"https://127.0.0.1:{server.port}/", protocol="http1")
            assert (await fetch(client, other)).ended == 1
            assert resumed[-1] is False, "a session is its host's alone"

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_http2_takes_up_sessions_too_and_a_server_that_forgot_them_makes_new_ones(
    certificate: Certificate, loop: str
) -> None:
    async def main() -> None:
        async with a_client(tls_context_factory=certificate.client, idle_connection_timeout_s=0.05) as client:
            async with http2_server(tls=certificate.server("h2")) as server:
                reused: list[bool] = []
                for number in range(2):
                    assert (await fetch(client, a_request(server.url, protocol="http2"))).ended == 1
                    reused.append(server.peers[number].transport.get_extra_info("ssl_object").session_reused)
                    await eventually(lambda: server.peers[-1].closed)
                assert reused == [False, True]
            async with http2_server(tls=certificate.server("h2")) as server:
                assert (await fetch(client, a_request(server.url, protocol="http2"))).ended == 1
                assert server.peer.transport.get_extra_info("ssl_object").session_reused is False

    run(main, loop)
