"""The owner of a request, where only its parts are real."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

from behest_ledger.charging import Outcome
from behest_ledger.holds import Admission, Answer, Granted, Settlement
from behest_ledger.prices.rates import ClassRates, Rates
from behest_ledger.store.credit import Account, AnswerCall
from behest_ledger.token_counts import TokenCounts
from behest_proxy.app.conduct import Conduct
from behest_proxy.app.context import RequestContext
from behest_proxy.app.memory import Memory
from behest_proxy.errors import LedgerUnavailable
from behest_proxy.exchange import Exchange
from behest_proxy.terms import Terms

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n'
RATES = Rates(price_key="test", base=ClassRates.of({"input": 1, "output": 1}))


class _Call:
    def cancel(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class _Client:
    on_gone = on_resume = None
    paused = gone = False

    def __init__(self) -> None:
        self.written = b""

    def begin(self, status: int, headers: Any) -> None: ...

    def write(self, data: bytes) -> None:
        self.written += data

    def end(self) -> None: ...


def _call(_request: Any, _handler: Any) -> _Call:
    return _Call()


def _nothing(_account: Account) -> None: ...


class _Gateway:
    """A gateway with one request; the credit desk remembers whom to answer."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(keep_alive_s=60.0, client_stall_s=60.0)
        self.holder = SimpleNamespace(lives=True)
        self.upstream = SimpleNamespace(send=_call)
        self.writer = SimpleNamespace(submit=self._submit)
        self.desk = SimpleNamespace(open=self._open, ask=self._ask, ended=_nothing)
        self.settlements: list[Settlement] = []
        self.asked: list[AnswerCall] = []
        self.conduct: Conduct | None = None

    async def admit(self, admission: Admission) -> Answer:
        return Granted(output_tokens=16)

    def lose_all(self) -> None:
        assert self.conduct is not None
        self.conduct.stop(Outcome.LEDGER_UNAVAILABLE, LedgerUnavailable("too late"))

    def ended(self, conduct: Conduct) -> None: ...

    def _submit(self, settlement: Settlement) -> None:
        self.settlements.append(settlement)

    def _open(self, tenant_id: str, request_id: UUID, windows: tuple[int, ...]) -> Account:
        return Account(tenant_id, request_id, windows)

    def _ask(self, account: Account, *, answer: AnswerCall, **_: Any) -> None:
        self.asked.append(answer)


async def _short_of_credit() -> tuple[_Gateway, _Client, Conduct]:
    """A stream that got ten tokens of sixteen and waits with ten more."""
    gateway, client = _Gateway(), _Client()
    terms = Terms(
        streamed=True, include_usage=False, choices=1, input_counts=TokenCounts(input=3), count=len, ratio=1.0,
        amount_pico=RATES.amount_pico, metered=False,
    )  # fmt: skip
    admission = Admission(
        tenant_id="acme", request_id=UUID(int=1 << 64 | 1), holder_id=UUID(int=2), attributes={}, price_key="test",
        input_tokens=3, input_amount_pico=3, output_rate_pico=1, need_tokens=1, want_tokens=16, shares=1,
    )  # fmt: skip
    trace = Memory(None).begin(admission, input_counts=TokenCounts(input=3), rates=RATES)
    conduct = gateway.conduct = Conduct(
        cast(Any, gateway), admission=admission, rates=RATES, trace=trace, exchange=lambda grant: Exchange(terms),
        upstream_request=lambda grant: cast(Any, None), client=cast(Any, client), context=RequestContext(()),
    )  # fmt: skip
    await conduct.admit()
    conduct.on_request_sent()
    conduct.on_head(200, [(b"content-type", b"text/event-stream")])
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
