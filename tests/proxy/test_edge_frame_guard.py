"""What is reckoned of frames before they are parsed: the same however the bytes are cut, and never of a payload."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.edge.frame_guard import FrameGuard
from behest_proxy.edge.limits import EdgeLimits
from proxy.h2_frames import frame

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LIMITS = EdgeLimits(control_frames=20, resets=30, requests_burst=20, window_updates=20)

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9


def guard() -> FrameGuard:
    opened = FrameGuard(LIMITS, 0.0)
    assert opened.admit(PREFACE, 0.0) is None
    return opened


@pytest.mark.parametrize("kind", [PRIORITY, SETTINGS, PING, CONTINUATION, 0x10, 0xEE])
def test_frames_that_carry_nothing_are_bounded(kind: int) -> None:
    one = guard()
    assert one.admit(frame(kind, 0, 0, b"12345678") * 20, 0.0) is None
    assert one.admit(frame(kind, 0, 0, b"12345678"), 0.0) == "too many frames that carry nothing"


def test_a_body_in_tiny_pieces_is_bounded_and_one_in_proper_pieces_is_not() -> None:
    one = guard()
    assert one.admit(frame(DATA, 0, 1, b"x" * 64) * 1000, 0.0) is None
    assert one.admit(frame(DATA, 1, 1, b"x") * 1000, 0.0) is None  # END_STREAM: a whole small body
    assert one.admit(frame(DATA, 0, 1, b"x") * 21, 0.0) is not None


def test_resets_and_requests_are_bounded_each_by_its_own_number() -> None:
    assert guard().admit(frame(RST_STREAM, 0, 1, b"1234") * 31, 0.0) == "too many streams were reset"
    assert guard().admit(frame(HEADERS, 5, 1, b"x") * 21, 0.0) == "too many requests at once"


def test_resets_that_the_client_provokes_count_like_its_own() -> None:
    one = guard()
    assert one.admit(frame(RST_STREAM, 0, 1, b"1234") * 29, 0.0) is None
    assert one.was_reset(0.0) is None
    assert one.was_reset(0.0) == "too many streams were reset"


def test_window_updates_are_paid_by_what_we_send() -> None:
    one = guard()
    one.sent(100)
    assert one.admit(frame(WINDOW_UPDATE, 0, 1, b"1234") * 20, 0.0) is None
    fresh = guard()
    for _ in range(50):
        fresh.sent(10)
        assert fresh.admit(frame(WINDOW_UPDATE, 0, 1, b"1234") * 20, 0.0) is None
    assert guard().admit(frame(WINDOW_UPDATE, 0, 1, b"1234") * 21, 0.0) == "too many window updates"


def test_buckets_refill_with_time_and_no_further_than_full() -> None:
    one = guard()
    pings = frame(PING, 0, 0, b"12345678")
    assert one.admit(pings * 20, 0.0) is None
    assert one.admit(pings * 2, 1.0) is None
    assert one.admit(pings, 1.0) is not None
    rested = guard()
    assert rested.admit(pings * 20, 1000.0) is None
    assert rested.admit(pings, 1000.0) is not None


def test_the_preface_may_come_in_pieces() -> None:
    one = FrameGuard(LIMITS, 0.0)
    for byte in PREFACE:
        assert one.admit(bytes([byte]), 0.0) is None
    assert one.admit(frame(PING, 0, 0, b"12345678") * 21, 0.0) is not None


frames = st.lists(
    st.builds(frame, st.integers(0, 12), st.sampled_from([0, 1]), st.integers(0, 5), st.binary(max_size=80)),
    max_size=60,
)


@given(frames, st.lists(st.integers(0, 3000), max_size=12))
def test_however_the_bytes_are_cut_the_same_is_reckoned(sent: list[bytes], cuts: list[int]) -> None:
    stream = PREFACE + b"".join(sent)
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    whole, in_pieces = FrameGuard(LIMITS, 0.0), FrameGuard(LIMITS, 0.0)
    expected = whole.admit(stream, 0.0)
    found = [in_pieces.admit(stream[start:end], 0.0) for start, end in itertools.pairwise(edges)]
    assert any(found) == (expected is not None)
