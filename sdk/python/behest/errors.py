"""The errors that a caller sees, before a stream and in the middle of it."""

import json
from collections.abc import Mapping
from typing import Any, cast

__all__ = [
    "BehestAuthError",
    "BehestBadRequestError",
    "BehestConfigError",
    "BehestConflictError",
    "BehestConnectionError",
    "BehestError",
    "BehestForbiddenError",
    "BehestNotFoundError",
    "BehestQuotaError",
    "BehestRateLimitError",
    "BehestServerError",
    "answer_error",
    "event_error",
]

TEXT_SHOWN_MAX = 500
"""Characters of an answer without an envelope that go into the message."""


class BehestError(Exception):
    """The base of all errors of this package."""

    # Every argument but the message has a default, so that errors can be pickled, as task queues do.
    def __init__(
        self,
        message: str = "",
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        trace_id: str | None = None,
        request_id: str | None = None,
        retry_after: int | None = None,
        may_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        """The HTTP status; in the middle of a stream the one that the answer would have had. None: there was none."""
        self.code = code
        """What went wrong, for programs: `quota_exceeded`, `rate_limited` ... (docs/errors.md of the gateway)."""
        self.param = param
        """The member of the request that is at fault."""
        self.details: dict[str, Any] = dict(details or {})
        """With a 402: `budget, scope, unit, limit, spent, held, remaining, resets_at`."""
        self.trace_id = trace_id
        self.request_id = request_id
        """The id of the request in the gateway's books."""
        self.retry_after = retry_after
        """Whole seconds after which the gateway wants to be asked again; None: it did not say."""
        self.may_retry = may_retry
        """False: the gateway says that a retry will not help; None: it did not say."""
        self.partial_text = ""
        """What a stream had said before this error (its first choice)."""

    def __str__(self) -> str:
        told = [f"{name} {value}" for name, value in (("status", self.status), ("trace", self.trace_id)) if value]
        return f"{self.message} ({', '.join(told)})" if told else self.message


class BehestConfigError(BehestError):
    """The client itself is set up wrongly: no key, one of no known form, or no place for it."""


class BehestBadRequestError(BehestError):
    """400 and its like: the request cannot be served as it is; `param` may name the member."""


class BehestAuthError(BehestError):
    """401: the token or the key is not believed."""


class BehestForbiddenError(BehestAuthError):
    """403: whoever this is may not do that, or is suspended (`details["reason"]`)."""


class BehestQuotaError(BehestError):
    """402: a budget cannot pay; `details` names it and says when it begins anew."""


class BehestNotFoundError(BehestError):
    """404: there is no such thread, or nothing at this address."""


class BehestConflictError(BehestError):
    """409: the request contradicts one that is known already, or a reply cannot be continued."""


class BehestRateLimitError(BehestError):
    """429: too many requests for now; `retry_after` says for how many seconds."""


class BehestServerError(BehestError):
    """5xx: the gateway or the provider behind it failed."""


class BehestConnectionError(BehestServerError):
    """The network failed, or a stream was cut; `status` is None."""

    def __init__(
        self,
        message: str = "",
        *,
        code: str = "network_error",
        trace_id: str | None = None,
        request_id: str | None = None,
        request_sent: bool = True,
    ) -> None:
        super().__init__(message, code=code, trace_id=trace_id, request_id=request_id)
        self.request_sent = request_sent
        """Whether the gateway may have seen the request."""


_CLASSES: dict[int, type[BehestError]] = {
    401: BehestAuthError,
    402: BehestQuotaError,
    403: BehestForbiddenError,
    404: BehestNotFoundError,
    409: BehestConflictError,
    429: BehestRateLimitError,
}


def _class_of(status: int) -> type[BehestError]:
    if status >= 500:
        return BehestServerError
    if status >= 400:
        return _CLASSES.get(status, BehestBadRequestError)
    return BehestError


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _error_of(members: Mapping[str, Any], status: int, headers: Mapping[str, str], fallback: str) -> BehestError:
    retry_after = headers.get("retry-after", "")
    details = members.get("details")
    return _class_of(status)(
        _text(members.get("message")) or fallback,
        status=status,
        code=_text(members.get("code")),
        param=_text(members.get("param")),
        details=cast("dict[str, Any]", details) if isinstance(details, dict) else None,
        trace_id=headers.get("x-trace-id"),
        request_id=headers.get("x-request-id"),
        # RFC 9110 allows a date, too; the gateway writes seconds. Nine digits: a proxy may write anything.
        retry_after=int(retry_after) if retry_after.isdecimal() and len(retry_after) < 10 else None,
        may_retry={"true": True, "false": False}.get(headers.get("x-should-retry", "")),
    )


def answer_error(status: int, headers: Mapping[str, str], body: bytes) -> BehestError:
    """The error that an answer is: of the gateway's envelope, or of whatever a proxy in between has sent.

    `headers` must find its names in lower case.
    """
    members: Mapping[str, Any] = {}
    try:
        envelope: object = json.loads(body)
    except (ValueError, RecursionError):
        envelope = None
    if isinstance(envelope, dict):
        error = cast("dict[str, Any]", envelope).get("error")
        if isinstance(error, dict):
            members = cast("dict[str, Any]", error)
    text = body[: TEXT_SHOWN_MAX * 4].decode("utf-8", "replace").strip()[:TEXT_SHOWN_MAX]
    return _error_of(members, status, headers, f"HTTP {status}: {text}" if text else f"HTTP {status}")


def event_error(members: Mapping[str, Any], headers: Mapping[str, str]) -> BehestError:
    """The error of a stream's terminal event. `headers` are those of the answer that it ends."""
    status = members.get("status")
    known = isinstance(status, int) and not isinstance(status, bool) and 400 <= status <= 599
    traced = {name: headers[name] for name in ("x-trace-id", "x-request-id") if name in headers}
    return _error_of(members, cast("int", status) if known else 500, traced, "the stream ended with an error")
