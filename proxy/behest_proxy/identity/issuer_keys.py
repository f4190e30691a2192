"""The keys of external issuers in memory: when they are fetched, how long they are believed, and that nobody is asked
too often.

A set is fresh for 5 minutes, which is how long a key lives on that its issuer has withdrawn. From half of that on the
next use fetches it again beside the request; after it the request waits. An issuer that does not answer is believed as
it was for an hour, and asked again after 5 s, 10 s ... 5 minutes. A kid that a fresh set does not have makes it be
fetched at most once in 30 s. Requests that want the same set wait for one fetch.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping

from behest_proxy.identity.external import keys_in
from behest_proxy.identity.keys import VerificationKey

logger = logging.getLogger(__name__)

FRESH_S = 300.0
STALE_S = 3600.0
UNKNOWN_KID_WAIT_S = 30.0
BACKOFF_MIN_S = 5.0
BACKOFF_MAX_S = 300.0
FETCHES_MAX = 8
"""At the same time, over all issuers."""

Fetch = Callable[[str], Awaitable[bytes]]
"""The document at a URL. Bounded in size and time; raises `OSError` or `ValueError` saying why there is none."""


class _Known:
    """One URL's keys."""

    def __init__(self) -> None:
        self.keys: Mapping[str, VerificationKey] = {}
        self.fetched_s: float | None = None
        self.not_before_s = 0.0
        """No fetch before this moment."""
        self.failures = 0
        self.task: asyncio.Task[None] | None = None


class IssuerKeys:
    """For one event loop. Only URLs that were named by `keep` are ever fetched."""

    def __init__(self, fetch: Fetch, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch = fetch
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._running = asyncio.Semaphore(FETCHES_MAX)

    def keep(self, urls: Collection[str]) -> None:
        """The URLs that are trusted from now on; what is known of others is forgotten."""
        for url in [url for url in self._known if url not in urls]:
            del self._known[url]  # a fetch under way ends by itself: somebody may be waiting for it
        for url in urls:
            self._known.setdefault(url, _Known())

    def get(self, url: str, kid: str) -> VerificationKey | None:
        """A key that is believed now. Never waits and never asks."""
        known = self._known.get(url)
        if known is None or known.fetched_s is None or self._clock() - known.fetched_s >= FRESH_S + STALE_S:
            return None
        return known.keys.get(kid)

    async def ensure(self, url: str, kid: str) -> None:
        """Do what can be done for `get` to know this kid. Raises nothing: then the kid is unknown."""
        known = self._known.get(url)
        if known is None:
            return
        now_s = self._clock()
        age_s = None if known.fetched_s is None else now_s - known.fetched_s
        is_fresh = age_s is not None and age_s < FRESH_S
        if is_fresh and kid in known.keys:
            if age_s is not None and age_s >= FRESH_S / 2 and now_s >= known.not_before_s:
                self._started(url, known)
            return
        if known.task is None and now_s < known.not_before_s:
            return
        # A caller that goes away must not take the fetch from the others.
        await asyncio.shield(self._started(url, known))

    async def aclose(self) -> None:
        """End what is under way."""
        tasks = [known.task for known in self._known.values() if known.task is not None]
        self.keep(())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _started(self, url: str, known: _Known) -> "asyncio.Task[None]":
        if known.task is None:
            known.task = asyncio.get_running_loop().create_task(self._refetch(url, known), name="issuer keys")
        return known.task

    async def _refetch(self, url: str, known: _Known) -> None:
        try:
            async with self._running:
                keys = keys_in(await self._fetch(url))
        except (OSError, ValueError) as error:
            known.failures += 1
            wait_s = min(BACKOFF_MIN_S * 2 ** min(known.failures - 1, 10), BACKOFF_MAX_S)
            known.not_before_s = self._clock() + wait_s
            # Never the document: it is a stranger's.
            logger.warning("the keys at %s cannot be used, asking again in %.0f s: %s", url, wait_s, error)
        else:
            known.keys, known.fetched_s, known.failures = keys, self._clock(), 0
            known.not_before_s = known.fetched_s + UNKNOWN_KID_WAIT_S
        finally:
            known.task = None
