"""Every code that an error of ours may have, and what docs/errors.md says of it: that page's table is made of this.

A code is a promise to programs: one that is here stays, and none is sent that is not here (the type of
`ShownError.code` holds that).
"""

from enum import StrEnum

import msgspec


class ErrorCode(StrEnum):
    """What an error is, for programs."""

    VALIDATION_ERROR = "validation_error"
    UNPRICED_MODEL = "unpriced_model"
    NO_PROVIDER_KEY = "no_provider_key"
    INVALID_TOKEN = "invalid_token"  # noqa: S105 - a code, no secret
    QUOTA_EXCEEDED = "quota_exceeded"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    CONFLICT = "conflict"
    IN_PROGRESS = "in_progress"
    CANNOT_CONTINUE = "cannot_continue"
    REQUEST_TOO_LARGE = "request_too_large"
    RATE_LIMITED = "rate_limited"
    UPSTREAM_RATE_LIMITED = "upstream_rate_limited"
    SERVER_ERROR = "server_error"
    UPSTREAM_ERROR = "upstream_error"
    DRAINING = "draining"
    LEDGER_UNAVAILABLE = "ledger_unavailable"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    UPSTREAM_REFUSED = "upstream_refused"


class Shown(msgspec.Struct, frozen=True):
    """One row of the page, in Markdown."""

    status: int
    code: ErrorCode
    happened: str
    remedy: str = ""


TABLE = (
    Shown(
        400,
        ErrorCode.VALIDATION_ERROR,
        "the request is malformed; `param` names the member",
        "mend that member",
    ),
    Shown(
        400,
        ErrorCode.UNPRICED_MODEL,
        "the model, or what was asked of it (`param`: `service_tier`, `speed`, images in `messages`), has no price"
        " here",
        "price it on its Upstream, or say `free: true`; `behest prices show MODEL`",
    ),
    Shown(
        400,
        ErrorCode.NO_PROVIDER_KEY,
        "the model's Upstream is called with the project's own key, and the project has none",
        "`behest provider-keys set`",
    ),
    Shown(
        401,
        ErrorCode.INVALID_TOKEN,
        "missing, expired, forged or unknown; or an API key where a token belongs",
        "mint a token",
    ),
    Shown(
        402,
        ErrorCode.QUOTA_EXCEEDED,
        "a budget cannot pay; `details` has `budget, scope, unit, limit, spent, held, remaining, resets_at`",
        "wait for `resets_at`, or raise the limit",
    ),
    Shown(
        403,
        ErrorCode.FORBIDDEN,
        "wrong tenant or project, another session than the token's, something suspended (`details.reason`)",
        "use a token for it",
    ),
    Shown(
        404,
        ErrorCode.NOT_FOUND,
        "no such route or thing",
        "",
    ),
    Shown(
        405,
        ErrorCode.METHOD_NOT_ALLOWED,
        "the route exists, the method does not",
        "",
    ),
    Shown(
        409,
        ErrorCode.CONFLICT,
        "the `Idempotency-Key` was used for another request; in a stream: another call has taken its reply over",
        "a new key",
    ),
    Shown(
        409,
        ErrorCode.IN_PROGRESS,
        "the request of this `Idempotency-Key` is under way in another sidecar",
        "wait `Retry-After`",
    ),
    Shown(
        409,
        ErrorCode.CANNOT_CONTINUE,
        "a broken reply cannot go on as it is asked ([threads.md](threads.md)); `details.last_event_id` where that"
        " would be possible",
        "ask so, or begin a new turn",
    ),
    Shown(
        413,
        ErrorCode.REQUEST_TOO_LARGE,
        "the body is over the limit",
        "send less",
    ),
    Shown(
        429,
        ErrorCode.RATE_LIMITED,
        "a tier's rate is used up, or as many requests as it allows run at once (`unit` is `concurrency`)",
        "wait `Retry-After`, or for a request of one's own to end",
    ),
    Shown(
        429,
        ErrorCode.UPSTREAM_RATE_LIMITED,
        "the provider's own rate limit",
        "wait `Retry-After`",
    ),
    Shown(
        500,
        ErrorCode.SERVER_ERROR,
        "our fault; the log has the request id",
        "tell us",
    ),
    Shown(
        502,
        ErrorCode.SERVER_ERROR,
        "the provider refused our key, was unreachable, or broke off before its answer",
        "come again",
    ),
    Shown(
        502,
        ErrorCode.UPSTREAM_ERROR,
        "the provider broke off in the middle of its answer",
        "come again",
    ),
    Shown(
        503,
        ErrorCode.DRAINING,
        "this process is going away",
        "come again",
    ),
    Shown(
        503,
        ErrorCode.LEDGER_UNAVAILABLE,
        "the books cannot be reached: no ledger, no spend",
        "come again",
    ),
    Shown(
        504,
        ErrorCode.UPSTREAM_TIMEOUT,
        "the provider was too slow",
        "come again",
    ),
)
"""By status."""

_HEAD = ("| status | code | what happened | what to do |", "|---|---|---|---|")


def with_table(page: str) -> str:
    """The page with its table made anew. Raises `ValueError` where it has none."""
    lines = page.splitlines()
    begin = lines.index(_HEAD[0])
    end = next((at for at, line in enumerate(lines) if at > begin and not line.startswith("|")), len(lines))
    rows = (f"| {row.status} | `{row.code}` | {row.happened} | {row.remedy} |" for row in TABLE)
    return "\n".join([*lines[:begin], *_HEAD, *(row.replace("|  |", "| |") for row in rows), *lines[end:]]) + "\n"
