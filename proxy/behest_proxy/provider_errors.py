"""A provider's refusals and failures, mapped to what the caller may see.

The caller's fault goes on as it came; a fault of our credentials is ours, not the caller's; everything else is the
provider's. Nothing of it is charged.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from behest_proxy.error_codes import ErrorCode
from behest_proxy.errors import RateLimited, ServerError, ShownError, UpstreamError, UpstreamTimeout

ERROR_BODY_BYTES_MAX = 64 * 1024
RETRY_AFTER_S_MAX = 3600
_RETRY_AFTER_DIGITS_MAX = 9
_MESSAGE_CHARS_MAX = 500
_EVENT_STREAM = (b"text/event-stream", "event stream")
_JSON = (b"application/json", "JSON")
_TIMEOUTS = ("connect_timeout", "first_byte_timeout", "idle_timeout")


class UpstreamRateLimited(RateLimited):
    """The provider's own rate limit, not one of ours."""

    code = ErrorCode.UPSTREAM_RATE_LIMITED


class ProviderRefused(ServerError):
    """The provider refused our credentials or is broken; the caller can do nothing about it but come again."""

    status = 502
    may_retry = True


class PassedThrough(msgspec.Struct, frozen=True):
    """The provider's own answer, for the caller."""

    status: int
    body: bytes


def unreadable(headers: Sequence[tuple[bytes, bytes]], *, streams: bool) -> ProviderRefused | None:
    """Why a successful answer with this head cannot be read; None: it can. What has no content type is believed."""
    told = dict(headers)
    wanted, called = _EVENT_STREAM if streams else _JSON
    if not told.get(b"content-type", wanted).lower().startswith(wanted):
        return ProviderRefused(f"the provider's answer is no {called}")
    if told.get(b"content-encoding", b"").strip().lower() not in (b"", b"identity"):
        return ProviderRefused("the provider's answer is compressed, though it was asked not to be")
    return None


def refused(status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> ShownError | PassedThrough:
    """What becomes of an answer other than 2xx."""
    if status == 429:
        return UpstreamRateLimited(
            f"the provider's rate limit is reached: {_message(body)}", retry_after_s=_retry_after_s(headers)
        )
    if status in (401, 403):
        return ProviderRefused("the provider refused the credentials of this gateway")
    if 400 <= status < 500 and status != 407:
        if _is_envelope(body):
            return PassedThrough(status, body)
        return PassedThrough(
            status,
            msgspec.json.encode(
                {
                    "error": {
                        "code": ErrorCode.UPSTREAM_REFUSED,
                        "message": f"the provider refused the request: {_message(body)}",
                        "type": "invalid_request_error",
                        "param": None,
                    }
                }
            ),
        )
    return ProviderRefused(f"the provider answered with status {status}")


def failed(kind: str, *, in_stream: bool) -> ShownError:
    """What becomes of a call that broke; `kind` is the upstream client's word for how."""
    if kind in _TIMEOUTS:
        return UpstreamTimeout("the provider did not answer in time")
    if in_stream:
        return UpstreamError("the provider broke off in the middle of its answer")
    return ProviderRefused("the provider could not be reached or broke off before its answer")


def reported(error: Any) -> ShownError:
    """What becomes of an error that the provider put into its stream."""
    members = error if isinstance(error, dict) else {"message": str(error)}
    details = {
        # Half surrogates, which escapes can carry, cannot be written again.
        key: str(members[key])[:_MESSAGE_CHARS_MAX].encode("utf-8", "replace").decode()
        for key in ("code", "type", "message")
        if members.get(key) is not None
    }
    return UpstreamError("the provider reported an error in the middle of its answer", details={"upstream": details})


def _is_envelope(body: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(body, type=dict[str, Any]).get("error"), dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _message(body: bytes) -> str:
    try:
        error = msgspec.json.decode(body, type=dict[str, Any]).get("error")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "it gave no reason"
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:_MESSAGE_CHARS_MAX] if message else "it gave no reason"


def _retry_after_s(headers: Sequence[tuple[bytes, bytes]]) -> int:
    for name, value in headers:
        if name == b"retry-after" and value.isdigit():
            return min(int(value[:_RETRY_AFTER_DIGITS_MAX]), RETRY_AFTER_S_MAX)
    return 1


def broken() -> ShownError:
    """What comes is no stream of chunks."""
    return UpstreamError("the provider's stream is broken")
