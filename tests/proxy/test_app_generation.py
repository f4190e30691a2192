"""A reply and its clients, without sockets; and a machine that cuts connections anywhere."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_ledger.charging import Outcome
from behest_proxy.app.context import RequestContext
from behest_proxy.app.generation import EVENTS_BYTES_MAX, Follower, Generation
from behest_proxy.request import parse
from behest_proxy.sse import DONE
from behest_proxy.threads import Memory, Said, continued, encoded, reply_of, take_turn, text_of


class Client:
    """A client's stream, which takes what it is given until it is told otherwise."""

    def __init__(self) -> None:
        self.on_gone: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None
        self.paused = False
        self.gone = False
        self.began = False
        self.data = b""
        self.over = ""

    def begin(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        assert status == 200
        assert dict(headers)[b"content-type"] == b"text/event-stream"
        self.began = True

    def write(self, data: bytes) -> None:
        assert self.began
        assert not self.over
        if not self.gone:
            self.data += data

    def end(self) -> None:
        self.over = "end"

    def reset(self) -> None:
        self.over = "reset"

    def leave(self) -> None:
        self.gone = True
        if self.on_gone is not None:
            self.on_gone()


def event(text: str) -> bytes:
    return b"data: " + msgspec.json.encode({"choices": [{"index": 0, "delta": {"content": text}}]}) + b"\n\n"


def follow(generation: Generation, *, after: int = 0, ids: bool = False) -> tuple[Client, Follower]:
    client = Client()
    context = RequestContext([])
    follower = generation.follow(client, context, after=after, ids=ids, stall_s=60)
    return client, follower


def run(test: Callable[[], None]) -> None:
    """Futures need a loop."""

    async def main() -> None:
        test()

    asyncio.run(main())


def nobody(_generation: Generation) -> None:
    """Is told, and does nothing."""


def a_generation(**members: Any) -> Generation:
    return Generation(generation_id=uuid4(), tenant_id="t", **members)


def test_everybody_gets_every_event_from_their_own_place_on_and_the_end() -> None:
    def test() -> None:
        generation = a_generation(events=[event("1"), event("2")])
        early, _ = follow(generation)
        assert not early.began, "nothing is promised before the provider has answered"
        generation.begin(200, [])
        generation.add(event("3"), 1)
        late, _ = follow(generation, after=2, ids=True)
        generation.add(event("4") + event("5"), 2)
        generation.write(b": ka\n")
        generation.add(event("6") + DONE, 1)
        generation.end()
        numbered = [b"id: %b-%d\n" % (generation.generation_id.hex.encode(), number) for number in range(3, 7)]
        assert early.data == b"".join(map(event, "12345")) + b": ka\n" + event("6") + DONE
        assert late.data == (
            numbered[0] + event("3") + numbered[1] + event("4") + numbered[2] + event("5") + b": ka\n"
            + numbered[3] + event("6") + DONE
        )  # fmt: skip
        assert (early.over, late.over) == ("end", "end")

    run(test)


def test_a_slow_client_holds_up_nobody_and_catches_up() -> None:
    def test() -> None:
        generation = a_generation()
        quick, _ = follow(generation)
        slow, _ = follow(generation)
        resumed: list[bool] = []
        generation.on_resume = lambda: resumed.append(True)
        generation.begin(200, [])
        slow.paused = True
        generation.add(event("1"), 1)
        assert (quick.data, slow.data, generation.paused) == (event("1"), b"", False)
        quick.paused = True
        assert generation.paused
        generation.add(event("2") + DONE, 1)
        slow.paused = False
        assert slow.on_resume is not None
        slow.on_resume()
        assert slow.data == event("1") + event("2")
        assert resumed
        generation.end()
        assert (slow.data, slow.over) == (event("1") + event("2") + DONE, "end")

    run(test)


def test_a_client_that_joins_a_reply_whose_other_client_is_stuck_gets_the_provider_going_again() -> None:
    def test() -> None:
        generation = a_generation()
        resumed: list[bool] = []
        generation.on_resume = lambda: resumed.append(generation.paused)
        stuck, _ = follow(generation)
        generation.begin(200, [])
        stuck.paused = True
        generation.add(event("1"), 1)
        assert generation.paused
        resumed.clear()
        joined, _ = follow(generation)
        assert (joined.data, resumed) == (event("1"), [False])

    run(test)


def test_a_client_that_takes_nothing_of_what_it_lacks_is_cut_and_one_that_takes_some_is_not() -> None:
    async def main() -> None:
        now_s = 0.0
        loop: Any = asyncio.get_running_loop()
        loop.time = lambda: now_s
        generation = a_generation(events=[event("1")])
        stuck, slow, quick = Client(), Client(), Client()
        stuck.paused = slow.paused = True
        followers = [
            generation.follow(client, RequestContext([]), after=0, ids=False, stall_s=60)
            for client in (stuck, slow, quick)
        ]
        generation.replayed(DONE)
        for follower in followers:
            follower.pump()
        for _ in range(3):
            assert slow.on_resume is not None
            slow.on_resume()  # full again at once
            now_s += 40
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert (stuck.over, slow.over, quick.over) == ("reset", "", "end")
        assert [follower.is_over for follower in followers] == [True, False, True]
        slow.paused = False
        assert slow.on_resume is not None
        slow.on_resume()
        now_s += 100
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert slow.over == "end"

    asyncio.run(main())


def test_the_last_clients_being_cut_is_its_leaving() -> None:
    async def main() -> None:
        generation = a_generation()
        left: list[bool] = []
        generation.on_gone = lambda: left.append(True)
        client = Client()
        generation.follow(client, RequestContext([]), after=0, ids=False, stall_s=0)
        generation.begin(200, [])
        client.paused = True
        generation.add(event("1"), 1)
        await asyncio.sleep(0.01)
        assert (client.over, left) == ("reset", [True])

    asyncio.run(main())


def test_it_is_gone_when_the_last_client_left_and_not_before() -> None:
    def test() -> None:
        generation = a_generation()
        left: list[bool] = []
        generation.on_gone = lambda: left.append(True)
        one, _ = follow(generation)
        two, _ = follow(generation)
        one.leave()
        assert (left, generation.gone) == ([], False)
        two.leave()
        assert (left, generation.gone) == ([True], True)

    run(test)


def test_what_the_ledger_has_and_every_client_too_is_forgotten() -> None:
    def test() -> None:
        generation = a_generation(on_change=nobody)
        client, _ = follow(generation)
        generation.begin(200, [])
        for text in "123":
            generation.add(event(text), 1)
        client.paused = True
        generation.add(event("4"), 1)
        generation.forget_stored(4)
        assert (generation.first_event, generation.count) == (4, 4)
        client.paused = False
        generation.add(event("5"), 1)
        assert client.data == b"".join(map(event, "12345"))

    run(test)


def test_with_a_key_all_of_it_stays_for_who_comes_later() -> None:
    def test() -> None:
        generation = a_generation(on_change=nobody)
        generation.has_key = True
        follow(generation)
        generation.begin(200, [])
        generation.add(event("1"), 1)
        generation.forget_stored(1)
        assert generation.events_after(0) == [event("1")]

    run(test)


def test_beyond_its_bound_a_reply_reaches_its_clients_and_is_kept_no_more() -> None:
    def test() -> None:
        generation = a_generation(on_change=nobody)
        client, _ = follow(generation)
        stuck, follower = follow(generation)
        generation.begin(200, [])
        stuck.paused = True
        large = event("x" * 100_000)
        for _ in range(2 * EVENTS_BYTES_MAX // len(large) + 2):
            generation.add(large, 1)
        assert generation.is_lossy
        assert generation.size_bytes <= EVENTS_BYTES_MAX
        assert len(client.data) == generation.count * len(large)
        assert (stuck.over, follower.is_over) == ("reset", True), "never a gap"

    run(test)


def test_the_last_client_that_is_too_far_behind_is_cut_and_its_leaving_is_noticed_at_once() -> None:
    async def main() -> None:
        generation = a_generation(on_change=nobody)
        left: list[bool] = []
        generation.on_gone = lambda: left.append(True)
        stuck, _ = follow(generation)
        generation.begin(200, [])
        stuck.paused = True
        for _ in range(2 * EVENTS_BYTES_MAX // 100_000 + 2):
            generation.add(event("x" * 100_000), 1)
            assert not left, "not in the middle of an event's way"
        await asyncio.sleep(0)
        assert (stuck.over, left) == ("reset", [True])

    asyncio.run(main())


def test_a_call_that_was_refused_leaves_nothing_and_a_broken_one_its_state() -> None:
    def test() -> None:
        told: list[Generation] = []
        new = a_generation(on_change=told.append)
        new.new_messages = [("user", b"{}")]
        new.finished(None, is_charged=False)
        assert (new.is_kept, told) == (False, [new])
        again = a_generation(on_change=told.append)
        again.finished(None, is_charged=False)
        assert (again.is_kept, again.state) == (True, "broken")
        whole = a_generation(on_change=told.append)
        whole.finished(Outcome.COMPLETED, is_charged=True)
        assert whole.state == "whole"

    run(test)


# The machine: a text that is cut at any event, by the provider or on the way to the client, stored as far as it is.

WORDS = [f"w{number} " for number in range(12)]
QUESTION = {"role": "user", "content": "q"}


class Cut(msgspec.Struct, frozen=True):
    """One attempt and how it ends."""

    provider_after: int
    """The provider breaks after so many events."""
    lost: int
    """So many of the last events that were written never reach the client."""


def provider_says(request_messages: Sequence[Any]) -> list[str]:
    """A provider that goes on where the last assistant message ends."""
    said = next((one["content"] for one in reversed(request_messages) if one["role"] == "assistant"), "")
    whole = "".join(WORDS)
    assert whole.startswith(said)
    return [word + " " for word in whole[len(said) :].split(" ") if word]


def attempt(stored: list[bytes], cut: Cut | None, *, after: int, ids: bool) -> tuple[Client, bool]:
    """One call: what its client was written, and whether the reply is whole. `stored` grows by what was said."""
    known = [Said(role="user", content=encoded(QUESTION))]
    request = parse(msgspec.json.encode({"messages": [QUESTION]}))
    if stored:
        known.append(Said(role="assistant", content=encoded(reply_of(stored)), is_whole=False))
    turn = take_turn(known if stored else [], request, Memory())
    assert turn.repeats == bool(stored)
    if stored:
        reply = reply_of(stored)
        request = continued(turn, reply, said_tokens=0, request=request, continuation="Prefix")
        assert text_of(reply) == "".join(WORDS)[: len(text_of(reply))]
    generation = a_generation(events=stored)
    client, _ = follow(generation, after=after, ids=ids)
    generation.begin(200, [])
    words = provider_says([msgspec.to_builtins(one) for one in msgspec.json.decode(request.members["messages"])])
    is_whole = cut is None or cut.provider_after >= len(words)
    for word in words if cut is None else words[: cut.provider_after]:
        generation.add(event(word), 1)
    generation.add(DONE if is_whole else b'data: {"error":{}}\n\ndata: [DONE]\n\n', 0)
    generation.end()
    stored[:] = generation.events_after(0)
    return client, is_whole


def events_in(data: bytes) -> list[tuple[int | None, str]]:
    found: list[tuple[int | None, str]] = []
    for part in data.split(b"\n\n"):
        lines = part.split(b"\n")
        number = int(lines[0].rpartition(b"-")[2]) if lines[0].startswith(b"id: ") else None
        payload = lines[-1].removeprefix(b"data: ")
        if payload.startswith(b'{"choices"'):
            found.append((number, msgspec.json.decode(payload)["choices"][0]["delta"]["content"]))
    return found


CUTS = st.lists(st.builds(Cut, st.integers(0, 12), st.integers(0, 6)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(CUTS)
def test_with_ids_the_text_is_always_the_uncut_text(cuts: list[Cut]) -> None:
    def test() -> None:
        stored: list[bytes] = []
        text: list[str] = []
        last = 0
        for cut in [*cuts, None]:
            client, is_whole = attempt(stored, cut, after=last, ids=True)
            arrived = events_in(client.data)
            if cut is not None and cut.lost:
                arrived = arrived[: max(0, len(arrived) - cut.lost)]
            text += [word for _, word in arrived]
            assert [number for number, _ in arrived] == list(range(last + 1, last + 1 + len(arrived)))
            last += len(arrived)
            if is_whole and last == len(stored):
                break
            if is_whole:  # the rest of a whole reply is replayed
                replayed = a_generation(events=stored)
                replayed.replayed(DONE)
                client, _ = follow(replayed, after=last, ids=True)
                assert client.data.endswith(DONE)
                text += [word for _, word in events_in(client.data)]
                break
        assert text == WORDS

    run(test)


@settings(max_examples=60, deadline=None)
@given(CUTS)
def test_without_ids_nothing_comes_twice_and_only_what_was_under_way_is_missing(cuts: list[Cut]) -> None:
    def test() -> None:
        stored: list[bytes] = []
        text: list[str] = []
        lost: list[str] = []
        for cut in [*cuts, None]:
            client, is_whole = attempt(stored, cut, after=len(stored), ids=False)
            arrived = [word for _, word in events_in(client.data)]
            kept = len(arrived) - (min(cut.lost, len(arrived)) if cut is not None else 0)
            text += arrived[:kept]
            lost += arrived[kept:]
            if is_whole:
                break
        assert len(set(text)) == len(text)
        assert sorted([*text, *lost]) == sorted(WORDS)

    run(test)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stored_reply_is_replayed_from_any_place(after: int) -> None:
    def test() -> None:
        generation = a_generation(events=[event("1"), event("2")])
        generation.replayed(DONE)
        client, follower = follow(generation, after=after)
        assert client.data == b"".join([event("1"), event("2")][after:]) + DONE
        assert (client.over, follower.is_over) == ("end", True)

    run(test)
