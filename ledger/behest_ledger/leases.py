"""Which windows this sidecar should have a lease on, and of how much: pure policy, from what it was granted and when.

A window is busy for a sidecar while it is granted money there several times a second. Then the sidecar wants as much
as it spends in a few seconds, so that one commit a second of the window's row serves all of its admissions; the ledger
decides how much of that it gets. Where a window refuses it wants nothing for a while: at the end of a window everybody
takes from the window itself.
"""

import math
from collections.abc import Collection

import msgspec

WindowKey = tuple[str, int]
"""Tenant and window."""

SMOOTHING_S = 2.0
"""A rate forgets what was so long ago, exponentially."""
BUSY_PER_S = 10.0
"""Grants a second from which a window is worth a lease: below that its row is not what anybody waits for."""
QUIET_PER_S = 5.0
"""Grants a second below which it is not worth one any more."""
AHEAD_S = 3.0
"""A lease should last so long at the present rate: two renewals may fail before it is empty."""
REFUSED_S = 5.0
"""After a refusal nothing is wanted of a window for so long."""
LEASES_MAX = 64
"""The busiest windows are leased, at most so many."""
WINDOWS_MAX = 1024
"""Windows that are looked at; the quieter half of so many is forgotten the next time that wants are asked for."""


class Want(msgspec.Struct, frozen=True):
    """How much a sidecar wants to have free in its lease of a window, in the window's unit. Zero gives it back."""

    tenant_id: str
    window_id: int
    amount: int


class _Window:
    __slots__ = ("amount_per_s", "at_s", "busy", "grants_per_s", "refused_s")

    def __init__(self, now_s: float) -> None:
        self.at_s = now_s
        self.grants_per_s = 0.0
        self.amount_per_s = 0.0
        self.refused_s = -math.inf
        self.busy = False

    def age(self, now_s: float) -> None:
        """Let time pass; a clock that goes back counts as one that stands still."""
        past_s = now_s - self.at_s
        if past_s > 0:
            left = math.exp(-past_s / SMOOTHING_S)
            self.grants_per_s *= left
            self.amount_per_s *= left
            self.at_s = now_s


class LeasePolicy:
    """What one sidecar wants. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._windows: dict[WindowKey, _Window] = {}
        self._leased: set[WindowKey] = set()
        """What the ledger was asked for, or said that we have: to be named until it says that it is gone."""

    def granted(self, tenant_id: str, windows: Collection[tuple[int, int]], now_s: float) -> None:
        """An admission or extension was granted so much of each of these windows."""
        for window_id, amount in windows:
            window = self._window((tenant_id, window_id), now_s)
            if window is None:
                continue
            window.age(now_s)
            window.grants_per_s += 1 / SMOOTHING_S
            window.amount_per_s += amount / SMOOTHING_S

    def refused(self, tenant_id: str, window_id: int, now_s: float) -> None:
        """A window had too little for somebody."""
        window = self._window((tenant_id, window_id), now_s)
        if window is not None:
            window.refused_s = now_s

    def wants(self, now_s: float) -> list[Want]:
        """What to ask the ledger for now; nothing to ask where that is empty. Tell the answer to `leased`."""
        busy: list[tuple[float, WindowKey, int]] = []
        for key, window in list(self._windows.items()):
            window.age(now_s)
            window.busy = window.grants_per_s >= (QUIET_PER_S if window.busy else BUSY_PER_S)
            if window.busy and now_s - window.refused_s >= REFUSED_S:
                amount = math.ceil(window.amount_per_s * AHEAD_S)
                if amount > 0:
                    busy.append((window.grants_per_s, key, amount))
            elif window.grants_per_s < QUIET_PER_S / 100 and now_s - window.refused_s >= REFUSED_S:
                del self._windows[key]
        if len(self._windows) >= WINDOWS_MAX:
            by_rate = sorted(self._windows, key=lambda key: self._windows[key].grants_per_s)
            for key in by_rate[: WINDOWS_MAX // 2]:
                del self._windows[key]
        busy.sort(reverse=True)
        wants = {key: amount for _, key, amount in busy[:LEASES_MAX]}
        named = self._leased | wants.keys()
        self._leased = set(named)
        return [Want(*key, wants.get(key, 0)) for key in sorted(named)]

    def leased(self, asked: Collection[Want], leases: dict[WindowKey, int]) -> None:
        """The ledger has answered these wants with what is free in each lease: the others are gone.

        Without an answer everything is named again the next time.
        """
        gone = {(want.tenant_id, want.window_id) for want in asked if want.amount == 0}
        gone |= {(want.tenant_id, want.window_id) for want in asked} - leases.keys()
        self._leased -= {key for key in gone if not leases.get(key)}

    def forget_leases(self) -> None:
        """The holder was lost, and its leases with it."""
        self._leased.clear()

    def _window(self, key: WindowKey, now_s: float) -> _Window | None:
        window = self._windows.get(key)
        if window is None and len(self._windows) < WINDOWS_MAX:
            window = self._windows[key] = _Window(now_s)
        return window
