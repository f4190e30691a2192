"""Resets, closed connections, broken frames, floods and idleness at the edge."""

import asyncio
import socket
from contextlib import suppress
from typing import Any

import h2.errors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_proxy.edge.host import Receive, Scope, Send
from behest_proxy.edge.limits import EdgeLimits
from behest_proxy.edge.served import ServedRequest
from proxy.edge_clients import (
    LOOPS,
    answer,
    application,
    echo,
    raw_h2,
    raw_tcp,
    run,
    running,
    stream_of,
    until,
)
from proxy.h2_frames import frame, frames_in


@LOOPS
def test_a_reset_by_the_client_tells_the_application_once_and_leaves_the_connection(loop: str) -> None:
    gone: list[bool] = []
    later: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/ok":
            await answer(send, b"ok")
            return
        stream = stream_of(scope)
        stream.on_gone = lambda: gone.append(True)
        stream.begin(200, [])
        stream.write(b"first")
        assert (await receive())["type"] == "http.request"
        later.append((await receive())["type"])
        assert stream.gone
        stream.write(b"dropped")
        stream.end()
        stream.reset()
        assert (await receive())["type"] == "http.disconnect"
        with pytest.raises(OSError):
            await send({"type": "http.response.body", "body": b"x"})
        later.append("returned")

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            stream_id = client.request()
            await until(lambda: bytes(client.answers[stream_id].body) == b"first")
            client.reset(stream_id)
            await until(lambda: gone)  # and not when one of the edge's times is over: the shortest is a minute
            await until(lambda: len(later) == 2)
            assert later == ["http.disconnect", "returned"]
            assert (await client.get("/ok")).body == b"ok"
            assert len(gone) == 1

    run(main(), loop=loop)


def test_a_closed_connection_tells_every_stream_once() -> None:
    gone: list[str] = []
    begun = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal begun
        stream = stream_of(scope)
        stream.on_gone = lambda: gone.append(scope["path"])
        stream.begin(200, [])
        begun += 1
        while (await receive())["type"] != "http.disconnect":
            pass

    async def main() -> None:
        async with running(application(app)) as server:
            async with raw_h2(server.port) as client:
                for number in range(20):
                    client.request(f"/{number}")
                await until(lambda: begun == 20)
            await until(lambda: len(gone) == 20)
            assert len(set(gone)) == 20

    run(main())


def test_a_protocol_error_is_answered_by_goaway_and_streams_are_told() -> None:
    begun = gone = 0

    def note() -> None:
        nonlocal gone
        gone += 1

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal begun
        stream_of(scope).on_gone = note
        begun += 1
        await receive()
        await receive()

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            client.request()
            await until(lambda: begun)
            client.writer.write(b"\x00\x00\x04\x08\x00\x00\x00\x00\x00" + b"\x00" * 4)  # WINDOW_UPDATE of 0
            await until(lambda: client.closed)
            assert client.goaways[0][1] == h2.errors.ErrorCodes.PROTOCOL_ERROR
            await until(lambda: gone == 1)

    run(main())


def test_a_client_that_pings_and_never_reads_is_aborted() -> None:
    async def main() -> None:
        limits = EdgeLimits(control_buffer_bytes=64 * 1024)
        async with running(application(echo), limits=limits) as server, raw_tcp(server.port) as (_, writer):
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            ping = b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + b"12345678"

            async def flood() -> None:
                for _ in range(20_000):
                    writer.write(ping * 1000)
                    await writer.drain()

            with pytest.raises(ConnectionError):
                await flood()

    run(main())


def test_an_idle_connection_is_closed_with_goaway_and_a_live_one_is_not() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            await asyncio.sleep(1.5)
        await answer(send, b"ok")

    async def main() -> None:
        limits = EdgeLimits(idle_timeout_s=1.0)
        async with running(application(app), limits=limits) as server, raw_h2(server.port) as client:
            assert (await client.get("/slow")).body == b"ok"
            await until(lambda: client.closed)
            assert client.goaways == [(1, 0)]

    run(main())


_GET = b"\x82\x84\x86\x41\x01a"
_POST = b"\x83\x84\x86\x41\x01a"
_WIDE = frame(4, 0, 0, b"\x00\x04\x00\x10\x00\x00") + frame(8, 0, 0, b"\x00\x10\x00\x00")
"""SETTINGS and WINDOW_UPDATE: a megabyte may come."""
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
LAST_WORDS = {
    "the client said goodbye": frame(7, 0, 0, bytes(8)),
    "the client broke the protocol": frame(8, 0, 0, bytes(4)),  # WINDOW_UPDATE of 0
    "the connection was idle": b"",
}


@LOOPS
@pytest.mark.parametrize("why", LAST_WORDS)
def test_what_a_client_sends_into_our_close_is_no_reason_for_a_reset(loop: str, why: str) -> None:
    """A reset could overtake our GOAWAY, and with it the word of which requests nobody took."""

    async def main() -> None:
        limits = EdgeLimits(idle_timeout_s=1.0 if why == "the connection was idle" else 60.0)
        async with running(application(echo), limits=limits) as server:
            events = asyncio.get_running_loop()
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.setblocking(False)
                await events.sock_sendall(client, _GREETING + LAST_WORDS[why])
                while await events.sock_recv(client, 65_536):
                    pass
                for _ in range(3):
                    await events.sock_sendall(client, frame(6, 0, 0, b"12345678"))
                    await asyncio.sleep(0.02)
                assert await events.sock_recv(client, 65_536) == b""
                assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0

    run(main(), loop=loop)


@LOOPS
def test_a_servers_end_takes_nothing_of_the_last_answers_from_clients_that_go_on_talking(loop: str) -> None:
    """A client confirms what it reads. A socket that is closed answers that with a reset, and the rest is lost."""
    streams: list[ServedRequest] = []
    chunks = 200

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.begin(200, [])
        streams.append(stream)
        while (await receive())["type"] != "http.disconnect":
            pass

    async def main() -> None:
        events = asyncio.get_running_loop()
        received = bytearray()

        def goaways() -> int:
            return [kind for kind, _ in frames_in(bytes(received))].count(7)

        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # most of the answer waits at the server
            client.setblocking(False)
            async with running(application(app)) as server:
                await events.sock_connect(client, ("127.0.0.1", server.port))
                await events.sock_sendall(client, _GREETING + _WIDE + frame(1, 5, 1, _GET))
                await until(lambda: streams)
                stopping = events.create_task(server.stop())
                while goaways() < 2:
                    received += await events.sock_recv(client, 65_536)
                    await events.sock_sendall(client, frame(6, 1, 0, b"behest-0"))
                for _ in range(chunks):
                    streams[0].write(b"x" * 1000)
                streams[0].end()
                while piece := await events.sock_recv(client, 65_536):
                    received += piece
                    await events.sock_sendall(client, frame(6, 0, 0, b"12345678"))
                client.close()
                await stopping
        assert sum(len(payload) for kind, payload in frames_in(bytes(received)) if kind == 0) == chunks * 1000

    run(main(), loop=loop)


def test_a_client_that_never_closes_its_side_keeps_its_place_no_longer_than_we_linger() -> None:
    async def main() -> None:
        limits = EdgeLimits(connections=1, linger_timeout_s=0.1, close_timeout_s=0.1)
        async with running(application(echo), limits=limits) as server, raw_tcp(server.port) as (reader, writer):
            writer.write(_GREETING + LAST_WORDS["the client said goodbye"])
            await reader.read()
            status = 0
            while status != 200:
                async with raw_h2(server.port) as client:
                    status = (await client.get("/")).status

    run(main())


def test_an_application_cancelled_by_its_callback_harms_no_other_stream() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/ok":
            await answer(send, b"ok")
            return
        stream = stream_of(scope)

        def fail() -> None:
            raise RuntimeError("a callback that fails")

        stream.on_gone = fail
        stream.begin(200, [])
        await receive()
        await receive()

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            stream_id = client.request()
            await until(lambda: client.answers[stream_id].status == 200)
            client.reset(stream_id)
            assert (await client.get("/ok")).body == b"ok"

    run(main())


_FRAMES = st.builds(
    frame,
    st.integers(0, 10),
    st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x25]),
    st.integers(0, 9),
    st.one_of(st.binary(max_size=40), st.sampled_from([_GET, _POST, b"\x00\x00\x00\x08", b""])),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(_FRAMES, st.binary(max_size=30)), max_size=25))
def test_no_sequence_of_frames_breaks_the_server(frames: list[bytes]) -> None:
    failures: list[dict[str, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.begin(200, [])
        stream.write(b"a")
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            stream.write(b"b" * 20_000)
        stream.end()

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async with running(application(app), graceful_timeout_s=0.2) as server:
            async with raw_tcp(server.port) as (_, writer):
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
                with suppress(RuntimeError):  # uvloop's word for a transport that was closed meanwhile
                    for each in frames:
                        writer.write(each)
                        await asyncio.sleep(0)
                await asyncio.sleep(0.005)
            async with raw_h2(server.port) as client:
                assert (await client.get(method="POST", body=b"x")).ended

    run(main())
    assert not failures
