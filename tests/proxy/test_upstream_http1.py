"""HTTP/1.1 against scripted bytes: framing, early ends, reuse, cancel, pause."""

import asyncio
import itertools
import logging
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from behest_proxy.upstream import UpstreamClient, live_call
from proxy.upstream_servers import (
    CHUNKED_HEAD,
    GENEROUS_S,
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
    run,
    start,
)

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


@pytest.mark.parametrize("loop", LOOPS)
def test_request_and_answer_are_what_was_meant(loop: str) -> None:
    async def main() -> None:
        seen: list[tuple[bytes, bytes]] = []

        async def script(peer: Peer) -> None:
            seen.append(await peer.request())
            await peer.send(b"HTTP/1.1 201 Created\r\nX-A: 1\r\nContent-Length: 5\r\n\r\nhello")

        async with http1_server(script) as server, a_client() as client:
            handler = await fetch(client, a_request(server.url, body=b'{"a":1}', headers=[(b"X-B", b"2")]))
        head, body = seen[0]
        assert head.split(b"\r\n")[0] == b"POST /v1/chat/completions HTTP/1.1"
        assert sorted(head.split(b"\r\n")[1:-2]) == [
            b"content-length: 7",
            b"host: 127.0.0.1:%d" % server.port,
            b"x-b: 2",
        ]
        assert body == b'{"a":1}'
        assert (handler.status, handler.headers) == (201, [(b"x-a", b"1"), (b"content-length", b"5")])
        assert (handler.body, handler.ended, handler.sent) == (b"hello", 1, 1)

    run(main, loop)


ANSWERS = {
    "length": OK,
    "chunked": CHUNKED_HEAD + chunk(b"hel") + chunk(b"lo") + b"0\r\n\r\n",
    "trailers": CHUNKED_HEAD + chunk(b"hello") + b"0\r\nx-a: b\r\n\r\n",
    "informational": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK,
    "until close": b"HTTP/1.1 200 OK\r\n\r\nhello",
    "http/1.0": b"HTTP/1.0 200 OK\r\n\r\nhello",
    "close": b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(points=st.lists(st.integers(1, 200), max_size=12))
def test_any_split_of_the_peers_bytes_gives_the_same_body_and_one_end(answer: bytes, points: list[int]) -> None:
    async def main() -> None:
        edges = sorted({0, len(answer), *(point % len(answer) for point in points)})
        pieces = [answer[left:right] for left, right in itertools.pairwise(edges)]

        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(*pieces)

        async with http1_server(script) as server, a_client() as client:
            handler = await fetch(client, a_request(server.url))
        assert (handler.status, handler.body, handler.ended) == (200, b"hello", 1)

    run(main)


@pytest.mark.parametrize(
    ("answer", "kind", "body"),
    [
        (b"", "closed", b""),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "closed", b""),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello", "closed", b"hello"),
        (CHUNKED_HEAD + chunk(b"hello"), "closed", b"hello"),
        (CHUNKED_HEAD + chunk(b"hello") + b"0\r\n", "closed", b"hello"),
        (CHUNKED_HEAD + chunk(b"hello") + b"zz\r\n", "protocol", b""),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello", "protocol", b""),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nhello", "protocol", b""),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n", "protocol", b""),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "protocol", b""),
        (b"\x00\xff" * 100_000, "protocol", b""),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000, "protocol", b""),
    ],
)
def test_an_answer_that_breaks_off_or_is_none_is_a_failure(answer: bytes, kind: str, body: bytes) -> None:
    async def main() -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(answer)

        async with http1_server(script) as server, a_client() as client:
            handler = await fetch(client, a_request(server.url))
            assert handler.failure is not None
            assert (handler.kind, handler.body, handler.ended) == (kind, body, 0)
            assert handler.failure.request_sent
            assert handler.failure.head_received is bool(handler.status)
            assert server.connections == 1

    run(main)


def test_an_html_answer_is_an_answer() -> None:
    async def main() -> None:
        page = b"<html>502</html>"
        answer = b"HTTP/1.1 502 Bad Gateway\r\ncontent-type: text/html\r\ncontent-length: %d\r\n\r\n" % len(page)
        async with http1_server(answering(answer + page)) as server, a_client() as client:
            handler = await fetch(client, a_request(server.url))
        assert (handler.status, handler.body, handler.ended) == (502, page, 1)

    run(main)


@pytest.mark.parametrize("loop", LOOPS)
def test_more_than_a_thousand_requests_share_one_connection(loop: str) -> None:
    async def main() -> None:
        async with http1_server(answering(CHUNKED_HEAD + chunk(b"hi") + b"0\r\n\r\n")) as server, a_client() as client:
            for _ in range(1010):
                assert (await fetch(client, a_request(server.url))).body == b"hi"
            assert server.connections == 1

    run(main, loop)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: Close\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\nhello",
        OK + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged",
    ],
)
def test_a_connection_that_must_not_be_used_again_is_not(answer: bytes) -> None:
    async def main() -> None:
        async with http1_server(answering(answer)) as server, a_client() as client:
            for _ in range(3):
                handler = await fetch(client, a_request(server.url))
                assert (handler.body, handler.ended) == (b"hello", 1)
            assert server.connections == 3

    run(main)


def test_bytes_on_an_idle_connection_close_it() -> None:
    async def main() -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(OK)
            await asyncio.sleep(0.02)
            await peer.send(b"HTTP/1.1 408 Too Late\r\n\r\n")
            await peer.sees_close()

        async with http1_server(script) as server, a_client() as client:
            await fetch(client, a_request(server.url))
            await eventually(lambda: not server.open_now)

    run(main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stale_connection_is_retried_once_on_a_new_one(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_call, "CROSSED_S", GENEROUS_S)

    async def main() -> None:
        requests = 0

        async def script(peer: Peer) -> None:
            nonlocal requests
            await peer.request()
            await peer.send(OK)
            await peer.request()
            requests += 1

        async with http1_server(script) as server, a_client() as client:
            first, second = start(client, a_request(server.url))[0], start(client, a_request(server.url))[0]
            await first.over.wait()
            await second.over.wait()
            assert server.connections == 2
            handler = await fetch(client, a_request(server.url))
            assert (handler.body, handler.ended, handler.sent) == (b"hello", 1, 1)
            assert (server.connections, requests) == (3, 1)

    run(main, loop)


def test_a_request_that_a_peer_had_for_longer_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have worked on it: it would bill both, and only one would be charged."""
    monkeypatch.setattr(live_call, "CROSSED_S", 0.05)

    async def main() -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(OK)
            await peer.request()
            await asyncio.sleep(0.2)

        async with http1_server(script) as server, a_client() as client:
            assert (await fetch(client, a_request(server.url))).ended == 1
            assert (await fetch(client, a_request(server.url))).kind == "closed"
            assert server.connections == 1

    run(main)


def test_a_new_connection_that_closes_is_not_retried() -> None:
    async def main() -> None:
        async def script(peer: Peer) -> None:
            await peer.request()

        async with http1_server(script) as server, a_client() as client:
            assert (await fetch(client, a_request(server.url))).kind == "closed"
            assert server.connections == 1

    run(main)


def test_idle_connections_are_few_and_not_kept_for_long() -> None:
    async def main() -> None:
        options = {"idle_connections_per_origin_max": 2, "idle_connection_timeout_s": 0.1}
        async with http1_server(answering(OK)) as server, a_client(**options) as client:
            handlers = [start(client, a_request(server.url))[0] for _ in range(6)]
            for handler in handlers:
                await handler.over.wait()
            await eventually(lambda: server.open_now <= 2)
            await eventually(lambda: server.open_now == 0)

    run(main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("phase", ["before the head", "after the head", "in the body", "inside on_data"])
def test_a_cancel_closes_the_connection_and_nothing_is_told_after_it(phase: str, loop: str) -> None:
    async def main() -> None:
        saw_close = asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            if phase != "before the head":
                await peer.send(CHUNKED_HEAD)
            if phase.startswith("in"):
                await peer.send(chunk(b"one"))
            await peer.sees_close()
            saw_close.set()

        async with http1_server(script) as server, a_client() as client:
            handler, call = start(client, a_request(server.url))
            handler.on_piece = lambda data: call.cancel() if phase == "inside on_data" else None
            match phase:
                case "before the head":
                    await eventually(lambda: handler.sent)
                case "after the head":
                    await handler.begun.wait()
                case _:
                    await eventually(lambda: handler.pieces)
            call.cancel()
            call.cancel()
            await saw_close.wait()
            assert not handler.over.is_set()
            call.pause()
            call.resume()

    run(main, loop)


def test_a_cancel_after_the_end_is_nothing() -> None:
    async def main() -> None:
        async with http1_server(answering(OK)) as server, a_client() as client:
            handler, call = start(client, a_request(server.url))
            await handler.over.wait()
            call.cancel()
            await fetch(client, a_request(server.url))
            assert server.connections == 1

    run(main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_paused_call_blocks_its_peer_and_loses_nothing(loop: str) -> None:
    async def main() -> None:
        sent = 0
        size = 32 * 1024 * 1024
        block = random.Random(1).randbytes(64 * 1024)

        async def script(peer: Peer) -> None:
            nonlocal sent
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            while sent < size:
                await peer.send(block)
                sent += len(block)
            await peer.sees_close()

        async with http1_server(script) as server, a_client() as client:
            handler, call = start(client, a_request(server.url, idle_timeout_s=1.0))
            handler.on_piece = lambda data: call.pause()
            await eventually(lambda: handler.pieces)
            await asyncio.sleep(1.2)  # longer than the idle limit
            stopped_at = -1
            while stopped_at != sent:  # the kernel's buffers are full when nothing more goes in
                stopped_at = sent
                await asyncio.sleep(0.1)
            assert stopped_at < size
            assert len(handler.pieces) == 1
            handler.on_piece = lambda data: None
            call.resume()
            await handler.over.wait()
            assert handler.ended == 1
            assert len(handler.body) == size
            assert handler.body == block * (size // len(block))

    run(main, loop)


def test_an_end_that_comes_while_paused_is_told_at_resume() -> None:
    async def main() -> None:
        async with http1_server(answering(OK)) as server, a_client() as client:
            handler, call = start(client, a_request(server.url))
            handler.on_piece = lambda data: call.pause()
            await eventually(lambda: handler.pieces)
            await asyncio.sleep(0.05)
            assert not handler.over.is_set()
            # Its connection serves others meanwhile.
            assert (await fetch(client, a_request(server.url))).ended == 1
            assert server.connections == 1
            call.resume()
            assert handler.ended == 1

    run(main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_request_counts_as_sent_when_the_kernel_has_all_of_it(loop: str) -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        async def script(peer: Peer) -> None:
            await go_on.wait()
            await peer.request()
            await peer.send(OK)

        async with http1_server(script) as server, a_client() as client:
            handler, _ = start(client, a_request(server.url, body=b"x" * 32 * 1024 * 1024))
            await asyncio.sleep(0.1)
            assert handler.sent == 0
            go_on.set()
            await handler.over.wait()
            assert (handler.sent, handler.ended) == (1, 1)

    run(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_answer_before_the_request_is_sent_is_told_and_its_connection_dropped(loop: str) -> None:
    async def main() -> None:
        async def script(peer: Peer) -> None:
            await peer.reader.readuntil(b"\r\n\r\n")
            await peer.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
            await asyncio.sleep(5)

        async with http1_server(script) as server, a_client() as client:
            handler = await fetch(client, a_request(server.url, body=b"x" * 32 * 1024 * 1024))
            assert (handler.status, handler.body, handler.ended, handler.sent) == (413, b"no", 1, 0)

    run(main, loop)


class Broken(Recorder):
    def on_data(self, data: bytes) -> None:
        raise RuntimeError("a bug in the handler")


def test_a_handler_that_raises_loses_its_call_only_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with http1_server(answering(OK)) as server, a_client() as client:
            broken = Broken()
            client.send(a_request(server.url, headers=[(b"authorization", b"secret")]), broken)
            await eventually(lambda: broken.broken)
            assert not broken.over.is_set()
            assert (await fetch(client, a_request(server.url))).ended == 1

    with caplog.at_level(logging.DEBUG):
        run(main)
    assert len([record for record in caplog.records if record.name.startswith("behest_proxy")]) == 1
    assert "secret" not in caplog.text


def test_a_line_break_in_a_header_never_reaches_the_wire() -> None:
    async def main() -> None:
        client = UpstreamClient(environment={})
        with pytest.raises(ValueError):
            client.send(a_request("http://127.0.0.1:9/", headers=[(b"x", b"a\r\nb: c")]), Recorder())
        await client.aclose()

    run(main)
