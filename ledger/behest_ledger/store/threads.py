"""Threads in PostgreSQL: what was said to whom. Every function may also raise the errors of `store.errors`.

No money is here. Contents come and go opened; how they lie there is the `Vault`'s. A reply that has not ended, or whose
sidecar died, has no content of its own yet: it is put together from its chunks, as far as they were written.
"""

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from behest_ledger.store.pool import Connection, asking
from behest_ledger.vault import Vault

MESSAGES_MAX = 2000
"""Messages of one thread, replies too."""
THREAD_BYTES_MAX = 16 * 1024 * 1024
THREADS_MAX = 1000
"""Threads of one user of a project."""
RETENTION_DAYS = 90
"""After so long without a message a thread is deleted, where its project does not say otherwise."""
LISTED_MAX = 1000


class ThreadKey(msgspec.Struct, frozen=True, kw_only=True):
    """Whose thread, by which name: another user's thread of the same name is another thread."""

    tenant_id: str
    project_id: str
    user_id: str
    thread_id: str

    @property
    def key(self) -> UUID:
        """The id under which it is stored: the same wherever it is asked for, so that nobody has to agree on one."""
        names = [self.tenant_id, self.project_id, self.user_id, self.thread_id]
        return UUID(bytes=hashlib.sha256(msgspec.json.encode(names)).digest()[:16])

    def covers(self, thread: "ThreadKey") -> bool:
        """This is that thread; without a thread's id, all threads of its user."""
        return (
            self.user_id == thread.user_id
            and self.project_id == thread.project_id
            and self.tenant_id == thread.tenant_id
            and self.thread_id in ("", thread.thread_id)
        )


class StoredThread(msgspec.Struct, frozen=True, kw_only=True):
    """A thread without its messages."""

    thread_id: str
    messages: int
    size_bytes: int
    created_at: datetime
    updated_at: datetime


class StoredMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a thread."""

    number: int
    """From 1, in their order."""
    role: str
    content: bytes | None
    """The whole message, a JSON object; None: a reply that is only in its chunks."""
    created_at: datetime
    generation_id: UUID | None = None
    """Of a reply."""
    state: str = "whole"
    """Of a reply: "running", "broken" or "whole"."""
    epoch: int = 1
    events: int = 0


_THREAD = "thread_id, messages, size_bytes, created_at, updated_at"
_MESSAGES = """
SELECT m.number, m.role, m.content, m.created_at, m.generation_id, coalesce(g.state, 'whole') AS state,
       coalesce(g.epoch, 1) AS epoch, coalesce(g.events, 0) AS events
FROM ledger.thread_message m
LEFT JOIN ledger.generation g ON g.tenant_id = m.tenant_id AND g.generation_id = m.generation_id
WHERE m.tenant_id = $1 AND m.thread_key = $2 AND m.number < $3
ORDER BY m.number DESC LIMIT $4
"""
_NO_NUMBER = 2**31 - 1


async def list_threads(
    source: Connection, whose: ThreadKey, *, limit: int, before: str | None = None
) -> list[StoredThread]:
    """A user's threads, the one that was used last first; with `before`, a thread's id, those behind it in this list.

    Of `whose` the thread's own name is not looked at.
    """
    async with asking(source) as connection:
        rows: list[Any] = await connection.fetch(
            f"SELECT {_THREAD} FROM ledger.thread t"  # noqa: S608 - a constant
            " WHERE t.tenant_id = $1 AND t.project_id = $2 AND t.user_id = $3 AND ($4::uuid IS NULL OR"
            " (t.updated_at, t.thread_key) < (SELECT b.updated_at, b.thread_key FROM ledger.thread b"
            " WHERE b.tenant_id = $1 AND b.thread_key = $4)) ORDER BY t.updated_at DESC, t.thread_key DESC LIMIT $5",
            whose.tenant_id,
            whose.project_id,
            whose.user_id,
            None if before is None else msgspec.structs.replace(whose, thread_id=before).key,
            min(limit, LISTED_MAX),
        )
    return [StoredThread(**dict(row)) for row in rows]


async def find_thread(source: Connection, whose: ThreadKey) -> StoredThread | None:
    """The thread; None where there is none."""
    async with asking(source) as connection:
        row = await connection.fetchrow(
            f"SELECT {_THREAD} FROM ledger.thread WHERE tenant_id = $1 AND thread_key = $2",  # noqa: S608 - a constant
            whose.tenant_id,
            whose.key,
        )
    return None if row is None else StoredThread(**dict(row))


async def load_messages(
    source: Connection, whose: ThreadKey, vault: Vault, *, limit: int, before: int | None = None
) -> list[StoredMessage]:
    """The last `limit` messages of a thread, or those before the one with this number, in their order.

    Raises `SealingError` where they do not open here.
    """
    async with asking(source) as connection:
        rows: list[Any] = await connection.fetch(
            _MESSAGES, whose.tenant_id, whose.key, _NO_NUMBER if before is None else before, min(limit, MESSAGES_MAX)
        )
    found: list[StoredMessage] = []
    for row in reversed(rows):
        members: dict[str, Any] = {**dict(row), "content": _opened(vault, whose, row)}
        found.append(StoredMessage(**members))
    return found


async def keep_turn(
    source: Connection,
    whose: ThreadKey,
    vault: Vault,
    *,
    messages: Sequence[tuple[str, bytes]],
    generation_id: UUID,
    holder_id: UUID,
) -> str:
    """Keep new messages (role and whole message) and make room for the reply. The thread is made where there is none.

    Answers "kept", or the limit against it: "messages", "bytes" or "threads". Asking again keeps nothing twice.
    """
    async with asking(source) as connection:
        verdict: str = await connection.fetchval(
            "SELECT ledger.keep_turn_v1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
            whose.tenant_id,
            whose.project_id,
            whose.user_id,
            whose.thread_id,
            whose.key,
            [role for role, _ in messages],
            [closed_message(vault, whose, role=role, content=content) for role, content in messages],
            generation_id,
            holder_id,
            MESSAGES_MAX,
            THREAD_BYTES_MAX,
            THREADS_MAX,
        )
    return verdict


async def delete_thread(source: Connection, whose: ThreadKey) -> bool:
    """Delete a thread, its messages and the chunks of its replies. False: there is none."""
    async with asking(source) as connection:
        found: bool = await connection.fetchval("SELECT ledger.delete_thread_v1($1, $2)", whose.tenant_id, whose.key)
    return found


def closed_message(vault: Vault, whose: ThreadKey, *, role: str, content: bytes) -> bytes:
    """A message as it may be stored."""
    return vault.closed(content, tenant_id=whose.tenant_id, owner=whose.key, place=role)


def _opened(vault: Vault, whose: ThreadKey, row: Any) -> bytes | None:
    content: bytes | None = row["content"]
    if content is None:
        return None
    return vault.opened(content, tenant_id=whose.tenant_id, owner=whose.key, place=row["role"])
