"""Telling of an outage: once when it begins, now and then while it lasts, and once when it is over.

Who asks the ledger twice a second would otherwise write as many lines, and what matters would be lost among them.
"""

import logging
import time
from collections.abc import Callable

REMIND_S = 30.0


class Outage:
    """What one asker says of the ledger's silence."""

    def __init__(self, logger: logging.Logger, what: str, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        """`what` cannot be done meanwhile: "the configuration cannot be read, the last one serves"."""
        self._logger = logger
        self._what = what
        self._clock_s = clock_s
        self._since_s: float | None = None
        self._told_s = 0.0

    def failed(self, error: Exception) -> None:
        """It failed, again or for the first time."""
        now_s = self._clock_s()
        if self._since_s is None:
            self._since_s = now_s
        elif now_s - self._told_s < REMIND_S:
            return
        self._told_s = now_s
        self._logger.warning("%s: %s", self._what, error)

    def over(self) -> None:
        """It went well."""
        if self._since_s is not None:
            self._logger.warning("the ledger answers again, after %.1f s", self._clock_s() - self._since_s)
            self._since_s = None
