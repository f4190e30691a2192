"""Many seeds, each with the command that plays it again."""

from collections.abc import Iterable

from simulation.run import Outcome, Size, simulate


def play(seeds: Iterable[int], size: Size = "small") -> None:
    """Play them all; those that went wrong are told at the end."""
    failed = [outcome for seed in seeds if (outcome := simulate(seed, size)).wrong]
    assert not failed, "\n".join(told(outcome, size) for outcome in failed)


def told(outcome: Outcome, size: Size) -> str:
    """What went wrong, and how to see it again."""
    more = "" if size == "small" else f" --size {size}"
    command = f"PYTHONPATH=tests python -m simulation.replay --seed {outcome.seed}{more} --verbose"
    return f"seed {outcome.seed}: {'; '.join(outcome.wrong)}\n    play it again: {command}"
