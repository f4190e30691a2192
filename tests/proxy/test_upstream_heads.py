"""Heads over HTTP/1.1: read however they are cut, as `h11` reads them, and refused where a body's end is in doubt."""

import itertools
import re

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from behest_proxy.upstream.heads import HEAD_BYTES_MAX, AnswerHead, HeadReader, MalformedHead, composed

OK = b"HTTP/1.1 200 OK\r\n"
PIECES = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.0 200\n",
        b"HTTP/1.1 103 Early\r\n\r\n",
        b"HTTP/1.1 204 \r\n",
        b"HTTP/1.1 304 Not Modified\r\n",
        b"content-length: 5\r\n",
        b"Content-Length:5, 5\n",
        b"content-length: 6\r\n",
        b"content-length: x\r\n",
        b"transfer-encoding: Chunked\r\n",
        b"transfer-encoding: gzip\r\n",
        b"connection: keep-alive, Close\r\n",
        b"x-a:  \t b c \r\n",
        b"x-a:\r\n",
        b"x a: b\r\n",
        b" folded\r\n",
        b"\r\n",
        b"\n",
        b"x-a: \xc3\xa9\r\n",
    ]
) | st.binary(max_size=8)


def read(data: bytes, *cuts: int) -> tuple[AnswerHead, bytes] | None:
    """What a reader makes of bytes that come in pieces; what comes behind the head in further reads is added."""
    reader = HeadReader()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    found: tuple[AnswerHead, bytes] | None = None
    for left, right in itertools.pairwise(edges):
        piece = data[left:right]
        found = reader.feed(piece) if found is None else (found[0], found[1] + piece)
    return found


STRICTER = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|\n[ \t]|HTTP/[^1]|HTTP/1\.[0-9] 0|101")
"""What `h11` takes and we do not: control characters, folded lines, other versions, statuses below 100, and 101."""


def is_refused_by_h11(data: bytes) -> bool:
    try:
        found = by_h11(data)
    except h11.RemoteProtocolError:
        return True
    return found is None


def by_h11(data: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes] | None:
    """The same by h11. Raises what it raises."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)
    connection.send(h11.Request(method=b"POST", target=b"/", headers=[(b"host", b"a"), (b"content-length", b"0")]))
    connection.receive_data(data)
    event = connection.next_event()
    while isinstance(event, h11.InformationalResponse):
        event = connection.next_event()
    if not isinstance(event, h11.Response):
        return None
    headers = [(bytes(name), bytes(value)) for name, value in event.headers]
    return event.status_code, headers, bytes(connection.trailing_data[0])


@given(data=st.lists(PIECES, max_size=8).map(b"".join).filter(bool))  # no bytes are the end to h11
@example(OK + b"content-length: 5\r\ncontent-length: 5\r\n\r\nhello")
@example(OK + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n")
@example(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"\r\n")
def test_whatever_is_read_h11_reads_alike(data: bytes) -> None:
    try:
        found = read(data)
    except MalformedHead:
        assert is_refused_by_h11(data) or STRICTER.search(data)
        return
    theirs = by_h11(data)
    if found is None:
        assert theirs is None
        return
    head, rest = found
    assert theirs is not None
    # h11 makes the value of some headers uniform, and repeats no length; here they are as they came.
    said = [(name, value) for name, value in head.headers if name not in (b"content-length", b"transfer-encoding")]
    expected = [(name, value) for name, value in theirs[1] if name not in (b"content-length", b"transfer-encoding")]
    assert (head.status, said, rest) == (theirs[0], expected, theirs[2])
    lengths = [int(value) for name, value in theirs[1] if name == b"content-length"]
    is_chunked = any(name == b"transfer-encoding" for name, _ in theirs[1])
    if head.status in (204, 304):
        assert (head.length, head.is_chunked) == (0, False)
    else:
        assert (head.length, head.is_chunked) == (None if is_chunked or not lengths else lengths[0], is_chunked)


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_a_head_may_be_cut_anywhere_and_come_byte_by_byte(end: bytes) -> None:
    data = end.join([b"HTTP/1.1 103 Hints", b"x: y", b"", b"HTTP/1.1 200 OK", b"content-length: 2", b"", b"ok"])
    whole = read(data)
    assert whole is not None
    assert (whole[0].status, whole[0].headers, whole[1]) == (200, [(b"content-length", b"2")], b"ok")
    for cut in range(1, len(data)):
        assert read(data, cut) == whole
    assert read(data, *range(len(data))) == whole


def test_interim_answers_are_passed_over_and_not_without_end() -> None:
    interim = b"HTTP/1.1 102 Processing\r\n\r\n"
    assert read(interim * 32 + OK + b"\r\n") is not None
    with pytest.raises(MalformedHead):
        read(interim * 33 + OK + b"\r\n")


@given(data=st.lists(PIECES, max_size=6).map(b"".join), cuts=st.lists(st.integers(0, 150), max_size=6))
def test_where_the_bytes_are_cut_changes_nothing(data: bytes, cuts: list[int]) -> None:
    try:
        whole = read(data)
    except MalformedHead:
        with pytest.raises(MalformedHead):
            read(data, *cuts)
        return
    assert read(data, *cuts) == whole


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x16\x03\x01",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 99 Low\r\n\r\n",
        b"HTTP/1.1 2000\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n",
        b"\r\n" + OK + b"\r\n",
        OK + b"x-a: b\r\n folded: c\r\n\r\n",
        OK + b"x-a : b\r\n\r\n",
        OK + b"x-a: b\x00\r\n\r\n",
        OK + b"x-a: b\rc: d\r\n\r\n",
        OK + b": b\r\n\r\n",
        OK + b"no colon\r\n\r\n",
        OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
        OK + b"content-length: 5, 6\r\n\r\n",
        OK + b"content-length: -5\r\n\r\n",
        OK + b"content-length: +5\r\n\r\n",
        OK + b"content-length: 0x5\r\n\r\n",
        OK + b"content-length:\r\n\r\n",
        OK + b"content-length: " + b"9" * 30 + b"\r\n\r\n",
        OK + b"transfer-encoding: gzip, chunked\r\n\r\n",
        OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
        OK + b"x-a: " + b"a" * HEAD_BYTES_MAX,
        OK + b"x-a: " + b"a" * HEAD_BYTES_MAX + b"\r\n\r\n",
    ],
)
def test_what_is_no_proper_head_is_refused_without_quoting_it(data: bytes) -> None:
    with pytest.raises(MalformedHead) as caught:
        read(data)
    assert not any(part in str(caught.value).encode() for part in data.split() if len(part) > 6)


@pytest.mark.parametrize(
    ("headers", "keeps"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", True),
        (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nconnection: x, Close\r\ncontent-length: 5\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", True),
        (b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n", False),
        (b"HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n", False),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", True),
        (b"HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n", False),
    ],
)
def test_a_connection_is_kept_where_nobody_can_doubt_where_the_answer_ends(headers: bytes, keeps: bool) -> None:
    found = read(headers)
    assert found is not None
    assert found[0].keeps_alive is keeps


def test_a_request_is_written_as_h11_writes_it() -> None:
    headers = [(b"host", b"a.b"), (b"content-type", b"application/json"), (b"x-a", b""), (b"content-length", b"2")]
    theirs = h11.Connection(h11.CLIENT).send(h11.Request(method=b"POST", target=b"/v1/x?y=z", headers=headers))
    assert composed(b"POST", b"/v1/x?y=z", headers) == theirs
