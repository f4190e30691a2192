"""`behest prices` against a real ledger."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from behest_proxy.cli.main import main

UPSTREAM = """
apiVersion: behest.ai/v1alpha1
kind: Upstream
metadata: {name: ours, namespace: demo}
spec:
  baseURL: https://api.openai.com/v1
  models:
    - {name: "gpt-4o*", prices: {input: "7", output: "9"}}
    - {name: llama, free: true}
"""


def file_of(folder: Path, name: str = "prices.json", **prices: Any) -> str:
    """A file of prices with one model `m` of one provider `p`."""
    models = [{"id": "m", "match": {"equals": "m"}, "prices": {"input_mtok": 1, "output_mtok": 2, **prices}}]
    path = folder / name
    path.write_text(json.dumps([{"id": "p", "name": "P", "api_pattern": "https://p\\.example", "models": models}]))
    return str(path)


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for variable in ("DATABASE_URL", "BEHEST_DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def test_an_update_shows_what_changes_and_asks(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--database-url", database]
    assert main(["prices", "update", "--from", file_of(tmp_path), *where]) == 0
    assert capsys.readouterr().out.startswith("prices/prices+")
    dearer = file_of(tmp_path, "dearer.json", output_mtok=3)
    assert main(["prices", "update", "--from", dearer, *where]) == 2
    out, err = capsys.readouterr()
    assert ["p", "m", "output", "2", "3"] in [line.split() for line in out.splitlines()]
    assert "nothing was stored; answer y, or say --yes" in err
    assert main(["prices", "update", "--from", dearer, "--yes", *where]) == 0
    assert "prices/dearer+" in capsys.readouterr().out
    assert main(["prices", "show", "m", "--provider", "p", *where]) == 0
    assert "3" in capsys.readouterr().out.splitlines()[1].split()


@pytest.mark.parametrize("prices", [{"output_mtok": 200}, {"output_mtok": 0}, {"input_mtok": 0.01}])
def test_an_absurd_change_needs_a_word_of_its_own(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], prices: dict[str, Any]
) -> None:
    where = ["--database-url", database]
    assert main(["prices", "update", "--from", file_of(tmp_path), *where]) == 0
    absurd = file_of(tmp_path, "absurd.json", **prices)
    assert main(["prices", "update", "--from", absurd, "--yes", *where]) == 2
    out, err = capsys.readouterr()
    assert "absurd: p m" in out
    assert "--accept-changes" in err
    assert main(["prices", "update", "--from", absurd, "--yes", "--accept-changes", *where]) == 0


def test_a_file_that_lost_most_models_is_absurd(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--database-url", database]
    assert main(["prices", "update", *where]) == 0
    assert main(["prices", "update", "--from", file_of(tmp_path), "--yes", *where]) == 2
    assert "models would have no price any more" in capsys.readouterr().out


def test_prices_that_held_before_can_hold_again(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--yes", "--database-url", database]
    first, second = file_of(tmp_path, "first.json"), file_of(tmp_path, "second.json", output_mtok=3)
    for source in (first, second, first):
        assert main(["prices", "update", "--from", source, *where]) == 0
    names = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prices/")]
    assert names[2] == names[0].replace(" created", "~2 created")
    assert main(["prices", "update", "--from", first, *where]) == 0
    assert capsys.readouterr().out.endswith("unchanged\n")


def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--database-url", "postgresql://nobody@127.0.0.1:1/x"]
    (tmp_path / "broken.json").write_text("{")
    for source, message in (
        ("missing.json", "missing.json cannot be read (No such file"),
        ("broken.json", "it is no JSON"),
        (file_of(tmp_path, output_mtok=-1), "p/m: "),
    ):
        assert main(["prices", "update", "--from", source, *where]) == 2
        assert message in capsys.readouterr().err


def test_a_difference_can_be_read_by_programs(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--database-url", database]
    assert main(["prices", "update", "--from", file_of(tmp_path), *where]) == 0
    capsys.readouterr()
    other = file_of(tmp_path, "other.json", output_mtok=3, cache_read_mtok=0.5)
    assert main(["prices", "diff", "--from", other, "-o", "json", *where]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stored"].startswith("prices+")
    row = {"provider": "p", "model": "m"}
    assert document["changes"] == [
        {**row, "class": "output", "stored": "2", "installed": "3"},
        {**row, "class": "cache_read", "stored": None, "installed": "0.5"},
    ]


def test_what_was_exported_can_be_stored(database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--database-url", database]
    assert main(["prices", "update", *where]) == 0
    capsys.readouterr()
    assert main(["prices", "export", *where]) == 0
    (tmp_path / "export.json").write_text(capsys.readouterr().out)
    assert main(["prices", "update", "--from", "export.json", *where]) == 0
    assert capsys.readouterr().out.endswith("unchanged\n")


def test_a_model_is_shown_with_its_later_prices_its_services_and_who_overrides_it(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--database-url", database]
    (tmp_path / "u.yaml").write_text(UPSTREAM)
    assert main(["apply", "-f", "u.yaml", *where]) == 0
    assert main(["prices", "update", *where]) == 0
    capsys.readouterr()
    assert main(["prices", "show", "gpt-4o-mini", "llama", *where]) == 0
    out = capsys.readouterr().out
    assert "service_tier=priority" in out
    assert "processing=batch" in out
    (override,) = (line.split() for line in out.splitlines() if "demo/ours  gpt-4o-mini" in line)
    assert override[:4] == ["Upstream", "demo/ours", "gpt-4o-mini", "override"]
    assert override[4:6] == ["7", "(7)"]
    assert "override, free" in out
    assert "source: genai-prices" in out
    assert main(["prices", "show", "gemini-3.6-flash", "--provider", "google", "--at", "2026-11-22", *where]) == 0
    assert "from 2027-01-01" in capsys.readouterr().out
    assert main(["prices", "show", "gemini-3.6-flash", "--provider", "google", "--at", "2027-01-01", "--package"]) == 0
    out = capsys.readouterr().out
    assert "from 2027-01-01" not in out
    assert "at 2027-01-01 00:00 UTC" in out


@pytest.mark.parametrize("at", ["2026-13-01", "soon", "2026-12-01T00:00:00"])
def test_a_date_that_is_none_is_a_mistake(at: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prices", "show", "gpt-4o", "--package", "--at", at]) == 2
    assert at in capsys.readouterr().err
