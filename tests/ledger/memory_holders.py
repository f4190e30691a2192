"""The rest of the ledger in memory: holders, suspense and policies, as `0007_holders.sql` has them."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg

from ledger.memory_ledger import SETTLE_SEQ, Hold, MoneyLedger
from ledger.memory_windows import Key

INPUT = ("input", "cache_read", "cache_write", "audio_input")
OUTPUT = ("output", "reasoning", "audio_output")
NOBODYS_AGE_S = 120.0
FOREVER_AGO = float("-inf")


class HolderRow:
    """One process, as the ledger knows it."""

    __slots__ = ("expires_at", "fenced_at", "name", "started_at", "ttl_s")

    def __init__(self, name: str, now_s: float, ttl_s: float) -> None:
        self.name = name
        self.started_at = now_s
        self.ttl_s = ttl_s
        self.expires_at = now_s + ttl_s
        self.fenced_at: float | None = None


class MemoryLedger(MoneyLedger):
    """All that a sidecar and a keeper may call."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        super().__init__(clock_s)
        self.holders: dict[UUID, HolderRow] = {}
        self.server_started_at = FOREVER_AGO
        """When the database started."""
        self.policy_charged: set[Key] = set()
        """Charged by policy, whatever came of it later."""

    # --- holders -----------------------------------------------------------------------------------------------

    def _lives(self, row: HolderRow) -> bool:
        return row.fenced_at is None and max(row.expires_at, self.server_started_at + row.ttl_s) > self.clock_s()

    def holder_may_admit(self, holder_id: UUID) -> bool:
        """Whether a holder may be given money. A ledger that never saw a holder asks nobody for one."""
        row = self.holders.get(holder_id)
        return not self.holders if row is None else self._lives(row)

    def may_lease(self, holder_id: UUID) -> bool:
        """Whether a holder is believed to live."""
        return holder_id in self.holders and self._lives(self.holders[holder_id])

    def is_fenced(self, holder_id: UUID) -> bool:
        """Whether a holder was fenced."""
        return holder_id in self.holders and self.holders[holder_id].fenced_at is not None

    def register_holder_v1(self, holder: UUID, name: str, ttl: timedelta) -> float:
        """Begin to live, and until when."""
        row = self.holders.get(holder)
        if row is None:
            self.holders[holder] = row = HolderRow(name, self.clock_s(), ttl.total_seconds())
        elif self.renew_holder_v1(holder, ttl) is None:
            raise asyncpg.CheckViolationError(f"holder {holder} has ended")
        return row.expires_at

    def renew_holder_v1(self, holder: UUID, ttl: timedelta) -> float | None:
        """Live on: until when. None: too late."""
        row = self.holders.get(holder)
        if row is None or not self._lives(row):
            return None
        row.ttl_s = ttl.total_seconds()
        row.expires_at = max(row.expires_at, self.clock_s() + row.ttl_s)
        return row.expires_at

    def unregister_holder_v1(self, holder: UUID) -> bool:
        """A clean end. False: the holder still holds something."""
        row = self.holders.get(holder)
        is_open = any(hold.state == "open" and hold.holder_id == holder for hold in self.holds.values())
        if row is not None and row.fenced_at is None and not is_open:
            row.fenced_at = self.clock_s()
        has_ended = row is None or row.fenced_at is not None
        self.give_up_leases(holder, for_good=has_ended)
        return has_ended

    def checkpoint_batch_v1(
        self, tenants: Sequence[str], requests: Sequence[UUID], inputs: Sequence[int], outputs: Sequence[int],
        amounts: Sequence[int], lines: Sequence[list[dict[str, Any]]],
    ) -> list[UUID]:  # fmt: skip
        """How far open requests have come; never less than before. Nobody is busy here."""
        items = zip(tenants, requests, inputs, outputs, amounts, lines, strict=True)
        for tenant, request, *reached, reached_lines in items:
            hold = self.holds.get((tenant, request))
            if hold is not None and hold.state == "open":
                now = (reached[0], reached[1], reached[2])
                if all(new >= old for new, old in zip(now, hold.checkpoint, strict=True)):
                    hold.checkpoint, hold.checkpoint_lines = now, reached_lines
        return []

    # --- the keeper --------------------------------------------------------------------------------------------

    def reap_v1(self, limit: int, since_s: float = FOREVER_AGO) -> dict[str, Any]:
        """Fence the dead, and move what fenced holders still have open to suspense."""
        now_s = self.clock_s()
        had_holders = bool(self.holders)
        fenced: list[str] = []
        for holder_id, row in self.holders.items():
            if row.fenced_at is None and not self._lives(row) and since_s + row.ttl_s < now_s:
                row.fenced_at = now_s
                fenced.append(f"{row.name} {holder_id}")
        dead = sorted(
            key
            for key, hold in self.holds.items()
            if hold.state == "open" and self._is_nobodys(hold, now_s, had_holders)
        )[:limit]
        for key in dead:
            hold = self.holds[key]
            hold.state, hold.suspense_at = "suspense", now_s
            for window_id, held in hold.lines.items():
                window = self.windows[window_id]
                self.post(key[1], window_id, SETTLE_SEQ + 1, "held", "suspense", held)
                window.held -= held
                window.suspense += held
                window.check()
        self.reap_leases()
        return {"fenced": sorted(fenced), "holds": len(dead), "more": len(dead) >= limit}

    def _is_nobodys(self, hold: Hold, now_s: float, had_holders: bool) -> bool:
        row = None if hold.holder_id is None else self.holders.get(hold.holder_id)
        if row is None:
            return had_holders and hold.admitted_at < now_s - NOBODYS_AGE_S
        return row.fenced_at is not None

    def charge_by_policy_v1(self, grace: timedelta, policy: str, limit: int = 200) -> list[dict[str, Any]]:
        """Charge what has been in suspense for longer than the grace, and release the rest."""
        until_s = self.clock_s() - grace.total_seconds()
        due = sorted(
            key
            for key, hold in self.holds.items()
            if hold.state == "suspense" and hold.suspense_at is not None and hold.suspense_at <= until_s
        )[:limit]
        items: list[dict[str, Any]] = []
        for key in due:
            lines = self._policy_lines(self.holds[key], policy)
            items.append(
                {
                    "tenant_id": key[0],
                    "request_id": key[1],
                    "state": "charged_by_policy",
                    "outcome": "crashed",
                    "requests": 1,
                    "lines": lines,
                    "facts": {"policy": policy},
                    "source": "none" if not lines else "estimate" if policy == "hold" else "local",
                    "amount_pico": sum(line["amount_pico"] for line in lines),
                    "input_tokens": sum(line["quantity"] for line in lines if line["class"] in INPUT),
                    "output_tokens": sum(line["quantity"] for line in lines if line["class"] in OUTPUT),
                }
            )
        self.settle_batch_v1(items)
        self.policy_charged.update(due)
        return [{name: item[name] for name in ("tenant_id", "request_id", "amount_pico")} for item in items]

    def _policy_lines(self, hold: Hold, policy: str) -> list[dict[str, Any]]:
        """The lines that a policy charges for a hold, cut so that no window pays more than it holds."""
        left: dict[str, int] = {}
        for window_id, held in hold.lines.items():
            window = self.windows[window_id]
            kind = window.kind if window.kind in ("input", "output") else "both"
            name = window.unit if window.unit != "tokens" else kind
            left[name] = min(held, left.get(name, held))
        rate = hold.input_amount // hold.input_tokens if hold.input_tokens else 0
        wanted: list[tuple[str, int, int]] = [
            (line["class"], line["quantity"], line["rate_pico"]) for line in hold.checkpoint_lines
        ]
        if policy == "hold":
            fee = hold.input_amount - hold.input_tokens * rate
            wanted = [
                ("input", hold.input_tokens, rate),
                ("request", 1, fee),
                ("output", hold.granted, hold.output_rate),
            ]
            wanted = [line for line in wanted if line[0] != "request" or line[2] > 0]
        lines: list[dict[str, Any]] = []
        for name, quantity, rate_pico in wanted:
            pays = [] if name == "request" else ["input" if name in INPUT else "output", "both"]
            bounds = [left[one] for one in pays if one in left]
            if "usd" in left and rate_pico:
                bounds.append(left["usd"] // rate_pico)
            quantity = min(quantity, *bounds) if bounds else quantity
            if quantity <= 0 or any(line["class"] == name for line in lines):
                continue
            for one in pays:
                if one in left:
                    left[one] -= quantity
            if "usd" in left:
                left["usd"] -= quantity * rate_pico
            lines.append(
                {
                    "class": name,
                    "quantity": quantity,
                    "rate_pico": rate_pico,
                    "amount_pico": quantity * rate_pico,
                    "source": "estimate" if policy == "hold" else "local",
                }
            )
        return lines

    def correct(self, key: Key, item: dict[str, Any]) -> None:
        """New entries on the windows of the admission: the difference moves."""
        request = key[1]
        hold = self.holds[key]
        paid: dict[int, int] = {}
        for posting in self.postings:
            if posting.source_id == request and posting.seq == SETTLE_SEQ and posting.credit in ("spent", "overrun"):
                paid[posting.window_id] = paid.get(posting.window_id, 0) + posting.amount
        for window_id in hold.lines:
            window = self.windows[window_id]
            due = window.charge(item["amount_pico"], item["input_tokens"], item["output_tokens"], item["requests"])
            change = due - paid.get(window_id, 0)
            if change >= 0:
                if window.ceiling is not None and change > window.limit - window.balance:
                    self.recall(window, 0)
                spend = change if window.ceiling is None else min(change, max(window.limit - window.balance, 0))
                overrun = change - spend
            else:
                overrun = max(change, -window.overrun)
                spend = change - overrun
            seq = SETTLE_SEQ + 2
            self.post(request, window_id, seq, "available", "spent", spend)
            self.post(request, window_id, seq, "spent", "available", -spend)
            self.post(request, window_id, seq, "funding", "overrun", overrun)
            self.post(request, window_id, seq, "overrun", "funding", -overrun)
            window.spent += spend
            window.overrun += overrun
            if overrun > 0:
                self.overruns.add(request)
            window.settle_ceiling()
            window.check()
        for line in [line for line in self.usage_lines if line[0] == request and line[1] == 0]:
            self.usage_lines.append((request, 1, line[2], -line[3], line[4], -line[5]))
        self._write_lines(request, 2, item["lines"])
        old = self.requests.pop(key)
        self._write_request(key, item)
        self.requests[key]["facts"]["corrected"] = {
            "policy": old["facts"]["policy"],
            "amount_pico": str(old["amount_pico"]),
        }
        hold.state = "corrected"
