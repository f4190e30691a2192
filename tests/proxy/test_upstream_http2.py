"""HTTP/2 against a scripted server: many streams, flow control, resets, GOAWAY, limits, bad frames."""

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Callable

import pytest
from h2.errors import ErrorCodes
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_proxy.upstream import UpstreamRequest
from behest_proxy.upstream.http2_settings import STREAM_WINDOW_BYTES
from proxy.upstream_servers import (
    LOOPS,
    H2Peer,
    H2Server,
    Recorder,
    a_client,
    eventually,
    fetch,
    http2_server,
    run,
    start,
)
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


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def goaway(last_id: int, code: int = 0) -> bytes:
    return frame(7, 0, 0, last_id.to_bytes(4, "big") + code.to_bytes(4, "big"))


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


def any_ok(server: H2Server) -> UpstreamRequest:
    server.on_request = lambda peer, stream_id: peer.reply(stream_id)
    return a_request(server.url)


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
            paused, call = start(client, a_request(server.url, idle_timeout_s=0.3))
            paused.on_piece = lambda data: call.pause()
            await eventually(lambda: paused.pieces)
            others = [start(client, a_request(server.url))[0] for _ in range(8)]
            for other in others:
                await other.over.wait()
                assert (len(other.body), other.ended) == (size, 1)
            assert len(paused.pieces) == 1
            assert len(paused.body) <= STREAM_WINDOW_BYTES
            assert not tasks[1].done()
            await asyncio.sleep(0.4)  # longer than the idle limit
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
            await eventually(lambda: server.peers and len(server.peers[0].requests[1].body) == 65_535)
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


def goes_away_once(code: int = 0) -> Callable[[H2Peer, int], None]:
    def on_request(peer: H2Peer, stream_id: int) -> None:
        if peer is peer.server.peers[0]:
            if stream_id == 3:
                peer.raw(goaway(1, code))
        else:
            peer.reply(stream_id)

    return on_request


@pytest.mark.parametrize("loop", LOOPS)
def test_after_goaway_streams_below_its_last_id_finish_and_those_above_move(loop: str) -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = goes_away_once()
            first, _ = start(client, a_request(server.url))
            await eventually(lambda: server.peers and server.peers[0].requests)
            second, _ = start(client, a_request(server.url))
            await second.over.wait()
            assert (second.body, second.ended, second.sent) == (b"hello", 1, 1)
            assert len(server.peers) == 2
            third = await fetch(client, a_request(server.url))
            assert third.ended == 1
            old = server.peers[0]
            old.reply(1, b"late but whole")
            await first.over.wait()
            assert (first.body, first.ended) == (b"late but whole", 1)
            await eventually(lambda: old.closed)
            assert len(server.peers) == 2

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stream_of_a_leaving_connection_can_still_be_cancelled(loop: str) -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: peer.raw(goaway(2**31 - 1))
            handler, call = start(client, a_request(server.url))
            await eventually(lambda: server.peers and server.peers[0].requests)
            await asyncio.sleep(0.05)
            assert not handler.over.is_set()
            call.cancel()
            await eventually(lambda: server.peers[0].requests[1].reset_code == ErrorCodes.CANCEL)
            await eventually(lambda: server.peers[0].closed)

    run(main, loop)


def test_a_peer_that_always_goes_away_is_tried_twice() -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: peer.raw(goaway(0))
            handler = await fetch(client, a_request(server.url))
            assert handler.kind == "refused_stream"
            assert len(server.peers) == 2

    run(main)


@pytest.mark.parametrize("times", [1, 2])
def test_a_refused_stream_is_tried_once_more(times: int) -> None:
    async def main() -> None:
        refusals = 0

        def on_request(peer: H2Peer, stream_id: int) -> None:
            nonlocal refusals
            if refusals < times:
                refusals += 1
                peer.h2.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            else:
                peer.reply(stream_id)

        async with http2_server() as server, a_client() as client:
            server.on_request = on_request
            handler = await fetch(client, a_request(server.url))
            assert (handler.kind, handler.ended) == ((None, 1) if times == 1 else ("refused_stream", 0))
            assert handler.sent == 1

    run(main)


@pytest.mark.parametrize("with_head", [False, True])
def test_a_reset_stream_is_a_failure_and_what_came_before_it_is_kept(with_head: bool) -> None:
    async def main() -> None:
        def on_request(peer: H2Peer, stream_id: int) -> None:
            if with_head:
                peer.h2.send_headers(stream_id, [(b":status", b"200")])
                peer.h2.send_data(stream_id, b"part")
            peer.h2.reset_stream(stream_id, ErrorCodes.INTERNAL_ERROR)

        async with http2_server() as server, a_client() as client:
            server.on_request = on_request
            handler = await fetch(client, a_request(server.url))
            assert (handler.kind, handler.body) == ("reset", b"part" if with_head else b"")
            assert handler.failure is not None
            assert handler.failure.head_received is with_head
            assert "INTERNAL_ERROR" in handler.failure.message
            assert (await fetch(client, any_ok(server))).ended == 1
            assert len(server.peers) == 1

    run(main)


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


@pytest.mark.parametrize("when", ["before the head", "in the body"])
def test_a_connection_that_closes_fails_its_calls(when: str) -> None:
    async def main() -> None:
        def on_request(peer: H2Peer, stream_id: int) -> None:
            if when == "in the body":
                peer.head(stream_id)
                peer.data(stream_id, b"part")
            peer.transport.close()

        async with http2_server() as server, a_client() as client:
            server.on_request = on_request
            handler = await fetch(client, a_request(server.url))
            assert (handler.kind, handler.body) == ("closed", b"part" if when == "in the body" else b"")
            assert len(server.peers) == 1

    run(main)


def test_a_stale_connection_is_retried_once_on_a_new_one() -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            assert (await fetch(client, a_request(server.url))).ended == 1

            def on_head(peer: H2Peer, stream_id: int) -> None:
                if peer is server.peers[0]:
                    peer.transport.abort()

            server.on_head = on_head
            handler = await fetch(client, a_request(server.url))
            assert (handler.body, handler.ended) == (b"hello", 1)
            assert len(server.peers) == 2

    run(main)


def test_a_length_that_is_not_kept_fails_its_stream_only() -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: None
            handlers = [start(client, a_request(server.url))[0] for _ in range(4)]
            await eventually(lambda: server.peers and len(server.peers[0].requests) == 4)
            peer = server.peer
            for stream_id in (1, 3, 5):
                peer.head(stream_id, (b"content-length", b"5"))
            peer.data(1, b"four", end=True)
            peer.data(3, b"sixsix")
            peer.h2.send_data(5, b"1")
            peer.h2.send_headers(5, [(b"x-a", b"b")], end_stream=True)
            peer.reply(7)
            for handler in handlers:
                await handler.over.wait()
            assert [handler.kind for handler in handlers[:3]] == ["protocol"] * 3
            assert handlers[3].ended == 1

    run(main)


def test_a_stream_that_overruns_its_window_fails_alone() -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: peer.head(stream_id)
            handler, call = start(client, a_request(server.url))
            other, _ = start(client, a_request(server.url))
            await asyncio.gather(handler.begun.wait(), other.begun.wait())
            call.pause()
            server.peer.raw(frame(0, 0, 1, b"x" * 16_000) * 20)
            await eventually(lambda: server.peer.requests[1].reset_code == ErrorCodes.FLOW_CONTROL_ERROR)
            call.resume()
            assert handler.kind == "protocol"
            server.peer.data(3, b"", end=True)
            await other.over.wait()
            assert other.ended == 1

    run(main)


HEAD_OF_1 = frame(1, 4, 1, b"\x88")


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x00" * 200,
        b"\xff" * 200,
        frame(0, 0, 99, b"never opened"),
        frame(0, 0, 0, b"on the connection"),
        frame(0, 0, 1, b"before the head"),
        HEAD_OF_1 + frame(0, 8, 1, b"\x09short"),
        HEAD_OF_1 + frame(0, 8, 1, b""),
        frame(1, 0, 1, b"\x88") + frame(0, 0, 1, b"inside a header block"),
        frame(1, 0, 1, b"\x88") + goaway(0),
        frame(1, 4, 1, b"\xff\xff\xff\xff\xff\xff"),
        frame(5, 4, 1, b"\x00\x00\x00\x02\x88"),
        frame(7, 0, 0, b"\x00"),
        frame(4, 0, 0, b"\x00\x04\xff\xff\xff\xff"),
        frame(8, 0, 0, b"\x7f\xff\xff\xff") * 2,
        frame(1, 4, 1, b"\x00\x07:status\x03abc"),
        frame(9, 4, 1, b"\x88"),
        frame(1, 0, 1, b"\x88") + frame(9, 0, 1, b"\x00\x01a" + b"\x7e" + b"b" * 126) * 200,
    ],
)
def test_bytes_that_break_the_rules_fail_every_call_of_that_connection(garbage: bytes) -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: peer.raw(garbage)
            handler = await fetch(client, a_request(server.url))
            assert handler.kind == "protocol"
            await eventually(lambda: server.peers[0].closed)
            assert (await fetch(client, any_ok(server))).ended == 1
            assert len(server.peers) == 2

    run(main)


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=30, max_size=300), st.booleans())
def test_any_garbage_ends_in_one_terminal_call(garbage: bytes, framed: bool) -> None:
    async def main() -> None:
        data = garbage
        if framed:
            data = frame(garbage[0] % 11, garbage[1], garbage[2] % 6, garbage[3:])
        async with http2_server() as server, a_client() as client:

            def on_request(peer: H2Peer, stream_id: int) -> None:
                peer.raw(HEAD_OF_1 + data)
                peer.transport.close()

            server.on_request = on_request
            handler = await fetch(client, a_request(server.url))
            assert handler.ended + (handler.failure is not None) == 1

    run(main)


def test_a_peer_that_speaks_no_http2_is_a_failure() -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.silent = True
            handler, _ = start(client, a_request(server.url))
            await eventually(lambda: server.peers)
            server.peer.raw(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")
            await handler.over.wait()
            assert handler.kind == "protocol"

    run(main)


def test_a_flood_of_pings_from_a_peer_that_does_not_read_is_cut() -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:

            def on_request(peer: H2Peer, stream_id: int) -> None:
                peer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                peer.head(stream_id)
                peer.transport.pause_reading()

            server.on_request = on_request
            handler, _ = start(client, a_request(server.url))
            await handler.begun.wait()
            flood = frame(6, 0, 0, b"12345678") * 10_000
            for _ in range(2000):  # how often depends on the kernel and on who else runs
                if handler.over.is_set():
                    break
                server.peer.raw(flood)
                await asyncio.sleep(0.01)
            assert handler.kind == "protocol"

    run(main)


def test_an_idle_connection_says_goodbye() -> None:
    async def main() -> None:
        async with http2_server() as server, a_client(idle_connection_timeout_s=0.1) as client:
            assert (await fetch(client, a_request(server.url))).ended == 1
            await eventually(lambda: server.peer.closed)
            assert server.peer.goaway
            assert (await fetch(client, a_request(server.url))).ended == 1

    run(main)


def test_a_connection_that_died_while_it_rested_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("behest_proxy.upstream.http2._PING_AFTER_S", 0.05)
    monkeypatch.setattr("behest_proxy.upstream.http2._PING_TIMEOUT_S", 0.1)

    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            assert (await fetch(client, a_request(server.url))).ended == 1
            await asyncio.sleep(0.1)
            assert (await fetch(client, a_request(server.url))).ended == 1
            assert server.peer.pings == 1
            await asyncio.sleep(0.15)
            server.peer.transport.pause_reading()
            handler = await fetch(client, a_request(server.url))
            assert (handler.body, handler.ended) == (b"hello", 1)
            assert len(server.peers) == 2

    run(main)


class Broken(Recorder):
    def on_data(self, data: bytes) -> None:
        raise RuntimeError("a bug in the handler")


def test_a_handler_that_raises_does_not_harm_its_neighbours(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: None
            broken = Broken()
            client.send(a_request(server.url), broken)
            other, _ = start(client, a_request(server.url))
            await eventually(lambda: server.peers and len(server.peers[0].requests) == 2)
            for stream_id in (1, 3):
                server.peer.h2.send_headers(stream_id, [(b":status", b"200")])
                server.peer.h2.send_data(stream_id, b"x")
            server.peer.flush()
            await eventually(lambda: server.peer.requests[1].reset_code == ErrorCodes.CANCEL)
            server.peer.data(3, b"y", end=True)
            await other.over.wait()
            assert other.body == b"xy"
            assert not broken.over.is_set()

    with caplog.at_level(logging.DEBUG):
        run(main)
    assert len([record for record in caplog.records if record.name.startswith("behest_proxy")]) == 1


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
