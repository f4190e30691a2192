import asyncio
import resource
from contextlib import suppress
from typing import Any

import h2.errors
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_proxy.edge.direct import DirectStream
from behest_proxy.edge.host import Receive, Scope, Send
from behest_proxy.edge.limits import EdgeLimits
from proxy.edge_clients import (
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

LOOPS = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])


@LOOPS
def test_a_request_is_served_over_prior_knowledge(loop: str) -> None:
    async def main() -> None:
        async with running(application(echo)) as server, raw_h2(server.port) as client:
            got = await client.get("/a%20b?c=d", method="POST", body=b"hello")
            assert got.status == 200
            assert got.body == b"2 POST /a b c=d hello"
            assert got.headers[b"server"] == b"behest"
            assert got.headers[b"date"].endswith(b" GMT")

    run(main(), loop=loop)


def test_the_scope_is_that_of_asgi() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await answer(send, b"")

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            await client.get("/x%2Fy?q", headers=[("Cookie", "a=1"), ("cookie", "b=2"), ("x-k", "v")])
            scope = seen[0]
            assert scope["http_version"] == "2"
            assert scope["raw_path"] == b"/x%2Fy"
            assert scope["path"] == "/x/y"
            assert scope["query_string"] == b"q"
            assert scope["scheme"] == "http"
            assert scope["server"] == ("127.0.0.1", server.port)
            assert scope["client"][0] == "127.0.0.1"
            assert (b"host", b"test.local") in scope["headers"]
            assert (b"cookie", b"a=1; b=2") in scope["headers"]
            assert (b"x-k", b"v") in scope["headers"]
            assert not any(name.startswith(b":") for name, _ in scope["headers"])

    run(main())


@LOOPS
def test_a_client_that_reads_64_kib_of_64_mib_makes_us_buffer_no_more_than_the_bound(loop: str) -> None:
    state: dict[str, Any] = {"written": 0, "cut": 0}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.on_gone = lambda: state.update(cut=state["cut"] + 1)
        stream.begin(200, [])
        for _ in range(1024):
            stream.write(b"x" * 65_536)  # without a look at `paused`
            state["most"] = max(state.get("most", 0), stream.buffered_bytes)
            if stream.gone:
                break
            state["written"] += 65_536
        assert stream.buffered_bytes == 0

    async def main() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        async with running(application(app)) as server, raw_h2(server.port, acknowledge=False) as client:
            got = await client.get()
            assert got.reset_code == h2.errors.ErrorCodes.INTERNAL_ERROR
            assert len(got.body) <= 65_535
        assert state["cut"] == 1
        assert state["written"] <= 65_535 + 256 * 1024 + 65_536
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024

    run(main(), loop=loop)


@LOOPS
def test_send_waits_for_a_client_that_does_not_read_and_costs_nothing_meanwhile(loop: str) -> None:
    sent = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": b"y" * 16_384, "more_body": True})
            sent += 16_384
        await send({"type": "http.response.body", "body": b""})

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port, acknowledge=False) as client:
            stream_id = client.request()
            await until(lambda: len(client.answers[stream_id].body) == 65_535)
            usage = resource.getrusage(resource.RUSAGE_SELF)
            await asyncio.sleep(0.3)
            used = resource.getrusage(resource.RUSAGE_SELF)
            assert used.ru_utime - usage.ru_utime < 0.15, "a busy loop"
            assert sent <= 65_536
            client.open_window(2**20)
            client.open_window(2**20, stream_id)
            await until(lambda: client.answers[stream_id].ended)
            assert len(client.answers[stream_id].body) == 64 * 16_384

    run(main(), loop=loop)


def test_a_client_that_takes_nothing_is_cut_after_the_stall_timeout() -> None:
    gone = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal gone
        if scope["path"] == "/send":
            try:
                await answer(send, b"z" * 200_000)
            except OSError:
                gone += 1
        else:
            stream = stream_of(scope)
            stream.begin(200, [])
            stream.write(b"z" * 200_000)
            stream.end()

    async def main() -> None:
        limits = EdgeLimits(stall_timeout_s=0.2)
        async with (
            running(application(app), limits=limits) as server,
            raw_h2(server.port, acknowledge=False) as client,
        ):
            assert (await client.get("/send")).reset_code is not None
            assert (await client.get("/direct")).reset_code is not None
            assert gone == 1

    run(main())


def test_late_body_data_after_an_early_answer_is_dropped_and_credited() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/refuse":
            await answer(send, b"no money", status=402)
        else:
            await echo(scope, receive, send)

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            for _ in range(40):  # each with more than a stream's window would credit: 2.4 MiB in all
                stream_id = client.request("/refuse", method="POST", body=b"b" * 16_000, end=False)
                # Composed by hand: to our h2 client the stream would be closed after the answer.
                for _ in range(3):
                    frame = (16_000).to_bytes(3, "big") + b"\x00\x00" + stream_id.to_bytes(4, "big")
                    client.writer.write(frame + b"b" * 16_000)
                    client.machine.outbound_flow_control_window -= 16_000
                got = client.answers[stream_id]
                await until(lambda got=got: got.ended)  # type: ignore[misc]
                assert got.status == 402
                await until(lambda got=got: got.reset_code == 0)  # type: ignore[misc]
                await until(lambda: client.machine.outbound_flow_control_window > 64_000)
            assert (await client.get("/alive")).status == 200
            assert not client.goaways

    run(main())


@LOOPS
def test_an_application_that_does_not_read_its_body_stalls_no_other_stream(loop: str) -> None:
    release = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/lazy":
            await release.wait()
            await answer(send, b"%d" % len(await read_body(receive)))
        else:
            await echo(scope, receive, send)

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            lazy = [client.request("/lazy", method="POST", end=False) for _ in range(30)]
            for _ in range(3):
                for stream_id in lazy:
                    await until(lambda: client.machine.outbound_flow_control_window >= 16_384)
                    client.machine.send_data(stream_id, b"l" * 16_384)
                    client.flush()
            # Each stream's window is nearly used up, the connection's is not.
            assert client.machine.streams[lazy[0]].outbound_flow_control_window == 65_536 - 3 * 16_384
            for _ in range(20):
                assert (await client.get("/other", method="POST", body=b"o" * 16_000)).status == 200
            release.set()
            await until(lambda: client.machine.streams[lazy[0]].outbound_flow_control_window > 60_000)
            for stream_id in lazy:
                client.machine.end_stream(stream_id)
            client.flush()
            await until(lambda: all(client.answers[stream_id].ended for stream_id in lazy))
            assert {bytes(client.answers[stream_id].body) for stream_id in lazy} == {b"49152"}

    run(main(), loop=loop)


def test_1100_requests_on_one_connection_while_a_stream_is_live() -> None:
    streams: list[DirectStream] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/live":
            await echo(scope, receive, send)
            return
        stream = stream_of(scope)
        stream.begin(200, [])
        streams.append(stream)
        while (await receive())["type"] != "http.disconnect":
            pass

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            live = client.request("/live")
            await until(lambda: streams)
            for number in range(1100):
                got = await client.get(f"/{number}")
                assert got.status == 200
                streams[0].write(b"%d\n" % number)
            streams[0].end()
            await until(lambda: client.answers[live].ended)
            assert bytes(client.answers[live].body) == b"".join(b"%d\n" % n for n in range(1100))
            assert not client.goaways

    run(main())


def test_a_request_limit_ends_the_connection_gracefully() -> None:
    streams: list[DirectStream] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/live":
            stream = stream_of(scope)
            stream.begin(200, [])
            streams.append(stream)
            await receive()
            await receive()
        else:
            await answer(send, b"ok")

    async def main() -> None:
        limits = EdgeLimits(connection_requests=3)
        async with running(application(app), limits=limits) as server, raw_h2(server.port) as client:
            live = client.request("/live")
            await client.get()
            await client.get()
            await until(lambda: len(client.goaways) == 2)
            assert client.goaways == [(2**31 - 1, 0), (5, 0)]
            late = await client.get()
            assert late.reset_code == h2.errors.ErrorCodes.REFUSED_STREAM
            streams[0].write(b"still here")
            streams[0].end()
            await until(lambda: client.answers[live].ended)
            assert client.answers[live].body == b"still here"
            await until(lambda: client.closed)

    run(main())


@LOOPS
def test_a_reset_by_the_client_tells_the_application_once_and_leaves_the_connection(loop: str) -> None:
    gone: list[float] = []
    later: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/ok":
            await answer(send, b"ok")
            return
        stream = stream_of(scope)
        loop_ = asyncio.get_running_loop()
        stream.on_gone = lambda: gone.append(loop_.time())
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
            at = asyncio.get_running_loop().time()
            client.reset(stream_id)
            await until(lambda: gone)
            assert gone[0] - at < 1.0
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


def test_ten_thousand_opened_and_reset_streams_leave_no_task() -> None:
    alive = 0
    started = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal alive, started
        if scope["path"] == "/ok":
            await answer(send, b"ok")
            return
        alive += 1
        started += 1
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            alive -= 1

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            tasks = len(asyncio.all_tasks())
            for number in range(10_000):
                stream_id = client.request()
                client.machine.reset_stream(stream_id, 8)
                client.flush()
                if number % 100 == 0:
                    await asyncio.sleep(0)
            assert (await client.get("/ok")).body == b"ok"
            await until(lambda: alive == 0)
            await until(lambda: len(asyncio.all_tasks()) <= tasks)
            assert started <= 10_000

    run(main())


def test_a_stream_too_many_is_refused_and_the_connection_lives() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/hold":
            await receive()
            await receive()
        else:
            await answer(send, b"ok")

    async def main() -> None:
        limits = EdgeLimits(concurrent_streams=5)
        async with running(application(app), limits=limits) as server, raw_h2(server.port) as client:
            held = [client.request("/hold") for _ in range(5)]  # before our SETTINGS arrived
            refused = await client.get("/ok")
            assert refused.reset_code == h2.errors.ErrorCodes.REFUSED_STREAM
            client.reset(held[0])
            assert (await client.get("/ok")).status == 200

    run(main())


def test_a_protocol_error_is_answered_by_goaway_and_streams_are_told() -> None:
    gone = 0

    def note() -> None:
        nonlocal gone
        gone += 1

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream_of(scope).on_gone = note
        await receive()
        await receive()

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            client.request()
            await asyncio.sleep(0.05)
            client.writer.write(b"\x00\x00\x04\x08\x00\x00\x00\x00\x00" + b"\x00" * 4)  # WINDOW_UPDATE of 0
            await until(lambda: client.closed)
            assert client.goaways[0][1] == h2.errors.ErrorCodes.PROTOCOL_ERROR
            await until(lambda: gone == 1)

    run(main())


def test_connect_and_malformed_targets_never_reach_the_application() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError(scope["path"])

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            assert (await client.get("nonsense")).status == 400
            client.machine.send_headers(3, [(":method", "CONNECT"), (":authority", "a:1")])
            client.answers[3] = got = type(client.answers[1])()
            client.flush()
            await until(lambda: got.ended)
            assert got.status == 501

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
            await asyncio.sleep(0.8)
        await answer(send, b"ok")

    async def main() -> None:
        limits = EdgeLimits(idle_timeout_s=0.3)
        async with running(application(app), limits=limits) as server, raw_h2(server.port) as client:
            assert (await client.get("/slow")).body == b"ok"
            await until(lambda: client.closed)
            assert client.goaways == [(1, 0)]

    run(main())


def test_a_failing_application_is_a_500_before_and_a_reset_after_the_head() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/after":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        if scope["path"] == "/silent":
            return
        if scope["path"] == "/header":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b\r\nc: d")]})
            await send({"type": "http.response.body", "body": b"part"})
        raise LookupError("secret")

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            for path in ("/before", "/silent", "/header"):
                got = await client.get(path)
                assert got.status == 500
                assert b"server_error" in got.body
                assert b"secret" not in got.body
            got = await client.get("/after")
            assert got.body == b"part"
            assert got.reset_code == h2.errors.ErrorCodes.INTERNAL_ERROR

    run(main())


def test_head_and_204_have_no_body() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"body", status=204 if scope["path"] == "/204" else 200)

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            got = await client.get("/", method="HEAD")
            assert (got.status, bytes(got.body), got.headers[b"content-length"]) == (200, b"", b"4")
            assert (await client.get("/204")).body == b""

    run(main())


def test_fifty_streams_write_interleaved_and_none_loses_a_byte() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.begin(200, [])
        for number in range(100):
            stream.write(f"{scope['path']}:{number}\n".encode())
            await asyncio.sleep(0)
        stream.end()

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port) as client:
            ids = {client.request(f"/{number}"): number for number in range(50)}
            await until(lambda: all(client.answers[stream_id].ended for stream_id in ids))
            for stream_id, number in ids.items():
                expected = "".join(f"/{number}:{line}\n" for line in range(100)).encode()
                assert bytes(client.answers[stream_id].body) == expected
                assert client.answers[stream_id].frames <= 101

    run(main())


@settings(max_examples=40, deadline=None)
@given(
    window=st.integers(0, 3000),
    writes=st.lists(st.integers(0, 40_000), min_size=1, max_size=8),
    openings=st.lists(st.integers(1, 20_000), min_size=1, max_size=20),
    obeys=st.booleans(),
)
def test_whatever_the_windows_the_client_receives_exactly_the_bytes_in_order(
    window: int, writes: list[int], openings: list[int], obeys: bool
) -> None:
    payload = b"".join(bytes([number % 256]) * size for number, size in enumerate(writes))
    resumed = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal resumed
        stream = stream_of(scope)
        ready = asyncio.Event()

        def resume() -> None:
            nonlocal resumed
            assert not stream.paused
            resumed += 1
            ready.set()

        stream.on_resume = resume
        stream.begin(200, [])
        for number, size in enumerate(writes):
            if obeys and stream.paused:
                ready.clear()
                await ready.wait()
                assert not stream.paused
                assert stream.buffered_bytes == 0
            stream.write(bytes([number % 256]) * size)
        stream.end()

    async def main() -> None:
        limits = EdgeLimits(stream_buffer_bytes=400_000)
        async with (
            running(application(app), limits=limits) as server,
            raw_h2(server.port, acknowledge=False, window=window) as client,
        ):
            stream_id = client.request()
            got = client.answers[stream_id]
            step = 0
            while not got.over:
                size = openings[step % len(openings)] + 100
                step += 1
                client.open_window(size)
                if not got.over:
                    client.open_window(size, stream_id)
                for _ in range(20):
                    await asyncio.sleep(0)
            assert got.ended
            assert bytes(got.body) == payload

    run(main())


def test_a_larger_initial_window_by_settings_resumes_streams() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"w" * 1000)

    async def main() -> None:
        async with (
            running(application(app)) as server,
            raw_h2(server.port, acknowledge=False, window=10) as client,
        ):
            stream_id = client.request()
            await until(lambda: len(client.answers[stream_id].body) == 10)
            client.machine.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 5000})
            client.flush()
            await until(lambda: client.answers[stream_id].ended)
            assert client.answers[stream_id].body == b"w" * 1000

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


def frame_of(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


_GET = b"\x82\x84\x86\x41\x01a"
_POST = b"\x83\x84\x86\x41\x01a"
_FRAMES = st.builds(
    frame_of,
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
                    for frame in frames:
                        writer.write(frame)
                        await asyncio.sleep(0)
                await asyncio.sleep(0.005)
            async with raw_h2(server.port) as client:
                assert (await client.get(method="POST", body=b"x")).ended

    run(main())
    assert not failures
