"""One streamed answer over all of its connections: what it has said, how it ended, where to go on. Pure.

A stream is whole when `[DONE]` came, or when every choice has finished. Anything else is a cut, also a clean end of the
body: unlike the `openai` package, which takes that for success.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from openai.types.chat import ChatCompletionChunk

from behest.errors import BehestConnectionError, BehestError, BehestServerError, event_error
from behest.sse import Event, EventReader, EventTooLargeError

__all__ = ["Reply"]

_EVENT_ID = re.compile(r"(.+)-([0-9]{1,18})")
"""`<generation>-<n>`: a generation is one call of the provider, and its chunks are numbered."""


class Reply:
    """The state of one answer. `receive` and `ended` tell what comes; `failure` and `is_over` how it stands."""

    def __init__(self, *, choices: int = 1, wants_usage: bool = False, last_event_id: str | None = None) -> None:
        self._texts: list[str] = []
        self.last_event_id = last_event_id
        """The last chunk that was given out, here or to whom broke off before, as the gateway names it."""
        self.failure: BehestError | None = None
        """Of this connection."""
        self.is_over = False
        """`[DONE]` came, or a failure: nothing more is read from this connection."""
        self._choices = choices
        self._wants_usage = wants_usage
        self._finished: set[int] = set()
        self._reader = EventReader()
        self._headers: Mapping[str, str] = {}
        self._continues = False
        """This connection goes on where another one broke off."""
        self._said = last_event_id is not None
        """A chunk was given out."""

    @property
    def text(self) -> str:
        """What the first choice has said, behind the place where it began."""
        return "".join(self._texts)

    @property
    def can_continue(self) -> bool:
        """Whether another connection can go on without a gap: nothing was said yet, or it is known up to where."""
        return not self._said or self.last_event_id is not None

    @property
    def is_whole(self) -> bool:
        """Every choice has finished."""
        return len(self._finished) >= self._choices

    def connected(self, headers: Mapping[str, str]) -> None:
        """A connection, the first or another one, begins to answer."""
        self._continues = self._said
        self._reader, self._headers = EventReader(), headers
        self.failure, self.is_over = None, False

    def receive(self, data: bytes) -> list[ChatCompletionChunk]:
        """The chunks that these bytes complete, in order. Afterwards `is_over` and `failure` say how it stands."""
        chunks: list[ChatCompletionChunk] = []
        try:
            for event in self._reader.feed(data):
                if self.is_over:
                    break
                chunk = self._event(event)
                if chunk is not None:
                    chunks.append(chunk)
        except EventTooLargeError as error:
            self._fail(BehestServerError(str(error), code="invalid_stream"))
        return chunks

    def ended(self, cause: str = "the stream ended before the answer did") -> None:
        """The connection has ended, cleanly or not."""
        if not self.is_over:
            self.is_over = True
            if not self.is_whole:
                self._fail(BehestConnectionError(cause, code="stream_cut", **self._traced()))

    def _event(self, event: Event) -> ChatCompletionChunk | None:
        if event.data.startswith("[DONE]"):
            self.is_over = True
            return None
        try:
            members: object = json.loads(event.data)
        except (ValueError, RecursionError):
            members = None
        if not isinstance(members, dict):
            self._fail(BehestServerError("an event of the stream is no JSON object", code="invalid_stream"))
            return None
        return self._members(cast("dict[str, Any]", members), event.id)

    def _members(self, members: dict[str, Any], event_id: str | None) -> ChatCompletionChunk | None:
        error = members.get("error")
        if error:
            told = cast("dict[str, Any]", error) if isinstance(error, dict) else {"message": str(error)}
            self._fail(event_error(told, self._headers))
            return None
        if not self._is_new(event_id):
            return None
        if event_id is not None:
            self.last_event_id = event_id
        chunk = ChatCompletionChunk.model_construct(**_with_deltas(members))
        self._continues = False
        if not chunk.choices and not self._wants_usage:
            return None
        self._said = True
        for choice in chunk.choices:
            if choice.index == 0 and isinstance(choice.delta.content, str):
                self._texts.append(choice.delta.content)
            if choice.finish_reason is not None:
                self._finished.add(choice.index)
        return chunk

    def _is_new(self, event_id: str | None) -> bool:
        """Whether this chunk was not given out before. A gap, or a chunk of unknown place, is a failure."""
        if self.last_event_id is None:
            return True
        last, this = _EVENT_ID.fullmatch(self.last_event_id), _EVENT_ID.fullmatch(event_id or "")
        if self._continues and this is None:
            message = "the gateway began anew instead of going on: it does not keep this thread"
            self._fail(BehestServerError(message, code="cannot_resume", may_retry=False, **self._traced()))
            return False
        if last is None or this is None or last[1] != this[1]:
            return True
        if self._continues and int(this[2]) > int(last[2]) + 1:
            message = "the gateway no longer has what was lost with the connection"
            self._fail(BehestServerError(message, code="cannot_resume", may_retry=False, **self._traced()))
            return False
        return int(this[2]) > int(last[2])

    def _traced(self) -> dict[str, Any]:
        return {name: self._headers.get(f"x-{name.replace('_', '-')}") for name in ("trace_id", "request_id")}

    def _fail(self, failure: BehestError) -> None:
        failure.partial_text = self.text
        self.failure, self.is_over = failure, True


def _with_deltas(members: dict[str, Any]) -> dict[str, Any]:
    """The members of a chunk, so that `chunk.choices[0].delta.content` never lacks an attribute on the way."""
    choices: object = members.get("choices")
    found: list[dict[str, Any]] = []
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict):
            known = cast("dict[str, Any]", choice)
            found.append(known if isinstance(known.get("delta"), dict) else {**known, "delta": {}})
    return {**{name: value for name, value in members.items() if not name.startswith("_")}, "choices": found}
