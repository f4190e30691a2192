"""`POST /v1/chat/completions`: from a verified caller and a body to a conducted exchange."""

import asyncio
import hashlib
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from behest_ledger.configuration.routing import Route, RoutingError, route
from behest_ledger.configuration.snapshot import ProjectEntry
from behest_ledger.holds import Admission, Granted
from behest_ledger.prices.manifest import prices_from_manifest
from behest_ledger.prices.rates import Rates
from behest_ledger.token_counts import TokenCounts
from behest_proxy.actions import Fail, Respond
from behest_proxy.app.callers import caller_of, project_of
from behest_proxy.app.client_stream import ClientStream, QueuedStream, client_stream
from behest_proxy.app.conduct import Conduct
from behest_proxy.app.context import RequestContext, context_of
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.generation import Generation
from behest_proxy.app.messages import JSON, ClientLeftError, read_body, send_answer, send_error
from behest_proxy.app.turns import Call as AskedCall
from behest_proxy.app.turns import Opened, asked_in, memory_of
from behest_proxy.error_codes import ErrorCode
from behest_proxy.errors import Draining, InvalidRequest, ShownError
from behest_proxy.exchange import Exchange
from behest_proxy.holding import HoldPlan, limit_for, plan
from behest_proxy.identity.caller import Caller
from behest_proxy.identity.session import NO_SESSION, session_of
from behest_proxy.models import ModelFacts, facts_for
from behest_proxy.request import ChatRequest, InputCount, count_input, parse, upstream_body
from behest_proxy.terms import Terms
from behest_proxy.threads import with_messages, without_thread
from behest_proxy.tokens import TokenCounter, counter_for
from behest_proxy.upstream import UpstreamRequest

_PROTOCOLS: Mapping[str, Any] = {"Auto": "auto", "HTTP1": "http1", "HTTP2": "http2"}
CONNECT_TIMEOUT_S = 10.0
FIRST_BYTE_TIMEOUT_S = 120.0
IDLE_TIMEOUT_S = 60.0
WHOLE_ANSWER_TIMEOUT_S = 600.0
"""For the first byte of a provider that does not stream: it comes when all is generated."""


class _Model(NamedTuple):
    """What is known of the model that serves a request."""

    route: Route
    rates: Rates
    facts: ModelFacts
    counter: TokenCounter


class _Call(NamedTuple):
    """Whose call it is."""

    context: RequestContext
    caller: Caller
    session: str
    project: ProjectEntry
    thread_id: str | None


class ChatCompletions:
    """The endpoint, an ASGI application."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        gateway = self._gateway
        context = context_of(scope)
        headers = scope["headers"]
        caller = caller_of(gateway, context, headers, time.time())
        _refuse_draining(gateway)
        project = project_of(gateway, caller, context)
        session = session_of(caller, [value for name, value in headers if name == b"x-session-id"])
        if project.require_session and session == NO_SESSION:
            raise InvalidRequest("this project needs a session: send X-Session-Id", param="X-Session-Id")
        asked = asked_in(headers)
        try:
            body = await read_body(receive, headers, bytes_max=gateway.settings.body_bytes_max)
        except ClientLeftError:
            return
        request = parse(body)
        call = _Call(context, caller, session, project, asked.thread_id)
        memory = memory_of(gateway.configuration, project, caller)
        client = client_stream(scope, receive, send)
        if not asked.is_plain:
            if not request.stream:
                asked = msgspec.structs.replace(asked, last_event=None)
            found = self._route_for(project, request, caller)
            looked_up = AskedCall(
                asked=asked,
                caller=caller,
                request=request,
                request_id=context.request_id,
                request_sha256=hashlib.sha256(b"%b\0%b" % ((asked.thread_id or "").encode(), body)).digest(),
                memory=memory,
                found=found,
            )
            await self._kept(call, looked_up, client, send)
            return
        prompted = without_thread(request, memory.system_prompt)
        if prompted is not None:
            request = with_messages(request, prompted)
        conduct = self._conducted(call, request, self._route_for(project, request, caller), client)
        if isinstance(client, QueuedStream):
            await _queued(client, conduct.answered)
        await _send(send, client, await conduct.answered)

    async def _kept(self, call: _Call, asked: AskedCall, client: ClientStream, send: Any) -> None:
        """A call whose reply is kept, or numbered: its client follows a `Generation`."""
        gateway = self._gateway
        opened = await gateway.turns.open(asked)
        generation = opened.generation
        try:
            follower = generation.follow(
                client,
                call.context,
                after=opened.after,
                ids=asked.asked.ids,
                stall_s=gateway.settings.client_stall_s,
            )
            if not opened.is_given:
                self._conducted(call, opened.request, asked.found, generation, opened)
        except ShownError as error:
            gateway.replies.given_up(generation, error)
            raise
        except BaseException:
            gateway.replies.given_up(generation, None)
            raise
        if isinstance(client, QueuedStream):
            await _queued(client, generation.answered)
        answer = await asyncio.shield(generation.answered)
        if answer is None:
            await follower.done
        await _send(send, client, answer)

    def _conducted(
        self,
        call: _Call,
        request: ChatRequest,
        found: Route,
        client: ClientStream | Generation,
        opened: Opened | None = None,
    ) -> Conduct:
        """Begin to give the answer."""
        gateway, context = self._gateway, call.context
        _refuse_draining(gateway)  # its body, or its turn in its thread, may have taken until now
        model = self._model_for(found, request)
        input_count = count_input(request, model.counter, model.facts)
        hold = plan(request, model.facts, model.rates, input_count, upstream_streams=_streams(model))
        provider_key = gateway.provider_keys.of(
            model.route.upstream, project_id=call.project.project_id, provider=_provider(gateway, model.route)
        )
        admission = _admission(gateway, call, model, hold)
        input_counts = TokenCounts(input=input_count.best_tokens)
        conduct = Conduct(
            gateway,
            admission=admission,
            rates=model.rates,
            trace=gateway.memory.begin(admission, input_counts=input_counts, rates=model.rates),
            exchange=lambda grant: _exchange(request, model, hold, input_count, grant, opened),
            upstream_request=lambda grant: _upstream_request(request, model, hold, grant, context, provider_key),
            client=client,
            context=context,
            attempt=opened.attempt if opened is not None else 1,
            report=gateway.telemetry.begin(
                context,
                admission,
                provider=_provider(gateway, model.route),
                base_url=model.route.upstream.spec.base_url,
                streamed=request.stream,
            ),
        )
        if isinstance(client, Generation):
            gateway.replies.begin(client)
        gateway.conduct(conduct)
        return conduct

    def _route_for(self, project: ProjectEntry, request: ChatRequest, caller: Caller) -> Route:
        gateway = self._gateway
        tier = gateway.configuration.tier(project, caller.tier)
        try:
            return route(gateway.configuration, project, request.model, tier=tier)
        except RoutingError as error:
            raise InvalidRequest(error.message, param="model") from None

    def _model_for(self, found: Route, request: ChatRequest) -> _Model:
        gateway = self._gateway
        facts = _facts(found)
        return _Model(found, _rates(gateway, found, request, facts), facts, counter_for(found.upstream_name))


def _refuse_draining(gateway: Gateway) -> None:
    if gateway.draining:
        raise Draining("this process is going away; ask again", retry_after_s=1)


async def _send(send: Any, client: ClientStream, answer: Respond | Fail | None) -> None:
    if answer is None or client.gone:
        return
    if isinstance(answer, Fail):
        await send_error(send, answer.error)
    else:
        await send_answer(send, answer.status, answer.body, [JSON, *answer.headers])


async def _queued(client: QueuedStream, answered: asyncio.Future[Respond | Fail | None]) -> None:
    """Send and watch under a server without direct writes, until the answer is decided."""
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(client.watch())
        sending = group.create_task(client.run())
        answer = await asyncio.shield(answered)
        watching.cancel()
        if answer is not None or client.gone:
            sending.cancel()


def _rates(gateway: Gateway, found: Route, request: ChatRequest, facts: ModelFacts) -> Rates:
    """The prices of this request, fixed for its life.

    Raises `InvalidRequest` where it has none: for the model, for the service it asks, or for what it brings.
    """
    entry = found.entry
    if entry is not None:
        rates = prices_from_manifest(entry, upstream=found.upstream.qualified_name)
        if rates is not None:
            # The resource states one price: that of the ordinary service.
            context = {name: value for name, value in request.price_context.items() if name != "cache_ttl"}
            if not rates.free:
                _refuse_unpriced(_chosen(context), request, found.model)
            return rates
    rates = None
    if gateway.book is not None:
        book, at = gateway.book, datetime.now(UTC)
        provider = found.provider or book.provider_for_url(found.upstream.spec.base_url)
        context = _chosen({**(entry.price_context if entry is not None else {}), **request.price_context})
        unpriced = book.unpriced(provider, found.upstream_name, context, at=at)
        if "cache_ttl" in unpriced:
            del context["cache_ttl"]  # this provider has one price for all that it caches, or caches nothing
            unpriced.remove("cache_ttl")
        rates = book.resolve(provider, found.upstream_name, at=at, context=context)
        if rates is not None:
            _refuse_unpriced(unpriced, request, found.model)
    if rates is None or (facts.searches and not rates.request_pico and not rates.free):
        raise InvalidRequest(
            f"the model {found.model!r} has no price here: price it on its Upstream, or say that it is free",
            code=ErrorCode.UNPRICED_MODEL,
            param="model",
        )
    if rates.text_only and not request.bounded_input:
        raise InvalidRequest(
            f"messages: of the model {found.model!r} only text has a price here",
            code=ErrorCode.UNPRICED_MODEL,
            param="messages",
        )
    return rates


def _provider(gateway: Gateway, found: Route) -> str:
    """Whose key a project would bring: the price book's id, for an address it does not know the Upstream's name."""
    of_address = gateway.book.provider_for_url(found.upstream.spec.base_url) if gateway.book is not None else None
    return found.provider or of_address or found.upstream.name


def _chosen(context: Mapping[str, str]) -> dict[str, str]:
    """A price context without what says that it is the ordinary price."""
    return {name: value for name, value in context.items() if value != "default"}


def _refuse_unpriced(names: Iterable[str], request: ChatRequest, model: str) -> None:
    for name in names:
        param = name if name in request.price_context else "model"
        value = request.price_context.get(name, "as its Upstream says")
        raise InvalidRequest(
            f"{name}: {value[:40]!r} has no price here for the model {model!r}",
            code=ErrorCode.UNPRICED_MODEL,
            param=param,
        )


def _facts(found: Route) -> ModelFacts:
    facts = facts_for(found.upstream_name)
    entry = found.entry
    if entry is None:
        return facts
    said = {
        "visible_only": entry.visible_only,
        "context_limit_tokens": entry.context_limit,
        "output_limit_tokens": entry.output_limit,
    }
    said = {name: value for name, value in said.items() if value is not None}
    return msgspec.structs.replace(facts, **said) if said else facts


def _admission(gateway: Gateway, call: _Call, model: _Model, hold: HoldPlan) -> Admission:
    caller, project = call.caller, call.project
    attribution = project.spec.attribution
    attributes: dict[str, Any] = {
        "namespace": project.namespace,
        "project": project.project_id,
        "user": caller.user_id,
        "session": call.session,
        "model": model.route.model,
        "upstream": model.route.upstream.qualified_name,
        "upstream_model": model.route.upstream_name,
    }
    if call.thread_id is not None:
        attributes["thread"] = call.thread_id
    if model.route.upstream.spec.byok:
        attributes["byok"] = True  # the provider bills the tenant itself
    tier = gateway.configuration.tier(project, caller.tier)
    if tier is not None:
        attributes["tier"] = tier.name
    if gateway.workload is not None:
        attributes["workload"] = gateway.workload.qualified_name
        attributes["labels"] = dict(gateway.workload.labels)
    if attribution is not None:
        for name in ("team", "cost_center"):
            value = getattr(attribution, name)
            if value is not None:
                attributes[name] = value
    return Admission(
        tenant_id=caller.tenant_id,
        request_id=call.context.request_id,
        holder_id=gateway.holder.holder_id,
        attributes=attributes,
        price_key=model.rates.price_key,
        input_tokens=hold.input_tokens,
        input_amount_pico=hold.input_amount_pico,
        output_rate_pico=hold.output_rate_pico,
        need_tokens=hold.need_tokens,
        want_tokens=hold.want_tokens,
        shares=hold.shares,
    )


def _exchange(
    request: ChatRequest,
    model: _Model,
    hold: HoldPlan,
    input_count: InputCount,
    grant: Granted | None,
    opened: Opened | None,
) -> Exchange:
    granted_tokens = grant.output_tokens if grant is not None else hold.want_tokens
    limit = limit_for(hold, granted_tokens=granted_tokens, choices=request.choices)
    stated = model.route.entry.hidden_tokens_per_second if model.route.entry is not None else None
    hidden = model.facts.hidden_tokens_per_second if stated is None else stated
    return Exchange(
        Terms(
            streamed=request.stream,
            upstream_streams=_streams(model),
            include_usage=request.include_usage,
            kept=opened is not None,
            said=opened.said if opened is not None else (),
            choices=request.choices,
            input_bound_tokens=hold.input_tokens,
            input_counts=TokenCounts(input=input_count.best_tokens),
            count=model.counter.count,
            ratio=model.counter.ratio,
            amount_pico=model.rates.amount_pico,
            metered=hold.metered,
            clamp_tokens=limit.send_tokens if limit.lowered_by_budget else None,
            cap_tokens=limit.cap_tokens,
            hidden_tokens_per_second=0 if hold.metered else hidden,
        )
    )


def _upstream_request(
    request: ChatRequest,
    model: _Model,
    hold: HoldPlan,
    grant: Granted,
    context: RequestContext,
    provider_key: str | None,
) -> UpstreamRequest:
    spec = model.route.upstream.spec
    limit = limit_for(hold, granted_tokens=grant.output_tokens, choices=request.choices)
    headers = [
        (b"content-type", b"application/json"),
        (b"accept", b"text/event-stream" if _streams(model) else b"application/json"),
        # Without it a provider may answer in any coding (RFC 9110, section 12.5.3), and nobody here undoes one.
        (b"accept-encoding", b"identity"),
        (b"user-agent", b"behest"),
        (b"x-request-id", str(context.request_id).encode()),
        *context.call_headers(),
    ]
    if provider_key is not None:
        headers.append((b"authorization", b"Bearer " + provider_key.encode()))
    return UpstreamRequest(
        method="POST",
        url=spec.base_url.rstrip("/") + "/chat/completions",
        headers=headers,
        body=upstream_body(
            request,
            model=model.route.upstream_name,
            ask_usage=spec.capabilities.usage_in_stream,
            clamp_field=model.facts.clamp_field,
            clamp_tokens=limit.send_tokens,
            streams=_streams(model),
        ),
        protocol=_PROTOCOLS[spec.protocol],
        connect_timeout_s=spec.timeouts.connect_seconds or CONNECT_TIMEOUT_S,
        first_byte_timeout_s=spec.timeouts.first_byte_seconds
        or (FIRST_BYTE_TIMEOUT_S if _streams(model) else WHOLE_ANSWER_TIMEOUT_S),
        idle_timeout_s=spec.timeouts.idle_seconds or IDLE_TIMEOUT_S,
    )


def _streams(model: _Model) -> bool:
    return model.route.upstream.spec.capabilities.streams
