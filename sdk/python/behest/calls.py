"""What is sent for each method of the clients, and what its answer is. Pure: both clients share it."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Generic, Literal, TypedDict, TypeVar, cast
from urllib.parse import quote

import anyio
import httpx2
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from behest._version import __version__
from behest.errors import BehestBadRequestError, BehestConnectionError, BehestError, BehestServerError
from behest.settings import Settings
from behest.shapes import BillingUsage, Budget, Thread, ThreadMessage, Usage
from behest.tokens import Identity, mint_body

__all__ = ["NETWORK_ERRORS", "Call", "ChatCall", "ChatOptions", "Granularity", "Moment", "Whom"]

Answer = TypeVar("Answer")
Granularity = Literal["minute", "hour", "day"]
Moment = datetime | date | str
"""A time, or a text as the gateway reads it: RFC 3339, or a plain date."""

_STREAM_HEADERS = {"accept": "text/event-stream", "x-event-ids": "1"}
"""Ids of events say up to where a stream has come."""
_VISIBLE = re.compile(r"[!-~]{1,255}")
NETWORK_ERRORS = (httpx2.RequestError, OSError, anyio.EndOfStream)
"""The last two come through httpx2 from TLS."""
_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol)


class Whom(TypedDict, total=False):
    """For whom a call is made. Without `user_id` for the client's own (`BEHEST_USER_ID`); None is as absent."""

    user_id: str | None
    session_id: str | None
    role: str | None
    tier: int | str | None
    ttl: int | None
    """Seconds for which the token is good."""
    token: str | None
    """A token that is there already; nothing is minted then, and the others but `session_id` do not count."""


class ChatOptions(Whom, total=False):
    """What a completion is told besides the request itself."""

    thread_id: str | None
    """The conversation that the gateway keeps. With it a cut stream goes on where it broke off."""
    last_event_id: str | None
    """Of a stream of this thread: begin behind this event, as an earlier stream or the thread's messages name it."""
    idempotency_key: str | None
    """The same key with the same request within 24 hours is carried out and charged once."""
    extra_headers: Mapping[str, str] | None
    extra_body: Mapping[str, Any] | None
    """Members of the request that have no argument, or whose name another one has."""
    timeout: float | None
    """Seconds of silence after which the call has failed."""


_OPTIONS = frozenset((*Whom.__annotations__, *ChatOptions.__annotations__))


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One small question."""

    method: Literal["GET", "DELETE"]
    path: str
    parse: Callable[[Any], Answer]
    query: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def is_safe(self) -> bool:
        """Whether it may be asked twice. A deletion that was carried out would be a 404 then."""
        return self.method == "GET"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatCall:
    """One completion, as it is sent."""

    body: bytes
    headers: Mapping[str, str]
    whom: Whom
    choices: int
    wants_usage: bool
    has_thread: bool
    has_key: bool
    last_event_id: str | None
    """Where a stream begins that was broken off before."""
    timeout_s: float | None


def identity_of(settings: Settings, whom: Whom) -> Identity:
    """Whose token a call needs."""
    return Identity(
        user_id=whom.get("user_id") or settings.user_id,
        session_id=whom.get("session_id") or None,
        role=whom.get("role"),
        tier=settings.tier if (tier := whom.get("tier")) is None else tier,
        ttl_s=whom.get("ttl") or settings.ttl_s,
    )


def headers_of(token: str, whom: Whom) -> dict[str, str]:
    """The headers that every call has."""
    headers = {
        "authorization": f"Bearer {token}",
        "accept": "application/json",
        "user-agent": f"behest-python/{__version__}",
    }
    session_id = whom.get("session_id")
    if whom.get("token") and session_id:  # a token that we made has its session in it
        headers["x-session-id"] = _visible("session_id", session_id)
    return headers


def chat_call(
    messages: Iterable[ChatCompletionMessageParam], *, is_stream: bool, model: str | None, options: Mapping[str, Any]
) -> ChatCall:
    """A completion. `options`: those of `ChatOptions`, and every other member of the request.

    Raises `BehestBadRequestError` where something cannot be written down.
    """
    ours = cast("ChatOptions", {name: options[name] for name in _OPTIONS if options.get(name) is not None})
    members: dict[str, Any] = {"messages": list(messages)}
    members |= {name: value for name, value in options.items() if name not in _OPTIONS and not _is_absent(value)}
    members |= ours.get("extra_body") or {}
    members |= {} if model is None else {"model": model}
    members |= {"stream": True} if is_stream else {}
    headers = {name.lower(): value for name, value in (ours.get("extra_headers") or {}).items()}
    headers |= {"content-type": "application/json", **(_STREAM_HEADERS if is_stream else {})}
    if thread_id := ours.get("thread_id"):
        headers["x-thread-id"] = _visible("thread_id", thread_id)
    if idempotency_key := ours.get("idempotency_key"):
        headers["idempotency-key"] = _visible("idempotency_key", idempotency_key)
    try:
        body = json.dumps(members, default=_jsonable, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BehestBadRequestError(f"the request is not JSON: {error}", code="validation_error") from None
    choices, streaming = members.get("n"), members.get("stream_options")
    return ChatCall(
        body=body,
        headers=headers,
        whom=cast("Whom", {name: value for name, value in ours.items() if name in Whom.__annotations__}),
        choices=choices if isinstance(choices, int) else 1,
        wants_usage=isinstance(streaming, dict) and bool(cast("dict[str, Any]", streaming).get("include_usage")),
        has_thread="x-thread-id" in headers,
        has_key="idempotency-key" in headers,
        last_event_id=_visible("last_event_id", last) if (last := ours.get("last_event_id")) else None,
        timeout_s=ours.get("timeout"),
    )


def completion(answer: object) -> ChatCompletion:
    """A whole answer."""
    return ChatCompletion.model_construct(**_object(answer))


def _is_absent(value: object) -> bool:
    """The `openai` package's own words for "not given": whoever wraps its methods passes them on."""
    return type(value).__name__ in ("NotGiven", "Omit") and type(value).__module__.startswith("openai.")


def _visible(name: str, value: str) -> str:
    if not _VISIBLE.fullmatch(value):
        raise BehestBadRequestError(
            f"{name} must be 1-255 visible ASCII characters", code="validation_error", param=name
        )
    return value


def _jsonable(value: object) -> object:
    """Messages of an answer may be sent back as they came."""
    dump = getattr(value, "model_dump", None)
    if dump is None:
        raise TypeError(f"{type(value).__name__} is not JSON")
    return dump(mode="json", exclude_unset=True)


def list_threads(limit: int | None, before: str | None) -> Call[list[Thread]]:
    """The caller's threads, newest first."""
    query = _query(limit=limit, before=before)
    return Call("GET", "/v1/threads", lambda answer: [Thread.model_construct(**row) for row in _rows(answer)], query)


def get_thread(thread_id: str) -> Call[Thread]:
    """One thread."""
    return Call("GET", _thread(thread_id), lambda answer: Thread.model_construct(**_object(answer)))


def delete_thread(thread_id: str) -> Call[None]:
    """A thread and everything in it."""
    return Call("DELETE", _thread(thread_id), lambda _answer: None)


def thread_messages(thread_id: str, limit: int | None, before: str | None) -> Call[list[ThreadMessage]]:
    """What was said in a thread."""
    return Call(
        "GET",
        _thread(thread_id) + "/messages",
        lambda answer: [ThreadMessage.model_construct(**row) for row in _rows(answer)],
        _query(limit=limit, before=before),
    )


def usage(begin: Moment | None, end: Moment | None, granularity: Granularity, tz: str | None) -> Call[Usage]:
    """What was used, by time."""
    query = _query(granularity=granularity, tz=tz, **{"from": _time(begin), "to": _time(end)})
    return Call("GET", "/v1/usage", lambda answer: Usage.model_construct(**_object(answer)), query)


def billing_usage(begin: Moment | None, end: Moment | None) -> Call[BillingUsage]:
    """What was used, by model and session."""
    query = _query(**{"from": _time(begin), "to": _time(end)})
    return Call("GET", "/v1/billing/usage", lambda answer: BillingUsage.model_construct(**_object(answer)), query)


def budgets() -> Call[list[Budget]]:
    """The budgets that bind the caller."""
    return Call("GET", "/v1/budgets", lambda answer: [Budget.model_construct(**row) for row in _data(answer)])


def models() -> Call[list[Model]]:
    """The models that the project may use."""
    return Call("GET", "/v1/models", lambda answer: [Model.model_construct(**row) for row in _data(answer)])


class Parts(TypedDict):
    """What `httpx2` makes a request of."""

    method: str
    url: str
    headers: dict[str, str]
    content: bytes


def mint_request(settings: Settings, identity: Identity, session_id: str) -> Parts:
    """Asks for a token."""
    return Parts(
        method="POST",
        url=settings.base_url + "/v1/auth/mint",
        headers={**headers_of(settings.key, {}), "content-type": "application/json"},
        content=json.dumps(mint_body(identity, session_id)).encode(),
    )


def chat_request(settings: Settings, call: ChatCall, token: str) -> Parts:
    """Asks for a completion."""
    headers = {**headers_of(token, call.whom), **call.headers}
    return Parts(method="POST", url=settings.base_url + "/v1/chat/completions", headers=headers, content=call.body)


def decoded(body: bytes) -> Any:
    """The JSON of a good answer; None where it has no body. Raises `BehestServerError`."""
    if not body:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise BehestServerError("the answer is not JSON", code="invalid_answer", may_retry=False) from None


def network_failure(error: Exception) -> BehestError:
    """What went wrong on the way."""
    sent = not isinstance(error, _NEVER_SENT)
    return BehestConnectionError(f"{type(error).__name__}: {error}".rstrip(": "), request_sent=sent)


def _thread(thread_id: str) -> str:
    return "/v1/threads/" + quote(_visible("thread_id", thread_id), safe="")


def _query(**members: str | int | None) -> dict[str, str]:
    return {name: str(value) for name, value in members.items() if value is not None}


def _time(moment: Moment | None) -> str | None:
    return moment if moment is None or isinstance(moment, str) else moment.isoformat()


def _object(answer: object) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise BehestServerError("the answer is not what this gateway answers", code="invalid_answer")
    return cast("dict[str, Any]", answer)


def _rows(answer: object) -> list[dict[str, Any]]:
    if not isinstance(answer, list):
        raise BehestServerError("the answer is not what this gateway answers", code="invalid_answer")
    return [_object(row) for row in cast("list[object]", answer)]


def _data(answer: object) -> list[dict[str, Any]]:
    return _rows(_object(answer).get("data"))
