"""The judge of the torture sees each fault that it is there for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torture.client import StreamEnd
from torture.judge import Ceilings, Charged, Figures, judge_streams, judge_windows
from torture.plan import Scale, plan_round
from torture.recordings import Recording, read_recordings

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


@pytest.mark.parametrize(
    ("seen", "is_fine"),
    [
        ({"charged": 40, "source": "provider", "done": True}, True),
        ({"charged": 30, "source": "provider", "done": True}, False),
        ({"charged": 20, "source": "local", "done": True}, True),
        ({"charged": 21, "source": "local", "done": True}, False),
        ({"charged": 25, "source": "local", "killed": True}, True),
        ({"charged": 19, "source": "local", "killed": True}, False),
        ({"charged": 19, "source": "local", "left": True}, False),
        ({"charged": 41, "source": "provider", "left": True}, False),
        ({"charged": 20, "source": "local"}, False),
    ],
)
def test_a_recorded_stream_costs_what_its_provider_says_or_what_was_received(
    seen: dict[str, Any], is_fine: bool
) -> None:
    recording = Recording(name="one", size_bytes=1000, prompt_tokens=10, counted_tokens=35, provider_tokens=40)
    charged, source, killed = seen.pop("charged"), seen.pop("source"), seen.pop("killed", False)
    plan = replace(plan_round(1, 1, SCALE).streams[0], recording=recording)
    end = StreamEnd(plan=plan, request_id="r", status=200, recorded_tokens=20, **seen)
    rows = {"r": Charged(request_id="r", outcome="any", source=source, output_tokens=charged, amount_pico=1)}
    sim = [{"id": "r", "body": {"sim": {"seed": plan.number}}, "output_tokens_sent": 0}]
    findings = judge_streams([end], rows=rows, sim=sim, killed={plan.number: killed}, figures=Figures())
    assert bool(findings) != is_fine


def test_what_was_refused_may_have_cost_its_input_and_nothing_else() -> None:
    plan = plan_round(1, 1, SCALE).streams[0]
    end = StreamEnd(plan=plan, refused_ids=["r"])
    sim = [{"id": "r", "body": {"sim": {"seed": plan.number}}, "output_tokens_sent": 0}]
    for output_tokens in (0, 1):
        rows = {
            "r": Charged(request_id="r", outcome="draining", source="local", output_tokens=output_tokens, amount_pico=1)
        }
        findings = judge_streams([end], rows=rows, sim=sim, killed={plan.number: False}, figures=Figures())
        assert len(findings) == output_tokens


def test_the_streams_of_this_repository_can_be_replayed(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "chat").symlink_to(repository / "tests" / "proxy" / "streams")
    found = read_recordings(tmp_path)
    assert found["text-usage-in-own-chunk"].provider_tokens
    assert found["text-without-usage"].provider_tokens is None
    assert "error-event" not in found


@pytest.mark.parametrize(
    ("outcome", "output_tokens", "is_fine"), [("killed", 0, True), ("killed", 1, False), ("refused", 0, False)]
)
def test_a_refusal_costs_nothing_but_the_input_of_what_was_suspended_while_it_waited(
    outcome: str, output_tokens: int, is_fine: bool
) -> None:
    plan = plan_round(1, 1, SCALE).streams[0]
    end = StreamEnd(plan=plan, request_id="r", status=403, code="forbidden")
    rows = {"r": Charged(request_id="r", outcome=outcome, source="local", output_tokens=output_tokens, amount_pico=1)}
    sim = [{"id": "r", "body": {"sim": {"seed": plan.number}}, "output_tokens_sent": 7}]
    findings = judge_streams([end], rows=rows, sim=sim, killed={plan.number: False}, figures=Figures())
    assert bool(findings) != is_fine
