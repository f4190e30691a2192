"""The simulator over real sockets: what it sends for each member of `sim`, and what it remembers of it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, AsyncOpenAI, OpenAI, RateLimitError

from behest_proxy.sim.answers import recorded_events
from behest_proxy.sim.records import RequestRecord
from behest_proxy.sim.server import SimServer
from behest_proxy.sim.text import token_count

Test = Callable[[SimServer, httpx.AsyncClient], Awaitable[None]]
PROTOCOLS = ["HTTP/1.1", "HTTP/2"]
MESSAGES: Any = [{"role": "user", "content": "Hello there"}]
PROMPT_TOKENS = 3 + 3 + 1 + 2
SPLIT_RECORDING = (
    b'data: {"choices":[]}\n\n: waiting\n\ndata: {"choices":[{"index":0}],\xc3\xa9}\r\n\r\ndata: [DONE]\n\nrest'
)


def serve(test: Test, *, protocol: str = "HTTP/1.1", recordings: Path | None = None) -> None:
    async def main() -> None:
        async with SimServer(recordings=recordings) as sim:
            http2 = protocol == "HTTP/2"
            origin = sim.base_url.removesuffix("/v1")
            async with httpx.AsyncClient(base_url=origin, http1=not http2, http2=http2, timeout=20) as client:
                await asyncio.wait_for(test(sim, client), 60)

    asyncio.run(main())


def asking(sim: dict[str, Any] | None = None, **members: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": MESSAGES, "stream": True, "sim": sim or {}, **members}


async def ask(client: httpx.AsyncClient, sim: dict[str, Any] | None = None, **members: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=asking(sim, **members))


def payloads(body: str) -> list[str]:
    lines = [line.decode() for line in body.encode().splitlines()]  # at CR and LF only, as event streams are
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def chunks(body: str) -> list[dict[str, Any]]:
    return [json.loads(payload) for payload in payloads(body) if payload != "[DONE]"]


def said(body: str, member: str = "content") -> str:
    deltas = [choice["delta"] for chunk in chunks(body) for choice in chunk["choices"]]
    return "".join(delta.get(member) or "" for delta in deltas)


async def ended(sim: SimServer, number: int = -1) -> RequestRecord:
    """The record of a request, once its answer has ended in whatever way."""
    for _ in range(2_000):
        if len(sim.requests):
            record = sim.requests.find()[number]
            if record.ended_ns is not None:
                return record
        await asyncio.sleep(0.005)
    raise AssertionError("the answer did not end")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_stream_is_what_openai_sends(protocol: str) -> None:
    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        answer = await ask(client, {"output_tokens": 5}, stream_options={"include_usage": True})
        assert answer.http_version == protocol
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-behest-sim"] == "1"
        assert payloads(answer.text)[-1] == "[DONE]"
        assert {chunk["system_fingerprint"] for chunk in chunks(answer.text)} == {"behest-sim"}
        assert [chunk["usage"] is None for chunk in chunks(answer.text)] == [True] * 7 + [False]
        usage = chunks(answer.text)[-1]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (PROMPT_TOKENS, 5)
        record = await ended(sim)
        assert (record.outcome, record.status, record.chunks_sent) == ("completed", 200, 5)
        assert (record.output_tokens_sent, record.prompt_tokens) == (5, PROMPT_TOKENS)
        assert record.http_version == protocol.removeprefix("HTTP/")
        assert record.body is not None
        assert record.body["model"] == "gpt-4o"
        assert record.reported_usage == usage

    serve(test, protocol=protocol)


def test_the_unmodified_openai_client_streams_and_does_not() -> None:
    async def test(sim: SimServer, _: httpx.AsyncClient) -> None:
        async with AsyncOpenAI(base_url=sim.base_url, api_key="any", max_retries=0) as client:
            texts = ["", ""]
            usage = None
            async for chunk in await client.chat.completions.create(
                model="gpt-4o",
                messages=MESSAGES,
                stream=True,
                n=2,
                stream_options={"include_usage": True},
                extra_body={"sim": {"output_tokens": 33, "tokens_per_chunk": 4}},
            ):
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
            assert usage is not None
            assert usage.completion_tokens == sum(map(token_count, texts)) == 66
            whole = await client.chat.completions.create(
                model="gpt-4o", messages=MESSAGES, n=2, extra_body={"sim": {"output_tokens": 33}}
            )
            assert [choice.message.content for choice in whole.choices] == texts
            assert whole.usage == usage
            assert "gpt-4o" in [model.id for model in (await client.models.list()).data]
            with pytest.raises(RateLimitError):
                await client.chat.completions.create(
                    model="gpt-4o", messages=MESSAGES, extra_body={"sim": {"status": 429}}
                )
            with pytest.raises(APIError, match="middle of a stream"):
                async for _chunk in await client.chat.completions.create(
                    model="gpt-4o",
                    messages=MESSAGES,
                    stream=True,
                    extra_headers={"x-sim": '{"error_event_after_chunks":2}'},
                ):
                    pass

    serve(test)


def test_the_unmodified_synchronous_client_calls_tools() -> None:
    def call(base_url: str) -> None:
        with OpenAI(base_url=base_url, api_key="any", max_retries=0) as client:
            answer = client.chat.completions.create(
                model="gpt-4o",
                messages=MESSAGES,
                tools=[{"type": "function", "function": {"name": "look_up", "parameters": {}}}],
                extra_body={"sim": {"tool_calls": 2, "output_tokens": 30}},
            )
            calls = answer.choices[0].message.tool_calls or []
            assert answer.choices[0].finish_reason == "tool_calls"
            assert [found.function.name for found in calls if found.type == "function"] == ["look_up"] * 2
            assert len({found.id for found in calls}) == 2
            with client.chat.completions.stream(
                model="gpt-4o", messages=MESSAGES, extra_body={"sim": {"output_tokens": 12}}
            ) as stream:
                assert stream.get_final_completion().choices[0].message.content

    async def test(sim: SimServer, _: httpx.AsyncClient) -> None:
        await asyncio.to_thread(call, sim.base_url)

    serve(test)


@pytest.mark.parametrize(
    ("sim", "asked", "with_usage"),
    [
        ("asked", False, []),
        ("asked", True, ["own"]),
        ("always", False, ["own"]),
        ("never", True, []),
        ("finish_chunk", False, ["finish"]),
        ("every_chunk", False, ["chunk", "chunk", "chunk", "finish"]),
    ],
)
def test_usage_stands_where_it_is_told_to(sim: str, asked: bool, with_usage: list[str]) -> None:
    async def test(_: SimServer, client: httpx.AsyncClient) -> None:
        options = {"stream_options": {"include_usage": True}} if asked else {}
        answer = await ask(client, {"output_tokens": 2, "usage": sim, "extra_usage_tokens": 7}, **options)
        found = [chunk for chunk in chunks(answer.text) if chunk.get("usage")]
        places = [
            "own" if not chunk["choices"] else "finish" if chunk["choices"][0]["finish_reason"] else "chunk"
            for chunk in found
        ]
        assert places == with_usage
        if found:
            assert found[-1]["usage"]["completion_tokens"] == 2 + 7
        if sim == "every_chunk":
            assert [chunk["usage"]["completion_tokens"] for chunk in found[:-1]] == [0, 1, 2]

    serve(test)


def test_cached_and_reasoning_tokens_are_reported() -> None:
    async def test(_: SimServer, client: httpx.AsyncClient) -> None:
        shape = {"cached_tokens": 6, "reasoning_tokens": 20, "usage": "always", "output_tokens": 4}
        hidden = (await ask(client, shape)).text
        shown = (await ask(client, {**shape, "reasoning_visible": True})).text
        for body in (hidden, shown):
            usage = chunks(body)[-1]["usage"]
            assert usage["completion_tokens"] == 24
            assert usage["completion_tokens_details"]["reasoning_tokens"] == 20
            assert usage["prompt_tokens_details"]["cached_tokens"] == 6
        assert said(hidden, "reasoning_content") == ""
        assert token_count(said(shown, "reasoning_content")) == 20
        assert said(hidden) == said(shown)
        whole = (await ask(client, {**shape, "reasoning_visible": True}, stream=False)).json()
        assert whole["choices"][0]["message"]["reasoning_content"] == said(shown, "reasoning_content")
        without_usage = (await ask(client, {"usage": "never"}, stream=False)).json()
        assert "usage" not in without_usage

    serve(test)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_error_answers_have_openais_envelope(protocol: str) -> None:
    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        limited = await ask(client, {"status": 429})
        assert (limited.status_code, limited.headers["retry-after"]) == (429, "1")
        assert limited.json()["error"]["code"] == "rate_limit_exceeded"
        assert (await ended(sim)).outcome == "refused"
        broken = await ask(client, {"status": 500, "retry_after_s": 9}, stream=False)
        assert (broken.status_code, broken.headers["retry-after"]) == (500, "9")
        assert set(broken.json()["error"]) == {"message", "type", "param", "code"}
        assert (await ask(client, {"status": 401})).json()["error"]["code"] == "invalid_api_key"
        assert (await ask(client, {"status": 204})).content == b""
        unknown = await ask(client, {"outputs": 1})
        assert unknown.status_code == 400
        assert unknown.json()["error"]["param"] == "sim.outputs"
        assert (await client.get("/v1/nothing")).status_code == 404
        assert (await client.get("/v1/chat/completions")).status_code == 405
        # The connection is as good as before.
        assert (await ask(client)).status_code == 200

    serve(test, protocol=protocol)


def test_other_bodies_are_what_no_client_expects() -> None:
    async def test(_: SimServer, client: httpx.AsyncClient) -> None:
        page = await ask(client, {"body": "html", "status": 502})
        assert (page.status_code, page.headers["content-type"]) == (502, "text/html; charset=utf-8")
        assert page.text.startswith("<html>")
        garbage = await ask(client, {"body": "garbage"})
        assert garbage.headers["content-type"].startswith("text/event-stream")
        assert len(garbage.content) == 512
        assert garbage.content != (await ask(client, {"body": "garbage", "seed": 5})).content
        with pytest.raises(json.JSONDecodeError):
            chunks((await ask(client, {"body": "bad_json"})).text)
        with pytest.raises(json.JSONDecodeError):
            (await ask(client, {"body": "bad_json"}, stream=False)).json()
        assert (await ask(client, {"body": "empty"})).content == b""

    serve(test)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_reset_breaks_the_answer_off(protocol: str, stream: bool) -> None:
    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        body = ""
        with pytest.raises(httpx.RemoteProtocolError) as broken:  # noqa: PT012 - what came before it is kept
            async with client.stream(
                "POST", "/v1/chat/completions", json=asking({"reset_after_chunks": 3}, stream=stream)
            ) as answer:
                async for piece in answer.aiter_text():
                    body += piece
        assert token_count(said(body)) == (3 if stream else 0)
        assert protocol == "HTTP/1.1" or "error_code:2" in str(broken.value)
        record = await ended(sim)
        assert record.outcome == "reset"
        assert record.chunks_sent == (3 if stream else 0)
        with pytest.raises(httpx.RemoteProtocolError) as refused:
            await ask(client, {"reset_before_head": True, "reset_code": 7})
        assert protocol == "HTTP/1.1" or "error_code:7" in str(refused.value)

    serve(test, protocol=protocol)


def test_an_answer_may_end_early_or_with_an_error_event() -> None:
    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        early = (await ask(client, {"end_after_chunks": 2})).text
        assert token_count(said(early)) == 2
        assert "[DONE]" not in early
        assert (await ended(sim)).outcome == "ended_early"
        with pytest.raises(json.JSONDecodeError):
            (await ask(client, {"end_after_chunks": 2}, stream=False)).json()
        failed = await ask(client, {"error_event_after_chunks": 0})
        assert list(json.loads(payloads(failed.text)[-1])) == ["error"]
        assert len(payloads(failed.text)) == 1
        assert (await ended(sim)).outcome == "error_event"
        named = (await ask(client, {"error_event_after_chunks": 1, "error_event_named": True})).text
        assert "\n\nevent: error\ndata: {" in named
        assert (await ask(client, {"error_event_after_chunks": 1}, stream=False)).status_code == 500
        undone = (await ask(client, {"no_done": True})).text
        assert "[DONE]" not in undone
        assert '"finish_reason":"stop"' in undone

    serve(test)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_stall_lasts_until_the_client_goes(protocol: str, stream: bool) -> None:
    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        call = asyncio.create_task(ask(client, {"stall_after_chunks": 1}, stream=stream))
        while [record.outcome for record in sim.requests.find()] != ["stalled"]:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        assert not call.done()
        call.cancel()
        # httpx never sends RST_STREAM: over HTTP/2 it only goes when its connection does.
        await client.aclose()
        record = await ended(sim)
        assert record.outcome == "cancelled"
        assert record.chunks_sent == (1 if stream else 0)

    serve(test, protocol=protocol)


def test_a_closed_connection_is_stamped_when_it_is_seen() -> None:
    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        shape = {"output_tokens": 100_000, "chunk_interval_ms": 5}
        async with client.stream("POST", "/v1/chat/completions", json=asking(shape)) as answer:
            async for _ in answer.aiter_bytes():
                if sim.requests.find()[-1].chunks_sent >= 3:
                    break
            assert sim.requests.find()[-1].outcome == "open"
        record = await ended(sim)
        assert record.outcome == "cancelled"
        assert record.cancelled_ns is not None
        assert record.cancelled_monotonic_ns is not None
        assert record.received_monotonic_ns < record.cancelled_monotonic_ns
        assert record.reset_code is None
        sent = record.chunks_sent
        await asyncio.sleep(0.05)
        assert record.chunks_sent == sent

    serve(test)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_cancel_before_the_head_is_stamped_too(protocol: str) -> None:
    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        call = asyncio.create_task(ask(client, {"head_delay_ms": 3_600_000}))
        while not len(sim.requests):
            await asyncio.sleep(0.005)
        call.cancel()
        # httpx sends no RST_STREAM for a stream without a head: it gives the connection up when it is closed.
        await client.aclose()
        record = await ended(sim)
        assert (record.outcome, record.status) == ("cancelled", None)

    serve(test, protocol=protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_that_does_not_read_stops_the_answer(protocol: str) -> None:
    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        shape = {"output_tokens": 200_000, "tokens_per_chunk": 50, "text": None}
        async with client.stream("POST", "/v1/chat/completions", json=asking(shape, n=8)) as answer:
            record = sim.requests.find()[-1]
            before = -1
            while record.chunks_sent != before:
                before = record.chunks_sent
                await asyncio.sleep(0.3)
            # Between the two kernels' socket buffers and one window: far less than all of it.
            assert record.chunks_sent < 8 * 4_000
            await answer.aread()
        assert (await ended(sim)).outcome == "completed"
        assert record.output_tokens_sent == 8 * 200_000

    serve(test, protocol=protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cut", [{}, {"chunk_split": 3}, {"chunk_split": 9, "chunk_split_random": True}])
def test_a_recording_is_replayed_byte_for_byte(protocol: str, cut: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "made-up").mkdir()
    (tmp_path / "made-up" / "odd.sse").write_bytes(SPLIT_RECORDING)
    (tmp_path / "made-up" / "plain.body.json").write_bytes(b'{"id": 1}\n')

    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        shape = {"recording": "made-up/odd", "chunk_interval_ms": 1, **cut}
        answer = await ask(client, shape)
        assert answer.content == SPLIT_RECORDING
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (await ended(sim)).chunks_sent == len(recorded_events(SPLIT_RECORDING)) == 5
        plain = await ask(client, {"recording": "made-up/plain.body.json", "status": 400, **cut})
        assert (plain.status_code, plain.content) == (400, b'{"id": 1}\n')
        early = await ask(client, {**shape, "end_after_chunks": 2})
        assert early.content == b"".join(recorded_events(SPLIT_RECORDING)[:2])
        for missing in ("other", "../odd", "/etc/passwd", "made-up"):
            refused = await ask(client, {"recording": missing})
            assert refused.json()["error"]["param"] == "sim.recording"

    serve(test, protocol=protocol, recordings=tmp_path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_form_on_the_wire_does_not_change_what_is_said(protocol: str) -> None:
    async def test(_: SimServer, client: httpx.AsyncClient) -> None:
        plain = await ask(client, {"output_tokens": 40})
        cut = await ask(client, {"output_tokens": 40, "chunk_split": 7})
        assert said(cut.text) == said(plain.text)
        framed = await ask(client, {"output_tokens": 40, "crlf": True, "text": "zwei 😀 drei"})
        assert framed.content.replace(b"\r\n", b"").count(b"\n") == 0
        assert said(framed.text) == "zwei 😀 drei"

    serve(test, protocol=protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_many_streams_at_once_are_whole(protocol: str) -> None:
    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        shape = {"output_tokens": 30, "chunk_interval_ms": 1}
        answers = await asyncio.gather(*(ask(client, {**shape, "seed": number}) for number in range(60)))
        assert [token_count(said(answer.text)) for answer in answers] == [30] * 60
        assert len(sim.requests) == 60

    serve(test, protocol=protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_record_of_requests_is_served_and_cleared(protocol: str) -> None:
    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        body = asking({"output_tokens": 2}, metadata={"long": "x" * 5_000})
        for number in range(3):
            headers = {"x-request-id": f"mine-{number}", "authorization": "Bearer secret"}
            answer = await client.post("/chat/completions", json=body, headers=headers)
            assert answer.headers["x-request-id"] == f"mine-{number}"
        records = (await client.get("/sim/requests")).json()
        assert [record["id"] for record in records] == ["mine-0", "mine-1", "mine-2"]
        assert records[0]["headers"]["authorization"] == "(not kept)"
        assert records[0]["body"]["metadata"].endswith(" bytes)")
        assert records[0]["body"]["sim"] == {"output_tokens": 2}
        assert (await client.get("/sim/requests?id=mine-1")).json() == records[1:2]
        assert (await client.get("/sim/requests?limit=2")).json() == records[1:]
        assert (await client.get("/sim/requests?limit=0")).json() == []
        assert (await client.get("/sim/requests?limit=x")).status_code == 400
        assert (await client.delete("/sim/requests")).status_code == 200
        assert len(sim.requests) == 0
        assert (await client.get("/sim/requests")).json() == []

    serve(test, protocol=protocol)


def test_what_is_set_for_all_holds_where_a_request_does_not_ask_otherwise() -> None:
    async def test(sim: SimServer, client: httpx.AsyncClient) -> None:
        assert (await client.put("/sim/behaviour", json={"output_tokens": 2, "no_done": True})).status_code == 200
        plain = await client.post("/v1/chat/completions", json={"model": "gpt-4o", "messages": MESSAGES})
        assert plain.json()["usage"]["completion_tokens"] == 2
        asked = payloads((await ask(client, {"output_tokens": 3})).text)
        assert sum('"content":' in payload for payload in asked[1:]) == 3
        assert asked[-1] != "[DONE]"
        refused = await client.put("/sim/behaviour", json={"unknown": 1})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "sim.unknown")
        assert (await client.put("/sim/behaviour", content=b"")).status_code == 200
        assert payloads((await ask(client)).text)[-1] == "[DONE]"

    serve(test)
