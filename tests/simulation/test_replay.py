"""A seed is a whole story: played again it is the same, also by another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.run import simulate
from simulation.seeds import told

TESTS = Path(__file__).resolve().parents[1]


def _replayed(*arguments: str, hash_seed: str = "1") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "simulation.replay", *arguments],
        env={**os.environ, "PYTHONPATH": str(TESTS), "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("seed", [3, 45, 586])
def test_a_seed_played_twice_is_the_same_in_every_event(seed: int) -> None:
    first = simulate(seed)
    assert first == simulate(seed)
    assert first.steps > 500
    assert first.statements > 20


def test_another_process_plays_the_same() -> None:
    outcome = simulate(7)
    found = _replayed("--seed", "7", hash_seed="12345")
    assert found.returncode == 0, found.stderr
    assert outcome.trace in found.stdout


def test_a_replay_tells_every_event_and_stops_at_a_step() -> None:
    found = _replayed("--seed", "7", "--verbose", "--steps", "300")
    assert found.returncode == 0, found.stderr
    assert "seed 7: 300 steps" in found.stdout
    assert "ledger admit_batch_v1" in found.stdout
    assert "budget all:" in found.stdout


def test_other_seeds_are_other_stories() -> None:
    traces = {simulate(seed).trace for seed in range(10)}
    assert len(traces) == 10


def test_a_seed_that_fails_comes_with_its_command() -> None:
    outcome = simulate(7)
    outcome.wrong.append("the sky fell")
    assert told(outcome, "crowd") == (
        "seed 7: the sky fell\n"
        "    play it again: PYTHONPATH=tests python -m simulation.replay --seed 7 --size crowd --verbose"
    )
