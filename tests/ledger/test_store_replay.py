"""Replies and idempotency keys on a real PostgreSQL: who writes, who takes over, and what comes twice."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from behest_ledger.store import holders, replay
from behest_ledger.store.keeper import Keeper
from behest_ledger.store.replay import Claimed, Piece
from behest_ledger.vault import Vault
from ledger.tenant_roles import logged_in

PLAIN = Vault(None)
TENANT = "acme"


def on(dsn: str, work: Callable[[Any], Awaitable[None]]) -> None:
    async def main() -> None:
        async with logged_in(dsn) as connection:
            await work(connection)

    asyncio.run(main())


def events(*numbers: int) -> tuple[bytes, ...]:
    return tuple(b"data: %d\n\n" % number for number in numbers)


async def claimed(
    connection: Any,
    *,
    key: bytes = b"k",
    request: bytes = b"r",
    user: str = "ann",
    generation: UUID | None = None,
    holder: UUID | None = None,
) -> Claimed:
    return await replay.claim_key(
        connection,
        tenant_id=TENANT,
        project_id="acme/shop",
        user_id=user,
        key_sha256=key,
        request_sha256=request,
        generation_id=generation or uuid4(),
        holder_id=holder or uuid4(),
    )


def piece(generation: UUID, first: int, *numbers: int, **members: Any) -> Piece:
    return Piece(
        tenant_id=TENANT, generation_id=generation, epoch=members.pop("epoch", 1), first_event=first,
        events=events(*numbers), **members,
    )  # fmt: skip


async def a_generation(connection: Any) -> UUID:
    """One that runs."""
    found = await claimed(connection, key=uuid4().bytes)
    assert found.state == "new"
    assert found.generation_id is not None
    return found.generation_id


async def loaded(connection: Any, generation: UUID) -> tuple[list[bytes], bytes | None]:
    return await replay.load_events(connection, PLAIN, tenant_id=TENANT, generation_id=generation)


async def take(connection: Any, generation: UUID, *, force: bool = False) -> Claimed | None:
    return await replay.claim(connection, tenant_id=TENANT, generation_id=generation, holder_id=uuid4(), force=force)


def test_what_is_written_again_with_more_behind_it_is_there_once(dsn: str) -> None:
    async def work(connection: Any) -> None:
        one = await a_generation(connection)
        for last in (piece(one, 1, 1, 2), piece(one, 1, 1, 2), piece(one, 1, 1, 2, 3), piece(one, 1, 1)):
            assert await replay.write(connection, PLAIN, [last]) == {one: "kept"}
        await replay.write(connection, PLAIN, [piece(one, 4, 4, state="whole", ending=b"end")])
        assert await loaded(connection, one) == ([*events(1, 2, 3, 4)], b"end")

    on(dsn, work)


def test_many_are_written_at_once_each_for_itself(dsn: str) -> None:
    async def work(connection: Any) -> None:
        ones = [await a_generation(connection) for _ in range(5)]
        unknown = uuid4()
        verdicts = await replay.write(connection, PLAIN, [piece(one, 1, 1) for one in [*ones, unknown]])
        assert verdicts == {**dict.fromkeys(ones, "kept"), unknown: "gone"}

    on(dsn, work)


def test_one_that_runs_is_wanted_and_taken_over_when_its_writer_stopped(dsn: str) -> None:
    async def work(connection: Any) -> None:
        one = await a_generation(connection)
        assert await take(connection, one) == Claimed("running", 1, one)
        assert await replay.write(connection, PLAIN, [piece(one, 1, 1)]) == {one: "wanted"}
        assert await replay.write(connection, PLAIN, [piece(one, 2, 2, state="broken")]) == {one: "kept"}
        assert await take(connection, one) == Claimed("claimed", 2, one)
        assert await replay.write(connection, PLAIN, [piece(one, 3, 9)]) == {one: "lost"}
        assert await replay.write(connection, PLAIN, [piece(one, 3, 3, epoch=2, state="whole")]) == {one: "kept"}
        assert (await loaded(connection, one))[0] == [*events(1, 2, 3)]
        assert await take(connection, one, force=True) == Claimed("whole", 2, one)
        assert await take(connection, uuid4()) is None

    on(dsn, work)


def test_one_whose_writer_does_not_stop_is_taken_from_it(dsn: str) -> None:
    async def work(connection: Any) -> None:
        one = await a_generation(connection)
        await replay.write(connection, PLAIN, [piece(one, 1, 1)])
        assert await take(connection, one, force=True) == Claimed("claimed", 2, one)
        late = [piece(one, 2, 9), piece(one, 2, 9, state="broken"), piece(one, 2, 9, state="whole", ending=b"x")]
        for last in late:
            assert await replay.write(connection, PLAIN, [last]) == {one: "lost"}
        assert await loaded(connection, one) == ([*events(1)], None)

    on(dsn, work)


def test_of_many_who_take_one_over_one_has_it(dsn: str) -> None:
    async def main() -> None:
        async with logged_in(dsn) as connection:
            one = await a_generation(connection)
            await replay.write(connection, PLAIN, [piece(one, 1, 1, state="broken")])

        async def try_it() -> str | None:
            async with logged_in(dsn) as own:
                found = await take(own, one)
                return found.state if found is not None else None

        states = await asyncio.gather(*(try_it() for _ in range(8)))
        assert sorted(map(str, states)) == ["claimed", *["running"] * 7]

    asyncio.run(main())


# Idempotency keys


def test_a_key_is_one_requests_and_says_what_became_of_it(dsn: str) -> None:
    async def work(connection: Any) -> None:
        holder = uuid4()
        await holders.register(connection, holder, "pod")
        new = await claimed(connection, holder=holder)
        assert new.state == "new"
        assert (await claimed(connection)).state == "running"
        assert (await claimed(connection, request=b"another")).state == "conflict"
        assert (await claimed(connection, user="bob")).state == "new"
        assert (await claimed(connection, key=b"other")).state == "new"
        assert new.generation_id is not None
        await replay.write(connection, PLAIN, [piece(new.generation_id, 1, 1, state="whole")])
        ended = await claimed(connection)
        assert (ended.state, ended.generation_id) == ("whole", new.generation_id)

    on(dsn, work)


def test_a_key_of_a_sidecar_that_died_is_free_again(dsn: str) -> None:
    async def work(connection: Any) -> None:
        holder = uuid4()
        await holders.register(connection, holder, "pod", 3.0)
        first = await claimed(connection, holder=holder)
        assert (await claimed(connection)).state == "running"
        await connection.execute("UPDATE ledger.holder SET expires_at = '-infinity', fenced_at = now()")
        again = await claimed(connection)
        assert again.state == "new"
        assert again.generation_id != first.generation_id

    on(dsn, work)


def test_a_key_that_came_to_nothing_is_free_again(dsn: str) -> None:
    async def work(connection: Any) -> None:
        holder = uuid4()
        await holders.register(connection, holder, "pod")
        first = await claimed(connection, holder=holder)
        assert first.generation_id is not None
        await replay.release_key(connection, tenant_id=TENANT, generation_id=first.generation_id)
        assert (await claimed(connection, request=b"another")).state == "new"
        assert await connection.fetchval("SELECT count(*) FROM ledger.generation") == 1

    on(dsn, work)


def test_a_key_is_forgotten_after_a_day_with_all_that_was_kept_for_it(dsn: str) -> None:
    async def work(connection: Any) -> None:
        first = await claimed(connection)
        assert first.generation_id is not None
        await replay.write(connection, PLAIN, [piece(first.generation_id, 1, 1, state="whole")])
        assert (await claimed(connection)).state == "whole"
        for table, column in (("idempotency_key", "created_at"), ("generation", "written_at")):
            await connection.execute(f"UPDATE ledger.{table} SET {column} = {column} - interval '25 hours'")
        keeper = Keeper(dsn)
        await keeper.run_once()
        await keeper.aclose()
        for table in ("idempotency_key", "generation", "generation_chunk"):
            assert await connection.fetchval(f"SELECT count(*) FROM ledger.{table}") == 0, table
        assert (await claimed(connection, request=b"another")).state == "new"

    on(dsn, work)


def test_an_old_key_is_new_before_the_keeper_comes(dsn: str) -> None:
    async def work(connection: Any) -> None:
        first = await claimed(connection)
        assert first.generation_id is not None
        await replay.write(connection, PLAIN, [piece(first.generation_id, 1, 1, state="whole")])
        await connection.execute("UPDATE ledger.idempotency_key SET created_at = created_at - interval '25 hours'")
        assert (await claimed(connection, request=b"another")).state == "new"

    on(dsn, work)


def test_a_key_that_came_for_a_broken_reply_stands_for_it_and_begins_where_it_was_broken(dsn: str) -> None:
    async def work(connection: Any) -> None:
        one = await a_generation(connection)
        await replay.write(connection, PLAIN, [piece(one, 1, 1, 2, state="broken")])
        second = await claimed(connection, key=b"second")
        taken = await replay.claim(
            connection, tenant_id=TENANT, generation_id=one, holder_id=uuid4(), instead_of=second.generation_id
        )
        assert taken == Claimed("claimed", 2, one)
        await replay.write(connection, PLAIN, [piece(one, 3, 3, epoch=2, state="whole")])
        found = await claimed(connection, key=b"second")
        assert (found.state, found.generation_id, found.after) == ("whole", one, 2)
        assert await connection.fetchval("SELECT count(*) FROM ledger.generation") == 1

    on(dsn, work)


def test_a_user_has_so_many_keys(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(connection: Any) -> None:
        states = [(await claimed(connection, key=b"%d" % number)).state for number in range(3)]
        assert states == ["new", "new", "keys"]

    monkeypatch.setattr(replay, "KEYS_MAX", 2)
    on(dsn, work)


def test_of_many_who_come_with_one_key_one_has_it(dsn: str) -> None:
    async def main() -> None:
        holder = uuid4()
        async with logged_in(dsn) as connection:
            await holders.register(connection, holder, "pod")

        async def try_it() -> str:
            async with logged_in(dsn) as own:
                return (await claimed(own, holder=holder)).state

        states = await asyncio.gather(*(try_it() for _ in range(10)))
        assert sorted(states) == ["new", *["running"] * 9]

    asyncio.run(main())


def test_events_behind_a_gap_are_left_out(dsn: str) -> None:
    async def work(connection: Any) -> None:
        one = await a_generation(connection)
        await replay.write(connection, PLAIN, [piece(one, 1, 1, 2)])
        await replay.write(connection, PLAIN, [piece(one, 4, 4)])
        assert (await loaded(connection, one))[0] == [*events(1, 2)]
        assert replay.split_events(b"".join(events(1, 2))) == [*events(1, 2)]
        assert msgspec.structs.asdict(piece(one, 1))["events"] == ()

    on(dsn, work)
