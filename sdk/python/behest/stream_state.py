"""What a stream of either client knows and decides; the clients' own classes read and wait. No I/O."""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from uuid import uuid4

from openai.types.chat import ChatCompletionChunk

from behest.calls import ChatCall
from behest.errors import BehestConnectionError, BehestError
from behest.reply import Reply
from behest.retries import IN_PROGRESS, Retries

__all__ = ["DRAIN_S", "StreamState"]

DRAIN_S = 0.1
"""The end of the body comes with `[DONE]`; a connection that makes us wait for it longer is not worth keeping."""


class StreamState:
    """The state of one answer as its caller sees it."""

    def __init__(self, call: ChatCall, retries: Retries) -> None:
        self._call = call
        self._retries = retries
        self._reply = Reply(choices=call.choices, wants_usage=call.wants_usage, last_event_id=call.last_event_id)
        # Until the first event there is no place to name: the key is what makes a repeated call the same call.
        self._key = str(uuid4()) if call.has_thread and not call.has_key else None
        self._pending: deque[ChatCompletionChunk] = deque()
        self._headers: Mapping[str, str] | None = None
        """Of the last answer; None: there was none yet."""
        self._is_ended = False
        """Everything was given out, or an error was."""
        self._is_left = False
        """The caller closed it before."""

    @property
    def text(self) -> str:
        """What the first choice has said so far."""
        return self._reply.text

    @property
    def last_event_id(self) -> str | None:
        """The last chunk that came, as the gateway names it."""
        return self._reply.last_event_id

    @property
    def request_id(self) -> str | None:
        """The id of the (last) request in the gateway's books."""
        return self._headers.get("x-request-id") if self._headers is not None else None

    @property
    def trace_id(self) -> str | None:
        """The id of the (last) request's trace."""
        return self._headers.get("x-trace-id") if self._headers is not None else None

    def _next_call(self) -> ChatCall:
        """The call as the next connection makes it: behind the last event that came, or under the key."""
        last_event_id = self._reply.last_event_id
        if last_event_id is not None:
            more = {"last-event-id": last_event_id}
        else:
            more = {"idempotency-key": self._key} if self._key is not None else {}
        return replace(self._call, headers={**self._call.headers, **more})

    def _begun(self, headers: Mapping[str, str]) -> None:
        self._headers = headers
        self._reply.connected(headers)

    def _received(self, data: bytes) -> None:
        chunks = self._reply.receive(data)
        self._pending.extend(chunks)
        if chunks:
            self._retries.progressed()

    def _check_open(self) -> None:
        if self._is_left:
            raise BehestError("this stream was left before its end", code="stream_closed")

    def _leave(self) -> None:
        self._is_left = not self._is_ended
        self._pending.clear()

    def _wait_s(self, failure: BehestError) -> float:
        """How long to wait before the next connection. Raises the failure, for good, where there shall be none."""
        wait_s = self._retries.wait_s(failure, is_safe=self._may_repeat(failure))
        if wait_s is None:
            self._is_ended = True
            failure.partial_text = self._reply.text
            raise failure
        # What was answered was a call, and the next one is another; but for one that another sidecar still carries out.
        if self._key is not None and failure.status is not None and failure.code != IN_PROGRESS:
            self._key = str(uuid4())
        return wait_s

    def _may_repeat(self, failure: BehestError) -> bool:
        if self._headers is None:  # an answer with an error has charged nothing; no answer may have
            known = not isinstance(failure, BehestConnectionError)
            return known or self._call.has_thread or self._call.has_key
        return self._call.has_thread and self._reply.can_continue
