"""Threads on a real PostgreSQL: bounds, curtains, sealing, deletion, retention."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest

from behest_ledger.sealing import SealingError, tenant_key
from behest_ledger.store import replay, threads
from behest_ledger.store.configuration import apply_text
from behest_ledger.store.keeper import Keeper
from behest_ledger.store.replay import Piece
from behest_ledger.store.threads import ThreadKey
from behest_ledger.vault import Vault
from ledger.houses import Houses, in_two_houses
from ledger.tenant_roles import logged_in

PLAIN = Vault(None)
SEALED = Vault(lambda tenant: tenant_key(bytes(32), tenant))
HI = ("user", b'{"role":"user","content":"Hi"}')
REPLY = b'{"role":"assistant","content":"Hello"}'


def whose(user: str = "ann", thread: str = "t", *, tenant: str = "acme") -> ThreadKey:
    return ThreadKey(tenant_id=tenant, project_id=f"{tenant}/shop", user_id=user, thread_id=thread)


def on(dsn: str, work: Callable[[Any], Awaitable[None]]) -> None:
    async def main() -> None:
        async with logged_in(dsn) as connection:
            await work(connection)

    asyncio.run(main())


async def keep(connection: Any, thread: ThreadKey, *, vault: Vault = PLAIN, end: bool = True) -> UUID:
    generation = uuid4()
    verdict = await threads.keep_turn(
        connection, thread, vault, messages=[HI], generation_id=generation, holder_id=uuid4()
    )
    assert verdict == "kept"
    if end:
        piece = Piece(
            tenant_id=thread.tenant_id,
            generation_id=generation,
            epoch=1,
            first_event=1,
            events=(b"data: 1\n\n", b"data: 2\n\n"),
            state="whole",
            message=threads.closed_message(vault, thread, role="assistant", content=REPLY),
        )
        assert await replay.write(connection, vault, [piece]) == {generation: "kept"}
    return generation


@pytest.mark.parametrize("vault", [PLAIN, SEALED], ids=["plain", "sealed"])
def test_what_is_kept_comes_back_in_its_order(dsn: str, vault: Vault) -> None:
    async def work(connection: Any) -> None:
        first = await keep(connection, whose(), vault=vault)
        second = await keep(connection, whose(), vault=vault, end=False)
        found = await threads.load_messages(connection, whose(), vault, limit=10)
        assert [(one.number, one.role, one.content, one.state) for one in found] == [
            (1, *HI, "whole"),
            (2, "assistant", REPLY, "whole"),
            (3, *HI, "whole"),
            (4, "assistant", None, "running"),
        ]
        assert [one.generation_id for one in found] == [None, first, None, second]
        assert [one.number for one in await threads.load_messages(connection, whose(), vault, limit=2)] == [3, 4]
        before = await threads.load_messages(connection, whose(), vault, limit=1, before=3)
        assert [one.number for one in before] == [2]
        events = await replay.load_events(connection, vault, tenant_id="acme", generation_id=first)
        assert events == ([b"data: 1\n\n", b"data: 2\n\n"], None)
        one = await threads.find_thread(connection, whose())
        assert one is not None
        assert (one.messages, one.thread_id) == (4, "t")

    on(dsn, work)


def test_sealed_contents_open_only_with_their_key_and_in_their_place(dsn: str) -> None:
    async def work(connection: Any) -> None:
        await keep(connection, whose(), vault=SEALED)
        rows = await connection.fetch("SELECT content FROM ledger.thread_message UNION ALL SELECT data FROM"
                                      " ledger.generation_chunk")  # fmt: skip
        assert rows
        assert not any(b"Hi" in row["content"] or b"data: " in row["content"] for row in rows)
        for other in (PLAIN, Vault(lambda _: bytes(32))):
            with pytest.raises(SealingError):
                await threads.load_messages(connection, whose(), other, limit=10)
        await connection.execute(
            "UPDATE ledger.thread_message SET content = (SELECT content FROM ledger.thread_message WHERE number = 1)"
            " WHERE number = 2"
        )
        with pytest.raises(SealingError):
            await threads.load_messages(connection, whose(), SEALED, limit=10)

    on(dsn, work)


def test_a_user_has_so_many_threads_and_a_thread_so_many_messages_and_bytes(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(connection: Any) -> None:
        async def verdict(thread: ThreadKey) -> str:
            return await threads.keep_turn(
                connection, thread, PLAIN, messages=[HI], generation_id=uuid4(), holder_id=uuid4()
            )

        assert [await verdict(whose(thread=str(number))) for number in range(3)] == ["kept", "kept", "threads"]
        assert await verdict(whose("bob")) == "kept"
        assert [await verdict(whose(thread="0")) for _ in range(2)] == ["kept", "messages"]
        monkeypatch.setattr(threads, "THREAD_BYTES_MAX", 60)
        assert await verdict(whose(thread="1")) == "bytes"

    monkeypatch.setattr(threads, "THREADS_MAX", 2)
    monkeypatch.setattr(threads, "MESSAGES_MAX", 5)
    on(dsn, work)


def test_a_turn_that_is_kept_again_is_kept_once(dsn: str) -> None:
    async def work(connection: Any) -> None:
        generation = uuid4()
        for _ in range(2):
            verdict = await threads.keep_turn(
                connection, whose(), PLAIN, messages=[HI], generation_id=generation, holder_id=uuid4()
            )
            assert verdict == "kept"
        assert len(await threads.load_messages(connection, whose(), PLAIN, limit=10)) == 2

    on(dsn, work)


def test_deletion_leaves_nothing_of_a_thread_and_touches_no_other(dsn: str) -> None:
    async def work(connection: Any) -> None:
        await keep(connection, whose())
        await keep(connection, whose("bob"))
        assert not await threads.delete_thread(connection, whose("eve"))
        assert await threads.delete_thread(connection, whose())
        assert not await threads.delete_thread(connection, whose())
        for table in ("thread", "thread_message", "generation", "generation_chunk"):
            owners = await connection.fetchval(f"SELECT count(*) FROM ledger.{table} WHERE tenant_id = 'acme'")
            assert owners == (2 if table == "thread_message" else 1), table

    on(dsn, work)


def test_the_list_is_a_users_own_the_last_used_first_page_by_page(dsn: str) -> None:
    async def work(connection: Any) -> None:
        for number in range(5):
            await keep(connection, whose(thread=str(number)))
        await keep(connection, whose("bob", "x"))
        found = await threads.list_threads(connection, whose(), limit=3)
        assert [one.thread_id for one in found] == ["4", "3", "2"]
        rest = await threads.list_threads(connection, whose(), limit=3, before="2")
        assert [one.thread_id for one in rest] == ["1", "0"]
        assert await threads.list_threads(connection, whose(), limit=3, before="unknown") == []

    on(dsn, work)


def test_no_tenants_sidecar_reads_writes_or_deletes_what_another_tenants_users_said(dsn: str) -> None:
    async def work(houses: Houses) -> None:
        generation = await keep(houses.acme, whose(), end=False)
        assert await threads.load_messages(houses.globex, whose(), PLAIN, limit=10) == []
        assert await threads.find_thread(houses.globex, whose()) is None
        seen = await houses.globex.fetch("SELECT DISTINCT tenant_id FROM ledger.generation")
        assert [row["tenant_id"] for row in seen] == ["globex"]
        piece = Piece(tenant_id="acme", generation_id=generation, epoch=1, first_event=1, events=(b"data: 1\n\n",))
        attacks: list[Callable[[], Awaitable[object]]] = [
            lambda: keep(houses.globex, whose()),
            lambda: threads.delete_thread(houses.globex, whose()),
            lambda: replay.write(houses.globex, PLAIN, [piece]),
            lambda: replay.claim(houses.globex, tenant_id="acme", generation_id=generation, holder_id=uuid4()),
            lambda: replay.release_key(houses.globex, tenant_id="acme", generation_id=generation),
        ]
        for attack in attacks:
            with pytest.raises(Exception, match="may not act for tenant acme"):
                await attack()
        for table in ("thread", "thread_message", "generation", "generation_chunk", "idempotency_key"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await houses.acme.execute(f"DELETE FROM ledger.{table}")
        assert len(await threads.load_messages(houses.acme, whose(), PLAIN, limit=10)) == 2

    in_two_houses(dsn, work)


def test_the_keeper_deletes_what_nobody_used_for_its_projects_time(dsn: str) -> None:
    async def work(connection: Any) -> None:
        await apply_text(
            connection,
            "apiVersion: behest.ai/v1alpha1\nkind: Project\nmetadata: {name: shop, namespace: acme}\n"
            "spec: {tenant: acme, memory: {retentionDays: 3}}\n",
        )
        await keep(connection, whose(thread="old"))
        await keep(connection, whose(thread="fresh"))
        await keep(connection, whose(thread="other", tenant="globex"))
        await keep(connection, whose(thread="ancient", tenant="globex"))
        for thread, days in (("old", 4), ("fresh", 2), ("other", 80), ("ancient", 91)):
            await connection.execute(
                "UPDATE ledger.thread SET updated_at = updated_at - $2::interval WHERE thread_id = $1",
                thread,
                timedelta(days=days),
            )
        keeper = Keeper(dsn)
        report = await keeper.run_once()
        await keeper.aclose()
        assert report.threads_deleted == 2
        left = await connection.fetch("SELECT thread_id FROM ledger.thread ORDER BY 1")
        assert [row["thread_id"] for row in left] == ["fresh", "other"]
        assert await connection.fetchval("SELECT count(*) FROM ledger.generation") == 2

    on(dsn, work)


def test_after_a_day_a_whole_reply_stays_as_a_message_without_its_chunks(dsn: str) -> None:
    async def work(connection: Any) -> None:
        generation = await keep(connection, whose())
        running = await keep(connection, whose(thread="running"), end=False)
        piece = Piece(tenant_id="acme", generation_id=running, epoch=1, first_event=1, events=(b"data: 1\n\n",))
        await replay.write(connection, PLAIN, [piece])
        await connection.execute("UPDATE ledger.generation SET written_at = written_at - interval '25 hours'")
        keeper = Keeper(dsn)
        await keeper.run_once()
        await keeper.aclose()
        assert (await replay.load_events(connection, PLAIN, tenant_id="acme", generation_id=generation))[0] == []
        assert (await replay.load_events(connection, PLAIN, tenant_id="acme", generation_id=running))[0] != []
        found = await threads.load_messages(connection, whose(), PLAIN, limit=10)
        assert [msgspec.json.decode(one.content or b"{}")["role"] for one in found] == ["user", "assistant"]

    on(dsn, work)
