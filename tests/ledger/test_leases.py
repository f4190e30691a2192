"""Which windows a sidecar wants to lease, and how much of them: from what it was granted and when, and nothing else."""

import math
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from behest_ledger.leases import (
    AHEAD_S,
    BUSY_PER_S,
    LEASES_MAX,
    QUIET_PER_S,
    REFUSED_S,
    WINDOWS_MAX,
    LeasePolicy,
    Want,
    WindowKey,
)

A, B = "acme", "beta"


def play(policy: LeasePolicy, *, window: int = 1, per_s: float, amount: int, from_s: float, for_s: float) -> float:
    """Grants at an even pace; when it ended."""
    for number in range(round(per_s * for_s)):
        policy.granted(A, [(window, amount)], from_s + number / per_s)
    return from_s + for_s


def tick(policy: LeasePolicy, now_s: float) -> dict[int, int]:
    """Ask for wants, and have them granted whole."""
    wants = policy.wants(now_s)
    policy.leased(wants, {(want.tenant_id, want.window_id): want.amount for want in wants})
    return {want.window_id: want.amount for want in wants}


def test_a_busy_window_is_wanted_for_a_few_seconds_of_its_spending() -> None:
    policy = LeasePolicy()
    now_s = play(policy, per_s=100, amount=7, from_s=0, for_s=20)
    (want,) = policy.wants(now_s)
    assert (want.tenant_id, want.window_id) == (A, 1)
    assert 0.95 * 700 * AHEAD_S < want.amount < 1.05 * 700 * AHEAD_S


def test_nothing_is_wanted_of_a_window_that_few_ask_for() -> None:
    policy = LeasePolicy()
    now_s = play(policy, per_s=BUSY_PER_S / 2, amount=10**12, from_s=0, for_s=20)
    assert policy.wants(now_s) == []


def test_what_is_not_busy_any_more_is_named_with_zero_until_the_ledger_says_that_it_is_gone() -> None:
    policy = LeasePolicy()
    now_s = play(policy, per_s=50, amount=7, from_s=0, for_s=10)
    assert tick(policy, now_s)[1] > 0
    assert tick(policy, now_s + 1)[1] > 0  # one quiet second is not the end of it
    for later_s in (20, 21):
        wants = policy.wants(now_s + later_s)
        assert wants == [Want(A, 1, 0)]
        policy.leased(wants, {(A, 1): 300})  # a ledger that did not take it back yet
    wants = policy.wants(now_s + 22)
    policy.leased(wants, {(A, 1): 0})
    assert policy.wants(now_s + 23) == []


def test_a_window_stays_busy_at_a_pace_that_would_not_make_it_so() -> None:
    policy = LeasePolicy()
    pace = (BUSY_PER_S + QUIET_PER_S) / 2
    now_s = play(policy, per_s=4 * BUSY_PER_S, amount=7, from_s=0, for_s=5)
    assert tick(policy, now_s)
    now_s = play(policy, per_s=pace, amount=7, from_s=now_s, for_s=20)
    assert tick(policy, now_s)[1] > 0
    policy = LeasePolicy()
    assert policy.wants(play(policy, per_s=pace, amount=7, from_s=0, for_s=20)) == []


def test_after_a_refusal_nothing_is_wanted_of_that_window_for_a_while() -> None:
    policy = LeasePolicy()
    now_s = play(policy, per_s=50, amount=7, from_s=0, for_s=5)
    play(policy, window=2, per_s=50, amount=7, from_s=0, for_s=5)
    tick(policy, now_s)
    policy.refused(A, 1, now_s)
    wants = tick(policy, now_s)
    assert wants[1] == 0
    assert wants[2] > 0
    now_s = play(policy, per_s=50, amount=7, from_s=now_s, for_s=REFUSED_S)
    assert tick(policy, now_s)[1] > 0


def test_without_an_answer_everything_is_named_again() -> None:
    policy = LeasePolicy()
    now_s = play(policy, per_s=50, amount=7, from_s=0, for_s=5)
    assert policy.wants(now_s) != []
    assert policy.wants(now_s + 60) == [Want(A, 1, 0)]
    assert policy.wants(now_s + 61) == [Want(A, 1, 0)]


def test_the_leases_of_a_holder_that_was_lost_are_not_named_any_more() -> None:
    policy = LeasePolicy()
    now_s = play(policy, per_s=50, amount=7, from_s=0, for_s=5)
    tick(policy, now_s)
    policy.forget_leases()
    assert tick(policy, now_s)[1] > 0  # still busy: wanted under the new id
    policy.forget_leases()
    assert policy.wants(now_s + 60) == []


def test_the_busiest_windows_are_leased_and_the_number_of_those_looked_at_is_bounded() -> None:
    policy = LeasePolicy()
    for _ in range(40):
        policy.granted(A, [(window, 1) for window in range(1, LEASES_MAX + 11)], 0.0)
        policy.granted(A, [(window, 1) for window in range(11, LEASES_MAX + 11)], 0.0)
    assert set(tick(policy, 0.0)) == set(range(11, LEASES_MAX + 11))
    policy.granted(A, [(window, 1) for window in range(1000, 1000 + 2 * WINDOWS_MAX)], 0.0)
    tick(policy, 0.0)  # the quieter half was forgotten
    play(policy, window=777, per_s=1000, amount=1, from_s=0.0, for_s=1)
    assert 777 in tick(policy, 1.0)


def test_a_clock_that_goes_back_does_no_harm() -> None:
    policy = LeasePolicy()
    play(policy, per_s=50, amount=7, from_s=100, for_s=5)
    policy.granted(A, [(1, 7)], 3.0)
    assert policy.wants(50.0)[0].amount > 0


@dataclass
class _Ledger:
    """What the ledger has of one sidecar's leases."""

    free: dict[WindowKey, int] = field(default_factory=dict[WindowKey, int])

    def lease(self, wants: list[Want], percent: int, ended: bool) -> dict[WindowKey, int]:
        tenants = {want.tenant_id for want in wants}
        named = {(want.tenant_id, want.window_id): want.amount for want in wants}
        for key in list(self.free):
            if key[0] in tenants and key not in named:
                self.free[key] = 0
        for key, amount in named.items():
            if amount or key in self.free:
                self.free[key] = amount * percent // 100
        answer = {key: free for key, free in self.free.items() if key[0] in tenants}
        if ended:
            for key in named:
                answer.pop(key, None)
                self.free.pop(key, None)
        return answer


class _Leasing(RuleBasedStateMachine):
    """One sidecar and its leases, while windows come and go, answers are lost, and the holder too."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = LeasePolicy()
        self.ledger = _Ledger()
        self.now_s = 0.0
        self.refused_s: dict[WindowKey, float] = {}
        self.spent = 0

    @rule(seconds=st.floats(0, 8))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(
        tenant=st.sampled_from([A, B]),
        window=st.integers(1, 4),
        grants=st.integers(1, 60),
        amount=st.integers(0, 10**15),
    )
    def grant(self, tenant: str, window: int, grants: int, amount: int) -> None:
        for _ in range(grants):
            self.policy.granted(tenant, [(window, amount), (9, 1)], self.now_s)
        self.spent = max(self.spent, grants * amount) + grants * amount

    @rule(tenant=st.sampled_from([A, B]), window=st.integers(1, 4))
    def refuse(self, tenant: str, window: int) -> None:
        self.policy.refused(tenant, window, self.now_s)
        self.refused_s[tenant, window] = self.now_s

    @rule(percent=st.sampled_from([0, 50, 100]), lost=st.sampled_from(["", "answer", "question"]), ended=st.booleans())
    def renew(self, percent: int, lost: str, ended: bool) -> None:
        wants = self.policy.wants(self.now_s)
        assert len({(want.tenant_id, want.window_id) for want in wants}) == len(wants)
        for want in wants:
            assert 0 <= want.amount <= self.spent * AHEAD_S + 60 * 9 * AHEAD_S * 100
            refused_s = self.refused_s.get((want.tenant_id, want.window_id), -math.inf)
            assert want.amount == 0 or self.now_s - refused_s >= REFUSED_S
        if wants and lost != "question":
            answer = self.ledger.lease(wants, percent, ended)
            if lost != "answer":
                self.policy.leased(wants, answer)

    @rule()
    def lose_the_holder(self) -> None:
        self.policy.forget_leases()
        self.ledger = _Ledger()

    @invariant()
    def what_is_leased_is_never_forgotten(self) -> None:
        # Asking does not change what is asked, so the machine may look.
        named = {(want.tenant_id, want.window_id) for want in self.policy.wants(self.now_s)}
        assert {key for key, free in self.ledger.free.items() if free} <= named

    def teardown(self) -> None:
        self.now_s += 3600
        for _ in range(2):
            wants = self.policy.wants(self.now_s)
            assert all(want.amount == 0 for want in wants)
            if wants:
                self.policy.leased(wants, self.ledger.lease(wants, 100, ended=False))
        assert not any(self.ledger.free.values())
        assert self.policy.wants(self.now_s) == []


def test_no_lease_is_forgotten_and_all_are_given_back_when_it_is_quiet() -> None:
    run_state_machine_as_test(_Leasing, settings=settings(max_examples=150, stateful_step_count=30, deadline=None))
