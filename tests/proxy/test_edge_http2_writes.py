"""How many writes an answer takes over HTTP/2: a system call costs as much as all that is done for a chunk."""

import asyncio
from typing import Any, cast

import h2.config
import h2.connection
import h2.events

from behest_proxy.edge.host import EdgeHost, Receive, Scope, Send
from behest_proxy.edge.http2 import Http2Connection
from behest_proxy.edge.limits import EdgeLimits
from proxy.edge_clients import application, run, stream_of


class CountingTransport:
    """Takes whatever is written."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, *, high: int, low: int) -> None: ...

    def get_extra_info(self, name: str) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


def _requests(client: h2.connection.H2Connection, count: int) -> bytes:
    head = [(":method", "GET"), (":path", "/"), (":scheme", "http"), (":authority", "test.local")]
    for number in range(count):
        client.send_headers(2 * number + 1, head, end_stream=True)
    return client.data_to_send()


def test_heads_and_first_chunks_of_one_turn_leave_in_one_write() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        stream = stream_of(scope)
        stream.begin(200, [(b"content-type", b"text/event-stream")])
        stream.write(b"data: first\n\n")
        await receive()
        await receive()

    async def main() -> None:
        host = EdgeHost(application(app), limits=EdgeLimits(), state={})
        transport = CountingTransport()
        connection = Http2Connection(host)
        connection.connection_made(cast("asyncio.Transport", transport))
        client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        client.initiate_connection()
        connection.data_received(client.data_to_send())
        before = len(transport.writes)
        connection.data_received(_requests(client, 3))
        for _ in range(20):  # turns of the loop, not time: all of it was there
            await asyncio.sleep(0)
        written = transport.writes[before:]
        assert len(written) == 1
        client.receive_data(b"".join(transport.writes[:before]))
        events: list[Any] = client.receive_data(written[0])
        kinds = [type(event) for event in events if hasattr(event, "stream_id") and event.stream_id]
        assert kinds.count(h2.events.ResponseReceived) == kinds.count(h2.events.DataReceived) == 3
        connection.abort()
        await host.cancel_tasks(timeout_s=1.0)

    run(main())
