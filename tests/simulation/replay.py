"""Plays one seed again, and tells what happens: `PYTHONPATH=tests python -m simulation.replay --seed 7 --verbose`."""

import argparse
import sys
from typing import get_args

from simulation.run import Size, simulate


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m simulation.replay", description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--size", choices=get_args(Size), default="small")
    parser.add_argument("--steps", type=int, help="stop after this step")
    parser.add_argument("--verbose", action="store_true", help="tell every event")
    arguments = parser.parse_args()
    outcome = simulate(
        arguments.seed, arguments.size, steps_max=arguments.steps, told=print if arguments.verbose else None
    )
    print(f"seed {outcome.seed}: {outcome.steps} steps, {outcome.statements} statements, {outcome.requests} requests,")
    print(f"  outcomes {outcome.outcomes}, incidents {outcome.incidents}, trace {outcome.trace}")
    for wrong in outcome.wrong:
        print(f"  WRONG: {wrong}")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
