"""The ledger in memory: what `admit_batch_v1`, `extend_batch_v1` and `settle_batch_v1` do, on plain numbers.

For tests that need thousands of ledgers, or a clock of their own. `test_store_holds_in_memory.py` plays the same to
this and to PostgreSQL and compares every answer, balance and posting. One call is one statement: nothing comes between.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import asyncpg

from ledger.memory_leases import Lease, LeasedWindows
from ledger.memory_windows import Key, Window

SETTLE_SEQ = 1_000_000
VOID: dict[str, Any] = {"verdict": "void"}


class Hold:
    """Money that left `available` for one request, or the tombstone of one that never came."""

    __slots__ = (
        "admitted_at", "answer", "attributes", "checkpoint", "checkpoint_lines", "ended_at", "extension", "granted",
        "holder_id", "input_amount", "input_tokens", "last_seq", "lines", "output_rate", "price_key", "state",
        "suspense_at",
    )  # fmt: skip

    def __init__(self, state: str, now_s: float) -> None:
        self.state = state
        self.admitted_at = now_s
        self.ended_at: float | None = None
        self.holder_id: UUID | None = None
        self.attributes: dict[str, Any] = {}
        self.price_key = ""
        self.output_rate = self.granted = self.last_seq = self.input_tokens = self.input_amount = 0
        self.answer: dict[str, Any] | None = None
        self.extension: dict[str, Any] | None = None
        self.lines: dict[int, int] = {}
        """What is, or was, held: by window, in ascending order."""
        self.checkpoint = (0, 0, 0)
        """Input tokens, output tokens, pico-USD."""
        self.checkpoint_lines: list[dict[str, Any]] = []
        self.suspense_at: float | None = None


def grant(available: int, rate: int, need: int, want: int, shares: int, live: int) -> int:
    """How many output tokens a window grants; -1: the need cannot be afforded."""
    if available < need * rate or available < 0:
        return -1
    most = max(want, need)
    if rate == 0:
        return most
    return min(most, available // rate, max(need, 16, available // (rate * shares * live)))


class MoneyLedger(LeasedWindows):
    """The three functions that move money."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        super().__init__(clock_s)
        self.holds: dict[Key, Hold] = {}
        self.requests: dict[Key, dict[str, Any]] = {}
        """Attribution and outcome of what ended."""
        self.usage_lines: list[tuple[UUID, int, str, int, int, int]] = []
        """Request, entry, class, quantity, rate, amount."""
        self.overruns: set[UUID] = set()
        """Requests with a posting to overrun since their settlement."""
        self.ended: list[Key] = []
        """What ended, in that order."""

    @abstractmethod
    def holder_may_admit(self, holder_id: UUID) -> bool:
        """Whether a holder may be given money."""

    # --- admission ---------------------------------------------------------------------------------------------

    def admit_batch_v1(self, holder: UUID, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Admit requests in the order of their ids: they are of one tenant and month."""
        items = sorted(items, key=lambda item: item["request_id"])
        answers: list[dict[str, Any] | None] = [self._known_without_windows(holder, item) for item in items]
        budgets: list[dict[int, dict[str, Any]]] = [{} for _ in items]
        wishes: dict[int, int] = {}
        for place, item in enumerate(items):
            if answers[place] is None:
                for budget in self.matching(item["tenant_id"], item["attributes"]):
                    window = self.open_window_v1(budget, item["attributes"])
                    budgets[place][window.window_id] = budget
                    wish = _held_for(window, item, max(item["need_tokens"], item["want_tokens"]))
                    wishes[window.window_id] = wishes.get(window.window_id, 0) + wish
        leased = self._leases_that_pay(holder, wishes, least=1)
        for place, item in enumerate(items):
            answers[place] = answers[place] or self._admit(holder, item, budgets[place], leased)
        return [
            {"request_id": item["request_id"], "answer": answer} for item, answer in zip(items, answers, strict=True)
        ]

    def _leases_that_pay(self, holder: UUID | None, wishes: dict[int, int], *, least: int) -> dict[int, Lease]:
        """The windows of which this holder has a lease that can pay all that is wished of them."""
        leases = {window_id: self.lease_of(window_id, holder) for window_id in wishes}
        return {
            window_id: lease
            for window_id, lease in leases.items()
            if lease is not None and lease.free >= max(wishes[window_id], least)
        }

    def _known_without_windows(self, holder: UUID, item: dict[str, Any]) -> dict[str, Any] | None:
        tenant, attributes = item["tenant_id"], item["attributes"]
        known = self.holds.get((tenant, item["request_id"]))
        if known is not None:
            return known.answer or VOID if known.state == "open" else VOID
        if not self.holder_may_admit(holder):
            return VOID
        if (tenant, attributes.get("project", "")) in self.suspended_projects:
            return _suspended("project", attributes["project"])
        for budget in self.matching(tenant, attributes):
            if budget["suspended"]:
                return _suspended("budget", budget["budget_id"])
        return None

    def _admit(
        self, holder: UUID, item: dict[str, Any], budgets: dict[int, dict[str, Any]], leased: dict[int, Lease]
    ) -> dict[str, Any]:
        request = item["request_id"]
        refused, granted, bound_by = self._afford(budgets, item, leased)
        if refused is not None:
            return refused
        hold = self.holds[item["tenant_id"], request] = Hold("open", self.clock_s())
        hold.holder_id, hold.attributes, hold.price_key = holder, item["attributes"], item["price_key"]
        hold.output_rate, hold.granted = item["output_rate_pico"], granted
        hold.input_tokens, hold.input_amount = item["input_tokens"], item["input_amount_pico"]
        for window_id in sorted(budgets):
            window, lease = self.windows[window_id], leased.get(window_id)
            hold.lines[window_id] = held = _held_for(window, item, granted)
            if lease is not None:
                lease.new_live += 1
            else:
                window.live += 1
            self.hold_of(window, request, 0, held, lease)
        hold.answer = {
            "verdict": "granted", "output_tokens": granted, "windows": list(hold.lines),
            "amounts": [str(held) for held in hold.lines.values()], "bound_by": bound_by,
        }  # fmt: skip
        return hold.answer

    def _afford(
        self, budgets: dict[int, dict[str, Any]], item: dict[str, Any], leased: dict[int, Lease]
    ) -> tuple[dict[str, Any] | None, int, dict[str, Any] | None]:
        refused: dict[str, Any] | None = None
        bound_by: dict[str, Any] | None = None
        need, want = item["need_tokens"], item["want_tokens"]
        granted = max(want, need)
        for window_id in sorted(budgets):
            window, budget = self.windows[window_id], budgets[window_id]
            if window.ceiling is None or window_id in leased:
                continue
            fixed = window.input_part(item["input_tokens"], item["input_amount_pico"])
            rate = window.output_rate(item["output_rate_pico"])
            possible = self._possible(window, fixed, rate, need, want, item["shares"], 1)
            if possible >= granted:
                continue
            if possible >= 0:
                granted, bound_by = possible, self.refusal(budget, window)
            elif refused is None or (refused["reason"] == "rate" and budget["refusal"] == "quota"):
                refused = self.refusal(budget, window)
        return refused, granted, bound_by

    def _possible(self, window: Window, fixed: int, rate: int, need: int, want: int, shares: int, more: int) -> int:
        """What a window grants; before it refuses, it takes back what is free in its leases."""

        def possible() -> int:
            live = max(window.live, 0) + 1 if more else max(window.live, 1)
            return grant(window.limit - window.balance - fixed, rate, need, want, shares, live)

        found = possible()
        if found < 0 and self.recall(window, need * rate + fixed - (window.limit - window.balance)):
            found = possible()
        return found

    # --- extensions --------------------------------------------------------------------------------------------

    def extend_batch_v1(
        self, tenants: Sequence[str], requests: Sequence[UUID], seqs: Sequence[int], needs: Sequence[int],
        wants: Sequence[int], shares: int,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """More output tokens for several holds."""
        items = list(zip(tenants, requests, seqs, needs, wants, strict=True))
        wishes: dict[int, int] = {}
        askers: dict[int, set[UUID | None]] = {}
        for tenant, request, seq, need, want in items:
            hold = self.holds.get((tenant, request))
            if hold is None or hold.state != "open" or seq <= hold.last_seq:
                continue
            for window_id in hold.lines:
                window = self.windows[window_id]
                if rate := window.output_rate(hold.output_rate):
                    wishes[window_id] = wishes.get(window_id, 0) + max(need, want) * rate
                    askers.setdefault(window_id, set()).add(hold.holder_id)
        now_s = self.clock_s()
        leased: dict[int, Lease] = {}
        for window_id, wish in wishes.items():
            if len(askers[window_id]) == 1 and self.windows[window_id].runs(now_s):
                leased.update(self._leases_that_pay(next(iter(askers[window_id])), {window_id: wish}, least=0))
        return [
            {"request_id": request, "answer": self._extend(tenant, request, seq, need, want, shares, leased)}
            for tenant, request, seq, need, want in items
        ]

    def _extend(
        self, tenant: str, request: UUID, seq: int, need: int, want: int, shares: int, leased: dict[int, Lease]
    ) -> dict[str, Any]:
        hold = self.holds.get((tenant, request))
        if hold is None or hold.state != "open":
            return VOID
        if seq <= hold.last_seq:
            return hold.extension or hold.answer or VOID
        if hold.holder_id is not None and self.is_fenced(hold.holder_id):
            return VOID  # a reap of many has not come to it yet
        refused, granted = self._more(tenant, hold, need, want, shares, leased)
        answer = refused
        if answer is None:
            moved: dict[int, str] = {}
            for window_id in hold.lines:
                window = self.windows[window_id]
                rate = window.output_rate(hold.output_rate)
                if rate:
                    moved[window_id] = str(granted * rate)
                    hold.lines[window_id] += granted * rate
                    self.hold_of(window, request, seq, granted * rate, leased.get(window_id))
            hold.granted += granted
            answer = {
                "verdict": "granted", "output_tokens": granted, "windows": list(moved), "amounts": list(moved.values()),
            }  # fmt: skip
        hold.last_seq, hold.extension = seq, answer
        return answer

    def _more(
        self, tenant: str, hold: Hold, need: int, want: int, shares: int, leased: dict[int, Lease]
    ) -> tuple[dict[str, Any] | None, int]:
        project = hold.attributes.get("project", "")
        if (tenant, project) in self.suspended_projects:
            return _suspended("project", project), 0
        refused: dict[str, Any] | None = None
        granted = max(want, need)
        for window_id in hold.lines:
            window = self.windows[window_id]
            budget = self.budgets[tenant, window.budget_id]
            if budget["suspended"]:
                return _suspended("budget", window.budget_id), 0
            rate = window.output_rate(hold.output_rate)
            if window.ceiling is None or rate == 0 or window_id in leased:
                continue
            possible = self._possible(window, 0, rate, need, want, shares, 0)
            if possible >= 0:
                granted = min(granted, possible)
            elif refused is None:
                refused = self.refusal(budget, window)
        return refused, granted

    # --- settling ----------------------------------------------------------------------------------------------

    def settle_batch_v1(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """End several requests; "settled", "already", "corrected" or "unknown" for each."""
        results: dict[Key, str] = {}
        todo: dict[Key, dict[str, Any]] = {}
        late: dict[Key, dict[str, Any]] = {}
        for item in items:
            key = (item["tenant_id"], item["request_id"])
            hold = self.holds.get(key)
            if key in results:
                continue
            if hold is None:
                results[key] = "unknown"
            elif hold.state in ("open", "suspense"):
                results[key], todo[key] = "settled", item
            elif hold.state == "charged_by_policy":
                results[key], late[key] = "corrected", item
            else:
                results[key] = "already"
        self._move(todo)
        now_s = self.clock_s()
        for key, item in todo.items():
            self.holds[key].state, self.holds[key].ended_at = item["state"], now_s
            self._write_request(key, item)
            self._write_lines(key[1], 0, item["lines"])
            self.ended.append(key)
        for key in sorted(late):
            self.correct(key, late[key])
        for key, result in results.items():
            if result == "unknown":
                self.holds[key] = tombstone = Hold("void", now_s)
                tombstone.ended_at = now_s
        return [
            {
                "request_id": item["request_id"],
                "result": results[item["tenant_id"], item["request_id"]],
                "overrun": item["request_id"] in self.overruns,
            }
            for item in items
        ]

    @abstractmethod
    def correct(self, key: Key, item: dict[str, Any]) -> None:
        """A settlement that comes after its hold was charged by policy."""

    def _move(self, todo: dict[Key, dict[str, Any]]) -> None:
        """Per window: from the hold, from the window's room in the order of the ids, beyond it."""
        by_window: dict[int, list[tuple[Key, int, int, str]]] = {}
        for key in sorted(todo):
            hold, item = self.holds[key], todo[key]
            account = "suspense" if hold.state == "suspense" else "held"
            for window_id, held in hold.lines.items():
                due = self.windows[window_id].charge(
                    item["amount_pico"], item["input_tokens"], item["output_tokens"], item["requests"]
                )
                by_window.setdefault(window_id, []).append((key, due, held, account))
        for window_id, charges in by_window.items():
            self._move_in(self.windows[window_id], charges)

    def _move_in(self, window: Window, charges: list[tuple[Key, int, int, str]]) -> None:
        released = sum(max(held - due, 0) for _, due, held, _ in charges)
        beyond = sum(max(due - held, 0) for _, due, held, _ in charges)
        room = max(window.limit - window.balance + released, 0)
        if window.ceiling is not None and beyond > room and self.recall(window, 0):
            room = max(window.limit - window.balance + released, 0)
        for (_, request), due, held, account in charges:
            from_hold = min(due, held)
            excess = due - from_hold
            from_room = excess if window.ceiling is None else min(excess, room)
            room -= min(excess, room)
            self.post(request, window.window_id, SETTLE_SEQ, account, "spent", from_hold)
            self.post(request, window.window_id, SETTLE_SEQ, account, "available", held - from_hold)
            self.post(request, window.window_id, SETTLE_SEQ, "available", "spent", from_room)
            self.post(request, window.window_id, SETTLE_SEQ, "funding", "overrun", excess - from_room)
            window.spent += from_hold + from_room
            if account == "held":
                window.held -= held
            else:
                window.suspense -= held
            if excess - from_room:
                window.overrun += excess - from_room
                self.overruns.add(request)
            window.live -= 1
        window.settle_ceiling()
        self.touched.add(window.window_id)
        window.check()

    def _write_request(self, key: Key, item: dict[str, Any]) -> None:
        if key in self.requests:
            raise asyncpg.UniqueViolationError(f"request {key[1]} has an outcome already")
        self.requests[key] = {
            "outcome": item["outcome"],
            "source": item["source"],
            "input_tokens": item["input_tokens"],
            "output_tokens": item["output_tokens"],
            "amount_pico": item["amount_pico"],
            "facts": {**item["facts"], "requests": item["requests"]},
        }

    def _write_lines(self, request: UUID, entry: int, lines: Sequence[dict[str, Any]]) -> None:
        for line in lines:
            quantity, rate, amount = line["quantity"], line["rate_pico"], line["amount_pico"]
            if amount != quantity * rate:
                raise asyncpg.CheckViolationError(f"a usage line of {request} does not add up")
            self.usage_lines.append((request, entry, line["class"], quantity, rate, amount))


def _held_for(window: Window, item: dict[str, Any], output_tokens: int) -> int:
    fixed = window.input_part(item["input_tokens"], item["input_amount_pico"])
    return fixed + output_tokens * window.output_rate(item["output_rate_pico"])


def _suspended(what: str, name: str) -> dict[str, Any]:
    return {"verdict": "refused", "reason": "suspended", "what": what, "name": name}
