"""Streams of both clients over real sockets: chunks, cuts, resuming, errors in the middle, leaving."""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from behest import (
    Behest,
    BehestConflictError,
    BehestConnectionError,
    BehestError,
    BehestQuotaError,
    BehestServerError,
    BehestSync,
)
from behest.testing import (
    API_KEY,
    DONE,
    QUESTION,
    Gateway,
    Scripted,
    async_http,
    refusal,
    stream,
    sync_http,
    terminal,
    word,
)

FINISH = word("", 99, finish="stop")


class Told:
    """What one stream said, and how it ended."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.chunks: list[Any] = []
        self.error: BehestError | None = None
        self.stream: Any = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def take(self, chunk: Any) -> None:
        self.chunks.append(chunk)
        self.texts += [choice.delta.content or "" for choice in chunk.choices]


Tell = Callable[..., Told]


def _tell(how: str, gateway: Gateway, max_retries: int = 3, idle_timeout: float = 150.0, **options: Any) -> Told:
    told = Told()
    where: dict[str, Any] = {"key": API_KEY, "base_url": gateway.base_url, "max_retries": max_retries}
    where["idle_timeout"] = idle_timeout

    async def read() -> None:
        async with Behest(**where, http_client=async_http()) as client:
            told.stream = await client.chat.completions.create(messages=QUESTION, stream=True, **options)
            async for chunk in told.stream:
                told.take(chunk)

    try:
        if how == "async":
            asyncio.run(read())
        else:
            with BehestSync(**where, http_client=sync_http()) as client:
                told.stream = client.chat.completions.create(messages=QUESTION, stream=True, **options)
                for chunk in told.stream:
                    told.take(chunk)
    except BehestError as error:
        told.error = error
    return told


@pytest.fixture(params=["async", "sync"])
def tell(request: pytest.FixtureRequest, gateway: Gateway) -> Tell:
    def told(**options: Any) -> Told:
        return _tell(request.param, gateway, **options)

    return told


def test_a_stream_says_its_text_and_asks_for_ids(gateway: Gateway, tell: Tell) -> None:
    gateway.plays(stream(word("Hel", 1), word("lo", 2), FINISH, DONE))
    told = tell()
    assert (told.text, told.error, told.stream.text) == ("Hello", None, "Hello")
    assert told.chunks[-1].choices[0].finish_reason == "stop"
    assert (told.stream.last_event_id, told.stream.request_id, told.stream.trace_id) == ("g-99", "r1", "t" * 32)
    assert gateway.seen[0].headers["x-event-ids"] == "1"
    assert gateway.seen[0].headers["accept"] == "text/event-stream"
    assert gateway.seen[0].body["stream"] is True


def test_chunks_without_choices_come_only_to_those_who_asked_for_usage(gateway: Gateway, tell: Tell) -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}\n\n'
    for _ in range(2):
        gateway.plays(stream(b'data: {"choices": []}\n\n', word("a", 1), FINISH, usage, DONE))
    assert all(chunk.choices for chunk in tell().chunks)
    asked = tell(stream_options={"include_usage": True}).chunks
    assert (len(asked), asked[-1].usage.total_tokens) == (4, 3)


def test_every_chunk_that_is_given_out_has_what_the_loop_reads(gateway: Gateway, tell: Tell) -> None:
    odd = b'data: {"choices": [{"index": 0}, {"index": 0, "delta": null}, 7]}\n\ndata: {"choices": null}\n\n'
    gateway.plays(stream(odd, FINISH, DONE))
    told = tell()
    assert (told.error, told.text, len(told.chunks)) == (None, "", 2)


@pytest.mark.parametrize("end", ["ended", "cut"])
def test_a_stream_without_its_end_is_an_error_that_keeps_the_text(gateway: Gateway, tell: Tell, end: Any) -> None:
    gateway.plays(stream(word("Hel", 1), word("lo", 2), end=end))
    told = tell()
    assert type(told.error) is BehestConnectionError
    assert (told.error.code, told.error.partial_text, told.text) == ("stream_cut", "Hello", "Hello")
    assert told.error.trace_id == "t" * 32


def test_a_stream_whose_choices_have_finished_is_whole_also_without_done(gateway: Gateway, tell: Tell) -> None:
    gateway.plays(stream(word("a", 1), FINISH, end="cut"))
    assert tell().error is None
    gateway.plays(stream(word("a", 1), FINISH, end="cut"))
    assert type(tell(n=2).error) is BehestConnectionError, "one of two choices has finished"


def test_a_cut_stream_of_a_thread_goes_on_behind_the_last_chunk(
    gateway: Gateway, tell: Tell, waits: list[float]
) -> None:
    gateway.plays(
        stream(word("He", 1), word("l", 2), end="cut"),
        refusal(502, "upstream_error"),
        stream(word("l", 3), end="ended"),
        stream(word("l", 3), word("o", 1, generation="h"), word("", 2, generation="h", finish="stop"), DONE),
    )
    told = tell(thread_id="t1")
    assert (told.error, told.text) == (None, "Hello")
    assert [seen.headers.get("last-event-id") for seen in gateway.seen] == [None, "g-2", "g-2", "g-3"]
    assert {seen.headers["x-thread-id"] for seen in gateway.seen} == {"t1"}
    assert all(seen.body == gateway.seen[0].body for seen in gateway.seen)
    assert waits == [0.5, 1.0, 0.5], "what came in between counts as progress"


def test_cuts_anywhere_leave_no_gap_and_no_repetition(gateway: Gateway, tell: Tell, waits: list[float]) -> None:
    dice = random.Random(5)
    words = [f"w{number} " for number in range(120)]
    events = [word(text, number) for number, text in enumerate(words)] + [word("", 120, finish="stop"), DONE]
    body = b"".join(events)
    ends = [sum(map(len, events[: number + 1])) for number in range(len(events))]
    begin = 0
    while begin < len(body):
        cut = begin + dice.randrange(1, 1200)
        gateway.plays(stream(body[begin:cut], end="cut") if cut < len(body) else stream(body[begin:]))
        whole = [end for end in ends if end <= cut]
        # What was not a whole event when the connection broke comes again; now and then more than that comes.
        begin = len(body) if cut >= len(body) else (whole[max(0, len(whole) - dice.choice([1, 1, 2]))] if whole else 0)
    told = tell(thread_id="t1")
    assert told.error is None
    assert told.text == "".join(words)
    assert len(gateway.seen) > 10


def test_a_stream_that_broke_off_in_another_process_goes_on_behind_its_last_chunk(
    gateway: Gateway, tell: Tell, waits: list[float]
) -> None:
    gateway.plays(stream(word("l", 3), end="cut"), stream(word("o", 4), FINISH, DONE))
    told = tell(thread_id="t1", last_event_id="g-2")
    assert (told.error, told.text) == (None, "lo")
    assert [seen.headers.get("last-event-id") for seen in gateway.seen] == ["g-2", "g-3"]


def test_what_comes_twice_is_given_out_once(gateway: Gateway, tell: Tell, waits: list[float]) -> None:
    gateway.plays(
        stream(word("a", 1), word("b", 2), end="cut"), stream(word("a", 1), word("b", 2), word("c", 3), FINISH, DONE)
    )
    assert tell(thread_id="t1").text == "abc"


@pytest.mark.parametrize("going_on", [word("d", 4), word("a")])
def test_a_gateway_that_cannot_go_on_is_an_error_and_not_a_gap(
    gateway: Gateway, tell: Tell, waits: list[float], going_on: bytes
) -> None:
    gateway.plays(stream(word("a", 1), word("b", 2), end="cut"), stream(going_on, FINISH, DONE))
    told = tell(thread_id="t1")
    assert told.error is not None
    assert (told.error.code, told.error.partial_text, told.text) == ("cannot_resume", "ab", "ab")
    gateway.plays(stream(going_on, FINISH, DONE))
    later = tell(thread_id="t1", last_event_id="g-2")
    assert later.error is not None
    assert (later.error.code, later.text) == ("cannot_resume", "")


def test_without_ids_or_without_a_thread_nothing_is_tried_again(
    gateway: Gateway, tell: Tell, waits: list[float]
) -> None:
    gateway.plays(stream(word("a"), end="cut"))
    assert type(tell(thread_id="t1").error) is BehestConnectionError
    gateway.plays(stream(word("a", 1), end="cut"))
    assert type(tell().error) is BehestConnectionError
    assert waits == []


def test_until_a_thread_s_first_event_comes_a_key_makes_the_repeated_call_the_same_call(
    gateway: Gateway, tell: Tell, waits: list[float]
) -> None:
    gateway.plays(
        stream(end="cut"),
        stream(b": alive\n\n", end="cut"),
        stream(word("a", 1), end="cut"),
        stream(word("b", 2), FINISH, DONE),
    )
    assert tell(thread_id="t1").text == "ab"
    keys = [seen.headers.get("idempotency-key") for seen in gateway.seen]
    assert keys[0]
    assert keys == [keys[0]] * 3 + [None]
    gateway.plays(stream(FINISH, DONE))
    tell(thread_id="t1")
    assert gateway.seen[-1].headers["idempotency-key"] != keys[0], "another call"


def test_a_call_that_was_refused_is_another_one_when_it_is_made_again_but_for_one_that_runs_still(
    gateway: Gateway, tell: Tell, waits: list[float]
) -> None:
    gateway.plays(
        stream(end="cut"),
        refusal(409, "in_progress", headers={"retry-after": "1", "x-should-retry": "true"}),
        refusal(503, "draining"),
        stream(terminal(502, "upstream_error")),
        stream(word("a", 1), FINISH, DONE),
    )
    told = tell(thread_id="t1", max_retries=4)
    assert (told.error, told.text, waits) == (None, "a", [0.5, 1.0, 2.0, 2.0])
    first, second, third, fourth, fifth = [seen.headers["idempotency-key"] for seen in gateway.seen]
    assert first == second == third
    assert len({third, fourth, fifth}) == 3


def test_a_key_is_made_only_where_one_helps(gateway: Gateway, tell: Tell, waits: list[float]) -> None:
    whole = stream(word("a", 3), FINISH, DONE)
    gateway.plays(whole, whole, stream(word("a", 1), end="cut"), refusal(503, "draining"), whole)
    tell()
    tell(thread_id="t1", last_event_id="g-2")
    tell(thread_id="t1", idempotency_key="mine")
    assert [seen.headers.get("idempotency-key") for seen in gateway.seen] == [None, None, "mine", "mine", "mine"]


def test_a_stream_that_never_comes_back_ends_with_the_last_error(
    gateway: Gateway, tell: Tell, waits: list[float]
) -> None:
    gateway.plays(stream(word("a", 1), end="cut"), *[refusal(503, "draining")] * 3)
    told = tell(thread_id="t1")
    assert type(told.error) is BehestServerError
    assert (told.error.code, told.error.partial_text, waits) == ("draining", "a", [0.5, 1.0, 2.0])


def test_what_a_retry_cannot_help_ends_a_cut_stream(gateway: Gateway, tell: Tell, waits: list[float]) -> None:
    gateway.plays(stream(word("a", 1), end="cut"), refusal(409, "cannot_continue"))
    told = tell(thread_id="t1")
    assert type(told.error) is BehestConflictError
    assert (told.error.partial_text, waits) == ("a", [0.5])


def test_a_budget_that_ends_in_the_middle_raises_its_class_with_the_text_so_far(
    gateway: Gateway, tell: Tell, waits: list[float]
) -> None:
    gateway.plays(stream(word("Hel", 1), word("lo", 2), terminal(402, "quota_exceeded", budget="n/b")))
    told = tell(thread_id="t1")
    error = told.error
    assert type(error) is BehestQuotaError
    assert (error.status, error.code, error.details["budget"]) == (402, "quota_exceeded", "n/b")
    assert (error.trace_id, error.request_id, error.partial_text) == ("t" * 32, "r1", "Hello")
    assert (told.text, waits) == ("Hello", []), "no retry helps"


def test_a_provider_that_breaks_in_the_middle_is_tried_again_only_in_a_thread(
    gateway: Gateway, tell: Tell, waits: list[float]
) -> None:
    broken = stream(word("a", 1), terminal(502, "upstream_error"))
    gateway.plays(broken)
    assert type(tell().error) is BehestServerError
    assert waits == []
    gateway.plays(broken, stream(word("b", 2), FINISH, DONE))
    assert tell(thread_id="t1").text == "ab"


def test_a_refusal_before_the_stream_is_raised_by_create(gateway: Gateway, tell: Tell, waits: list[float]) -> None:
    gateway.plays(refusal(402, "quota_exceeded", budget="n/b"))
    told = tell()
    assert type(told.error) is BehestQuotaError
    assert (told.stream, told.error.details) == (None, {"budget": "n/b"})


@pytest.mark.parametrize("event", [b"data: {\n\n", b"data: 7\n\n", b'data: {"error": "text"}\n\n'])
def test_nonsense_in_a_stream_is_an_error(gateway: Gateway, tell: Tell, event: bytes) -> None:
    gateway.plays(stream(word("a", 1), event, DONE))
    assert type(tell().error) is BehestServerError


def test_leaving_the_loop_ends_the_call(gateway: Gateway) -> None:
    gateway.plays(stream(word("a", 1), word("b", 2), end="held"))

    async def first() -> None:
        async with Behest(key=API_KEY, base_url=gateway.base_url, http_client=async_http()) as client:
            begun = await client.chat.completions.create(messages=QUESTION, stream=True)
            async for chunk in begun:
                assert chunk.choices[0].delta.content == "a"
                break
            assert await asyncio.to_thread(gateway.gone.wait, 10), "the provider would go on"
            with pytest.raises(BehestError, match="left before its end"):
                await anext(begun)

    asyncio.run(first())
    gateway.gone.clear()
    gateway.plays(stream(word("a", 1), word("b", 2), end="held"))
    with BehestSync(key=API_KEY, base_url=gateway.base_url, http_client=sync_http()) as client:
        left = client.chat.completions.create(messages=QUESTION, stream=True)
        for _ in left:
            break
        assert gateway.gone.wait(10)
        with pytest.raises(BehestError, match="left before its end"):
            next(left)


def test_a_cancelled_task_ends_the_call(gateway: Gateway) -> None:
    gateway.plays(stream(word("a", 1), end="held"))

    async def cancelled() -> None:
        async with Behest(key=API_KEY, base_url=gateway.base_url, http_client=async_http()) as client:
            came = asyncio.Event()

            async def read() -> None:
                async for _ in await client.chat.completions.create(messages=QUESTION, stream=True):
                    came.set()

            task = asyncio.create_task(read())
            await came.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(gateway.gone.wait, 10)

    asyncio.run(cancelled())


def test_one_chunk_can_be_taken_before_the_loop(gateway: Gateway) -> None:
    gateway.plays(stream(word("a", 1), word("b", 2), FINISH, DONE))
    with (
        BehestSync(key=API_KEY, base_url=gateway.base_url, http_client=sync_http()) as client,
        client.chat.completions.create(messages=QUESTION, stream=True) as begun,
    ):
        assert next(begun).choices[0].delta.content == "a"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in begun) == "b"
        assert list(begun) == []


def test_a_silent_stream_is_a_cut(gateway: Gateway, tell: Tell) -> None:
    gateway.plays(stream(word("a", 1), end="held"))
    told = tell(timeout=2)  # before its head, too: that much a busy machine may take
    assert type(told.error) is BehestConnectionError
    assert told.error.partial_text == "a"


def test_a_stream_may_be_silent_for_longer_before_its_head(gateway: Gateway, tell: Tell) -> None:
    gateway.plays(Scripted(pieces=(word("a", 1), FINISH, DONE), wait_s=0.6))
    assert tell(idle_timeout=0.2).text == "a"
    gateway.plays(stream(word("a", 1), end="held"))
    assert type(tell(idle_timeout=0.2).error) is BehestConnectionError


def test_a_stream_leaves_its_connection_to_the_next_call_unless_its_end_is_held_back(gateway: Gateway) -> None:
    whole = (word("a", 1), FINISH, DONE)
    gateway.plays(stream(*whole), stream(*whole, end="held"), Scripted(pieces=(b"[]",)))
    with BehestSync(key=API_KEY, base_url=gateway.base_url, http_client=sync_http()) as client:
        token = client.auth.mint().value
        began_s = time.monotonic()
        for _ in range(2):
            for _ in client.chat.completions.create(messages=QUESTION, stream=True, token=token):
                pass
        assert gateway.connections == 1
        assert client.threads.list(token=token) == []
        assert time.monotonic() - began_s < 10
    assert gateway.connections == 2


def test_an_open_stream_after_the_end_is_not_waited_for(gateway: Gateway) -> None:
    gateway.plays(stream(word("a", 1), FINISH, DONE, end="held"), Scripted(pieces=(b"[]",)))

    async def read() -> None:
        async with (
            Behest(key=API_KEY, base_url=gateway.base_url, http_client=async_http()) as client,
            asyncio.timeout(10),
        ):
            async for _ in await client.chat.completions.create(messages=QUESTION, stream=True):
                pass
            assert await client.threads.list() == []

    asyncio.run(read())
