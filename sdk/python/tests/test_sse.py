"""Events come out the same however their bytes are cut."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest import sse
from behest.sse import Event, EventReader, EventTooLargeError

TEXT = 'data: {"a": "h\u00e9 \U0001f600"}\n\n'


def read(*pieces: bytes) -> list[Event]:
    reader = EventReader()
    return [event for piece in pieces for event in reader.feed(piece)]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_cut_at_every_byte_changes_nothing(line_end: bytes) -> None:
    text = (
        b": ka\nid: g-1\ndata: one\n\n: ka\nevent: x\nretry: 7\nid: g-2\ndata: two\ndata:\xc3\xa9\n\n"
        b"id: g-3\n\ndata\n\ndata: [DONE]\n\n"
    ).replace(b"\n", line_end)
    whole = [Event("one", "g-1"), Event("two\n\u00e9", "g-2"), Event("", None)][:2]
    expected = [*whole, Event("", None), Event("[DONE]", None)]
    assert read(text) == expected
    for cut in range(len(text) + 1):
        assert read(text[:cut], text[cut:]) == expected
    for first, second in itertools.combinations(range(0, len(text), 3), 2):
        assert read(text[:first], text[first:second], text[second:]) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=6),
    st.lists(st.integers(1, 9), min_size=1, max_size=20),
)
def test_any_text_comes_back_from_any_pieces(texts: list[str], sizes: list[int]) -> None:
    data = b"".join(f"id: {number}\ndata: {text}\n\n".encode() for number, text in enumerate(texts))
    pieces: list[bytes] = []
    for size in itertools.cycle(sizes):
        if not data:
            break
        pieces.append(data[:size])
        data = data[size:]
    assert read(*pieces) == [Event(text, str(number)) for number, text in enumerate(texts)]


def test_a_comment_with_a_blank_line_behind_it_is_no_event_also_after_an_id() -> None:
    assert read(b"id: g-1\ndata: a\n\n: ka\n\n: ka\n\nid: g-2\ndata: b\n\n") == [Event("a", "g-1"), Event("b", "g-2")]


def test_an_event_without_a_blank_line_behind_it_is_none() -> None:
    assert read(b"data: a\n\ndata: half") == [Event("a", None)]


def test_a_byte_order_mark_counts_only_at_the_begin() -> None:
    mark = b"\xef\xbb\xbf"
    assert read(mark + b"data: a\n\n" + mark + b"data: b\n\n") == [Event("a", None)]
    assert read(b"\xef", b"\xbb", b"\xbfdata: a\n\n") == [Event("a", None)]


def test_an_event_has_a_largest_size_in_one_line_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "EVENT_BYTES_MAX", 1000)
    with pytest.raises(EventTooLargeError):
        read(b"data: " + b"x" * 1000)
    line = b"data: " + b"x" * 125 + b"\n"
    with pytest.raises(EventTooLargeError):
        read(*[line] * 9)
    assert len(read(*[line] * 8, b"\n", *[line] * 8, b"\n")) == 2
