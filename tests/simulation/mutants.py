"""Bugs on purpose: each is one that a gateway could well have, and the simulator must find it."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from behest_ledger.holds import Admission, Answer, Granted, Settlement
from behest_ledger.prices.rates import Rates
from behest_ledger.store.credit import CreditDesk
from behest_ledger.store.errors import LedgerError, LedgerUnavailableError
from behest_ledger.store.holds import Settled
from behest_ledger.store.writer import SettlementWriter
from behest_ledger.token_counts import TokenCounts
from behest_proxy.actions import Action
from behest_proxy.app.conduct import Conduct
from behest_proxy.app.holder import Holder
from behest_proxy.app.memory import Trace
from behest_proxy.exchange import Exchange
from behest_proxy.meter import Meter
from behest_proxy.terms import Phase
from ledger.memory_holders import HolderRow, MemoryLedger
from ledger.memory_leases import Lease
from ledger.memory_windows import Key, Window
from simulation.remembered import SimulatedMemory
from simulation.sidecar import Parts

FREE: dict[str, Any] = {
    "outcome": "crashed",
    "source": "none",
    "requests": 1,
    "input_tokens": 0,
    "output_tokens": 0,
    "amount_pico": 0,
    "facts": {"policy": "free"},
}
"""What a request is written as that ends without a charge."""

# --- bugs of the ledger ---------------------------------------------------------------------------------------------


class SettlesAgain(MemoryLedger):
    """A settlement that comes twice is charged twice."""

    def settle_batch_v1(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        for item in items:
            key = (item["tenant_id"], item["request_id"])
            hold = self.holds.get(key)
            if hold is not None and hold.state == "settled":
                hold.state = "open"
                for window_id, held in hold.lines.items():
                    self.windows[window_id].held += held
                    self.windows[window_id].live += 1
                del self.requests[key]
        return super().settle_batch_v1(items)


class ForgetsTombstones(MemoryLedger):
    """An admission that comes after its void holds money for nobody."""

    def settle_batch_v1(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        answers = super().settle_batch_v1(items)
        for item, answer in zip(items, answers, strict=True):
            if answer["result"] == "unknown":
                self.holds.pop((item["tenant_id"], item["request_id"]), None)
        return answers


class ReapsEarly(MemoryLedger):
    """Holders are dead before their time to live has passed."""

    def _lives(self, row: HolderRow) -> bool:
        return row.fenced_at is None and row.expires_at - row.ttl_s / 2 > self.clock_s()


class ReapsToAvailable(MemoryLedger):
    """What a dead holder held is free at once, though its clients may have received it."""

    def reap_v1(self, limit: int, since_s: float = float("-inf")) -> dict[str, Any]:
        report = super().reap_v1(limit, since_s)
        for key, hold in self.holds.items():
            request = key[1]
            if hold.state == "suspense":
                hold.state = "charged_by_policy"
                self._write_request(key, FREE)
                for window_id, held in hold.lines.items():
                    self.post(request, window_id, 1_000_003, "suspense", "available", held)
                    self.windows[window_id].suspense -= held
                    self.windows[window_id].live -= 1
        return report


class ExtendsAgain(MemoryLedger):
    """An extension that is asked again is granted again."""

    def _extend(
        self, tenant: str, request: UUID, seq: int, need: int, want: int, shares: int, leased: dict[int, Lease]
    ) -> dict[str, Any]:
        if (tenant, request) in self.holds:
            self.holds[tenant, request].last_seq = 0
        return super()._extend(tenant, request, seq, need, want, shares, leased)


class ForgetsSuspense(MemoryLedger):
    """What is in suspense is granted to others."""

    def admit_batch_v1(self, holder: UUID, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        suspended = {window_id: window.suspense for window_id, window in self.windows.items()}
        for window_id, amount in suspended.items():
            self.windows[window_id].limit += amount
        try:
            return super().admit_batch_v1(holder, items)
        finally:
            for window_id, amount in suspended.items():
                self.windows[window_id].limit -= amount


class CorrectsByAdding(MemoryLedger):
    """A settlement after the policy is charged beside it, not instead of it."""

    def correct(self, key: Key, item: dict[str, Any]) -> None:
        for window_id in self.holds[key].lines:
            window = self.windows[window_id]
            due = window.charge(item["amount_pico"], item["input_tokens"], item["output_tokens"], item["requests"])
            self.post(key[1], window_id, 1_000_002, "available", "spent", due)
            window.spent += due
            window.settle_ceiling()
        self.requests[key].update({name: item[name] for name in ("input_tokens", "output_tokens", "amount_pico")})
        self.holds[key].state = "corrected"


class LendsWhatIsNotThere(MemoryLedger):
    """What is leased stays available to everybody."""

    def set_lease(self, window: Window, holder_id: UUID, lease: Lease, free: int) -> None:
        before = lease.free
        super().set_lease(window, holder_id, lease, free)
        window.held -= free - before


class KeepsDeadLeases(MemoryLedger):
    """What is free in the leases of the dead is nobody's any more."""

    def reap_leases(self) -> None:
        pass


class AdmitsTheFenced(MemoryLedger):
    """Who was fenced is given money all the same."""

    def holder_may_admit(self, holder_id: UUID) -> bool:
        return True


# --- bugs of a sidecar ----------------------------------------------------------------------------------------------


class _Generous(Meter):
    """Forwards first, and hopes that it will be paid."""

    def pay(self, output: int, reasoning: int = 0) -> bool:
        self.output += output
        self.reasoning += reasoning
        return True


class WritesUnpaid(Exchange):
    """Its meter never says no."""

    def __init__(self, terms: Any) -> None:
        super().__init__(terms)
        self._meter = _Generous(
            ratio=terms.ratio,
            choices=terms.choices,
            credit_tokens=0,
            cap_tokens=terms.cap_tokens,
            metered=terms.metered,
        )


class LeavesUnknownHolds(Exchange):
    """No answer is taken for a no: nothing is voided."""

    def admitted(self, answer: Answer | None, now_s: float) -> list[Action]:
        actions = super().admitted(answer, now_s)
        return actions if answer is not None or self.phase is not Phase.ENDED else actions[:-1]


class NeverLate(Holder):
    """Believes that it lives as long as it likes."""

    @property
    def lives(self) -> bool:
        return True


class GivesUp(SettlementWriter):
    """A settlement whose result is unknown is taken for written."""

    def __init__(self, settle: Any, **named: Any) -> None:
        async def once(settlements: Sequence[Settlement]) -> list[Settled]:
            try:
                found: list[Settled] = await settle(settlements)
            except LedgerUnavailableError:
                return [Settled(item.request_id, "settled", False) for item in settlements]
            return found

        super().__init__(once, **named)


class CountsUnknownGrants(CreditDesk):
    """No answer to an extension is taken for a yes."""

    def ask(self, account: Any, *, need_tokens: int, want_tokens: int, may_wait: bool, answer: Any) -> None:
        def hopeful(came: Answer | LedgerError) -> None:
            answer(Granted(output_tokens=want_tokens) if isinstance(came, LedgerError) else came)

        super().ask(account, need_tokens=need_tokens, want_tokens=want_tokens, may_wait=may_wait, answer=hopeful)


class StoresLate(SimulatedMemory):
    """A slot says what was handed over before, not what is about to be."""

    def begin(self, admission: Admission, *, input_counts: TokenCounts, rates: Rates) -> Trace:
        trace: Any = super().begin(admission, input_counts=input_counts, rates=rates)
        now, before = trace.store, [(0, 0, 0)]

        def store(*counts: int) -> None:
            now(*before[0])
            before[0] = (counts[0], counts[1], counts[2])

        trace.store = store
        found: Trace = trace
        return found


class ForgetsItsPast(SimulatedMemory):
    """What an earlier life left is not settled."""

    def left(self) -> list[Settlement]:
        return []


class SettlesBeforeRemembering(Conduct):
    """A stream that is over is not written down before the books are told, and its slot is given up."""

    def _settle(self, action: Any) -> None:
        self._trace.refused()
        super()._settle(action)


def _parts(**parts: Any) -> Parts:
    made = Parts()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


LEDGERS: tuple[type[MemoryLedger], ...] = (
    SettlesAgain, ForgetsTombstones, ReapsEarly, ReapsToAvailable, ExtendsAgain, ForgetsSuspense, CorrectsByAdding,
    AdmitsTheFenced,
    LendsWhatIsNotThere,
    KeepsDeadLeases,
)  # fmt: skip
SIDECARS: dict[str, Parts] = {
    "writes before it is paid": _parts(exchange=WritesUnpaid),
    "leaves what may have been admitted": _parts(exchange=LeavesUnknownHolds),
    "never looks at its deadline": _parts(holder=NeverLate),
    "settles once and forgets": _parts(writer=GivesUp),
    "takes no answer for a yes": _parts(desk=CountsUnknownGrants),
    "stores after the write": _parts(memory=StoresLate),
    "does not read its journal": _parts(memory=ForgetsItsPast),
    "tells the books before the journal": _parts(conduct=SettlesBeforeRemembering),
}
