"""The layout: top-level folders are source roots, and none of them hides a module of the standard library."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


def test_no_top_level_folder_is_a_package(repository: Path) -> None:
    assert [path for path in repository.glob("*/__init__.py") if not path.parent.name.startswith(".")] == []


def test_tests_are_no_packages(repository: Path) -> None:
    # With tests/operator/__init__.py pytest replaces the standard library's `operator` by it.
    assert list((repository / "tests").rglob("__init__.py")) == []


def test_each_source_root_holds_one_package_of_its_own_name(repository: Path) -> None:
    for root in ("proxy", "ledger", "operator"):
        folder = repository / root
        if folder.is_dir():
            assert [path.parent.name for path in folder.glob("*/__init__.py")] == [f"behest_{root}"]


@pytest.mark.parametrize(
    "arguments", [["-c", "import operator"], ["-m", "json.tool", "--help"], ["-m", "unittest", "--help"]], ids=" ".join
)
def test_a_bare_interpreter_starts_at_the_root(repository: Path, arguments: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-S", *arguments], cwd=repository, capture_output=True, text=True, check=False, timeout=60
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_operator_is_the_standard_librarys_also_without_site_packages(repository: Path) -> None:
    code = "import operator, collections; print(operator.__file__); operator.eq"
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=repository, capture_output=True, text=True, check=True, timeout=60
    )
    assert repository not in Path(ran.stdout.strip()).parents


def test_the_tests_need_nothing_from_outside_of_the_repository(repository: Path) -> None:
    assert not [path for path in (repository / "tests").rglob("*") if path.is_symlink()]


def test_every_folder_of_tests_is_run_by_make_test_or_has_a_command_of_its_own(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    run = set(project["tool"]["pytest"]["ini_options"]["testpaths"])
    makefile = (repository / "Makefile").read_text()
    tests = [*(repository / "tests").rglob("test_*.py"), *(repository / "sdk").glob("*/tests/**/test_*.py")]
    for folder in sorted({path.parent for path in tests}):
        name = folder.relative_to(repository).as_posix()
        if folder != repository / "tests":
            assert name in run or f"pytest {name}" in makefile, f"nobody runs {name}"
