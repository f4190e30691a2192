"""The owner of a request, where only its parts are real."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from behest_ledger.charging import Outcome
from behest_ledger.holds import Admission, Answer, Granted, Settlement
from behest_ledger.prices.rates import ClassRates, Rates
from behest_ledger.store.credit import Account, AnswerCall
from behest_ledger.token_counts import TokenCounts
from behest_proxy.app.conduct import Conduct
from behest_proxy.app.context import RequestContext
from behest_proxy.app.generation import Generation
from behest_proxy.app.memory import Memory
from behest_proxy.app.report import NoReport
from behest_proxy.errors import LedgerUnavailable
from behest_proxy.exchange import Exchange
from behest_proxy.sse import DONE
from behest_proxy.terms import Terms
from behest_proxy.upstream import UpstreamHandler, UpstreamRequest
from behest_proxy.upstream.live_call import LiveCall
from behest_proxy.upstream.prepared import prepare

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n'
CLIENT_STALL_S = KEEP_ALIVE_S = 60.0
RATES = Rates(price_key="test", base=ClassRates.of({"input": 1, "output": 1}))


class _Call:
    paused = False

    def cancel(self) -> None: ...

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


class _Client:
    def __init__(self) -> None:
        self.on_gone: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None
        self.paused = self.gone = False
        self.written = b""
        self.over = ""

    def begin(self, status: int, headers: Any) -> None: ...

    def write(self, data: bytes) -> None:
        self.written += data

    def end(self) -> None:
        self.over = "end"

    def reset(self) -> None:
        self.over = "reset"


def _nothing(_account: Account) -> None: ...


class _Gateway:
    """A gateway with one request; the credit desk remembers whom to answer."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(keep_alive_s=KEEP_ALIVE_S, client_stall_s=CLIENT_STALL_S)
        self.holder = SimpleNamespace(lives=True)
        self.call = _Call()
        self.upstream = SimpleNamespace(send=self._send)
        self.writer = SimpleNamespace(submit=self._submit)
        self.desk = SimpleNamespace(open=self._open, ask=self._ask, ended=_nothing)
        self.handler: UpstreamHandler | None = None
        self.settlements: list[Settlement] = []
        self.asked: list[AnswerCall] = []
        self.conduct: Conduct | None = None

    async def admit(self, admission: Admission) -> Answer:
        return Granted(output_tokens=16)

    def lose_all(self) -> None:
        assert self.conduct is not None
        self.conduct.stop(Outcome.LEDGER_UNAVAILABLE, LedgerUnavailable("too late"))

    def ended(self, conduct: Conduct) -> None: ...

    def _send(self, _request: Any, handler: UpstreamHandler) -> _Call:
        self.handler = handler
        return self.call

    def _submit(self, settlement: Settlement) -> None:
        self.settlements.append(settlement)

    def _open(self, tenant_id: str, request_id: UUID, windows: tuple[int, ...]) -> Account:
        return Account(tenant_id, request_id, windows)

    def _ask(self, account: Account, *, answer: AnswerCall, **_: Any) -> None:
        self.asked.append(answer)


class _Report(NoReport):
    """Notes whether a first byte was told of."""

    def __init__(self) -> None:
        self.first_bytes = 0

    def first_byte(self) -> None:
        self.first_bytes += 1


async def _streaming(
    client: _Client | Generation, *, status: int = 200, report: NoReport | None = None
) -> tuple[_Gateway, Conduct]:
    """A stream of up to sixteen tokens whose provider has begun to answer."""
    gateway = _Gateway()
    terms = Terms(
        streamed=True, include_usage=False, choices=1, input_bound_tokens=3, input_counts=TokenCounts(input=3),
        count=len, ratio=1.0, amount_pico=RATES.amount_pico, metered=False,
    )  # fmt: skip
    admission = Admission(
        tenant_id="acme", request_id=UUID(int=1 << 64 | 1), holder_id=UUID(int=2), attributes={}, price_key="test",
        input_tokens=3, input_amount_pico=3, output_rate_pico=1, need_tokens=1, want_tokens=16, shares=1,
    )  # fmt: skip
    trace = Memory(None).begin(admission, input_counts=TokenCounts(input=3), rates=RATES)
    conduct = gateway.conduct = Conduct(
        cast(Any, gateway), admission=admission, rates=RATES, trace=trace, exchange=lambda grant: Exchange(terms),
        upstream_request=lambda grant: cast(Any, None), client=cast(Any, client), context=RequestContext(()),
        report=report,
    )  # fmt: skip
    await conduct.admit()
    conduct.on_request_sent()
    conduct.on_head(status, [(b"content-type", b"text/event-stream")])
    return gateway, conduct


async def _short_of_credit() -> tuple[_Gateway, _Client, Conduct]:
    """A stream that got ten tokens of sixteen and waits with ten more."""
    client = _Client()
    gateway, conduct = await _streaming(client)
    conduct.on_data(CHUNK % (b"~" * 10))
    conduct.on_data(CHUNK % (b"+" * 10))
    assert client.written.count(b"~") == 10
    return gateway, client, conduct


def test_a_grant_lets_the_kept_chunk_through() -> None:
    async def main() -> None:
        gateway, client, _ = await _short_of_credit()
        gateway.asked[-1](Granted(output_tokens=512))
        assert client.written.count(b"+") == 10

    asyncio.run(main())


def test_a_grant_that_reaches_a_holder_after_its_deadline_passes_nothing_on() -> None:
    async def main() -> None:
        gateway, client, _ = await _short_of_credit()
        gateway.holder.lives = False
        gateway.asked[-1](Granted(output_tokens=512))
        assert client.written.count(b"+") == 0
        (settlement,) = gateway.settlements
        assert (settlement.outcome, settlement.output_tokens) == ("ledger_unavailable", 10)

    asyncio.run(main())


@pytest.mark.parametrize(("status", "told"), [(200, 1), (429, 0)])
def test_only_a_successful_answer_has_a_first_byte(status: int, told: int) -> None:
    """Else a crash in the middle of a refusal's body would charge the input."""
    report = _Report()

    async def main() -> None:
        _, conduct = await _streaming(_Client(), status=status, report=report)
        conduct.on_data(CHUNK % b"~")
        conduct.on_data(CHUNK % b"~")

    asyncio.run(main())
    assert report.first_bytes == told


class _Clock:
    """The running loop's time, which passes only when it is told to."""

    def __init__(self) -> None:
        self._now_s = 0.0
        cast(Any, asyncio.get_running_loop()).time = lambda: self._now_s

    async def passes(self, seconds: float) -> None:
        self._now_s += seconds
        await asyncio.sleep(0)  # timers that are due are found
        await asyncio.sleep(0)  # and run


def _follow(generation: Generation, client: _Client) -> None:
    generation.follow(cast(Any, client), RequestContext(()), after=0, ids=False, stall_s=CLIENT_STALL_S)


def test_a_client_that_joins_a_stalled_reply_gets_all_of_it() -> None:
    async def main() -> None:
        generation, stuck, joined = Generation(generation_id=uuid4(), tenant_id="acme"), _Client(), _Client()
        clock = _Clock()
        _follow(generation, stuck)
        gateway, conduct = await _streaming(generation)
        stuck.paused = True
        conduct.on_data(CHUNK % b"~")
        assert gateway.call.paused
        _follow(generation, joined)
        assert not gateway.call.paused
        conduct.on_data(CHUNK % b"+")
        await clock.passes(2 * CLIENT_STALL_S)
        assert (joined.written.count(b"~"), joined.written.count(b"+"), joined.over) == (1, 1, "")
        assert not gateway.settlements

    asyncio.run(main())


def test_a_client_that_takes_what_it_lacks_slowly_is_not_stuck_and_one_that_stops_is() -> None:
    async def main() -> None:
        generation, client = Generation(generation_id=uuid4(), tenant_id="acme"), _Client()
        clock = _Clock()
        _follow(generation, client)
        gateway, conduct = await _streaming(generation)
        client.paused = True
        conduct.on_data(CHUNK % b"~")
        for _ in range(4):  # longer than the time in all, and each time something was taken
            await clock.passes(CLIENT_STALL_S / 2)
            assert client.on_resume is not None
            client.on_resume()  # it took some, and is full again with what it was given at once
        assert (client.over, gateway.settlements, gateway.call.paused) == ("", [], True)
        await clock.passes(CLIENT_STALL_S)
        assert client.over == "reset"
        (settlement,) = gateway.settlements
        assert settlement.outcome == "client_cancelled"

    asyncio.run(main())


def test_a_client_that_is_cut_by_what_it_lacked_leaves_no_timer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        clock = _Clock()
        generation = Generation(generation_id=uuid4(), tenant_id="acme", events=[CHUNK % b"."])
        client, signs_of_life = _Client(), list[bytes]()

        def cut(_data: bytes) -> None:
            client.gone = True
            assert client.on_gone is not None
            client.on_gone()

        monkeypatch.setattr(client, "write", cut)
        monkeypatch.setattr(generation, "write", signs_of_life.append)
        _follow(generation, client)
        gateway, _ = await _streaming(generation)
        (settlement,) = gateway.settlements
        assert settlement.outcome == "client_cancelled"
        for _ in range(2):
            await clock.passes(KEEP_ALIVE_S)
        assert signs_of_life == []

    asyncio.run(main())


class _Bug(Exception):
    """What nobody expects."""


def _fails(*_: Any) -> Any:
    raise _Bug


def _upstream(gateway: _Gateway) -> LiveCall:
    """The upstream client's side of the call, as a connection has it."""
    assert gateway.handler is not None
    request = prepare(UpstreamRequest(method="POST", url="http://provider.test/", headers=[]))
    return LiveCall(request, gateway.handler, loop=asyncio.get_running_loop(), requeue=lambda _: None)


@pytest.mark.parametrize("where", ["passes", "parsed", "upstream_end", "upstream_failed", "credit"])
def test_a_bug_on_the_way_of_a_chunk_ends_the_request_properly(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        client = _Client()
        gateway, _ = await _streaming(client)
        upstream = _upstream(gateway)
        upstream.data(CHUNK % (b"~" * 10))
        if where == "credit":
            upstream.data(CHUNK % (b"secret" * 2))
        monkeypatch.setattr(Exchange, where, _fails)
        match where:
            case "passes":
                upstream.data(CHUNK % b"secret")
            case "parsed":
                upstream.data(b"data: secret")
            case "upstream_end":
                upstream.end()
            case "upstream_failed":
                upstream.fail("reset", "the peer reset the stream")
            case _:
                gateway.asked[-1](Granted(output_tokens=512))
        (settlement,) = gateway.settlements
        assert (settlement.outcome, settlement.output_tokens) == ("upstream_error", 10)
        assert b'"code":"server_error"' in client.written
        assert (client.written.endswith(DONE), client.over) == (True, "end")
        assert not upstream.live or where == "credit"

    asyncio.run(main())
    assert "_Bug" in caplog.text
    assert "secret" not in caplog.text


def test_an_end_that_cannot_be_told_to_the_client_is_settled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        client = _Client()
        gateway, _ = await _streaming(client)
        upstream = _upstream(gateway)
        upstream.data(CHUNK % b"~")
        upstream.data(b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n')
        monkeypatch.setattr(client, "write", _fails)
        upstream.data(DONE)
        upstream.end()
        (settlement,) = gateway.settlements
        assert (settlement.outcome, client.over) == ("completed", "reset")

    asyncio.run(main())
