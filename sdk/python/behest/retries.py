"""When a call is made again, and after how long. Pure."""

from behest.errors import BehestConnectionError, BehestError, BehestRateLimitError, BehestServerError

__all__ = ["BACKOFF_S", "Retries"]

BACKOFF_S = (0.5, 1.0, 2.0)
RETRIES_DEFAULT = len(BACKOFF_S)
IN_PROGRESS = "in_progress"
"""The code of the 409 that says: another sidecar still carries out the call of this key."""
WAIT_MAX_S = 30.0
"""Nobody is kept waiting for longer: a limit per day can say hours."""


class Retries:
    """How often one call has failed since it last got anywhere."""

    def __init__(self, most: int = RETRIES_DEFAULT) -> None:
        self._most = most
        self._failed = 0

    def progressed(self) -> None:
        """Something new has come: what fails from now on fails for the first time."""
        self._failed = 0

    def wait_s(self, failure: BehestError, *, is_safe: bool) -> float | None:
        """How long to wait before the call is repeated; None: it is not.

        `is_safe`: repeating cannot be charged or say anything twice, even if the first call has been carried out.
        """
        if self._failed >= self._most or failure.may_retry is False:
            return None
        wait_s = _wait_s(failure, self._failed, is_safe=is_safe)
        if wait_s is None or wait_s > WAIT_MAX_S:
            return None
        self._failed += 1
        return wait_s


def _wait_s(failure: BehestError, failed: int, *, is_safe: bool) -> float | None:
    backoff_s = BACKOFF_S[min(failed, len(BACKOFF_S) - 1)]
    if isinstance(failure, BehestRateLimitError):
        # Without a time it is not known when asking again would help.
        return None if failure.retry_after is None else float(failure.retry_after)
    if isinstance(failure, BehestConnectionError):
        return backoff_s if is_safe or not failure.request_sent else None
    if failure.code == IN_PROGRESS:
        return max(backoff_s, float(failure.retry_after or 0))
    if isinstance(failure, BehestServerError):
        return max(backoff_s, float(failure.retry_after or 0)) if is_safe else None
    return None
