import argparse
import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest

from behest_ledger.configuration.manifests import parse
from behest_ledger.configuration.plan import PutBudget, plan
from behest_ledger.configuration.state import ConfigurationState
from behest_ledger.configuration.status import BudgetStatus
from behest_ledger.prices.book import PriceBook
from behest_ledger.prices.snapshot import compile_package_book
from behest_proxy.cli import apply, get
from behest_proxy.cli.database import dsn_from
from behest_proxy.cli.main import main
from behest_proxy.cli.prices_difference import difference
from behest_proxy.cli.tables import print_table
from behest_proxy.cli.terminal import Terminal, UserError

BUDGET = """
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: shop-sessions, namespace: demo}
spec:
  scope: {project: shop}
  per: [session]
  limit: {amount: "0.50", currency: USD}
  window: {period: Day, timeZone: Europe/Berlin}
  alertThresholds: [50]
"""

NOBODY = "postgresql://behest@127.0.0.1:1/behest?sslmode=disable"
"""Port 1 of the loopback: nothing listens there."""


def parsed(module: ModuleType, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    return parser.parse_args(argv)


@pytest.fixture(autouse=True)
def no_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("DATABASE_URL", "BEHEST_DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


# Which database


def test_the_option_wins_over_the_environment_and_that_over_the_ready_file(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "ready.json").write_text(json.dumps({"database_url": "of-the-file"}))
    arguments = argparse.Namespace(database_url=None, data_dir=str(folder))
    assert dsn_from(arguments, environment={}) == "of-the-file"
    assert dsn_from(arguments, environment={"DATABASE_URL": "general"}) == "general"
    assert dsn_from(arguments, environment={"DATABASE_URL": "general", "BEHEST_DATABASE_URL": "ours"}) == "ours"
    arguments.database_url = "option"
    assert dsn_from(arguments, environment={"BEHEST_DATABASE_URL": "ours"}) == "option"


def test_a_mounted_file_may_name_the_database(tmp_path: Path) -> None:
    file = tmp_path / "database-url"
    arguments = argparse.Namespace(database_url=None, data_dir=str(tmp_path))
    environment = {"DATABASE_URL": "general", "BEHEST_DATABASE_URL_FILE": str(file)}
    with pytest.raises(UserError, match=r"database-url cannot be read .*BEHEST_DATABASE_URL_FILE"):
        dsn_from(arguments, environment=environment)
    file.write_text("\n")
    with pytest.raises(UserError, match="database-url is empty"):
        dsn_from(arguments, environment=environment)
    file.write_text("of-the-mount\n")
    assert dsn_from(arguments, environment=environment) == "of-the-mount"
    assert dsn_from(arguments, environment={**environment, "BEHEST_DATABASE_URL": "ours"}) == "ours"


def test_no_database_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no `behest up` runs in .*start one with `behest up`, or set DATABASE_URL"):
        dsn_from(argparse.Namespace(data_dir=str(tmp_path / "nowhere")), environment={})


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"database_url": 5}'])
def test_a_damaged_ready_file_is_told_by_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "ready.json").write_text(content)
    with pytest.raises(UserError, match=r"ready\.json"):
        dsn_from(argparse.Namespace(data_dir=str(tmp_path)), environment={})


def test_a_database_that_does_not_answer_is_told_with_a_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.yaml").write_text(BUDGET)
    for argv in (["apply", "-f", "b.yaml"], ["get", "budgets"], ["prices", "diff"]):
        assert main([*argv, "--database-url", NOBODY]) == 2
        assert "the ledger's database does not answer" in capsys.readouterr().err


# apply


def test_wrong_manifests_are_all_told_before_a_database_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.yaml").write_text(BUDGET.replace('"0.50"', "-1"))
    (tmp_path / "two.yaml").write_text(BUDGET.replace("period: Day", "period: Dya"))
    assert main(["apply", "-f", "one.yaml", "-f", "two.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        (
            "behest: Budget demo/shop-sessions: spec.limit.amount: must be a decimal string such as"
            ' "5.00", got -1 (one.yaml, document 1)'
        ),
        (
            "behest: Budget demo/shop-sessions: spec.window.period: must be Day, Hour, Lifetime, Minute, Month or Week,"
            ' got "Dya" (two.yaml, document 1)'
        ),
        "behest: 2 errors; nothing was applied",
    ]


def test_manifests_come_from_standard_input_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"kind: Nothing\n")))
    assert main(["apply", "-f", "-"]) == 2
    assert "kind: must be Project, Upstream, Tier or Budget" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"#" * (1024 * 1024 + 1), "is longer than 1048576 bytes"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_text_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "it.yaml").write_bytes(content)
    assert main(["apply", "-f", "it.yaml"]) == 2
    assert f"behest: it.yaml {reason}" in capsys.readouterr().err


def test_apply_needs_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply"]) == 2
    assert "-f" in capsys.readouterr().err


def test_a_namespace_is_told_with_n_and_is_default_otherwise() -> None:
    assert parsed(apply, "apply", "-f", "a").namespace == "default"
    arguments = parsed(apply, "apply", "-f", "a", "-f", "b", "-n", "demo", "--dry-run")
    assert (arguments.files, arguments.namespace, arguments.dry_run) == (["a", "b"], "demo", True)


# get


def budget_status(text: str, **members: int) -> BudgetStatus:
    (change,) = plan(ConfigurationState(), parse(text), tenant_of_namespace=lambda _: "acme").changes
    assert isinstance(change, PutBudget)
    return BudgetStatus(record=change.record, **{"remaining": change.record.limit_amount, **members})  # type: ignore[arg-type]


def test_budgets_are_a_table_that_a_person_can_read() -> None:
    out = io.StringIO()
    of_session = budget_status(
        BUDGET,
        spent=300_000_000_000,
        held=50_000_000_000,
        remaining=150_000_000_000,
        active=1,
        most_used=300_000_000_000,
    )
    of_tenant = budget_status(
        BUDGET.replace("{project: shop}", "{tenant: acme, user: 'a*'}")
        .replace("[session]", "[]")
        .replace('{amount: "0.50", currency: USD}', "{tokens: 9, tokenKind: Output}")
        .replace("{period: Day, timeZone: Europe/Berlin}", "{period: Hour, alignment: Rolling}")
        + "  suspended: true\n  enforcement: Soft\n"
    )
    print_table(Terminal(out), *get.budget_rows([of_session, of_tenant]))
    columns = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.getvalue().splitlines()]
    assert columns == [
        ["NAMESPACE", "NAME", "SCOPE", "LIMIT", "SPENT", "HELD", "REMAINING", "EXHAUSTED", "WINDOW", "PHASE"],
        [
            "demo",
            "shop-sessions",
            "project=shop per session",
            "0.5 USD",
            "0.3",
            "0.05",
            "0.15",
            "0 of 1",
            "Day Europe/Berlin",
            "Warning",
        ],
        [
            "demo",
            "shop-sessions",
            "user=a*,tenant=acme",
            "9 output tokens",
            "0",
            "0",
            "9",
            "0 of 0",
            "Hour rolling (soft)",
            "Suspended",
        ],
    ]


def test_get_takes_a_kind_a_namespace_and_a_form() -> None:
    arguments = parsed(get, "get", "budgets", "-n", "demo", "-o", "json")
    assert (arguments.kind, arguments.namespace, arguments.output) == ("budgets", "demo", "json")


# prices


def test_prices_are_shown_without_a_database(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prices", "show", "gpt-4o-mini", "gemini-2.5-pro"]) == 0
    header, mini, *rest = capsys.readouterr().out.splitlines()
    pro, pro_long = (line for line in rest if "gemini-2.5-pro" in line and "=" not in line and "00000 " in line)
    source = rest[-1]
    assert header.split()[:3] == ["PROVIDER", "MODEL", "CONTEXT"]
    assert mini.split() == [
        "openai",
        "gpt-4o-mini",
        "any",
        "0.15",
        "0.075",
        "(0.15)",
        "0.6",
        "(0.6)",
        "(0.15)",
        "(0.6)",
        "-",
    ]
    assert "to 200000" in pro
    assert "over 200000" in pro_long
    assert "genai-prices-" in source


def test_a_model_without_a_price_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prices", "show", "our-own-llama", "--package"]) == 1
    assert "our-own-llama: no price is known" in capsys.readouterr().out


def test_an_unknown_provider_or_nothing_at_all_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prices", "show", "--provider", "nobody", "--package"]) == 2
    assert "knows no provider 'nobody'" in capsys.readouterr().err
    assert main(["prices", "show"]) == 2
    assert "name models, or a provider" in capsys.readouterr().err


def test_a_difference_names_every_class_that_changed() -> None:
    at = datetime(2026, 11, 22, tzinfo=UTC)
    installed = compile_package_book()
    only_openai = [provider for provider in installed.document.providers if provider.id == "openai"]
    document = type(installed.document)(source="older", providers=only_openai)
    rows = difference(PriceBook(document, version="older"), installed, at=at)
    assert ("groq", "gemma2-9b-it", "input", "-", "0.2") in rows
    assert not any(provider == "openai" for provider, *_ in rows)
    assert difference(installed, installed, at=at) == []


@pytest.mark.parametrize("moment", ["tomorrow", "2026-12-01T00:00:00"])
def test_a_time_needs_its_zone(moment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prices", "update", "--effective-from", moment, "--database-url", NOBODY]) == 2
    assert moment in capsys.readouterr().err


# With a ledger


def test_apply_get_and_prices_work_together(database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--database-url", database]
    (tmp_path / "b.yaml").write_text(BUDGET)
    assert main(["apply", "-f", "b.yaml", "--dry-run", *where]) == 0
    assert capsys.readouterr().out == "budget/shop-sessions created (dry run)\n"
    assert main(["get", "budgets", *where]) == 0
    assert capsys.readouterr().out == "There are no budgets: behest apply -f FILE\n"
    for action in ("created", "unchanged"):
        assert main(["apply", "-f", "b.yaml", *where]) == 0
        out, err = capsys.readouterr()
        assert out == f"budget/shop-sessions {action}\n"
        assert err == (
            "behest: warning: Budget demo/shop-sessions: spec.scope.project: there is no Project demo/shop\n"
        )
    assert main(["get", "budgets", "-n", "demo", *where]) == 0
    assert "0.5 USD" in capsys.readouterr().out
    for form in ("json", "yaml"):
        assert main(["get", "budgets", "shop-sessions", "-o", form, *where]) == 0
        (tmp_path / "again").write_text(capsys.readouterr().out)
        assert main(["apply", "-f", "again", *where]) == 0
        assert capsys.readouterr().out == "budget/shop-sessions unchanged\n"
    (tmp_path / "b.yaml").write_text(BUDGET.replace("Day", "Week"))
    assert main(["apply", "-f", "b.yaml", *where]) == 2
    assert "spec.window.period: is immutable: it is Day, got Week" in capsys.readouterr().err


def test_an_update_stores_the_packages_prices_once(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--database-url", database]
    assert main(["prices", "diff", *where]) == 0
    assert "No prices are stored yet" in capsys.readouterr().out
    assert main(["prices", "update", *where]) == 0
    assert capsys.readouterr().out.endswith(" created\n")
    assert main(["prices", "update", *where]) == 0
    assert capsys.readouterr().out.endswith(" unchanged\n")
    assert main(["prices", "diff", *where]) == 0
    assert "They cost the same." in capsys.readouterr().out
    assert main(["prices", "show", "gpt-4o-mini", *where]) == 0
    assert "stored, since" in capsys.readouterr().out
