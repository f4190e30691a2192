"""House rules that no linter knows: sizes, first lines, mirrors, and what must never be written down."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOTS = [root for root in ("proxy", "ledger", "operator") if (ROOT / root).is_dir()]
SOURCES = [*(ROOT / root for root in ROOTS), ROOT / "sdk" / "python" / "behest"]
MODULES = sorted(path for source in SOURCES for path in source.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600

WORKPLACE = re.compile(r"/(work|tmp)/(main|shared|plan|seed)\b|/work/\.|/root/|/home/\w+/")
"""Paths of the machines where this was written. A reader has none of them."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=name_of(path))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_says_its_job_in_its_first_line(path: Path) -> None:
    docstring = ast.get_docstring(tree_of(path))
    assert docstring, "the module's docstring is missing"
    assert docstring.splitlines()[0].strip()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES_MAX
    long = {
        function.name: lines
        for function in functions(tree_of(path))
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES_MAX
    }
    assert not long, f"functions of more than {FUNCTION_LINES_MAX} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_commands_print(path: Path) -> None:
    tree = tree_of(path)
    if "cli" in path.parts or any(function.name in ("add_parser", "main") for function in functions(tree)):
        return
    calls = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls, "print in a module that is no command"


@pytest.mark.parametrize("path", [path for path in TESTS if path.name.startswith("test_")], ids=name_of)
def test_a_test_lies_where_its_source_lies(path: Path) -> None:
    """`tests/<part>/test_[<package>_]<module>[_<aspect>].py` beside `<part>/behest_<part>/<package>/<module>.py`."""
    part = path.relative_to(ROOT / "tests").parts[0]
    if part not in ROOTS:
        return
    package = ROOT / part / f"behest_{part}"
    modules = [module.relative_to(package).with_suffix("") for module in package.rglob("*.py")]
    names = {name for module in modules for name in (module.stem, "_".join(module.parts).removesuffix("___init__"))}
    # What tests are made with is tested too.
    names |= {helper.stem for helper in path.parent.glob("*.py") if not helper.name.startswith("test_")}
    said = path.stem.removeprefix("test_")
    if said.startswith("end_to_end") or said == "recordings":
        return  # these pass through many modules
    assert any(said == name or said.startswith(f"{name}_") for name in names), f"no module is tested by {path.stem}"


@pytest.mark.parametrize("path", [path for path in TESTS if path.name.startswith("test_")], ids=name_of)
def test_no_test_hides_another_one_of_its_name(path: Path) -> None:
    tests = [function.name for function in functions(tree_of(path)) if function.name.startswith("test_")]
    assert len(tests) == len(set(tests))


def tracked() -> list[Path]:
    """The files that a reader gets; all files of the tree where this is no git repository."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        return [path for path in (*MODULES, *TESTS) if path.is_file()]
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_path_of_a_workplace_is_written_down() -> None:
    found: list[str] = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if path != Path(__file__).resolve() and WORKPLACE.search(text):
            found.append(name_of(path))
    assert found == []


def test_the_changelog_is_written_in_the_form_of_keep_a_changelog() -> None:
    path = ROOT / "CHANGELOG.md"
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    assert lines[0] == "# Changelog"
    versions = [line for line in lines if line.startswith("## ")]
    assert versions, "no version is told"
    for line in versions:
        assert re.fullmatch(r"## (\[?Unreleased\]?|\[?\d+\.\d+\.\d+\S*\]?( - \d{4}-\d{2}-\d{2})?)", line), line
    for line in lines:
        if line.startswith("### "):
            assert line[4:] in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"), line
