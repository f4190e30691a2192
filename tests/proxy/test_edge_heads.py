from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.edge.heads import (
    BadHead,
    answer_headers,
    asks_to_close,
    has_no_body,
    http_scope,
    peer_address,
)


def scope_of(target: bytes, method: bytes = b"GET") -> dict[str, object]:
    return http_scope(
        http_version="1.1",
        method=method,
        target=target,
        headers=[],
        scheme="http",
        client=None,
        server=None,
        state={},
    )


@pytest.mark.parametrize(
    ("target", "path", "raw_path", "query"),
    [
        (b"/", "/", b"/", b""),
        (b"/a%20b?c=%20", "/a b", b"/a%20b", b"c=%20"),
        (b"/\xc3\xa4%C3%A4%ff", "ää\ufffd", b"/\xc3\xa4%C3%A4%ff", b""),
        (b"*", "*", b"*", b""),
        (b"http://host:1/p?q", "/p", b"/p", b"q"),
        (b"HTTPS://host?q/r", "/", b"/", b"q/r"),
        (b"http://host", "/", b"/", b""),
    ],
)
def test_targets_become_paths(target: bytes, path: str, raw_path: bytes, query: bytes) -> None:
    scope = scope_of(target)
    assert scope["path"] == ("/" + path if path.startswith("ä") else path)
    assert scope["raw_path"] == raw_path
    assert scope["query_string"] == query


@pytest.mark.parametrize("target", [b"", b"path", b"ftp://host/", b"/a b", b"/a\r\n", b"/\x00", b"://"])
def test_malformed_targets_are_refused(target: bytes) -> None:
    with pytest.raises(BadHead):
        scope_of(target)


@pytest.mark.parametrize("method", [b"", b"G T", b"GET\n", b"G\xc3\xa4T", b"X" * 33])
def test_malformed_methods_are_refused(method: bytes) -> None:
    with pytest.raises(BadHead):
        scope_of(b"/", method)


@given(st.binary(max_size=60))
def test_any_target_is_a_scope_or_a_bad_head(target: bytes) -> None:
    with suppress(BadHead):
        scope_of(target)


def test_the_state_is_the_requests_own_copy() -> None:
    state = {"shared": 1}
    scope = http_scope(
        http_version="2",
        method=b"get",
        target=b"/",
        headers=[],
        scheme="https",
        client=None,
        server=None,
        state=state,
    )
    scope["state"]["own"] = 2
    assert state == {"shared": 1}
    assert scope["method"] == "GET"


def test_date_and_server_are_added_where_missing_and_connection_level_headers_dropped() -> None:
    lines = dict(answer_headers([(b"X-A", b"1"), (b"Connection", b"close"), (b"transfer-encoding", b"chunked")]))
    assert lines.keys() == {b"x-a", b"date", b"server"}
    own = [(b"date", b"then"), (b"server", b"other")]
    assert answer_headers(own) == own
    assert dict(answer_headers([(b"x-a", b" \t b \t")]))[b"x-a"] == b"b"  # HTTP/2 knows no space around a value


@pytest.mark.parametrize(
    "header",
    [(b"a b", b"c"), (b"a\r\nb", b"c"), (b":status", b"200"), (b"", b"c"), (b"a", b"b\r\nc: d"), (b"a", b"\0")],
)
def test_headers_that_could_split_an_answer_are_refused(header: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError):
        answer_headers([header])


def test_small_facts() -> None:
    assert asks_to_close([(b"Connection", b"Close")])
    assert not asks_to_close([(b"connection", b"keep-alive")])
    assert has_no_body(method="HEAD", status=200)
    assert has_no_body(method="GET", status=304)
    assert not has_no_body(method="GET", status=200)
    assert peer_address(("::1", 5, 0, 0)) == ("::1", 5)
    assert peer_address("") is None
