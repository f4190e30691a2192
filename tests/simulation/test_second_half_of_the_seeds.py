"""Two files, so that two processors share the seeds. The other half is in the other one."""

import pytest

from simulation.seeds import play


@pytest.mark.parametrize("first", range(1000, 2000, 50))
def test_whatever_breaks_no_budget_is_passed_and_nothing_is_lost_or_charged_twice(first: int) -> None:
    play(range(first, first + 50))


@pytest.mark.parametrize("seed", range(10, 20))
def test_three_hundred_sidecars_keep_the_books(seed: int) -> None:
    play([seed], "crowd")
