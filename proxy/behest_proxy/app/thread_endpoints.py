"""`/v1/threads`: the caller's threads, their messages, and their deletion. Another user's thread is none."""

import time
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response

from behest_ledger.sealing import SealingError
from behest_ledger.store import replay, threads
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.threads import StoredMessage, StoredThread, ThreadKey
from behest_proxy.app.callers import caller_of, project_of
from behest_proxy.app.context import context_of
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.messages import json_response
from behest_proxy.app.replies import LOST
from behest_proxy.app.turns import thread_key
from behest_proxy.chunk import loads
from behest_proxy.errors import InvalidRequest, LedgerUnavailable, MethodNotAllowed, NotFound, ServerError
from behest_proxy.identity.caller import is_session_id
from behest_proxy.threads import EventId, reply_of

LIMIT_DEFAULT = 100
LIMIT_MAX = threads.LISTED_MAX
TURN_WRITTEN_S = 1.0
"""Its client knows of it already. If the store is away it is not waited for longer."""


class ThreadEndpoints:
    """One method an endpoint."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def threads(self, request: Request) -> Response:
        """`GET /v1/threads?limit&before`: the one that was used last comes first."""
        whose = self._whose(request, "")
        before = request.query_params.get("before")
        if before is not None and not is_session_id(before):
            raise InvalidRequest("before: must be a thread's id", param="before")
        limit = _limit(request)
        await self._written(whose)
        try:
            found = await threads.list_threads(self._pool, whose, limit=limit, before=before)
        except LedgerError:
            raise _ledger_away() from None
        return json_response([_thread(one) for one in found])

    async def one(self, request: Request) -> Response:
        """`/v1/threads/{id}` and `/v1/threads/{id}/messages`. An id may have a slash: it is percent-encoded."""
        parts = bytes(request.scope["raw_path"]).partition(b"?")[0].split(b"/")[3:]
        thread_id = unquote(parts[0].decode("latin-1"))
        whose = self._whose(request, thread_id)
        if not is_session_id(thread_id) or len(parts) > 2 or parts[1:] not in ([], [b"messages"]):
            raise _no_thread()
        if not parts[1:]:
            return await self._thread(request, whose)
        if request.method == "DELETE":
            raise MethodNotAllowed("messages are deleted with their thread")
        return await self._messages(request, whose)

    async def _thread(self, request: Request, whose: ThreadKey) -> Response:
        """`GET /v1/threads/{id}`, or its deletion."""
        is_written = await self._written(whose)
        try:
            if request.method == "DELETE":
                if not is_written:
                    raise _ledger_away()  # a turn that is written later would bring back what was deleted
                if not await threads.delete_thread(self._pool, whose):
                    raise _no_thread()
                return Response(status_code=204)
            found = await threads.find_thread(self._pool, whose)
        except LedgerError:
            raise _ledger_away() from None
        if found is None:
            raise _no_thread()
        return json_response(_thread(found))

    async def _messages(self, request: Request, whose: ThreadKey) -> Response:
        """`GET /v1/threads/{id}/messages?limit&before`: the last ones, in the order in which they were said."""
        limit, before = _limit(request), request.query_params.get("before")
        if before is not None and not (before.isascii() and before.isdigit() and len(before) < 10):
            raise InvalidRequest("before: must be a message's id", param="before")
        await self._written(whose)
        try:
            if await threads.find_thread(self._pool, whose) is None:
                raise _no_thread()
            found = await threads.load_messages(
                self._pool,
                whose,
                self._gateway.replies.vault,
                limit=limit,
                before=None if before is None else int(before),
            )
            return json_response([await self._message(whose, one) for one in found])
        except LedgerError:
            raise _ledger_away() from None
        except SealingError as error:
            raise ServerError(f"the thread cannot be read here: {error}") from None

    async def _message(self, whose: ThreadKey, message: StoredMessage) -> dict[str, Any]:
        if message.state == "whole" and message.content is not None:
            said, end = loads(message.content), None
        else:
            said, end = await self._unfinished(whose, message)
        shown = {
            **said,
            "id": message.number,
            "role": message.role,
            "content": said.get("content"),
            "created_at": message.created_at,
            "complete": message.state == "whole",
        }
        return shown if end is None else {**shown, "last_event_id": str(end)}

    async def _unfinished(self, whose: ThreadKey, message: StoredMessage) -> tuple[dict[str, Any], EventId | None]:
        """A reply as far as it is known, and the event that its text ends with; None where it cannot go on.

        Its events come before its own content: that is of the attempt before, while another one is under way. What this
        process has not written yet is in its memory: who loads a page anew sees what he had read.
        """
        generation_id = message.generation_id
        if generation_id is None:
            return {}, None
        events, ending = await replay.load_events(
            self._pool, self._gateway.replies.vault, tenant_id=whose.tenant_id, generation_id=generation_id
        )
        running = self._gateway.replies.running.get(generation_id)
        if running is not None and not running.is_lossy and running.first_event - 1 <= len(events) < running.count:
            events += running.events_after(len(events))
        is_lost = message.state == "whole" or ending == LOST
        if events or message.content is None:
            return reply_of(events), None if is_lost or not events else EventId(generation_id, len(events))
        return loads(message.content), None if is_lost else EventId(generation_id, message.events)

    async def _written(self, whose: ThreadKey) -> bool:
        """What a caller has had of this process he finds in the store. False: it cannot be written just now."""
        return await self._gateway.replies.written(whose, timeout_s=TURN_WRITTEN_S)

    @property
    def _pool(self) -> Any:
        return self._gateway.replies_pool

    def _whose(self, request: Request, thread_id: str) -> ThreadKey:
        context = context_of(request.scope)
        caller = caller_of(self._gateway, context, request.scope["headers"], time.time())
        project_of(self._gateway, caller, context)
        return thread_key(caller, thread_id)


def _limit(request: Request) -> int:
    text = request.query_params.get("limit")
    if text is None:
        return LIMIT_DEFAULT
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= LIMIT_MAX):
        raise InvalidRequest(f"limit: must be from 1 to {LIMIT_MAX}", param="limit")
    return int(text)


def _thread(thread: StoredThread) -> dict[str, Any]:
    return {
        "id": thread.thread_id,
        "object": "thread",
        "messages": thread.messages,
        "created_at": thread.created_at,
        "updated_at": thread.updated_at,
    }


def _no_thread() -> NotFound:
    return NotFound("there is no such thread")


def _ledger_away() -> LedgerUnavailable:
    return LedgerUnavailable("the ledger cannot be reached", retry_after_s=1)
