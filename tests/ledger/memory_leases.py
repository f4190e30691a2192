"""Leases of the ledger in memory: what `0009_leases.sql` does with slices of windows that are one holder's own."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from ledger.memory_windows import Window, Windows

LEFT_AFTER_S = 10.0
"""So long after the end of a window the keeper takes its leases back."""


class Lease:
    """A sub-account of a window. What is free in it is part of the window's `held`."""

    __slots__ = ("free", "new_live", "seq")

    def __init__(self) -> None:
        self.free = 0
        self.new_live = 0
        """Admissions that the window's `live` does not count yet."""
        self.seq = 0


class LeasedWindows(Windows, ABC):
    """Windows with the leases on them."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        super().__init__(clock_s)
        self.leases: dict[int, dict[UUID, Lease]] = {}
        """By window and holder."""

    @abstractmethod
    def may_lease(self, holder_id: UUID) -> bool:
        """Whether a holder is believed to live."""

    @abstractmethod
    def is_fenced(self, holder_id: UUID) -> bool:
        """Whether a holder was fenced."""

    def lease_of(self, window_id: int, holder_id: UUID | None) -> Lease | None:
        """The lease that a holder has of a window."""
        of_window = self.leases.get(window_id)
        return of_window.get(holder_id) if of_window and holder_id is not None else None

    def hold_of(self, window: Window, source_id: UUID, seq: int, amount: int, lease: Lease | None) -> None:
        """Money for a request: out of the lease, or of what is available."""
        if lease is not None:
            self.post(source_id, window.window_id, seq, "leased", "held", amount)
            lease.free -= amount
        else:
            self.post(source_id, window.window_id, seq, "available", "held", amount)
            window.held += amount
        self.touched.add(window.window_id)
        window.check()

    def set_lease(self, window: Window, holder_id: UUID, lease: Lease, free: int) -> None:
        """Give a lease so much free money, and tell its window how many requests it admitted."""
        change = free - lease.free
        if change:
            lease.seq += 1
            names = ("available", "leased") if change > 0 else ("leased", "available")
            self.post(holder_id, window.window_id, lease.seq, *names, abs(change))
        if change or lease.new_live:
            window.held += change
            window.live += lease.new_live
            lease.free, lease.new_live = free, 0
            window.settle_ceiling()
            self.touched.add(window.window_id)
            window.check()

    def recall(self, window: Window, lacking: int) -> bool:
        """Take back what is free in the leases of a window, where together it is enough."""
        leases = self.leases.get(window.window_id)
        if not leases or sum(lease.free for lease in leases.values()) < lacking:
            return False
        for holder_id, lease in leases.items():
            if lease.free > 0:
                self.set_lease(window, holder_id, lease, 0)
        return True

    def give_up_leases(self, holder_id: UUID, *, for_good: bool) -> None:
        """What is free in all leases of a holder is available again."""
        for window_id, leases in self.leases.items():
            if holder_id in leases:
                self.set_lease(self.windows[window_id], holder_id, leases[holder_id], 0)
                if for_good:
                    del leases[holder_id]

    def reap_leases(self) -> None:
        """The keeper's part: leases of fenced holders, and of windows that have ended."""
        until_s = self.clock_s() - LEFT_AFTER_S
        for window_id, leases in self.leases.items():
            window = self.windows[window_id]
            for holder_id in list(leases):
                if self.is_fenced(holder_id) or (window.ends_at is not None and window.ends_at < until_s):
                    self.set_lease(window, holder_id, leases.pop(holder_id), 0)

    def put_budget_v1(self, row: dict[str, Any]) -> None:
        """As without leases; and a lowered limit takes back what is free in them."""
        balances = {window_id: window.balance for window_id, window in self.windows.items()}
        super().put_budget_v1(row)
        now_s = self.clock_s()
        of_budget = [
            window
            for window in self.windows.values()
            if (window.tenant_id, window.budget_id) == (row["tenant_id"], row["budget_id"]) and window.runs(now_s)
        ]
        for window in of_budget:
            if row["enforcement"] == "hard" and balances[window.window_id] > row["limit_amount"]:
                self.recall(window, 0)

    def lease_batch_v1(
        self, holder: UUID, tenants: Sequence[str], window_ids: Sequence[int], wants: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Bring the leases of a holder to what it wants, and give up those that it does not name."""
        if not self.may_lease(holder):
            return []
        now_s = self.clock_s()
        wanted: dict[int, int] = {}
        for tenant, window_id, want in zip(tenants, window_ids, wants, strict=True):
            window = self.windows.get(window_id)
            if window is None or window.tenant_id != tenant or want <= 0:
                continue
            wanted[window_id] = max(want, wanted.get(window_id, 0))
            if window.runs(now_s) and window.unit != "concurrency":
                self.leases.setdefault(window_id, {}).setdefault(holder, Lease())
        slices: list[tuple[Window, Lease, int]] = []
        for window_id in sorted(self.leases):
            window, lease = self.windows[window_id], self.leases[window_id].get(holder)
            if lease is not None and window.tenant_id in tenants:
                slices.append((window, lease, self._slice(window, holder, lease, wanted.get(window_id, 0), now_s)))
        for window, lease, free in slices:
            self.set_lease(window, holder, lease, free)
            if not window.runs(now_s):
                del self.leases[window.window_id][holder]
        return [
            {"tenant_id": window.tenant_id, "window_id": window.window_id, "free": lease.free}
            for window, lease, _ in slices
            if window.runs(now_s)
        ]

    def _slice(self, window: Window, holder: UUID, lease: Lease, want: int, now_s: float) -> int:
        """At most a quarter of a fair share of what is left, and nothing where that is far below the wish."""
        if not window.runs(now_s):
            return 0
        if window.ceiling is None:
            return min(want, window.limit)
        others = self.leases[window.window_id].items()
        count = sum(1 for other, its in others if its.free > 0 or other == holder)
        most = min(want, max(window.limit - window.balance + lease.free, 0) // (4 * count))
        return most if most * 4 >= want else 0
