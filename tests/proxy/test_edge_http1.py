import asyncio
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_proxy.edge.host import Receive, Scope, Send
from behest_proxy.edge.limits import EdgeLimits
from proxy.edge_clients import (
    LOOPS,
    answer,
    application,
    echo,
    raw_tcp,
    read_body,
    run,
    running,
    stream_of,
    until,
)

GET = b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n"


async def read_answers(reader: asyncio.StreamReader, methods: list[bytes]) -> list[tuple[int, Any, bytes]]:
    """Reads as many answers as there are methods, by h11's client: status, headers, body."""
    answers: list[tuple[int, Any, bytes]] = []
    rest = b""
    for method in methods:
        machine = h11.Connection(h11.CLIENT)
        machine.send(h11.Request(method=method, target="/", headers=[("host", "a")]))
        machine.send(h11.EndOfMessage())
        if rest:
            machine.receive_data(rest)
        status, headers, body = 0, {}, bytearray()
        while True:
            event = machine.next_event()
            if event is h11.NEED_DATA:
                machine.receive_data(await reader.read(65_536))
            elif isinstance(event, h11.Response):
                status, headers = event.status_code, dict(event.headers)
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                assert isinstance(event, h11.InformationalResponse)
        rest = machine.trailing_data[0]
        answers.append((status, headers, bytes(body)))
    return answers


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """`/direct/...` answers by direct writes, everything else echoes."""
    if not scope["path"].startswith("/direct"):
        await echo(scope, receive, send)
        return
    stream = stream_of(scope)
    stream.begin(200, [(b"content-type", b"text/event-stream")])
    for number in range(5):
        stream.write(b"%d," % number)
        stream.write(b"")
    stream.end()
    stream.end()
    with pytest.raises(RuntimeError):
        stream.write(b"late")


@LOOPS
def test_direct_and_ordinary_answers_alternate_on_one_connection(loop: str) -> None:
    async def main() -> None:
        async with running(application(app)) as server, raw_tcp(server.port) as (reader, writer):
            for _ in range(3):
                writer.write(GET % b"direct")
                [(status, headers, body)] = await read_answers(reader, [b"GET"])
                assert (status, body) == (200, b"0,1,2,3,4,")
                assert headers[b"transfer-encoding"] == b"chunked"
                assert headers[b"server"] == b"behest"
                assert b"connection" not in headers
                writer.write(
                    b"POST /x?y HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
                )
                [(status, headers, body)] = await read_answers(reader, [b"POST"])
                assert (status, body) == (200, b"1.1 POST /x y abc")

    run(main(), loop=loop)


@LOOPS
def test_pipelined_requests_are_answered_in_order(loop: str) -> None:
    async def main() -> None:
        async with running(application(app)) as server, raw_tcp(server.port) as (reader, writer):
            count = 300
            writer.write(b"".join(GET % (b"direct" if n % 2 else b"%d" % n) for n in range(count)))
            answers = await read_answers(reader, [b"GET"] * count)
            for number, (status, _, body) in enumerate(answers):
                assert status == 200
                assert body == (b"0,1,2,3,4," if number % 2 else b"1.1 GET /%d  " % number)

    run(main(), loop=loop)


def test_pipelined_bytes_are_bounded_while_an_answer_runs() -> None:
    release = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await release.wait()
        await answer(send, b"")

    async def main() -> None:
        limits = EdgeLimits(pipelined_bytes=10_000)
        async with running(application(slow), limits=limits) as server, raw_tcp(server.port) as (reader, writer):
            requests = 200_000
            sent = asyncio.get_running_loop().create_task(_write_all(writer, (GET % b"") * requests))
            await asyncio.sleep(0.3)
            assert not sent.done(), "the socket was read without bound"
            release.set()
            await read_answers(reader, [b"GET"] * 2000)
            sent.cancel()
            await asyncio.wait([sent])

    run(main())


async def _write_all(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def test_an_http_1_0_client_gets_a_body_that_ends_with_the_connection() -> None:
    async def main() -> None:
        async with running(application(app)) as server, raw_tcp(server.port) as (reader, writer):
            writer.write(b"GET /direct HTTP/1.0\r\n\r\n")
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK")
            assert b"chunked" not in head
            assert body == b"0,1,2,3,4,"

    run(main())


@LOOPS
def test_a_client_that_closes_mid_answer_is_told_at_once(loop: str) -> None:
    gone: list[bool] = []
    disconnects: list[str] = []

    async def stream_for_ever(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.on_gone = lambda: gone.append(True)
        stream.begin(200, [])
        stream.write(b"first")
        await receive()
        disconnects.append((await receive())["type"])
        stream.write(b"dropped")
        stream.end()

    async def main() -> None:
        async with running(application(stream_for_ever)) as server:
            async with raw_tcp(server.port) as (reader, writer):
                writer.write(GET % b"")
                await reader.readuntil(b"first")
            await until(lambda: disconnects)  # and not when one of the edge's times is over: the shortest is a minute
            assert gone == [True]
            assert disconnects == ["http.disconnect"]

    run(main(), loop=loop)


@LOOPS
def test_send_stops_with_an_os_error_when_the_client_left(loop: str) -> None:
    ended: list[BaseException] = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
                await asyncio.sleep(0)
        except OSError as error:
            ended.append(error)
            raise

    async def main() -> None:
        async with running(application(endless)) as server:
            async with raw_tcp(server.port) as (reader, writer):
                writer.write(GET % b"")
                await reader.read(1000)
            await until(lambda: ended)

    run(main(), loop=loop)


@LOOPS
def test_a_full_socket_pauses_and_a_reader_resumes(loop: str) -> None:
    events: list[str] = []
    most = 0

    async def flood(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal most
        stream = stream_of(scope)
        ready = asyncio.Event()

        def resume() -> None:
            events.append("resume")
            ready.set()

        stream.on_resume = resume
        stream.begin(200, [])
        for number in range(600):
            stream.write(b"%08d" % number * 1250)
            most = max(most, stream.buffered_bytes)
            if stream.paused:
                events.append("pause")
                ready.clear()
                await ready.wait()
                assert not stream.paused
        stream.end()

    async def main() -> None:
        async with running(application(flood)) as server, raw_tcp(server.port) as (reader, writer):
            writer.write(GET % b"")
            await until(lambda: events)
            await asyncio.sleep(0.1)
            await until(lambda: events[-1] == "pause")
            [(_, _, body)] = await read_answers(reader, [b"GET"])
            assert body == b"".join(b"%08d" % number * 1250 for number in range(600))
            assert events[0::2] == ["pause"] * len(events[0::2])
            assert events[1::2] == ["resume"] * len(events[1::2])
            assert most < 64 * 1024 + 11_000

    run(main(), loop=loop)


@LOOPS
def test_one_large_write_is_no_reason_to_cut_a_client_that_reads(loop: str) -> None:
    size = 16 * 2**20  # more than the kernel takes at once

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.begin(200, [])
        stream.write(b"x" * size)
        assert stream.paused
        stream.write(b"y" * 1000)
        stream.end()

    async def main() -> None:
        async with running(application(large)) as server, raw_tcp(server.port) as (reader, writer):
            writer.write(GET % b"")
            [(_, _, body)] = await read_answers(reader, [b"GET"])
            assert body == b"x" * size + b"y" * 1000

    run(main(), loop=loop)


@LOOPS
def test_a_producer_that_ignores_the_pause_is_cut(loop: str) -> None:
    state: dict[str, int] = {"written": 0, "gone": 0}

    async def flood(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.on_gone = lambda: state.update(gone=state["gone"] + 1)
        stream.begin(200, [])
        while not stream.gone:
            stream.write(b"x" * 65_536)
            state["written"] += 65_536
            await asyncio.sleep(0)

    async def main() -> None:
        async with running(application(flood)) as server, raw_tcp(server.port) as (_, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(GET % b"")
            await until(lambda: state["gone"] == 1)
            assert state["written"] < 20 * 2**20  # the kernel's socket buffers hold several MiB

    run(main(), loop=loop)


def test_a_body_that_nobody_reads_is_not_buffered_without_bound() -> None:
    scope_of: list[Any] = []
    release = asyncio.Event()

    async def lazy(scope: Scope, receive: Receive, send: Send) -> None:
        scope_of.append(stream_of(scope))
        await release.wait()
        body = await read_body(receive)
        await answer(send, b"%d" % len(body))

    async def main() -> None:
        async with running(application(lazy)) as server, raw_tcp(server.port) as (reader, writer):
            size = 32 * 2**20
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
            sent = asyncio.get_running_loop().create_task(_write_all(writer, b"b" * size))
            await until(lambda: scope_of)
            await asyncio.sleep(0.3)
            assert not sent.done()
            assert scope_of[0].unread_bytes <= 64 * 1024 + 256 * 1024
            release.set()
            [(status, _, body)] = await read_answers(reader, [b"POST"])
            assert (status, body) == (200, b"%d" % size)
            await sent

    run(main())


def test_continue_is_said_when_the_application_asks_for_the_body_and_not_before() -> None:
    async def maybe(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/no":
            await answer(send, b"no", status=413)
        else:
            await echo(scope, receive, send)

    head = b"POST /%b HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"

    async def main() -> None:
        async with running(application(maybe)) as server:
            async with raw_tcp(server.port) as (reader, writer):
                writer.write(head % b"yes")
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
                writer.write(b"abc")
                [(status, _, body)] = await read_answers(reader, [b"POST"])
                assert (status, body) == (200, b"1.1 POST /yes  abc")
            async with raw_tcp(server.port) as (reader, writer):
                writer.write(head % b"no")
                text = await reader.read()
                assert text.startswith(b"HTTP/1.1 413 ")
                assert b"connection: close" in text.lower()

    run(main())


@LOOPS
def test_an_early_answer_to_an_unread_body_arrives_whole_and_closes(loop: str) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"r" * 100_000, status=402)

    async def main() -> None:
        async with running(application(refuse)) as server:
            for _ in range(5):
                async with raw_tcp(server.port) as (reader, writer):
                    writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 900000\r\n\r\n" + b"b" * 500_000)
                    [(status, headers, body)] = await read_answers(reader, [b"POST"])
                    assert (status, len(body)) == (402, 100_000)
                    assert headers[b"connection"] == b"close"
                    assert await reader.read() == b""

    run(main(), loop=loop)


def test_malformed_and_oversized_heads_are_refused_in_the_envelope() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError(scope["path"])

    cases = [
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no host
        (b"GET nonsense HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    ]

    async def main() -> None:
        async with running(application(never)) as server:
            for head, expected in cases:
                async with raw_tcp(server.port) as (reader, writer):
                    writer.write(head)
                    text = await reader.read()
                    assert text.startswith(b"HTTP/1.1 %d " % expected), (head[:40], text[:60])
                    assert b'{"error":{' in text

    run(main())


def test_an_absolute_target_is_accepted() -> None:
    async def main() -> None:
        async with running(application(echo)) as server, raw_tcp(server.port) as (reader, writer):
            writer.write(b"GET http://other/p?q HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await read_answers(reader, [b"GET"]))[0][2] == b"1.1 GET /p q "

    run(main())


def test_a_head_that_trickles_in_is_given_up() -> None:
    async def main() -> None:
        limits = EdgeLimits(head_timeout_s=0.3, idle_timeout_s=30)
        async with running(application(echo), limits=limits) as server, raw_tcp(server.port) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\n")

            async def trickle() -> None:
                while True:
                    writer.write(b"x: y\r\n")
                    await asyncio.sleep(0.05)

            task = asyncio.get_running_loop().create_task(trickle())
            text = await reader.read()
            task.cancel()
            assert text.startswith(b"HTTP/1.1 408 ")

    run(main())


def test_an_idle_connection_is_closed() -> None:
    async def main() -> None:
        limits = EdgeLimits(idle_timeout_s=1.0)
        async with running(application(echo), limits=limits) as server:
            async with raw_tcp(server.port) as (reader, writer):
                assert await reader.read() == b""
            async with raw_tcp(server.port) as (reader, writer):
                writer.write(GET % b"")
                await read_answers(reader, [b"GET"])
                assert await reader.read() == b""

    run(main())


def test_an_answer_that_is_cut_never_ends_properly() -> None:
    async def cut(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        headers = [(b"content-length", b"9")] if scope["path"] == "/short" else []
        stream.begin(200, headers)
        stream.write(b"part")
        await asyncio.sleep(0.05)
        if scope["path"] == "/reset":
            stream.reset()
        elif scope["path"] == "/fail":
            raise LookupError
        elif scope["path"] == "/short":
            stream.end()

    async def main() -> None:
        async with running(application(cut)) as server:
            for path in (b"reset", b"fail", b"return", b"short"):
                async with raw_tcp(server.port) as (reader, writer):
                    writer.write(GET % path)
                    text = b""
                    try:
                        while more := await reader.read(1000):
                            text += more
                    except ConnectionError:
                        pass
                    assert b"part" in text
                    assert not text.endswith(b"0\r\n\r\n")

    run(main())


def test_head_and_204_have_no_body_and_keep_the_connection() -> None:
    async def empty(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.begin(204 if scope["path"] == "/204" else 200, [])
        stream.write(b"dropped")
        stream.end()

    async def main() -> None:
        async with running(application(empty)) as server, raw_tcp(server.port) as (reader, writer):
            writer.write(GET % b"204")
            assert (await read_answers(reader, [b"GET"]))[0][::2] == (204, b"")
            writer.write(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await read_answers(reader, [b"HEAD"]))[0][::2] == (200, b"")
            writer.write(GET % b"204")
            assert (await read_answers(reader, [b"GET"]))[0][::2] == (204, b"")

    run(main())


@settings(max_examples=30, deadline=None)
@given(
    writes=st.lists(st.binary(max_size=5000), max_size=10),
    body=st.binary(max_size=20_000),
    cuts=st.lists(st.integers(0, 20_500), max_size=6),
)
def test_however_the_bytes_are_cut_request_and_answer_arrive_whole(
    writes: list[bytes], body: bytes, cuts: list[int]
) -> None:
    async def direct_echo(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        got = await read_body(receive)
        stream.begin(200, [])
        for data in writes:
            stream.write(data)
        stream.write(got)
        stream.end()

    request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    request *= 2

    async def main() -> None:
        async with running(application(direct_echo)) as server, raw_tcp(server.port) as (reader, writer):
            last = 0
            for position in sorted(cuts):
                writer.write(request[last:position])
                last = max(last, position)
                for _ in range(5):
                    await asyncio.sleep(0)
            writer.write(request[last:])
            for status, _, got in await read_answers(reader, [b"POST", b"POST"]):
                assert status == 200
                assert got == b"".join(writes) + body

    run(main())
