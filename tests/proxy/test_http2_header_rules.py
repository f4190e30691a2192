"""The rules for headers over HTTP/2: each by its example, and all of them held against those of `h2`."""

from collections.abc import Callable, Sequence

import pytest
from h2.exceptions import ProtocolError
from h2.utilities import HeaderValidationFlags, validate_headers
from hypothesis import example, given
from hypothesis import strategies as st

from behest_proxy.http2.header_rules import check_answer, check_request, check_trailers

Lines = list[tuple[bytes, bytes]]

METHOD, SCHEME, PATH, AUTHORITY = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/"),
    (b":authority", b"a.b"),
)
WHOLE: Lines = [METHOD, SCHEME, PATH, AUTHORITY]
CONNECT = (b":method", b"CONNECT")

KNOWN_NAMES = (
    b":method :scheme :path :authority :protocol :status :x host te connection proxy-connection keep-alive"
    b" transfer-encoding upgrade x-a X-A a:b \x7f"
)
NAMES = st.sampled_from([b"", b"a b", *KNOWN_NAMES.split()]) | st.binary(max_size=6)
VALUES = st.sampled_from(
    [
        b"",
        b"/",
        b"a.b",
        b"CONNECT",
        b"POST",
        b"trailers",
        b"Trailers",
        b"gzip",
        b" a",
        b"a\t",
        b"a b",
        b" ",
        b"a\nb",
        b"\0",
    ]
) | st.binary(max_size=6)
LINES = st.lists(st.tuples(NAMES, VALUES), max_size=4)
BEGINNINGS = st.sampled_from(
    [[], WHOLE, [CONNECT, AUTHORITY], [CONNECT, (b":protocol", b"x"), SCHEME, PATH, AUTHORITY]]
)


def is_refused(check: Callable[[Lines], object], lines: Lines) -> bool:
    try:
        check(lines)
    except ProtocolError:
        return True
    return False


def by_h2(lines: Lines, *, is_trailer: bool = False, is_answer: bool = False) -> None:
    flags = HeaderValidationFlags(
        is_client=is_answer, is_trailer=is_trailer, is_response_header=is_answer, is_push_promise=False
    )
    list(validate_headers(lines, flags))


@given(beginning=BEGINNINGS, more=LINES)
@example(WHOLE, [(b"host", b"a.b"), (b"host", b"a.b")])
@example(WHOLE, [(b"host", b"other")])
@example(WHOLE, [(b"x-a", b"\xc3\xa9")])
@example([CONNECT], [SCHEME, PATH, AUTHORITY])
def test_a_request_is_refused_where_h2_would_refuse_it(beginning: Lines, more: Lines) -> None:
    lines = [*beginning, *more]
    assert is_refused(check_request, lines) == is_refused(by_h2, lines)


@given(beginning=st.sampled_from([[], [(b":status", b"200")]]), more=LINES)
@example([(b":status", b"200")], [(b":status", b"200")])
def test_an_answer_is_refused_where_h2_would_refuse_it(beginning: Lines, more: Lines) -> None:
    lines = [*beginning, *more]
    assert is_refused(check_answer, lines) == is_refused(lambda said: by_h2(said, is_answer=True), lines)


@given(lines=LINES)
def test_trailers_are_refused_where_h2_would_refuse_them(lines: Lines) -> None:
    assert is_refused(check_trailers, lines) == is_refused(lambda said: by_h2(said, is_trailer=True), lines)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        WHOLE[1:],
        [METHOD, PATH, AUTHORITY],
        [METHOD, SCHEME, AUTHORITY],
        [METHOD, SCHEME, (b":path", b""), AUTHORITY],
        [METHOD, SCHEME, PATH],
        [*WHOLE, METHOD],
        [*WHOLE, (b":status", b"200")],
        [*WHOLE, (b":protocol", b"websocket")],
        [METHOD, SCHEME, (b"x-a", b"1"), PATH, AUTHORITY],
        [*WHOLE, (b"host", b"other")],
        [METHOD, SCHEME, PATH, (b"host", b"a.b"), (b"host", b"a.b")],
        [*WHOLE, (b"Content-Type", b"text/plain")],
        [*WHOLE, (b"", b"x")],
        [*WHOLE, (b"x-a", b"1\r\nx-b: 2")],
        [*WHOLE, (b"x-a", b"1 ")],
        [*WHOLE, (b"transfer-encoding", b"chunked")],
        [*WHOLE, (b"te", b"gzip")],
        [METHOD, SCHEME, (b":path", b"/a\0b"), AUTHORITY],
    ],
)
def test_a_malformed_request_is_refused_without_quoting_it(lines: Lines) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_request(lines)
    assert not any(value.decode("latin-1") in str(caught.value) for _, value in lines if len(value) > 4)


@pytest.mark.parametrize(
    "more", [[], [(b"host", b"a.b")], [(b"te", b"trailers")], [(b"x-a", b"")], [(b"x-a", b"a, \t b")]]
)
def test_a_whole_request_is_taken(more: Lines) -> None:
    check_request([*WHOLE, *more])
    check_request([METHOD, SCHEME, PATH, (b"host", b"a.b"), *[line for line in more if line[0] != b"host"]])


@pytest.mark.parametrize("lines", [[METHOD], [(b"X-A", b"1")], [(b"x-a", b"\n")], [(b"connection", b"close")]])
def test_trailers_have_no_pseudo_headers_and_are_headers_otherwise(lines: Sequence[tuple[bytes, bytes]]) -> None:
    with pytest.raises(ProtocolError):
        check_trailers(lines)
    check_trailers([(b"x-checksum", b"abc")])


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [(b"x-a", b"1")],
        [(b"x-a", b"1"), (b":status", b"200")],
        [(b":status", b"200"), (b":status", b"200")],
        [(b":status", b"200"), (b":path", b"/")],
        [(b":status", b"200"), (b"x-a", b"1\n2")],
        [(b":status", b"200"), (b"X-A", b"1")],
        [(b":status", b"200"), (b"connection", b"close")],
    ],
)
def test_a_malformed_answer_is_refused(lines: Lines) -> None:
    with pytest.raises(ProtocolError):
        check_answer(lines)
    check_answer([(b":status", b"200"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")])
