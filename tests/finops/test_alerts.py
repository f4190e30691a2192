"""The alert rules, played by promtool: each fires when it should and not before."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from finops.prometheus import program

RULES = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "behest" / "alerts" / "behest.yaml"
ALERTS: dict[str, str] = {
    rule["alert"]: rule["labels"]["severity"]
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
"""Each with its severity."""
OUTCOMES = "behest_stream_outcomes_total"
Series = dict[str, str]
MONTH_S, DAY_S, HOUR_S = 2_592_000, 86_400, 3_600


def of_budget(name: str, *, unit: str = "usd") -> dict[str, str]:
    return {"behest_tenant": "acme", "behest_budget": name, "behest_unit": unit}


def budget(
    name: str, spent: str, *, period_s: int = MONTH_S, resets: str = "1000000x900", keeper: str = "a"
) -> dict[str, str]:
    """The series of a budget of 100 as a keeper tells them; `resets` is when its windows end."""
    labels = ",".join(f'{key}="{value}"' for key, value in {**of_budget(name), "instance": keeper}.items())
    return {
        f"behest_budget_limit{{{labels}}}": "100x900",
        f"behest_budget_spent{{{labels}}}": spent,
        f"behest_budget_period_seconds{{{labels}}}": f"{period_s}x900",
        f"behest_budget_resets_at_seconds{{{labels}}}": resets,
    }


CASES: dict[str, tuple[str, Series, dict[str, list[dict[str, str]]]]] = {
    # What it is of: the alert, what came in (a value a minute), and who is told of at which times.
    "an overrun, also the first one of a project": (
        "BehestOverrun",
        {
            'behest_overrun_total{behest_project="first"}': "_x20 1x60",
            'behest_overrun_total{behest_project="again"}': "1x50 2x30",
            'behest_overrun_total{behest_project="calm"}': "3x80",
        },
        {
            "19m": [],
            "22m": [{"behest_project": "first"}],
            "45m": [],
            "53m": [{"behest_project": "again"}],
            "79m": [],
        },
    ),
    "a project that spends four times as fast as the day before": (
        "BehestSpendFast",
        {
            'behest_cost_USD_total{behest_project="hasty"}': "0+0.1x1500 150+1x100",
            'behest_cost_USD_total{behest_project="even"}': "0+0.1x1600",
            'behest_cost_USD_total{behest_project="small"}': "0+0.0001x1500 0.15+0.001x100",
        },
        {"1500m": [], "1590m": [{"behest_project": "hasty"}]},
    ),
    "a budget that refuses much": (
        "BehestBudgetRefusals",
        {
            'behest_admission_refusals_total{behest_project="poor",behest_reason="quota"}': "0+2x60",
            f'{OUTCOMES}{{behest_project="poor",behest_outcome="completed"}}': "0+5x60",
            'behest_admission_refusals_total{behest_project="busy",behest_reason="rate"}': "0+9x60",
            f'{OUTCOMES}{{behest_project="busy",behest_outcome="completed"}}': "0+5x60",
            'behest_admission_refusals_total{behest_project="rich",behest_reason="quota"}': "0+2x60",
            f'{OUTCOMES}{{behest_project="rich",behest_outcome="completed"}}': "0+500x60",
            # Nothing of it was served since the pods began.
            'behest_admission_refusals_total{behest_project="spent",behest_reason="quota"}': "0+20x60",
        },
        {"2m": [], "40m": [{"behest_project": "poor"}, {"behest_project": "spent"}]},
    ),
    "a month's budget that is spent in a day and a half": (
        "BehestBudgetBurnFast",
        {
            **budget("hasty", "0+0.05x900"),
            **budget("even", "0+0.002x900"),
            # Its burst is over: an hour sees it still, five minutes do not.
            **budget("calmed", "0+0.05x80 4+0.002x900"),
            # Half is gone already when somebody begins to look: of the last hour nothing is known for an hour.
            **budget("found", "50+0.05x900", resets=f"{MONTH_S - 10 * HOUR_S}x900"),
        },
        {
            "30m": [],
            "58m": [],
            "62m": [of_budget("calmed"), of_budget("found"), of_budget("hasty")],
            "90m": [of_budget("found"), of_budget("hasty")],
        },
    ),
    "a budget whose window begins, whose keeper changes or that is corrected": (
        "BehestBudgetBurnFast",
        {
            **budget("begins", "80+0.002x89 0+0.002x900", resets=f"5400x89 {5400 + MONTH_S}x900"),
            **budget("hastily", "80+0.002x89 0+0.2x900", resets=f"5400x89 {5400 + MONTH_S}x900"),
            **budget("kept", "50+0.002x99 _x900", resets="1000000x99 _x900"),
            **budget("kept", "_x100 50.2+0.002x900", resets="_x100 1000000x900", keeper="b"),
            **budget("corrected", "80x99 20x900"),
        },
        {"85m": [], "95m": [], "105m": [of_budget("hastily")], "200m": [of_budget("hastily")]},
    ),
    "a budget that lasts a fifth of its time": (
        "BehestBudgetBurnSlow",
        {
            **budget("month", "0+0.02x900"),
            **budget("day", "0+0.5x200 100x900", period_s=DAY_S, resets=f"{DAY_S}x900"),
            **budget("steady day", "0+0.06x900", period_s=DAY_S, resets=f"{DAY_S}x900"),
            **budget("hour", "0+1.5x59 0+1.5x59 0+1.5x900", period_s=HOUR_S, resets="3600x59 7200x59 10800x900"),
        },
        {"40m": [], "70m": [of_budget("day")], "300m": [], "380m": [of_budget("month")]},
    ),
    "a ledger that nobody keeps": (
        "BehestNotKept",
        {
            'behest_keeper_rounds_total{instance="a",behest_result="worked"}': "0+12x100 _x100",
            'behest_keeper_rounds_total{instance="b",behest_result="stood_by"}': "0+12x200",
        },
        {"5m": [], "90m": [], "110m": [], "125m": [{}]},
    ),
    "a ledger that cannot be sealed": (
        "BehestSealLag",
        {"behest_ledger_seal_lag_seconds": "0 60 0 60 0 60 0 60 0 60 0+60x30"},
        {"10m": [], "24m": [], "33m": [{}]},
    ),
    "a request that waits for its journal": (
        "BehestSuspense",
        {'behest_ledger_suspense_age_seconds{instance="a"}': "0+60x900"},
        {"700m": [], "730m": [{}]},
    ),
    "a certificate that nobody renews": (
        "BehestWebhookCertificate",
        {
            'behest_webhook_certificate_expires_at_seconds{instance="a"}': f"{20 * DAY_S}x60 {10 * DAY_S}x60",
            'behest_webhook_certificate_expires_at_seconds{instance="b"}': f"{20 * DAY_S}x120",
        },
        {"60m": [], "75m": [{}]},
    ),
    "a resource that the ledger does not take": (
        "BehestReconcileErrors",
        {
            'behest_operator_reconciles_total{behest_kind="Budget",behest_result="failed"}': "0x10 0+7x60",
            'behest_operator_reconciles_total{behest_kind="Tier",behest_result="accepted"}': "0+7x60",
            'behest_operator_reconciles_total{behest_kind="Project",behest_result="failed"}': "0x10 1x60",
        },
        {"10m": [], "20m": [], "35m": [{"behest_kind": "Budget"}], "60m": [{"behest_kind": "Budget"}]},
    ),
    "a ledger that does not take settlements": (
        "BehestLedgerLag",
        {
            'behest_ledger_journal_lag_seconds{job="behest",instance="a"}': "0x10 0+60x10 0x10",
            'behest_ledger_journal_lag_seconds{job="behest",instance="b"}': "0x10 2x20",
        },
        {"9m": [], "14m": [{"job": "behest", "instance": "a"}], "24m": []},
    ),
    "a ledger that does not answer": (
        "BehestLedgerUnavailable",
        {
            f'{OUTCOMES}{{job="behest",behest_outcome="ledger_unavailable"}}': "0x10 0+1x20",
            f'{OUTCOMES}{{job="other",behest_outcome="completed"}}': "0+9x30",
        },
        {"10m": [], "16m": [{"job": "behest"}]},
    ),
    "a provider that fails": (
        "BehestUpstreamErrors",
        {
            f'{OUTCOMES}{{gen_ai_provider_name="openai",behest_outcome="upstream_error"}}': "0x10 0+2x30",
            f'{OUTCOMES}{{gen_ai_provider_name="openai",behest_outcome="upstream_timeout"}}': "0x10 0+2x30",
            f'{OUTCOMES}{{gen_ai_provider_name="openai",behest_outcome="completed"}}': "0+30x40",
            f'{OUTCOMES}{{gen_ai_provider_name="google",behest_outcome="upstream_error"}}': "0+2x40",
            f'{OUTCOMES}{{gen_ai_provider_name="google",behest_outcome="completed"}}': "0+30x40",
        },
        {"10m": [], "25m": [{"gen_ai_provider_name": "openai"}]},
    ),
    "a webhook without a pod": (
        "BehestWebhookDown",
        {
            'kube_deployment_status_replicas_available{namespace="behest",deployment="behest-webhook"}': "2x9 0x10",
            'kube_deployment_status_replicas_available{namespace="other",deployment="web"}': "0x20",
        },
        {"9m": [], "13m": [{"namespace": "behest", "deployment": "behest-webhook"}]},
    ),
}


def run(*arguments: str) -> None:
    ran = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_promtool_finds_no_fault_in_the_rules() -> None:
    run("check", "rules", "--lint-fatal", str(RULES))


def labels(alert: str, more: dict[str, str]) -> str:
    shown = {"alertname": alert, "alertstate": "firing", "severity": ALERTS[alert], **more}
    return "ALERTS{" + ",".join(f'{name}="{value}"' for name, value in shown.items()) + "}"


@pytest.mark.parametrize("name", CASES)
def test_it_fires_when_it_should_and_not_before(name: str, tmp_path: Path) -> None:
    alert, series, told = CASES[name]
    asked: list[dict[str, Any]] = [
        {
            "expr": f'ALERTS{{alertname="{alert}",alertstate="firing"}}',
            "eval_time": at,
            "exp_samples": [{"labels": labels(alert, one), "value": 1} for one in who],
        }
        for at, who in told.items()
    ]
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "name": name,
                "interval": "1m",
                "input_series": [{"series": one, "values": values} for one, values in series.items()],
                "promql_expr_test": asked,
            }
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(test))
    run("test", "rules", str(path))


def test_every_alert_is_played() -> None:
    assert {alert for alert, _, _ in CASES.values()} == set(ALERTS)
    assert all(any(told.values()) and not all(told.values()) for _, _, told in CASES.values())
