"""The errors that a caller may see: one envelope on every route, split by whose fault it is.

Only a `ShownError` reaches a client; everything else is mapped at the border (`app`) to `server_error`
without its text. The codes are those of `error_codes`, of which docs/errors.md is made.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from behest_proxy.error_codes import ErrorCode


class ShownError(Exception):
    """An error whose message is meant for the caller."""

    status: ClassVar[int] = 500
    code: ClassVar[ErrorCode] = ErrorCode.SERVER_ERROR
    type: ClassVar[str] = "server_error"
    may_retry: bool = False
    """False sends `x-should-retry: false`: the OpenAI SDKs otherwise retry 409, 429 and 5xx twice."""

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode | None = None,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        retry_after_s: int | None = None,
        may_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.shown_code = code or self.code
        self.param = param
        self.details = dict(details) if details else None
        self.retry_after_s = retry_after_s
        if may_retry is not None:
            self.may_retry = may_retry

    def members(self) -> dict[str, Any]:
        """The members of the envelope's `error` object; `type` and `param` are there because OpenAI SDKs read them."""
        members: dict[str, Any] = {
            "code": self.shown_code,
            "message": self.message,
            "type": self.type,
            "param": self.param,
        }
        if self.details is not None:
            members["details"] = self.details
        return members

    def envelope(self) -> bytes:
        """The JSON body of an error answer."""
        return msgspec.json.encode({"error": self.members()})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that belong to this error: `retry-after` in whole seconds, `x-should-retry`."""
        headers: list[tuple[bytes, bytes]] = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, self.retry_after_s)))
        if not self.may_retry:
            headers.append((b"x-should-retry", b"false"))
        return headers

    def terminal_event(self) -> bytes:
        """The last event of a stream that was cut, with `[DONE]` behind it.

        `choices` keeps clients alive that index into every chunk; `status` is what the answer's status would
        have been.
        """
        members = self.members()
        members["status"] = self.status
        return b'data: {"error":' + msgspec.json.encode(members) + b',"choices":[]}\n\ndata: [DONE]\n\n'


class InvalidRequest(ShownError):
    """The caller's request is malformed; `param` names the member."""

    status = 400
    code = ErrorCode.VALIDATION_ERROR
    type = "invalid_request_error"


class RequestTooLarge(ShownError):
    """The body is over the limit."""

    status = 413
    code = ErrorCode.REQUEST_TOO_LARGE
    type = "invalid_request_error"


class InvalidToken(ShownError):
    """Missing, expired, forged or unknown credentials."""

    status = 401
    code = ErrorCode.INVALID_TOKEN
    type = "authentication_error"


class QuotaExceeded(ShownError):
    """A budget cannot pay. `details` name the budget and its balances."""

    status = 402
    code = ErrorCode.QUOTA_EXCEEDED
    type = "insufficient_quota"


class Forbidden(ShownError):
    """Wrong tenant, project, session or role, or something is suspended."""

    status = 403
    code = ErrorCode.FORBIDDEN
    type = "permission_error"


class NotFound(ShownError):
    """No such route or thing."""

    status = 404
    code = ErrorCode.NOT_FOUND
    type = "invalid_request_error"


class MethodNotAllowed(ShownError):
    """The route exists, the method does not."""

    status = 405
    code = ErrorCode.METHOD_NOT_ALLOWED
    type = "invalid_request_error"


class Conflict(ShownError):
    """The request contradicts one that is known already."""

    status = 409
    code = ErrorCode.CONFLICT
    type = "invalid_request_error"


class RateLimited(ShownError):
    """A rate, not a budget, is used up for now."""

    status = 429
    code = ErrorCode.RATE_LIMITED
    type = "rate_limit_error"
    may_retry = True


class ServerError(ShownError):
    """Our own fault; the text says no more than that."""

    status = 500
    code = ErrorCode.SERVER_ERROR
    type = "server_error"


def our_bug() -> ServerError:
    """What is shown of an exception that nobody expected: the log has the rest, under the request's id."""
    return ServerError("something went wrong here; the request id tells us what")


class UpstreamError(ShownError):
    """The provider refused, broke, or answered what is no answer."""

    status = 502
    code = ErrorCode.UPSTREAM_ERROR
    type = "server_error"
    may_retry = True


class UpstreamTimeout(ShownError):
    """The provider was too slow to answer."""

    status = 504
    code = ErrorCode.UPSTREAM_TIMEOUT
    type = "server_error"
    may_retry = True


class LedgerUnavailable(ShownError):
    """No ledger, no spend: the books cannot be reached, so nothing is sent."""

    status = 503
    code = ErrorCode.LEDGER_UNAVAILABLE
    type = "server_error"
    may_retry = True


class Draining(ShownError):
    """This process is going away; another one will serve the retry."""

    status = 503
    code = ErrorCode.DRAINING
    type = "server_error"
    may_retry = True
