"""The alert rules, played by promtool: each fires when it should and not before."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from finops.prometheus import program

RULES = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "behest" / "alerts" / "behest.yaml"
ALERTS: dict[str, str] = {
    rule["alert"]: rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
}
OUTCOMES = "behest_stream_outcomes_total"
Series = dict[str, str]
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
        },
        {"2m": [], "40m": [{"behest_project": "poor"}]},
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
SEVERITIES = {
    rule["alert"]: rule["labels"]["severity"]
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
}


def run(*arguments: str) -> None:
    ran = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_promtool_finds_no_fault_in_the_rules() -> None:
    run("check", "rules", "--lint-fatal", str(RULES))


def labels(alert: str, more: dict[str, str]) -> str:
    shown = {"alertname": alert, "alertstate": "firing", "severity": SEVERITIES[alert], **more}
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
