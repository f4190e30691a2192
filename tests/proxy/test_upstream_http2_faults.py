"""HTTP/2 against a scripted server that fails: GOAWAY, resets, closed connections, bad frames, floods."""

import asyncio
import logging
import socket
from collections.abc import Callable

import pytest
from h2.errors import ErrorCodes
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_proxy.upstream import live_call
from proxy.h2_frames import frame, goaway
from proxy.upstream_http2 import a_request, any_ok
from proxy.upstream_servers import (
    GENEROUS_S,
    LOOPS,
    H2Peer,
    Recorder,
    a_client,
    eventually,
    fetch,
    http2_server,
    run,
    start,
)

FOR_EVER_S = 6 * GENEROUS_S
"""Nothing here may wait for it: it is twice as long as a test may take."""


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


def test_a_stale_connection_is_retried_once_on_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_call, "CROSSED_S", GENEROUS_S)

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


def test_a_request_that_a_peer_had_for_longer_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_call, "CROSSED_S", 0.05)

    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            assert (await fetch(client, a_request(server.url))).ended == 1

            def on_request(peer: H2Peer, _stream_id: int) -> None:
                asyncio.get_running_loop().call_later(0.2, peer.transport.abort)

            server.on_request = on_request
            assert (await fetch(client, a_request(server.url))).kind in ("closed", "reset")
            assert len(server.peers) == 1

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


def test_a_flood_of_pings_from_a_peer_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel takes megabytes before it.
    monkeypatch.setattr("behest_proxy.upstream.http2.CONTROL_BACKLOG_BYTES_MAX", 64 * 1024)

    async def main() -> None:
        async with http2_server() as server, a_client() as client:

            def on_request(peer: H2Peer, stream_id: int) -> None:
                peer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                peer.head(stream_id)
                peer.transport.pause_reading()

            server.on_request = on_request
            handler, _ = start(client, a_request(server.url, idle_timeout_s=FOR_EVER_S))
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

    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            assert (await fetch(client, a_request(server.url))).ended == 1
            await asyncio.sleep(0.1)
            assert (await fetch(client, a_request(server.url))).ended == 1
            assert server.peer.pings == 1
            await asyncio.sleep(0.15)
            server.peer.transport.pause_reading()
            monkeypatch.setattr("behest_proxy.upstream.http2._PING_TIMEOUT_S", 0.1)
            handler = await fetch(client, a_request(server.url))
            assert (handler.body, handler.ended) == (b"hello", 1)
            assert len(server.peers) == 2

    run(main)


def _soon(monkeypatch: pytest.MonkeyPatch, *, timeout_s: float = 0.1) -> None:
    monkeypatch.setattr("behest_proxy.upstream.http2._PING_SILENT_S", 0.05)
    monkeypatch.setattr("behest_proxy.upstream.http2._PING_TIMEOUT_S", timeout_s)


def test_a_connection_that_dies_under_a_silent_stream_ends_it_and_is_used_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _soon(monkeypatch)

    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: peer.head(stream_id)
            handler, _ = start(client, a_request(server.url))
            await handler.begun.wait()
            server.peer.transport.pause_reading()
            await handler.over.wait()
            assert handler.failure is not None
            assert (handler.kind, handler.failure.request_sent) == ("closed", True)
            assert "PING" in handler.failure.message
            _soon(monkeypatch, timeout_s=GENEROUS_S)
            assert (await fetch(client, any_ok(server))).ended == 1
            assert len(server.peers) == 2

    run(main)


def test_a_connection_that_dies_while_it_rests_is_gone_before_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    _soon(monkeypatch)

    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            assert (await fetch(client, a_request(server.url))).ended == 1
            server.silent = True
            await eventually(lambda: server.peers[0].closed)
            server.silent = False
            _soon(monkeypatch, timeout_s=GENEROUS_S)
            assert (await fetch(client, a_request(server.url))).ended == 1
            assert [len(peer.requests) for peer in server.peers] == [1, 1]

    run(main)


def test_a_peer_that_thinks_for_long_but_answers_pings_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _soon(monkeypatch, timeout_s=0.5)

    async def main() -> None:
        async with http2_server() as server, a_client() as client:
            server.on_request = lambda peer, stream_id: None
            handler, _ = start(client, a_request(server.url))
            await eventually(lambda: server.peers and server.peer.pings >= 3)
            assert not handler.over.is_set()
            server.peer.reply(1)
            await handler.over.wait()
            assert (handler.body, handler.ended) == (b"hello", 1)

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
            assert (broken.over.is_set(), broken.broken) == (False, 1)

    with caplog.at_level(logging.DEBUG):
        run(main)
    assert len([record for record in caplog.records if record.name.startswith("behest_proxy")]) == 1
