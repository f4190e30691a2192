"""Verification of API keys: refused by a lookup, proved by argon2id off the event loop, remembered briefly.

argon2id takes 135 ms and 64 MiB. So only a key that was issued ever gets that far, one run goes at a time,
the queue is bounded, and a run's result is remembered: published clients mint before every call.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from behest_ledger.api_key_hash import (
    API_KEY_PREFIX,
    api_key_digest,
    api_key_matches,
    is_api_key,
    new_api_key,
    same_digest,
)
from behest_ledger.store.identity import ApiKeyRecord
from behest_proxy.errors import InvalidToken, RateLimited

__all__ = ["API_KEY_PREFIX", "ApiKeyVerifier", "is_api_key", "new_api_key"]

_ARGON2_S = 0.15
"""What one run takes, roughly: only for telling a refused caller when to come back."""

_LOOKUPS_MAX = 8
"""Lookups in one verification; more than two happen only when the configuration changes without end."""

Lookup = Callable[[bytes], Awaitable[ApiKeyRecord | None]]
"""Finds a key's record by its SHA-256. May raise a `ShownError`, which reaches the caller."""

Prove = Callable[[str, str], bool]
"""Whether the key has the argon2 hash; called in a thread."""


class _Known(msgspec.Struct):
    """A key that argon2id proved."""

    record: ApiKeyRecord
    """As last looked up; its `argon2` is the hash that was proved."""
    looked_up_s: float
    """When, on the verifier's clock; minus infinity forces a new lookup."""


class ApiKeyVerifier:
    """Turns API keys into their records. For one event loop; `aclose()` ends its thread.

    What argon2id proved is a fact about a key and a hash, and is kept while the row's hash is that one.
    What the row says (whose key, what role, revoked or not) is kept for `ttl_s` and dropped by `clear()`,
    and then costs one lookup, not another argon2 run.
    """

    def __init__(
        self,
        lookup: Lookup,
        *,
        queue_max: int = 16,
        lookups_max: int = 256,
        cache_size: int = 1024,
        ttl_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        prove: Prove | None = None,
    ) -> None:
        """`queue_max` argon2 runs (the running one included) and `lookups_max` verifications may be under
        way; `ttl_s` bounds how long a revocation can go unseen when nobody calls `clear()`. Clock in
        seconds.
        """
        self._lookup = lookup
        self._queue_max = queue_max
        self._lookups_max = lookups_max
        self._cache_size = cache_size
        self._ttl_s = ttl_s
        self._clock = clock
        self._prove = prove or _prove
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[ApiKeyRecord]] = {}
        self._queued = 0
        self._generation = 0
        # One thread is the queue: argon2 releases the interpreter's lock, but not its 64 MiB.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="argon2")

    @property
    def cached_count(self) -> int:
        """How many proved keys are remembered."""
        return len(self._known)

    async def verify(self, key: str) -> ApiKeyRecord:
        """The record of a good key.

        Raises `InvalidToken` for a malformed, unknown or revoked key and `RateLimited` when too many wait.
        Simultaneous calls with one key share one verification.
        """
        if not is_api_key(key):
            raise InvalidToken(f"An API key is {API_KEY_PREFIX} followed by 32 lower-case hexadecimal digits.")
        digest = api_key_digest(key)
        known = self._known.get(digest)
        if known is not None and self._clock() - known.looked_up_s < self._ttl_s:
            self._known.move_to_end(digest)
            return known.record
        task = self._running.get(digest)
        if task is None:
            if len(self._running) >= self._lookups_max:
                raise self._too_many()
            task = asyncio.get_running_loop().create_task(self._verify(key, digest))
            self._running[digest] = task
            task.add_done_callback(lambda done: self._ended(digest, done))
        # A caller that goes away must not take the verification from the others.
        return await asyncio.shield(task)

    def forget(self, sha256: bytes) -> None:
        """Drop all that is known of the key with this digest."""
        self._generation += 1
        self._known.pop(sha256, None)

    def clear(self) -> None:
        """Believe no row any more: each key's next use looks it up. For when the configuration changed."""
        self._generation += 1
        for known in self._known.values():
            known.looked_up_s = -math.inf

    async def aclose(self) -> None:
        """End the thread; verifications under way are cancelled."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A run that has begun cannot be stopped; it ends by itself and nobody waits for it.
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _verify(self, key: str, digest: bytes) -> ApiKeyRecord:
        proved_hash: str | None = None
        for _ in range(_LOOKUPS_MAX):
            generation, looked_up_s = self._generation, self._clock()
            record = await self._good_record(digest)
            known = self._known.get(digest)
            is_proved = record.argon2 == proved_hash or (known is not None and known.record.argon2 == record.argon2)
            if not is_proved:
                await self._prove_queued(key, record.argon2)
                proved_hash = record.argon2
            # A revocation while argon2 ran or waited its turn must be seen, so the row is read again then.
            # A row read just now is as fresh as can be, however slow the reading was.
            is_recent = is_proved or self._clock() - looked_up_s < self._ttl_s
            if generation == self._generation and is_recent:
                self._remember(digest, _Known(record, looked_up_s))
                return record
        raise self._too_many()

    async def _good_record(self, digest: bytes) -> ApiKeyRecord:
        record = await self._lookup(digest)
        if record is None or not same_digest(record.sha256, digest):
            self._known.pop(digest, None)
            raise InvalidToken("The API key is unknown.")
        if record.revoked_at is not None:
            self._known.pop(digest, None)
            raise InvalidToken("The API key was revoked.")
        return record

    async def _prove_queued(self, key: str, argon2_hash: str) -> None:
        if self._queued >= self._queue_max:
            raise self._too_many()
        self._queued += 1
        try:
            loop = asyncio.get_running_loop()
            is_proved = await loop.run_in_executor(self._thread, self._prove, key, argon2_hash)
        finally:
            self._queued -= 1
        if not is_proved:
            raise InvalidToken("The API key is unknown.")

    def _remember(self, digest: bytes, known: _Known) -> None:
        self._known[digest] = known
        self._known.move_to_end(digest)
        if len(self._known) > self._cache_size:
            self._known.popitem(last=False)

    def _ended(self, digest: bytes, task: asyncio.Task[ApiKeyRecord]) -> None:
        self._running.pop(digest, None)
        # When every caller has gone, somebody must still look at the error.
        if not task.cancelled():
            task.exception()

    def _too_many(self) -> RateLimited:
        retry_after_s = math.ceil((self._queued + 1) * _ARGON2_S)
        return RateLimited("Too many API keys are being verified: try again soon.", retry_after_s=retry_after_s)


def _prove(key: str, argon2_hash: str) -> bool:
    return api_key_matches(key, argon2_hash=argon2_hash)
