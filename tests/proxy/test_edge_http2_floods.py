"""Frames that cost their sender nothing: bounded, told once, and no matter to anybody else."""

import asyncio
import logging
from contextlib import suppress

import pytest
from h2.errors import ErrorCodes

from behest_proxy.edge.host import Receive, Scope, Send
from behest_proxy.edge.limits import EdgeLimits
from proxy.edge_clients import GENEROUS_S, Running, answer, application, raw_h2, raw_tcp, run, running, until
from proxy.h2_frames import frame, frames_in

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
_POST = b"\x83\x84\x86\x41\x01a"
_GET = b"\x82\x84\x86\x41\x01a"
_OPEN = frame(1, 4, 1, _POST)


class Work:
    """An application that waits for its client, and counts who waits."""

    def __init__(self) -> None:
        self.alive = 0
        self.most = 0
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/ok":
            await answer(send, b"ok")
            return
        self.alive += 1
        self.most = max(self.most, self.alive)
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
            await self.may_end.wait()  # the ledger is told, say
        finally:
            self.alive -= 1


async def goaways_to(server: Running, attack: bytes, repeated: bytes, times: int) -> list[int]:
    """Send an attack on a connection of its own; the error codes of the GOAWAYs that came back."""
    async with raw_tcp(server.port) as (reader, writer):
        writer.write(_PREFACE + attack)
        received = bytearray()

        async def read() -> None:
            with suppress(ConnectionError):
                while piece := await reader.read(65_536):
                    received.extend(piece)

        reading = asyncio.get_running_loop().create_task(read())
        with suppress(ConnectionError, RuntimeError):
            for _ in range(times):
                writer.write(repeated)
                await writer.drain()
                await asyncio.sleep(0)
        await asyncio.wait([reading], timeout=GENEROUS_S)
        assert reading.done(), "the connection was not ended"
    return [int.from_bytes(payload[4:8], "big") for kind, payload in frames_in(bytes(received)) if kind == 7]


@pytest.mark.parametrize(
    ("attack", "repeated"),
    [
        pytest.param(b"", frame(6, 0, 0, b"12345678"), id="PING"),
        pytest.param(b"", frame(4, 0, 0, b""), id="SETTINGS"),
        pytest.param(b"", frame(2, 0, 1, b"\x00\x00\x00\x00\x10"), id="PRIORITY"),
        pytest.param(b"", frame(0xEE, 0, 0, b""), id="unknown frames"),
        pytest.param(_OPEN, frame(0, 0, 1, b""), id="empty DATA"),
        pytest.param(_OPEN, frame(0, 0, 1, b"x"), id="a body of one byte a frame"),
        pytest.param(_OPEN, frame(8, 0, 1, b"\x00\x00\x00\x01"), id="WINDOW_UPDATE"),
    ],
)
def test_a_flood_of_frames_ends_its_connection_and_is_told_once(
    attack: bytes, repeated: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work()

    async def main() -> None:
        async with running(application(work)) as server, raw_h2(server.port) as other:
            assert await goaways_to(server, attack, repeated * 500, 20) == [ErrorCodes.ENHANCE_YOUR_CALM]
            assert (await other.get("/ok")).body == b"ok"
            await until(lambda: work.alive == 0)

    with caplog.at_level(logging.WARNING):
        run(main())
    assert len(caplog.records) == 1
    assert "connection is ended" in caplog.records[0].getMessage()


def test_a_head_without_an_end_ends_its_connection() -> None:
    """CONTINUATION frames: `h2` itself takes no more than 64 of them."""

    async def main() -> None:
        async with running(application(Work())) as server, raw_h2(server.port) as other:
            head, more = frame(1, 0, 1, _POST), frame(9, 0, 1, b"")
            assert await goaways_to(server, head, more * 500, 1) == [ErrorCodes.PROTOCOL_ERROR]
            assert (await other.get("/ok")).body == b"ok"

    run(main())


def test_ten_thousand_opened_and_reset_streams_make_no_hundred_tasks_and_the_connection_is_told() -> None:
    work = Work()

    async def main() -> None:
        async with running(application(work)) as server, raw_h2(server.port) as other, raw_h2(server.port) as client:
            with suppress(ConnectionError, RuntimeError):
                for number in range(10_000):
                    stream_id = client.request()
                    if number % 5 == 0:  # the others are taken back before anybody began to work on them
                        await asyncio.sleep(0.0005)
                    client.reset(stream_id)
                    if number % 5 == 0:
                        assert work.alive <= 100
                        assert len(asyncio.all_tasks()) < 150
                    if client.closed:
                        break
            await until(lambda: client.closed)
            assert [code for _, code in client.goaways] == [ErrorCodes.ENHANCE_YOUR_CALM]
            assert (await other.get("/ok")).body == b"ok"
            await until(lambda: work.alive == 0)
            assert 0 < work.most <= 100

    run(main())


def test_requests_are_refused_while_the_work_for_reset_ones_goes_on() -> None:
    work = Work()

    async def main() -> None:
        limits = EdgeLimits(abandoned_requests=3)
        async with running(application(work), limits=limits) as server, raw_h2(server.port) as client:
            work.may_end.clear()
            for number in range(3):
                stream_id = client.request()
                while work.alive == number:
                    await asyncio.sleep(0.001)
                client.reset(stream_id)
            assert (await client.get("/")).reset_code == ErrorCodes.REFUSED_STREAM
            work.may_end.set()
            await until(lambda: work.alive == 0)
            assert (await client.get("/ok")).body == b"ok"

    run(main())


def test_streams_that_the_client_makes_us_reset_count_as_its_resets() -> None:
    """MadeYouReset: a window pushed over its bound obliges us to reset the stream (RFC 9113, 6.9.1)."""
    work = Work()

    async def main() -> None:
        async with running(application(work), limits=EdgeLimits(resets=50)) as server:
            attack = b"".join(
                frame(1, 5, stream_id, _GET) + frame(8, 0, stream_id, b"\x7f\xff\xff\xff")
                for stream_id in range(1, 400, 2)
            )
            assert await goaways_to(server, b"", attack, 1) == [ErrorCodes.ENHANCE_YOUR_CALM]
            await until(lambda: work.alive == 0)
            assert work.most <= 100

    run(main())


def test_a_body_that_never_ends_is_cut() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/ok":
            await answer(send, b"ok")
            return
        while (await receive())["type"] != "http.disconnect":
            pass

    async def main() -> None:
        limits = EdgeLimits(body_timeout_s=0.2)
        async with running(application(app), limits=limits) as server, raw_h2(server.port) as client:
            slow = client.request(method="POST", end=False)
            await until(lambda: client.answers[slow].reset_code is not None)
            assert (await client.get("/ok")).body == b"ok"
            async with raw_tcp(server.port) as (reader, writer):
                writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nslow")
                assert await asyncio.wait_for(reader.read(-1), GENEROUS_S) == b""

    run(main())
