"""The client for asyncio."""

from collections.abc import Iterable
from typing import Any, Literal, Self, Unpack, overload

import httpx2
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from behest import calls
from behest.async_stream import ChatStream
from behest.async_transport import AsyncTransport
from behest.calls import Granularity, Moment, Whom
from behest.retries import RETRIES_DEFAULT
from behest.settings import Settings, resolve
from behest.shapes import BillingUsage, Budget, Thread, ThreadMessage, Usage
from behest.tokens import CACHE_SIZE_DEFAULT, Token

__all__ = ["Behest"]

TIMEOUT_S = 600.0
IDLE_TIMEOUT_S = 150.0
CONNECT_TIMEOUT_S = 10.0
CONNECTIONS_MAX = 1000
# `list` is a method's name in the classes below.
ThreadList = list[Thread]
MessageList = list[ThreadMessage]
BudgetList = list[Budget]
ModelList = list[Model]


class Completions:
    """`behest.chat.completions`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    @overload
    async def create(
        self,
        *,
        messages: Iterable[ChatCompletionMessageParam],
        stream: Literal[True],
        model: str | None = None,
        **options: Any,
    ) -> ChatStream: ...

    @overload
    async def create(
        self,
        *,
        messages: Iterable[ChatCompletionMessageParam],
        stream: Literal[False] | None = None,
        model: str | None = None,
        **options: Any,
    ) -> ChatCompletion: ...

    async def create(
        self,
        *,
        messages: Iterable[ChatCompletionMessageParam],
        stream: bool | None = None,
        model: str | None = None,
        **options: Any,
    ) -> ChatStream | ChatCompletion:
        """A completion: streamed (returns when it has begun), or whole.

        Without `model` the project's default answers. `options` are those of `ChatOptions` (`user_id`, `session_id`,
        `thread_id` ...), and every other member of the request as OpenAI names it (`temperature`, `tools` ...).
        Chunks without choices are skipped, unless `stream_options={"include_usage": True}` asks for them.
        Raises `BehestError`.
        """
        call = calls.chat_call(messages, is_stream=bool(stream), model=model, options=options)
        if not stream:
            return calls.completion(await self._transport.whole(call))
        begun = ChatStream(self._transport.connect, call, self._transport.retries())
        await begun.begin()
        return begun


class Chat:
    """`behest.chat`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self.completions = Completions(transport)


class Auth:
    """`behest.auth`: tokens to hand out, such as to the browser of a user."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def mint(self, **whom: Unpack[Whom]) -> Token:
        """A token for a user. The one that is kept, while it is good for at least a minute."""
        return await self._transport.token(calls.identity_of(self._transport.settings, whom))


class Threads:
    """`behest.threads`: the conversations of a user that the gateway keeps."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def list(self, *, limit: int | None = None, before: str | None = None, **whom: Unpack[Whom]) -> ThreadList:
        """The user's threads, newest first; `before` is the id of a thread on the page before."""
        return await self._transport.perform(calls.list_threads(limit, before), whom)

    async def get(self, thread_id: str, **whom: Unpack[Whom]) -> Thread:
        """One thread. Raises `BehestNotFoundError`, also when it is another user's."""
        return await self._transport.perform(calls.get_thread(thread_id), whom)

    async def messages(
        self, thread_id: str, *, limit: int | None = None, before: str | None = None, **whom: Unpack[Whom]
    ) -> MessageList:
        """What was said in a thread, oldest first."""
        return await self._transport.perform(calls.thread_messages(thread_id, limit, before), whom)

    async def delete(self, thread_id: str, **whom: Unpack[Whom]) -> None:
        """Delete a thread and everything in it."""
        await self._transport.perform(calls.delete_thread(thread_id), whom)


class UsageReports:
    """`behest.usage`: what a user has used."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def get(
        self,
        *,
        from_: Moment | None = None,
        to: Moment | None = None,
        granularity: Granularity = "day",
        tz: str | None = None,
        **whom: Unpack[Whom],
    ) -> Usage:
        """By time: without `from_` the 30 days before `to`, without `to` until now. `tz` says where days begin."""
        return await self._transport.perform(calls.usage(from_, to, granularity, tz), whom)


class Billing:
    """`behest.billing`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def usage(
        self, *, from_: Moment | None = None, to: Moment | None = None, **whom: Unpack[Whom]
    ) -> BillingUsage:
        """By model and session: the user's own, with `role="admin"` the whole project's."""
        return await self._transport.perform(calls.billing_usage(from_, to), whom)


class Budgets:
    """`behest.budgets`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def list(self, **whom: Unpack[Whom]) -> BudgetList:
        """The budgets that bind a user in a session, and what is left of them."""
        return await self._transport.perform(calls.budgets(), whom)


class Models:
    """`behest.models`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def list(self, **whom: Unpack[Whom]) -> ModelList:
        """The models that the project may use."""
        return await self._transport.perform(calls.models(), whom)


class Behest:
    """A client of one project, for asyncio. Make one and keep it: it keeps tokens and connections."""

    def __init__(
        self,
        *,
        key: str | None = None,
        base_url: str | None = None,
        user_id: str | None = None,
        ttl: int | None = None,
        tier: int | str | None = None,
        issuer: str | None = None,
        audience: str | None = None,
        kid: str | None = None,
        tenant_id: str | None = None,
        project_id: str | None = None,
        timeout: float = TIMEOUT_S,
        idle_timeout: float = IDLE_TIMEOUT_S,
        max_retries: int = RETRIES_DEFAULT,
        max_tokens_kept: int = CACHE_SIZE_DEFAULT,
        http_client: httpx2.AsyncClient | None = None,
    ) -> None:
        """What is not given comes from the environment: `BEHEST_KEY`, `BEHEST_BASE_URL` ... (README).

        `timeout` and `idle_timeout` are seconds of silence: before an answer, whole or a stream, and in a stream, where
        the gateway is never silent for more than 15 s once the provider has begun. Raises `BehestConfigError`.
        """
        settings = resolve(
            key=key,
            base_url=base_url,
            user_id=user_id,
            ttl_s=ttl,
            tier=tier,
            issuer=issuer,
            audience=audience,
            kid=kid,
            tenant_id=tenant_id,
            project_id=project_id,
        )
        http = http_client or httpx2.AsyncClient(
            timeout=httpx2.Timeout(timeout, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=100),
        )
        self._transport = AsyncTransport(
            settings,
            http,
            retries_max=max_retries,
            tokens_max=max_tokens_kept,
            timeout_s=timeout,
            idle_timeout_s=idle_timeout,
        )
        self.auth = Auth(self._transport)
        self.chat = Chat(self._transport)
        self.threads = Threads(self._transport)
        self.usage = UsageReports(self._transport)
        self.billing = Billing(self._transport)
        self.budgets = Budgets(self._transport)
        self.models = Models(self._transport)

    @property
    def settings(self) -> Settings:
        """What this client was made of."""
        return self._transport.settings

    async def aclose(self) -> None:
        """Close the connections, also those of a given `http_client`."""
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
