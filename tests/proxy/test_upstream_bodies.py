"""However a peer's bytes are cut, the body is the same; what is no framing is refused."""

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.upstream.bodies import ChunkedReader, CloseReader, LengthReader, MalformedBody
from proxy.upstream_servers import chunk


def cut(data: bytes, points: list[int]) -> list[bytes]:
    edges = sorted({point % (len(data) + 1) for point in points} | {0, len(data)})
    return [data[left:right] for left, right in itertools.pairwise(edges)]


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=12),
    st.sampled_from([b"", b";a=b", b" ;token", b';q="x"']),
    st.sampled_from([b"", b"x-a: b\r\n", b"x-a: b\r\nx-c: d\r\n"]),
    st.lists(st.integers(0, 10_000), max_size=30),
)
def test_any_cut_of_a_chunked_body_gives_the_same_bytes(
    chunks: list[bytes], extension: bytes, trailers: bytes, points: list[int]
) -> None:
    wire = b"".join(b"%X%b\r\n%b\r\n" % (len(data), extension, data) for data in chunks)
    wire += b"000" + extension + b"\r\n" + trailers + b"\r\n"
    reader = ChunkedReader()
    body = b""
    for piece in cut(wire, points):
        assert not reader.complete
        body += reader.feed(piece)
    assert body == b"".join(chunks)
    assert reader.complete
    assert not reader.surplus


def test_every_cut_in_two_of_a_chunked_body_gives_the_same_bytes() -> None:
    wire = chunk(b"hello") + b"a;x=1\r\n0123456789\r\n" + b"0\r\nx: y\r\n\r\n"
    for point in range(len(wire) + 1):
        reader = ChunkedReader()
        assert reader.feed(wire[:point]) + reader.feed(wire[point:]) == b"hello0123456789"
        assert reader.complete


def test_one_read_with_a_hundred_chunks_is_one_piece() -> None:
    reader = ChunkedReader()
    assert reader.feed(b"".join(chunk(b"x" * 200) for _ in range(100))) == b"x" * 20_000


def _read(pieces: Iterable[bytes]) -> tuple[bytes, bool, bool] | None:
    """The body, whether it ended, whether more came; None: refused."""
    reader, body = ChunkedReader(), b""
    try:
        for piece in pieces:
            if reader.complete:
                return body, True, True
            body += reader.feed(piece)
    except MalformedBody:
        return None
    return body, reader.complete, reader.surplus


@given(
    st.lists(st.sampled_from([b"x" * 90, b"{}", b"0"]), min_size=30, max_size=90),
    st.sampled_from([b"a\r\nb", b"\r\n", b"0\r\n", b"y"]),
    st.sampled_from([b"", b"0\r\n\r\n", b"0\r\n\r\n" + chunk(b"z" * 9), b"0\r\na: b\r\n\r\n", b"5\r\nab"]),
    st.integers(0, 10_000),
    st.sampled_from([b"", b"\r\n", b"0", b"\r", b"-", b"_", b" ", b";", b"\r\n\r\n", b"g"]),
    st.integers(0, 3),
)
def test_a_run_of_chunks_in_one_read_is_what_it_is_byte_by_byte(
    chunks: list[bytes], last: bytes, end: bytes, place: int, odd: bytes, dropped: int
) -> None:
    wire = b"".join(map(chunk, [*chunks, last])) + end
    at = place % len(wire)
    wire = wire[:at] + odd + wire[at + dropped :]
    assert _read([wire]) == _read(wire[index : index + 1] for index in range(len(wire)))


@pytest.mark.parametrize(
    "wire",
    [
        b"x\r\n",
        b"-1\r\nx\r\n",
        b"+1\r\nx\r\n",
        b"0x1\r\nx\r\n",
        b"1_0\r\n",
        b" 1\r\nx\r\n",
        b"\r\n",
        b";a\r\n",
        b"1\r\nxy\r\n",
        b"1\r\nxyz",
        b"1\r\nx\n0\r\n\r\n",
        b"1" * 17 + b"\r\n",
        b"1" * 5000,
        b"0\r\n" + b"a: b\r\n" * 10_000,
        b"0\r\n" + b"a" * 5000,
        b"<html>\r\n",
    ],
)
def test_what_is_no_chunk_is_refused(wire: bytes) -> None:
    with pytest.raises(MalformedBody):
        ChunkedReader().feed(wire)


@given(st.binary(max_size=200))
def test_garbage_is_a_body_or_refused_and_nothing_else(data: bytes) -> None:
    reader = ChunkedReader()
    try:
        for index in range(len(data)):
            if reader.complete:
                break
            reader.feed(data[index : index + 1])
    except MalformedBody:
        pass


def test_bytes_behind_a_body_are_told() -> None:
    chunked, measured = ChunkedReader(), LengthReader(3)
    assert chunked.feed(b"0\r\n\r\nHTTP") == b""
    assert measured.feed(b"abcd") == b"abc"
    assert (chunked.complete, chunked.surplus) == (True, True)
    assert (measured.complete, measured.surplus) == (True, True)
    run = ChunkedReader()
    assert run.feed(chunk(b"x" * 90) * 20 + b"0\r\n\r\n" + chunk(b"y")) == b"x" * 1800
    assert (run.complete, run.surplus) == (True, True)


@given(st.binary(min_size=1, max_size=100), st.lists(st.integers(0, 1000), max_size=10))
def test_a_body_with_a_length_ends_with_its_last_byte(body: bytes, points: list[int]) -> None:
    reader = LengthReader(len(body))
    got = b""
    for piece in cut(body, points):
        assert not reader.complete
        got += reader.feed(piece)
    assert got == body
    assert reader.complete
    assert not reader.surplus


def test_a_body_without_framing_is_everything() -> None:
    assert CloseReader().feed(b"abc") == b"abc"
    assert LengthReader(0).complete
