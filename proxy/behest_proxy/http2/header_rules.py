"""What the header block of a request, an answer or trailers may hold over HTTP/2 (RFC 9113, 8.2 and 8.3).

`h2` has these rules too, and looks at each byte of each value in a loop of its own: a token of 700 bytes takes it
50 µs. What these refuse is what it refuses.
"""

import re
from collections.abc import Iterable

from h2.exceptions import ProtocolError
from hpack.struct import Header

_NAME = re.compile(rb"[!-9;-@\[-~]+")
"""Visible ASCII, without upper case and colons (8.2.1)."""
_VALUE = re.compile(rb"(?:[^\0\n\r\t ](?:[^\0\n\r]*[^\0\n\r\t ])?)?")
_OF_A_REQUEST = frozenset({b":method", b":scheme", b":path", b":authority", b":protocol"})
_OF_A_CONNECTION = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})


def check_request(headers: Iterable[Header]) -> None:
    """Raises `ProtocolError`, without the offending value."""
    controls: dict[bytes, bytes] = {}
    host: bytes | None = None
    is_behind = False
    for name, value in headers:
        if name[:1] == b":":
            if name not in _OF_A_REQUEST or name in controls or is_behind:
                raise ProtocolError("a pseudo-header that is unknown, repeated or behind a header")
            if not _VALUE.fullmatch(value):
                raise ProtocolError("a malformed value of a pseudo-header")
            controls[name] = value
            continue
        is_behind = True
        _check_line(name, value)
        if name == b"host":
            if host is not None:
                raise ProtocolError("more than one host")
            host = value
    _check_controls(controls)
    authority = controls.get(b":authority")
    if host is None and authority is None:
        raise ProtocolError("neither :authority nor host")
    if host is not None and authority is not None and host != authority:
        raise ProtocolError(":authority and host differ")


def check_answer(headers: Iterable[Header]) -> None:
    """Raises `ProtocolError`, without the offending value. Before all headers, `:status` and nothing else (8.3.2)."""
    has_status = is_behind = False
    for name, value in headers:
        if name[:1] != b":":
            is_behind = True
            _check_line(name, value)
            continue
        if name != b":status" or has_status or is_behind or not _VALUE.fullmatch(value):
            raise ProtocolError("a pseudo-header that is none of an answer's, repeated or behind a header")
        has_status = True
    if not has_status:
        raise ProtocolError("no :status")


def check_trailers(headers: Iterable[Header]) -> None:
    """Raises `ProtocolError`, without the offending value. Pseudo-headers have no place here (8.1)."""
    for name, value in headers:
        _check_line(name, value)


def _check_line(name: bytes, value: bytes) -> None:
    if not _NAME.fullmatch(name):
        raise ProtocolError("a malformed name of a header")
    if not _VALUE.fullmatch(value):
        raise ProtocolError("a malformed value of a header")
    if name in _OF_A_CONNECTION or (name == b"te" and value.lower() != b"trailers"):
        raise ProtocolError("a header that belongs to a connection")


def _check_controls(controls: dict[bytes, bytes]) -> None:
    """8.3.1; 8.5 and RFC 8441, 4 for CONNECT."""
    method = controls.get(b":method")
    if method is None:
        raise ProtocolError("no :method")
    if method == b"CONNECT" and b":protocol" not in controls:
        if b":scheme" in controls or b":path" in controls:
            raise ProtocolError("CONNECT has neither :scheme nor :path")
        return
    if method != b"CONNECT" and b":protocol" in controls:
        raise ProtocolError(":protocol is for CONNECT")
    if b":scheme" not in controls or not controls.get(b":path"):
        raise ProtocolError("no :scheme, or no :path")
