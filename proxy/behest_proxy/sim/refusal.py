"""Errors in OpenAI's envelope, as the simulated provider shows them."""

from typing import Any, NamedTuple

import msgspec


class _Kind(NamedTuple):
    type: str
    code: str | None


_KINDS = {
    400: _Kind("invalid_request_error", None),
    401: _Kind("invalid_request_error", "invalid_api_key"),
    403: _Kind("invalid_request_error", "permission_denied"),
    404: _Kind("invalid_request_error", "not_found"),
    405: _Kind("invalid_request_error", "method_not_allowed"),
    413: _Kind("invalid_request_error", "request_too_large"),
    429: _Kind("rate_limit_error", "rate_limit_exceeded"),
}


class Refusal(Exception):
    """A request that the simulator answers with an error; `param` names the member at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param


def error_members(status: int, message: str, *, param: str | None = None) -> dict[str, Any]:
    """The members of `error` as OpenAI writes them for this status."""
    kind = _KINDS.get(status) or _Kind("server_error" if status >= 500 else "invalid_request_error", None)
    return {"message": message, "type": kind.type, "param": param, "code": kind.code}


def error_envelope(status: int, message: str, *, param: str | None = None) -> bytes:
    """The JSON body of an error answer."""
    return msgspec.json.encode({"error": error_members(status, message, param=param)})
