"""Flow control at the edge: windows of clients that read slowly or never, and bodies that nobody reads."""

import asyncio
import resource
from typing import Any

import h2.errors
import h2.settings
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_proxy.edge.host import Receive, Scope, Send
from behest_proxy.edge.limits import EdgeLimits
from proxy.edge_clients import (
    LOOPS,
    answer,
    application,
    echo,
    raw_h2,
    read_body,
    run,
    running,
    stream_of,
    until,
)


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
def test_one_large_write_is_no_reason_to_cut_a_client_that_reads(loop: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.begin(200, [])
        stream.write(b"x" * 2**20)
        stream.write(b"y" * 1000)
        stream.end()

    async def main() -> None:
        async with running(application(app)) as server:
            async with raw_h2(server.port) as client:
                got = await client.get()
                assert (got.ended, bytes(got.body)) == (True, b"x" * 2**20 + b"y" * 1000)
            async with raw_h2(server.port, acknowledge=False, window=0) as client:  # shut before the first byte
                stream_id = client.request()
                await until(lambda: client.answers[stream_id].status == 200)
                client.open_window(2**21)
                client.open_window(2**21, stream_id)
                await until(lambda: client.answers[stream_id].over)
                assert client.answers[stream_id].ended

    run(main(), loop=loop)


def test_a_client_that_allows_large_frames_does_not_make_us_fill_its_socket_beyond_the_bound() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.begin(200, [])
        stream.write(b"x" * 2**24)
        stream.end()

    async def main() -> None:
        async with running(application(app)) as server, raw_h2(server.port, window=2**24) as client:
            client.machine.update_settings({h2.settings.SettingCodes.MAX_FRAME_SIZE: 2**24 - 1})
            client.open_window(2**24)
            got = await client.get()
            assert (got.ended, len(got.body), client.closed) == (True, 2**24, False)
            assert got.frames >= 2**24 // 16_384

    run(main())


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
