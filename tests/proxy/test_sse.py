"""The framer against the standard: any cut of the bytes, any line ends, and bounds."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.sse import DONE, KEEP_ALIVE, NamedEvent, SseFramer, SseTooLarge, data_event, data_events


def framed(data: bytes, cuts: list[int] | None = None) -> list[tuple[str, bytes]]:
    """The events of a stream read in pieces, each with its name."""
    framer = SseFramer()
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts or []), len(data)]
    events: list[bytes] = []
    for start, end in itertools.pairwise(edges):
        events += framer.feed(data[start:end])
    return [(event.name if isinstance(event, NamedEvent) else "message", bytes(event)) for event in events]


def by_the_standard(stream: bytes) -> list[tuple[str, bytes]]:
    """WHATWG HTML, "Interpreting an event stream", word by word."""
    text = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    *lines, _unfinished = text.split(b"\n")
    events: list[tuple[str, bytes]] = []
    data, name = b"", b""
    for line in lines:
        if not line:
            if data:
                events.append((name.decode("utf-8", "replace") or "message", data[:-1]))
            data, name = b"", b""
        elif line.startswith(b":"):
            continue
        else:
            field, _, value = line.partition(b":")
            value = value[1:] if value.startswith(b" ") else value
            if field == b"data":
                data += value + b"\n"
            elif field == b"event":
                name = value
    return events


pieces = st.sampled_from(
    [
        b"data: ",
        b"data:",
        b"data",
        b"event: error",
        b"event:message",
        b"event",
        b"id: 1",
        b"retry: 5",
        b": note",
        b"\n",
        b"\n\n",
        b"\r",
        b"\r\n",
        b"\r\n\r\n",
        b" ",
        b":",
        b"{}",
        b"x",
        b"\xff",
        b"\xef\xbb\xbf",
        b'data: {"a":1}\n\n',
        b"data: a\n\ndata: b\n\n",
    ]
)
streams = st.lists(pieces, max_size=30).map(b"".join)
cuts = st.lists(st.integers(0, 400), max_size=30)


@given(streams, cuts)
def test_any_bytes_cut_anywhere_give_the_events_of_the_standard(stream: bytes, cuts: list[int]) -> None:
    assert framed(stream, cuts) == by_the_standard(stream)


@given(st.lists(st.binary(max_size=40).map(lambda b: b.translate(None, b"\r\n")), max_size=8), cuts)
def test_written_events_are_read_back(payloads: list[bytes], cuts: list[int]) -> None:
    assert framed(data_events(payloads), cuts) == [("message", payload) for payload in payloads]


@given(streams)
def test_the_end_hands_out_what_a_blank_line_would_have_ended(stream: bytes) -> None:
    framer = SseFramer()
    events = framer.feed(stream) + framer.finish()
    assert [bytes(event) for event in events] == [data for _, data in by_the_standard(stream + b"\n\n")]
    assert framer.finish() == []


def test_a_read_of_ordinary_events_is_cut_into_their_payloads() -> None:
    framer = SseFramer()
    assert framer.feed(b'data: {"a":1}\n\n') == [b'{"a":1}']
    assert framer.feed(b'data: {"a":1}\n\ndata: {"a":2}\n\n' + DONE) == [b'{"a":1}', b'{"a":2}', b"[DONE]"]


def test_a_named_event_tells_its_name() -> None:
    (event,) = SseFramer().feed(b"event: error\ndata: {}\n\n")
    assert event == b"{}"
    assert isinstance(event, NamedEvent)
    assert event.name == "error"


def test_our_keep_alive_is_no_event_and_spoils_none() -> None:
    assert framed(KEEP_ALIVE * 3 + b"data: a\n\n" + KEEP_ALIVE) == [("message", b"a")]


def test_line_ends_between_tokens_become_spaces() -> None:
    assert data_event(b'{"a":\r\n1\n}') == b'data: {"a":  1 }\n\n'


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_an_event_over_the_bound_is_refused_however_it_is_read(size: int) -> None:
    framer = SseFramer(event_bytes_max=100)
    stream = b"data: " + b"x" * 200 + b"\n\n"
    reads = [stream[start : start + size] for start in range(0, len(stream), size)]
    with pytest.raises(SseTooLarge):
        any(map(framer.feed, reads))


def test_many_small_events_in_one_read_may_exceed_the_bound_together() -> None:
    framer = SseFramer(event_bytes_max=20)
    assert len(framer.feed(b"data: abc\n\n" * 50)) == 50
    assert len(framer.feed(b": note\n\ndata: abc\n\n" * 50)) == 50


def test_an_event_in_very_many_reads_is_joined_once() -> None:
    framer = SseFramer()
    stream = b"data: " + b"x" * 1_000_000
    for start in range(0, len(stream), 64):
        assert framer.feed(stream[start : start + 64]) == []
    (event,) = framer.feed(b"\n\n")
    assert len(event) == 1_000_000
