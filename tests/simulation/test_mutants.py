"""The simulator can fail: each deliberate bug is found within the first seeds."""

import pytest

from ledger.memory_holders import MemoryLedger
from simulation.mutants import LEDGERS, SIDECARS
from simulation.run import Outcome, simulate
from simulation.sidecar import Parts

SEEDS_MAX = 1000


def _found(parts: Parts | None, ledger: type[MemoryLedger]) -> Outcome | None:
    played = (simulate(seed, parts=parts, ledger=ledger) for seed in range(SEEDS_MAX))
    return next((outcome for outcome in played if outcome.wrong), None)


@pytest.mark.parametrize("ledger", LEDGERS, ids=[ledger.__name__ for ledger in LEDGERS])
def test_a_bug_of_the_ledger_is_found(ledger: type[MemoryLedger]) -> None:
    outcome = _found(None, ledger)
    assert outcome is not None, f"not in {SEEDS_MAX} seeds"


@pytest.mark.parametrize("parts", SIDECARS.values(), ids=SIDECARS)
def test_a_bug_of_a_sidecar_is_found(parts: Parts) -> None:
    outcome = _found(parts, MemoryLedger)
    assert outcome is not None, f"not in {SEEDS_MAX} seeds"
