"""HTTP/2 against a scripted server: many streams, flow control, cancels and limits."""

import asyncio
import itertools
import os

import pytest
from h2.errors import ErrorCodes
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_proxy.upstream.http2_settings import STREAM_WINDOW_BYTES
from proxy.h2_frames import frame
from proxy.upstream_http2 import a_request, any_ok
from proxy.upstream_servers import (
    LOOPS,
    H2Peer,
    a_client,
    eventually,
    fetch,
    http2_server,
    run,
    start,
)


@pytest.mark.parametrize("loop", LOOPS)
def test_request_and_answer_are_what_was_meant(loop: str) -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            handler = await fetch(client, a_request(server.url, b'{"a":1}'))
            request = server.peer.requests[1]
        assert request.headers == {
            b":method": b"POST",
            b":scheme": b"http",
            b":authority": b"127.0.0.1:%d" % server.port,
            b":path": b"/v1/chat/completions",
            b"content-type": b"application/json",
            b"content-length": b"7",
        }
        assert bytes(request.body) == b'{"a":1}'
        assert (handler.status, handler.headers) == (200, [(b"content-type", b"text/event-stream")])
        assert (handler.body, handler.ended, handler.sent) == (b"hello", 1, 1)

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_more_than_a_thousand_requests_share_one_connection(loop: str) -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            for _ in range(0, 1020, 20):
                handlers = [start(client, a_request(server.url))[0] for _ in range(20)]
                for handler in handlers:
                    await handler.over.wait()
                    assert (handler.body, handler.ended) == (b"hello", 1)
            assert len(server.peer.requests) == 1020

    run(main, loop)


class Slicer:
    """Collects what a server's h2 wants to send, to send it in other pieces."""

    def __init__(self, peer: H2Peer) -> None:
        self.peer = peer

    async def send(self, points: list[int]) -> None:
        data = self.peer.h2.data_to_send()
        edges = sorted({0, len(data), *(point % (len(data) + 1) for point in points)})
        for left, right in itertools.pairwise(edges):
            self.peer.raw(data[left:right])
            await asyncio.sleep(0)


@settings(max_examples=30, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.sampled_from([1, 3]), st.binary(max_size=300), st.booleans()), max_size=20),
    points=st.lists(st.integers(0, 5000), max_size=15),
    with_length=st.booleans(),
    trailers=st.booleans(),
)
def test_any_split_of_interleaved_streams_gives_the_same_bodies(
    pieces: list[tuple[int, bytes, bool]], points: list[int], with_length: bool, trailers: bool
) -> None:
    bodies = {stream: b"".join(data for number, data, _ in pieces if number == stream) for stream in (1, 3)}

    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: None
            handlers = [start(client, a_request(server.url))[0] for _ in (1, 3)]
            await eventually(lambda: server.peers and len(server.peers[0].requests) == 2)
            server.peer.flush()
            h2 = server.peer.h2
            for stream in (1, 3):
                length = [(b"content-length", b"%d" % len(bodies[stream]))] if with_length else []
                h2.send_headers(stream, [(b":status", b"103")])
                h2.send_headers(stream, [(b":status", b"200"), *length])
            for stream, data, padded in pieces:
                h2.send_data(stream, data, pad_length=7 if padded else None)
            for stream in (1, 3):
                if trailers:
                    h2.send_headers(stream, [(b"x-a", b"b")], end_stream=True)
                else:
                    h2.end_stream(stream)
            await Slicer(server.peer).send(points)
            for handler, stream in zip(handlers, (1, 3), strict=True):
                await handler.over.wait()
                assert handler.failure is None
                assert (handler.status, handler.body, handler.ended) == (200, bodies[stream], 1)

    run(main)


def test_a_hundred_frames_in_one_read_are_one_piece_per_stream() -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: peer.head(stream_id)
            first, second = start(client, a_request(server.url))[0], start(client, a_request(server.url))[0]
            await asyncio.gather(first.begun.wait(), second.begun.wait())
            for index in range(100):
                server.peer.h2.send_data(1 if index % 2 else 3, b"x" * 200)
            server.peer.flush()
            await eventually(lambda: len(first.body) == len(second.body) == 10_000)
            assert len(first.pieces) <= 2  # one, unless the kernel cut the read
            assert len(second.pieces) <= 2

    run(main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("phase", ["before the head", "after the head", "in the body", "inside on_data"])
def test_a_cancel_resets_the_stream_with_cancel_and_others_go_on(phase: str, loop: str) -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: None
            handler, call = start(client, a_request(server.url))
            other, _ = start(client, a_request(server.url))
            handler.on_piece = lambda data: call.cancel() if phase == "inside on_data" else None
            await eventually(lambda: server.peers and len(server.peers[0].requests) == 2)
            peer = server.peer
            if phase != "before the head":
                peer.head(1)
                await handler.begun.wait()
            if phase.startswith("in"):
                peer.data(1, b"one")
                await eventually(lambda: handler.pieces)
            call.cancel()
            call.cancel()
            # On their way while the reset travels.
            if phase.startswith("in"):
                peer.raw(frame(0, 0, 1, b"late") * 3 + frame(0, 1, 1, b"end"))
            await eventually(lambda: peer.requests[1].reset_code is not None)
            assert peer.requests[1].reset_code == ErrorCodes.CANCEL
            peer.reply(3)
            await other.over.wait()
            assert (other.body, other.ended) == (b"hello", 1)
            assert not handler.over.is_set()
            assert (await fetch(client, any_ok(server))).ended == 1

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("with_length", [False, True])
def test_a_paused_stream_is_bounded_and_does_not_stand_in_anothers_way(with_length: bool, loop: str) -> None:
    async def main() -> None:
        size = 4 * 1024 * 1024
        block = os.urandom(size)
        tasks: dict[int, asyncio.Task[int]] = {}

        def on_request(peer: H2Peer, stream_id: int) -> None:
            peer.head(stream_id, *([(b"content-length", b"%d" % size)] if with_length else []))
            tasks[stream_id] = asyncio.ensure_future(peer.stream(stream_id, block))

        async with http2_server() as server, a_client() as client:
            server.on_request = on_request
            paused, call = start(client, a_request(server.url, idle_timeout_s=1.0))
            paused.on_piece = lambda data: call.pause()
            await eventually(lambda: paused.pieces)
            others = [start(client, a_request(server.url))[0] for _ in range(8)]
            for other in others:
                await other.over.wait()
                assert (len(other.body), other.ended) == (size, 1)
            assert len(paused.pieces) == 1
            assert len(paused.body) <= STREAM_WINDOW_BYTES
            assert not tasks[1].done()
            await asyncio.sleep(1.2)  # longer than the idle limit
            # A resume may be followed by another pause at once.
            call.resume()
            assert len(paused.pieces) == 2
            assert len(paused.body) <= STREAM_WINDOW_BYTES * 2
            paused.on_piece = lambda data: None
            call.resume()
            await paused.over.wait()
            assert paused.ended == 1
            assert paused.body == block

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_paused_call_can_be_cancelled(loop: str) -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: peer.head(stream_id)
            handler, call = start(client, a_request(server.url))
            call.pause()
            await handler.begun.wait()
            server.peer.data(1, b"held back")
            await asyncio.sleep(0.05)
            call.cancel()
            call.resume()
            assert not handler.pieces
            await eventually(lambda: server.peer.requests[1].reset_code == ErrorCodes.CANCEL)

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_request_larger_than_the_window_is_sent_as_the_window_opens(loop: str) -> None:
    async def main() -> None:
        body = os.urandom(3 * 1024 * 1024)
        async with http2_server() as server, a_client() as client:
            server.stingy = True
            handler, _ = start(client, a_request(server.url, body))
            # The connection is there before its first request.
            await eventually(lambda: server.peers and 1 in server.peer.requests)
            await eventually(lambda: len(server.peer.requests[1].body) == 65_535)
            await asyncio.sleep(0.05)
            assert handler.sent == 0
            server.stingy = False
            server.peer.h2.acknowledge_received_data(65_535, 1)
            server.peer.flush()
            await handler.over.wait()
            assert (handler.sent, handler.ended) == (1, 1)
            assert bytes(server.peer.requests[1].body) == body

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_early_answer_ends_the_call_and_gives_up_the_rest_of_the_request(loop: str) -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.stingy = True
            server.on_head = lambda peer, stream_id: peer.head(stream_id, status=b"413", end=True)
            handler = await fetch(client, a_request(server.url, b"x" * 1_000_000))
            assert (handler.status, handler.ended, handler.sent) == (413, 1, 0)
            await eventually(lambda: server.peer.requests[1].reset_code is not None)

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_peers_limit_of_streams_is_kept_and_more_connections_are_opened(loop: str) -> None:
    async def main() -> None:
        async with http2_server(max_concurrent_streams=3) as server:
            server.on_request = lambda peer, stream_id: None
            async with a_client(multiplexed_connections_per_origin_max=2) as client:
                handlers = [start(client, a_request(server.url))[0] for _ in range(10)]
                await eventually(lambda: sum(len(peer.requests) for peer in server.peers) == 6)
                await asyncio.sleep(0.05)
                assert [len(peer.requests) for peer in server.peers] == [3, 3]
                answered: set[tuple[H2Peer, int]] = set()
                while not all(handler.over.is_set() for handler in handlers):
                    for peer in server.peers:
                        for stream_id in list(peer.requests):
                            if (peer, stream_id) not in answered:
                                answered.add((peer, stream_id))
                                peer.reply(stream_id)
                    await asyncio.sleep(0.005)
                assert all(handler.ended for handler in handlers)
                assert len(server.peers) == 2

    run(main, loop)


def test_a_call_that_waits_for_a_stream_can_be_cancelled_and_times_out() -> None:
    async def main() -> None:
        async with http2_server(max_concurrent_streams=1) as server:
            server.on_request = lambda peer, stream_id: None
            async with a_client(multiplexed_connections_per_origin_max=1) as client:
                start(client, a_request(server.url))
                await eventually(lambda: server.peers and server.peers[0].requests)
                cancelled, call = start(client, a_request(server.url))
                call.cancel()
                late = await fetch(client, a_request(server.url, connect_timeout_s=0.1))
                assert late.kind == "connect_timeout"
                assert not cancelled.over.is_set()
                assert len(server.peer.requests) == 1

    run(main)


def test_only_one_call_goes_ahead_before_the_peers_settings() -> None:
    async def main() -> None:
        async with http2_server(max_concurrent_streams=1) as server:
            async with a_client(multiplexed_connections_per_origin_max=1) as client:
                handlers = [start(client, a_request(server.url))[0] for _ in range(20)]
                for handler in handlers:
                    await handler.over.wait()
                    assert (handler.ended, handler.failure) == (1, None)
            assert len(server.peer.requests) == 20

    run(main)


@pytest.mark.parametrize("loop", LOOPS)
def test_silence_has_its_limits_and_resets_only_its_stream(loop: str) -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: peer.head(stream_id) if stream_id == 3 else None
            silent = await fetch(client, a_request(server.url, first_byte_timeout_s=0.1))
            stalled = await fetch(client, a_request(server.url, idle_timeout_s=0.1))
            assert (silent.kind, stalled.kind) == ("first_byte_timeout", "idle_timeout")
            await eventually(lambda: server.peer.requests[3].reset_code == ErrorCodes.CANCEL)
            assert server.peer.requests[1].reset_code == ErrorCodes.CANCEL
            assert (await fetch(client, any_ok(server))).ended == 1
            assert len(server.peers) == 1

    run(main, loop)


def test_the_connections_window_is_given_back_also_for_streams_that_were_cancelled() -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: peer.head(stream_id)
            for _ in range(30):
                handler, call = start(client, a_request(server.url))
                await handler.begun.wait()
                number = max(server.peer.requests)
                call.pause()
                server.peer.h2.send_data(number, b"x" * 16_000)
                server.peer.flush()
                call.cancel()
                await eventually(lambda: server.peer.requests[max(server.peer.requests)].reset_code is not None)
            for _ in range(8):
                body = b"y" * 4 * 1024 * 1024
                server.on_request = lambda peer, stream_id: peer.head(stream_id)
                handler, _ = start(client, a_request(server.url))
                await handler.begun.wait()
                assert await server.peer.stream(max(server.peer.requests), body) == len(body)
                await handler.over.wait()
                assert len(handler.body) == len(body)
            assert len(server.peers) == 1

    run(main)
