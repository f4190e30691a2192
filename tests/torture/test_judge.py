"""The judge of the torture sees each fault that it is there for."""

from typing import Any

import pytest

from torture.client import StreamEnd
from torture.judge import Ceilings, Charged, Figures, judge_streams, judge_windows
from torture.plan import Scale, plan_round

SCALE = Scale(
    sidecars=2,
    streams=1,
    round_s=1.0,
    session_limit_usd=1.0,
    intervals_ms=(1,),
    tokens_per_chunk=(1,),
    chunks_max=500,
)


def _findings(
    *, charged: int | None, sent: int = 500, received: int = 100, killed: bool = False, **seen: Any
) -> list[str]:
    end = StreamEnd(plan=plan_round(1, 1, SCALE).streams[0], request_id="r", status=200, chunks=received, **seen)
    rows = {}
    if charged is not None:
        rows["r"] = Charged(request_id="r", outcome="any", source="local", output_tokens=charged, amount_pico=1)
    sim = [{"id": "r", "body": {"sim": {"seed": end.plan.number}}, "output_tokens_sent": sent}]
    return judge_streams([end], rows=rows, sim=sim, killed={end.plan.number: killed}, figures=Figures())


@pytest.mark.parametrize(
    "seen",
    [
        {"charged": 100, "done": True},
        {"charged": 100, "left": True},
        {"charged": 300, "left": True},
        {"charged": 164, "killed": True},
    ],
)
def test_what_the_rules_allow_is_no_finding(seen: dict[str, Any]) -> None:
    assert _findings(**seen) == []


@pytest.mark.parametrize(
    "seen",
    [
        {"charged": None, "done": True},
        {"charged": 101, "done": True},
        {"charged": 99, "done": True},
        {"charged": 99, "left": True},
        {"charged": 501, "left": True},
        {"charged": 99, "killed": True},
        {"charged": 165, "killed": True},
        {"charged": 100},
        {"charged": 100, "done": True, "fault": "something came after [DONE]"},
    ],
)
def test_what_the_rules_forbid_is_a_finding(seen: dict[str, Any]) -> None:
    assert len(_findings(**seen)) == 1


@pytest.mark.parametrize(("spent", "overrun", "over"), [("110", "0", 0), ("111", "0", 1), ("100", "5", 5)])
def test_a_window_may_stand_at_its_highest_limit_and_not_above_it(spent: str, overrun: str, over: int) -> None:
    ceilings, figures = Ceilings(), Figures()
    ceilings.set_limit("sessions", 90)
    ceilings.begin("sessions", "s1")
    ceilings.set_limit("sessions", 120)
    ceilings.set_limit("sessions", 10)
    window = {"budget": "sessions", "subject": "s1", "spent": spent, "held": "5", "suspense": "5", "overrun": overrun}
    assert bool(judge_windows([window], ceilings, figures)) == bool(over)
    assert figures.overshoot_pico == over


def test_the_same_seed_plans_the_same_rounds() -> None:
    assert plan_round(7, 3, SCALE) == plan_round(7, 3, SCALE)
    assert plan_round(7, 3, SCALE) != plan_round(8, 3, SCALE)
