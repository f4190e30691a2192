import asyncio
import gc
import shutil
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypercorn.utils import LifespanFailureError

from behest_proxy.edge.direct import DirectStream, direct_stream
from behest_proxy.edge.host import Receive, Scope, Send
from behest_proxy.edge.limits import EdgeLimits
from behest_proxy.edge.server import TlsFiles, serve
from proxy.certificates import self_signed
from proxy.edge_clients import (
    GENEROUS_S,
    LOOPS,
    answer,
    application,
    echo,
    raw_h2,
    raw_tcp,
    read_body,
    run,
    running,
    stream_of,
    until,
)

FOR_EVER_S = 6 * GENEROUS_S
"""Nothing here may wait for it: it is twice as long as a test may take."""


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """A throw-away certificate for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    files = TlsFiles(certificate=folder / "cert.pem", key=folder / "key.pem")
    certificate, key = self_signed()
    files.certificate.write_bytes(certificate)
    files.key.write_bytes(key)
    return files


def trusting(files: TlsFiles, *alpn: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(files.certificate))
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


async def direct(scope: Scope, receive: Receive, send: Send) -> None:
    """Streams ten chunks by direct writes after reading the body."""
    body = await read_body(receive)
    stream = stream_of(scope)
    stream.begin(200, [(b"content-type", b"text/plain")])
    for number in range(10):
        stream.write(b"%d " % number)
        await asyncio.sleep(0)
    stream.write(body)
    stream.end()


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize("kind", ["clear", "tls"])
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_httpx_speaks_both_versions(http2: bool, kind: str, loop: str, tls_files: TlsFiles) -> None:
    async def main() -> None:
        tls = tls_files if kind == "tls" else None
        async with (
            running(application(direct), tls=tls) as server,
            httpx.AsyncClient(
                http2=http2, http1=not http2 or kind == "tls", verify=trusting(tls_files), trust_env=False
            ) as client,
        ):
            for size in (0, 3, 300_000):
                got = await client.post(server.url + "/x", content=b"b" * size)
                assert got.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
                assert got.content == b"0 1 2 3 4 5 6 7 8 9 " + b"b" * size
                assert got.headers["server"] == "behest"

    run(main(), loop=loop)


@LOOPS
def test_both_protocols_are_chosen_by_alpn(loop: str, tls_files: TlsFiles) -> None:
    async def main() -> None:
        async with running(application(echo), tls=tls_files) as server:
            assert server.url.startswith("https://127.0.0.1:")
            async with raw_h2(server.port, tls=trusting(tls_files, "h2")) as client:
                assert (await client.get("/")).body == b"2 GET /  "
            async with raw_tcp(server.port, tls=trusting(tls_files)) as (reader, writer):
                writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                assert b"1.1 GET /  " in await reader.read()

    run(main(), loop=loop)


def test_tls_and_clear_text_ports_stand_side_by_side(tls_files: TlsFiles) -> None:
    async def main() -> None:
        async with running(application(echo), tls=tls_files, insecure_binds=["127.0.0.1:0"]) as server:
            assert [address.scheme for address in server.addresses] == ["https", "http"]
            async with raw_h2(server.addresses[1].port) as client:
                assert (await client.get("/")).status == 200

    run(main())


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    ("options", "version"),
    [(["--http2-prior-knowledge"], "2"), (["--http1.1"], "1.1"), (["--http1.0"], "1.1"), (["--http2"], "1.1")],
)
def test_curl_is_served(options: list[str], version: str) -> None:
    async def main() -> None:
        async with running(application(direct)) as server:
            for _ in range(2):
                process = await asyncio.create_subprocess_exec(
                    "curl", "-sS", "--noproxy", "*", "--max-time", "50", *options,
                    "-d", "hello", "-w", "|%{http_version} %{http_code}", server.url + "/",
                    stdout=subprocess.PIPE,
                )  # fmt: skip
                output, _ = await process.communicate()
                assert output.decode() == f"0 1 2 3 4 5 6 7 8 9 hello|{version} 200"

    run(main())


def test_the_lifespan_runs_around_the_service_and_its_state_reaches_requests() -> None:
    order: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.startup"
            order.append("startup")
            scope["state"]["answer"] = 42
            await send({"type": "lifespan.startup.complete"})
            assert (await receive())["type"] == "lifespan.shutdown"
            order.append("shutdown")
            await send({"type": "lifespan.shutdown.complete"})
            return
        order.append(f"request {scope['state']['answer']}")
        await answer(send, b"")

    async def main() -> None:
        async with running(app) as server, raw_h2(server.port) as client:
            await client.get()
        assert order == ["startup", "request 42", "shutdown"]

    run(main())


def test_a_startup_that_fails_ends_serve_and_binds_nothing() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no ledger"})

    async def main() -> None:
        with pytest.raises(LifespanFailureError, match="no ledger"):
            async with running(app):
                raise AssertionError

    run(main())


# Hypercorn leaves the socket that it could not bind to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_an_address_in_use_ends_serve_with_its_error() -> None:
    async def main() -> None:
        async with running(application(echo)) as server:
            with pytest.raises(OSError):
                async with running(application(echo), binds=[f"127.0.0.1:{server.port}"]):
                    raise AssertionError

    run(main())
    gc.collect()


def test_two_applications_are_served_in_one_loop() -> None:
    async def admin(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"admin")

    async def main() -> None:
        async with running(application(echo)) as public, running(application(admin)) as private:
            async with raw_h2(public.port) as client:
                assert (await client.get()).body == b"2 GET /  "
            async with raw_h2(private.port) as client:
                assert (await client.get()).body == b"admin"

    run(main())


def test_a_unix_socket_is_served(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "edge"
        async with running(application(echo), binds=[f"unix:{path}"]):
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert b"1.1 GET /  " in await reader.read()
            writer.close()
            await writer.wait_closed()

    run(main())


class Live:
    """An application whose streams live until told otherwise."""

    def __init__(self) -> None:
        self.streams: list[DirectStream] = []
        self.gone = 0
        self.settled = 0

    def _gone(self) -> None:
        self.gone += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.on_gone = self._gone
        stream.begin(200, [])
        stream.write(b"first ")
        self.streams.append(stream)
        while (await receive())["type"] != "http.disconnect":
            pass
        await asyncio.sleep(0.01)
        self.settled += 1


@LOOPS
def test_a_live_stream_finishes_within_the_grace_period(loop: str) -> None:
    async def main() -> None:
        live = Live()
        async with (
            running(application(live), graceful_timeout_s=FOR_EVER_S) as server,
            raw_h2(server.port) as client,
            raw_tcp(server.port) as (reader, writer),
            raw_tcp(server.port) as (idle_reader, _),
        ):
            stream_id = client.request()
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await until(lambda: len(live.streams) == 2)
            stopping = asyncio.get_running_loop().create_task(server.stop())
            await until(lambda: len(client.goaways) == 2)
            assert client.goaways == [(2**31 - 1, 0), (stream_id, 0)]
            assert await idle_reader.read() == b""
            refused = await client.get()
            assert refused.reset_code == 7
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", server.port)
            for stream in live.streams:
                stream.write(b"last")
                stream.end()
            await until(lambda: client.answers[stream_id].ended)
            assert client.answers[stream_id].body == b"first last"
            assert (await reader.read()).endswith(b"0\r\n\r\n")
            await stopping
            assert (live.gone, live.settled) == (0, 2)

    run(main(), loop=loop)


@LOOPS
def test_a_stream_that_outlives_the_grace_period_is_reset_and_its_application_settles(loop: str) -> None:
    async def main() -> None:
        live = Live()
        async with (
            running(application(live), graceful_timeout_s=2.0) as server,
            raw_h2(server.port) as client,
            raw_tcp(server.port) as (reader, writer),
        ):
            stream_id = client.request()
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await until(lambda: len(live.streams) == 2)
            await server.stop()
            await until(lambda: client.answers[stream_id].reset_code is not None)
            assert (live.gone, live.settled) == (2, 2)
            with suppress(ConnectionError):
                assert not (await reader.read()).endswith(b"0\r\n\r\n")

    run(main(), loop=loop)


def test_an_application_that_will_not_end_is_cancelled_at_the_end_of_the_grace_period() -> None:
    begun = cancelled = 0

    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal begun, cancelled
        begun += 1
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled += 1
            raise

    async def main() -> None:
        async with (
            running(application(stubborn), graceful_timeout_s=0.4) as server,
            raw_h2(server.port) as client,
        ):
            client.request()
            await until(lambda: begun)
            await server.stop()
            assert cancelled == 1

    run(main())


def test_a_client_that_reads_nothing_cannot_hold_the_shutdown() -> None:
    async def main() -> None:
        live = Live()
        limits = EdgeLimits(stream_buffer_bytes=64 * 2**20, stall_timeout_s=FOR_EVER_S, close_timeout_s=FOR_EVER_S)
        async with (
            running(application(live), graceful_timeout_s=0.4, limits=limits) as server,
            raw_tcp(server.port) as (_, writer),
        ):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await until(lambda: live.streams)
            live.streams[0].write(b"x" * 2**24)
            live.streams[0].end()
            await server.stop()

    run(main())


def test_cancelling_serve_tells_the_applications() -> None:
    async def main() -> None:
        live = Live()
        bound: list[Any] = []
        task = asyncio.get_running_loop().create_task(
            serve(
                application(live),
                binds=["127.0.0.1:0"],
                shutdown_trigger=asyncio.Event().wait,
                graceful_timeout_s=FOR_EVER_S,
                on_bound=bound.extend,
            )
        )
        await until(lambda: bound)
        async with raw_h2(bound[0].port) as client:
            client.request()
            await until(lambda: live.streams)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            (stream,) = live.streams
            assert live.gone == 1, (stream.gone, stream.paused, stream.on_gone, client.closed, client.goaways)

    run(main())


def test_the_extension_is_absent_under_another_server() -> None:
    assert direct_stream({"type": "http"}) is None
    assert direct_stream({"type": "http", "extensions": None}) is None


def test_limits_below_the_protocols_default_window_are_refused() -> None:
    with pytest.raises(ValueError):
        EdgeLimits(request_window_bytes=1000)


@LOOPS
def test_a_connection_too_many_is_closed_and_counted_and_leaves_the_others_alone(loop: str) -> None:
    async def scenario() -> None:
        refused: list[int] = []
        limits = EdgeLimits(connections=2)
        async with running(application(echo), limits=limits, on_refused=lambda: refused.append(1)) as server:
            first = await asyncio.open_connection("127.0.0.1", server.port)
            second = await asyncio.open_connection("127.0.0.1", server.port)
            for reader, writer in (first, second):  # answered: both are on the books
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            for number in range(3):
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                with suppress(ConnectionResetError):
                    assert await reader.read() == b""
                writer.close()
                assert len(refused) == number + 1
            second[1].write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            await second[0].read()
            second[1].close()

            async def is_served() -> bool:
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                try:
                    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                    return (await reader.read(12)).startswith(b"HTTP/1.1 200")
                except ConnectionResetError:
                    return False
                finally:
                    writer.close()

            async with asyncio.timeout(10):
                while not await is_served():
                    await asyncio.sleep(0.01)
            first[1].close()

    run(scenario(), loop=loop)
