"""ASGI messages: a whole body in, a whole answer out."""

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from behest_proxy.errors import InvalidRequest, RequestTooLarge, ShownError

JSON = (b"content-type", b"application/json")


def json_response(content: Any) -> Response:
    """A whole answer in JSON."""
    return Response(msgspec.json.encode(content), media_type="application/json")


def exact_number(text: str) -> msgspec.Raw:
    """A decimal as a JSON number with every digit: a float would round it."""
    return msgspec.Raw(text.encode())


class ClientLeftError(Exception):
    """The client went away before its request was whole."""


async def read_body(receive: Any, headers: Sequence[tuple[bytes, bytes]], *, bytes_max: int) -> bytes:
    """The request's body.

    Raises `RequestTooLarge` as soon as that is known, and `ClientLeftError`.
    """
    for name, value in headers:
        if name == b"content-length" and (not value.isdigit() or int(value) > bytes_max):
            raise _too_large(bytes_max)
        if name == b"content-encoding" and value.lower() != b"identity":
            raise InvalidRequest("a compressed body is not supported: send it as it is", param="content-encoding")
    body = bytearray()  # not a list of pieces: a client may send them of one byte each
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        part: bytes = message.get("body", b"")
        last = not message.get("more_body", False)
        if len(body) + len(part) > bytes_max:
            raise _too_large(bytes_max)
        if last and not body:
            return part
        body += part
        if last:
            return bytes(body)


async def send_answer(send: Any, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Send a whole answer."""
    length = [(b"content-length", b"%d" % len(body))] if status != 204 else []
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Any, error: ShownError) -> None:
    """Send an error's envelope."""
    await send_answer(send, error.status, error.envelope(), [JSON, *error.headers()])


def _too_large(bytes_max: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is larger than {bytes_max} bytes")
