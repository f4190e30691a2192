"""API keys cost argon2 once, never on the event loop, and end when they are revoked."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import pytest

from behest_ledger.api_key_hash import (
    api_key_digest,
    api_key_matches,
    hash_api_key,
    is_api_key,
    last_four,
    new_api_key,
)
from behest_ledger.store.identity import ApiKeyRecord
from behest_proxy.errors import InvalidToken, LedgerUnavailable, RateLimited
from behest_proxy.identity.api_keys import ApiKeyVerifier

REVOKED_AT = datetime(2026, 1, 2, tzinfo=UTC)


def key(number: int = 1) -> str:
    return f"behest_sk_live_{number:032x}"


def record(text: str, *, argon2: str = "hash", revoked_at: datetime | None = None) -> ApiKeyRecord:
    return ApiKeyRecord(
        tenant_id="acme",
        project_id="demo/shop",
        key_id="key_1",
        sha256=api_key_digest(text),
        argon2=argon2,
        role="user",
        name="test",
        last_four=last_four(text),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        revoked_at=revoked_at,
    )


class World:
    """A table of keys, a clock, and an argon2 that counts, waits for its gate and believes what it is told."""

    def __init__(self, *texts: str, **settings: Any) -> None:
        self.rows = {api_key_digest(text): record(text) for text in texts}
        self.lookups: list[bytes] = []
        self.proofs: list[str] = []
        self.threads: set[int] = set()
        self.at_once = self.at_once_max = 0
        self.now_s = 100.0
        self.verdict = True
        self.gate = threading.Event()
        self.gate.set()
        self.verifier = ApiKeyVerifier(self.lookup, clock=lambda: self.now_s, prove=self.prove, **settings)

    async def lookup(self, sha256: bytes) -> ApiKeyRecord | None:
        self.lookups.append(sha256)
        await asyncio.sleep(0)
        return self.rows.get(sha256)

    def prove(self, text: str, argon2_hash: str) -> bool:
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        self.proofs.append(text)
        self.threads.add(threading.get_ident())
        assert self.gate.wait(30)
        time.sleep(0.001)
        self.at_once -= 1
        return self.verdict and argon2_hash.startswith("hash")

    def revoke(self, text: str) -> None:
        self.rows[api_key_digest(text)] = record(text, revoked_at=REVOKED_AT)


def run(world: World, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def closed_after() -> None:
        try:
            await main()
        finally:
            world.gate.set()
            await world.verifier.aclose()

    asyncio.run(closed_after())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


# ---- the form and the hashes


def test_a_new_key_has_the_published_form_and_is_never_the_same() -> None:
    keys = {new_api_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(map(is_api_key, keys))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "behest_sk_live_",
        "behest_sk_live_" + "0" * 31,
        "behest_sk_live_" + "0" * 33,
        "behest_sk_live_" + "A" * 32,
        "behest_sk_live_" + "g" * 32,
        "behest_sk_test_" + "0" * 32,
        "BEHEST_SK_LIVE_" + "0" * 32,
        key() + "\n",
        " " + key(),
        "behest_sk_live_" + "٠" * 32,
        "\ud800",
        "x" * 1_000_000,
    ],
)
def test_a_text_of_another_form_is_refused_before_any_lookup(text: str) -> None:
    world = World()

    async def main() -> None:
        with pytest.raises(InvalidToken) as caught:
            await world.verifier.verify(text)
        assert len(text) < 16 or text not in caught.value.message

    run(world, main)
    assert not is_api_key(text)
    assert world.lookups == []


def test_the_stored_hash_is_argon2id_at_its_defaults_and_proves_only_its_key() -> None:
    stored = hash_api_key(key(1))
    assert stored.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert api_key_matches(key(1), argon2_hash=stored)
    assert not api_key_matches(key(2), argon2_hash=stored)
    assert hash_api_key(key(1)) != stored


@pytest.mark.parametrize("stored", ["", "hash", "$argon2id$", "$2b$12$abc", key(1)])
def test_a_damaged_stored_hash_matches_nothing(stored: str) -> None:
    assert not api_key_matches(key(1), argon2_hash=stored)


def test_a_real_key_is_proved_by_real_argon2() -> None:
    text = new_api_key()
    row = record(text, argon2=hash_api_key(text))

    async def lookup(sha256: bytes) -> ApiKeyRecord | None:
        return row if sha256 == row.sha256 else None

    async def main() -> None:
        verifier = ApiKeyVerifier(lookup)
        assert await verifier.verify(text) is row
        with pytest.raises(InvalidToken):
            await verifier.verify(new_api_key())
        await verifier.aclose()

    asyncio.run(main())


# ---- lookups and proofs


def test_an_unknown_key_is_refused_by_the_lookup_alone() -> None:
    world = World()

    async def main() -> None:
        with pytest.raises(InvalidToken):
            await world.verifier.verify(key())

    run(world, main)
    assert (len(world.lookups), world.proofs) == (1, [])


def test_looking_a_key_up_takes_the_same_steps_however_near_a_guess_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are found by their SHA-256, which nobody can steer, and compared as such in constant time: how long a
    refusal takes says nothing about how much of a key was right. The steps are counted, because times are not exact.
    """
    known = key(1)
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return False

    monkeypatch.setattr("behest_ledger.api_key_hash.hmac.compare_digest", compare)
    flipped = {"0": "1"}
    guesses = [
        known[:place] + flipped.get(known[place], "0") + known[place + 1 :]
        for place in range(len(known) - 32, len(known))
    ]
    world = World(known)
    for guess in guesses:
        world.rows[api_key_digest(guess)] = record(known)

    async def main() -> None:
        for guess in guesses:
            with pytest.raises(InvalidToken, match=r"^The API key is unknown\.$"):
                await world.verifier.verify(guess)

    run(world, main)
    assert compared == [(api_key_digest(known), api_key_digest(guess)) for guess in guesses]
    assert (len(world.lookups), world.proofs) == (len(guesses), [])


def test_a_revoked_key_is_refused_by_the_lookup_alone() -> None:
    world = World(key())
    world.revoke(key())

    async def main() -> None:
        with pytest.raises(InvalidToken, match="revoked"):
            await world.verifier.verify(key())

    run(world, main)
    assert world.proofs == []


def test_a_row_of_another_key_is_not_believed() -> None:
    world = World()
    world.rows[api_key_digest(key(1))] = record(key(2))

    async def main() -> None:
        with pytest.raises(InvalidToken):
            await world.verifier.verify(key(1))

    run(world, main)
    assert world.proofs == []


def test_a_key_that_its_hash_does_not_prove_is_refused_and_not_remembered() -> None:
    world = World(key())
    world.verdict = False

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(InvalidToken):
                await world.verifier.verify(key())

    run(world, main)
    assert len(world.proofs) == 2
    assert world.verifier.cached_count == 0


def test_a_proved_key_costs_nothing_within_the_time_to_live_and_then_one_lookup() -> None:
    world = World(key(), ttl_s=1.0)

    async def main() -> None:
        for _ in range(5):
            await world.verifier.verify(key())
        assert (len(world.lookups), len(world.proofs)) == (1, 1)
        world.now_s += 1.0
        for _ in range(5):
            await world.verifier.verify(key())
        assert (len(world.lookups), len(world.proofs)) == (2, 1)

    run(world, main)


def test_a_changed_hash_is_proved_again() -> None:
    world = World(key())

    async def main() -> None:
        await world.verifier.verify(key())
        world.rows[api_key_digest(key())] = record(key(), argon2="hash 2")
        world.verifier.clear()
        await world.verifier.verify(key())
        world.rows[api_key_digest(key())] = record(key(), argon2="forged")
        world.verifier.clear()
        with pytest.raises(InvalidToken):
            await world.verifier.verify(key())

    run(world, main)
    assert len(world.proofs) == 3


def test_a_changed_row_is_seen_after_clear() -> None:
    world = World(key())

    async def main() -> None:
        await world.verifier.verify(key())
        changed = record(key())
        world.rows[changed.sha256] = changed
        assert await world.verifier.verify(key()) is not changed
        world.verifier.clear()
        assert await world.verifier.verify(key()) is changed

    run(world, main)
    assert len(world.proofs) == 1


@pytest.mark.parametrize("how", ["clear", "forget", "wait"])
def test_a_revoked_key_ends_by_clear_by_forget_or_by_its_time_to_live(how: str) -> None:
    world = World(key())

    async def main() -> None:
        await world.verifier.verify(key())
        world.revoke(key())
        if how == "clear":
            world.verifier.clear()
        elif how == "forget":
            world.verifier.forget(api_key_digest(key()))
        else:
            world.now_s += 1.0
        with pytest.raises(InvalidToken, match="revoked"):
            await world.verifier.verify(key())
        assert world.verifier.cached_count == 0

    run(world, main)


@pytest.mark.parametrize("how", ["clear", "wait"])
def test_a_revocation_while_argon2_runs_is_seen(how: str) -> None:
    world = World(key())
    world.gate.clear()

    async def main() -> None:
        task = asyncio.create_task(world.verifier.verify(key()))
        await until(lambda: bool(world.proofs))
        world.revoke(key())
        if how == "clear":
            world.verifier.clear()
        else:
            world.now_s += 1.0
        world.gate.set()
        with pytest.raises(InvalidToken, match="revoked"):
            await task

    run(world, main)
    assert len(world.proofs) == 1


def test_a_lookup_slower_than_the_time_to_live_does_not_go_round_for_ever() -> None:
    world = World(key())
    lookup = world.lookup

    async def slow(sha256: bytes) -> ApiKeyRecord | None:
        world.now_s += 5
        return await lookup(sha256)

    async def main() -> None:
        verifier = ApiKeyVerifier(slow, clock=lambda: world.now_s, prove=world.prove)
        assert await verifier.verify(key())
        await verifier.aclose()

    run(world, main)
    assert (len(world.lookups), len(world.proofs)) == (2, 1)


def test_a_configuration_that_changes_without_end_is_a_429_not_a_loop() -> None:
    world = World(key())
    lookup = world.lookup

    async def restless(sha256: bytes) -> ApiKeyRecord | None:
        verifier.clear()
        return await lookup(sha256)

    verifier = ApiKeyVerifier(restless, prove=world.prove)

    async def main() -> None:
        with pytest.raises(RateLimited):
            await verifier.verify(key())
        await verifier.aclose()

    run(world, main)
    assert len(world.proofs) == 1


def test_an_error_of_the_lookup_reaches_every_caller_and_is_not_remembered() -> None:
    world = World(key())
    fails = True

    async def lookup(sha256: bytes) -> ApiKeyRecord | None:
        if fails:
            raise LedgerUnavailable("away")
        return await world.lookup(sha256)

    async def main() -> None:
        nonlocal fails
        verifier = ApiKeyVerifier(lookup, prove=world.prove)
        results = await asyncio.gather(*(verifier.verify(key()) for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [LedgerUnavailable] * 3
        fails = False
        assert await verifier.verify(key())
        await verifier.aclose()

    run(world, main)


# ---- many at once


def test_simultaneous_verifications_of_one_key_share_one_argon2_run() -> None:
    world = World(key())

    async def main() -> None:
        records = await asyncio.gather(*(world.verifier.verify(key()) for _ in range(100)))
        assert len({id(found) for found in records}) == 1

    run(world, main)
    assert (len(world.lookups), len(world.proofs)) == (1, 1)


def test_argon2_runs_one_at_a_time_and_never_on_the_event_loops_thread() -> None:
    texts = [key(number) for number in range(10)]
    world = World(*texts)

    async def main() -> None:
        await asyncio.gather(*map(world.verifier.verify, texts))

    run(world, main)
    assert world.at_once_max == 1
    assert len(world.proofs) == 10
    assert threading.get_ident() not in world.threads


def test_the_event_loop_runs_on_while_argon2_works() -> None:
    world = World(key())
    world.gate.clear()

    async def main() -> None:
        task = asyncio.create_task(world.verifier.verify(key()))
        await until(lambda: bool(world.proofs))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        world.gate.set()
        await task

    run(world, main)


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    texts = [key(number) for number in range(6)]
    world = World(*texts, queue_max=4)
    world.gate.clear()

    async def main() -> None:
        waiting = [asyncio.create_task(world.verifier.verify(text)) for text in texts[:4]]
        await until(lambda: len(world.lookups) == 4 and bool(world.proofs))
        for text in texts[4:]:
            with pytest.raises(RateLimited) as caught:
                await world.verifier.verify(text)
            assert caught.value.status == 429
            assert caught.value.retry_after_s == 1
        # One that waits already may be waited for by more.
        more = asyncio.create_task(world.verifier.verify(texts[0]))
        world.gate.set()
        await asyncio.gather(*waiting, more)
        # And the places are free again.
        for text in texts[4:]:
            await world.verifier.verify(text)

    run(world, main)


def test_lookups_under_way_are_bounded_too() -> None:
    world = World()
    gate = asyncio.Event()

    async def lookup(sha256: bytes) -> ApiKeyRecord | None:
        await gate.wait()
        return await world.lookup(sha256)

    async def main() -> None:
        verifier = ApiKeyVerifier(lookup, lookups_max=3, prove=world.prove)
        tasks = [asyncio.create_task(verifier.verify(key(number))) for number in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(RateLimited):
            await verifier.verify(key(9))
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [InvalidToken] * 3
        await verifier.aclose()

    run(world, main)


def test_a_caller_that_goes_away_takes_nothing_from_the_others() -> None:
    world = World(key())
    world.gate.clear()

    async def main() -> None:
        first = asyncio.create_task(world.verifier.verify(key()))
        await until(lambda: bool(world.proofs))
        second = asyncio.create_task(world.verifier.verify(key()))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        world.gate.set()
        assert await second

    run(world, main)
    assert len(world.proofs) == 1


def test_a_refusal_for_which_nobody_waits_any_more_is_silent() -> None:
    world = World(key())
    world.verdict = False
    world.gate.clear()
    complaints: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        task = asyncio.create_task(world.verifier.verify(key()))
        await until(lambda: bool(world.proofs))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        world.gate.set()
        await until(lambda: world.at_once == 0)
        await asyncio.sleep(0.01)

    run(world, main)
    assert complaints == []


def test_only_so_many_keys_are_remembered_and_the_least_used_goes_first() -> None:
    texts = [key(number) for number in range(4)]
    world = World(*texts, cache_size=3)

    async def main() -> None:
        for text in texts[:3]:
            await world.verifier.verify(text)
        await world.verifier.verify(texts[0])
        await world.verifier.verify(texts[3])
        assert world.verifier.cached_count == 3
        await world.verifier.verify(texts[0])
        assert len(world.proofs) == 4
        await world.verifier.verify(texts[1])
        assert len(world.proofs) == 5

    run(world, main)


def test_closing_while_a_key_is_verified_cancels_it() -> None:
    world = World(key())
    world.gate.clear()

    async def main() -> None:
        task = asyncio.create_task(world.verifier.verify(key()))
        await until(lambda: bool(world.proofs))
        await world.verifier.aclose()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(world, main)
