"""What reaches a wire is clean, and what cannot be made clean is refused before it."""

import pytest

from behest_proxy.upstream import UpstreamRequest
from behest_proxy.upstream.prepared import Origin, prepare


def a(url: str = "https://api.example/v1", **fields: object) -> UpstreamRequest:
    arguments: dict[str, object] = {"method": "POST", "url": url, "headers": [], **fields}
    return UpstreamRequest(**arguments)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("url", "origin", "authority", "target"),
    [
        ("https://API.Example/v1?a=b#c", Origin("https", "api.example", 443), "api.example", b"/v1?a=b"),
        ("http://h:8080", Origin("http", "h", 8080), "h:8080", b"/"),
        ("http://h:80/x", Origin("http", "h", 80), "h", b"/x"),
        ("https://[::1]:8443/x", Origin("https", "::1", 8443), "[::1]:8443", b"/x"),
        ("http://h?q", Origin("http", "h", 80), "h", b"/?q"),
    ],
)
def test_a_url_is_an_origin_and_a_target(url: str, origin: Origin, authority: str, target: bytes) -> None:
    prepared = prepare(a(url))
    assert prepared.origin == origin
    assert prepared.origin.authority == authority
    assert prepared.target == target


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/",
        "/relative",
        "https:///x",
        "https://user:secret@h/",
        "http://h/a b",
        "http://h/\r\nx",
        "http://h/é",
        "http://h:99999/",
    ],
)
def test_a_url_that_must_not_reach_a_wire_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        prepare(a(url))


@pytest.mark.parametrize("value", [b"a\r\nx: y", b"a\nb", b"a\rb", b"a\x00b", b"\x7f"])
def test_a_value_with_a_line_break_is_refused_without_being_quoted(value: bytes) -> None:
    with pytest.raises(ValueError) as refused:
        prepare(a(headers=[(b"authorization", b"secret" + value)]))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", [b"", b"a b", b":authority", b"a\r\n", b"a:", "é".encode()])
def test_a_name_that_is_no_token_is_refused(name: bytes) -> None:
    with pytest.raises(ValueError):
        prepare(a(headers=[(name, b"x")]))


@pytest.mark.parametrize("method", ["", "PO ST", "GET\r\n", "CONNECT", "HEAD", "PÖST"])
def test_a_method_that_is_none_is_refused(method: str) -> None:
    with pytest.raises(ValueError):
        prepare(a(method=method))


def test_hop_by_hop_headers_and_what_the_client_decides_are_never_sent() -> None:
    headers = [
        (b"Host", b"elsewhere"),
        (b"Content-Length", b"999"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Connection", b"keep-alive, X-Private"),
        (b"Keep-Alive", b"5"),
        (b"X-Private", b"1"),
        (b"TE", b"trailers"),
        (b"Upgrade", b"h2c"),
        (b"Proxy-Authorization", b"secret"),
        (b"Expect", b"100-continue"),
        (b"X-Kept", b"  yes\t"),
    ]
    prepared = prepare(a(headers=headers, body=b"abc"))
    assert prepared.headers == [(b"x-kept", b"yes"), (b"content-length", b"3")]


def test_a_get_has_no_length_and_an_empty_post_has() -> None:
    assert prepare(a(method="GET")).headers == []
    assert prepare(a()).headers == [(b"content-length", b"0")]


def test_plain_http_is_http1_unless_told_otherwise() -> None:
    assert prepare(a("http://h/")).protocol == "http1"
    assert prepare(a("http://h/", protocol="http2")).protocol == "http2"
    assert prepare(a("https://h/")).protocol == "auto"


def test_no_repr_shows_a_header_or_a_body() -> None:
    request = a(headers=[(b"authorization", b"secret")], body=b"prompt")
    for shown in (repr(request), repr(prepare(request))):
        assert "secret" not in shown
        assert "prompt" not in shown
