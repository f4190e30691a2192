"""HTTP/2 requests at the edge: scopes, limits, answers without a body, applications that fail."""

import h2.errors

from behest_proxy.edge.direct import DirectStream
from behest_proxy.edge.host import Receive, Scope, Send
from behest_proxy.edge.limits import EdgeLimits
from proxy.edge_clients import (
    LOOPS,
    answer,
    application,
    echo,
    raw_h2,
    run,
    running,
    stream_of,
    until,
)


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
