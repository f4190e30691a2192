"""The simulator and clients that no library plays: raw sockets, frames and what is no HTTP at all."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from h2.config import H2Configuration
from h2.connection import H2Connection

from behest_proxy.sim.records import RequestRecord
from behest_proxy.sim.server import SimServer


def serve(test: Callable[[SimServer], Awaitable[None]]) -> None:
    async def main() -> None:
        async with SimServer() as sim:
            await asyncio.wait_for(test(sim), 60)

    asyncio.run(main())


def port_of(sim: SimServer) -> int:
    return int(sim.base_url.rsplit(":", 1)[1].split("/")[0])


def asking(sim: dict[str, Any]) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user"}], "stream": True, "sim": sim}


async def ended(sim: SimServer, number: int) -> RequestRecord:
    record = sim.requests.find()[number]
    while record.ended_ns is None:
        await asyncio.sleep(0.005)
    return record


def test_a_reset_stream_is_stamped_with_its_code_and_harms_no_other() -> None:
    async def test(sim: SimServer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(sim))
        connection = H2Connection(H2Configuration(client_side=True))
        connection.initiate_connection()
        head = [(":method", "POST"), (":path", "/v1/chat/completions"), (":scheme", "http"), (":authority", "x")]
        for stream_id, shape in ((1, {"stall_after_chunks": 1}), (3, {"stall_after_chunks": 2})):
            connection.send_headers(stream_id, head)
            connection.send_data(stream_id, json.dumps(asking(shape)).encode(), end_stream=True)
        writer.write(connection.data_to_send())
        while [record.outcome for record in sim.requests.find()] != ["stalled", "stalled"]:
            await asyncio.sleep(0.005)
        connection.reset_stream(1, error_code=8)
        before_ns = time.monotonic_ns()
        writer.write(connection.data_to_send())
        record = await ended(sim, 0)
        assert (record.outcome, record.reset_code) == ("cancelled", 8)
        assert record.cancelled_monotonic_ns is not None
        assert before_ns <= record.cancelled_monotonic_ns <= time.monotonic_ns()
        assert sim.requests.find()[1].outcome == "stalled"
        writer.close()
        await writer.wait_closed()
        assert (await ended(sim, 1)).reset_code is None
        del reader

    serve(test)


def test_a_client_that_expects_100_continue_is_told_to_continue() -> None:
    async def test(sim: SimServer) -> None:
        body = json.dumps(asking({"output_tokens": 1})).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(sim))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(body)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()

    serve(test)


def test_what_is_no_http_is_cut_off_and_harms_nobody() -> None:
    async def test(sim: SimServer) -> None:
        no_increment = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x04\x08\0\0\0\0\0\0\0\0\0"
        for first in (b"\x16\x03\x01\x00 TLS?", no_increment):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(sim))
            writer.write(first + b"\r\n\r\n")
            await asyncio.wait_for(reader.read(), 20)
            writer.close()
            await writer.wait_closed()
        async with httpx.AsyncClient(base_url=sim.base_url) as client:
            assert (await client.post("/chat/completions", json=asking({}))).status_code == 200

    serve(test)
