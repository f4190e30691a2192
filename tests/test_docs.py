"""The documents say what the code does."""

import inspect
import re
from pathlib import Path

from behest_ledger.configuration.manifests import parse
from behest_proxy import app, errors, provider_errors, threads
from behest_proxy.cli import main as command_line
from behest_proxy.error_codes import TABLE, ErrorCode, with_table
from behest_proxy.errors import ShownError


def _shown_errors() -> list[type[ShownError]]:
    return [
        found
        for module in (errors, provider_errors, threads)
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, ShownError) and found is not ShownError
    ]


def test_the_table_of_the_errors_page_is_made_of_the_codes(repository: Path) -> None:
    page = repository / "docs" / "errors.md"
    # To make it anew:
    # python -c 'from behest_proxy.error_codes import *; print(with_table(open("docs/errors.md").read()), end="")'
    assert page.read_text() == with_table(page.read_text())
    assert [row.status for row in TABLE] == sorted(row.status for row in TABLE)


def test_every_error_has_its_row_and_every_row_its_error(repository: Path) -> None:
    shown = {(row.status, row.code) for row in TABLE}
    assert {(error.status, error.code) for error in _shown_errors()} <= shown
    # What is said of a code that passes through from a provider stands below the table.
    assert set(ErrorCode) - {row.code for row in TABLE} == {ErrorCode.UPSTREAM_REFUSED}
    assert f"`{ErrorCode.UPSTREAM_REFUSED}`" in (repository / "docs" / "errors.md").read_text()
    files = [file for file in (repository / "proxy").rglob("*.py") if file.name != "error_codes.py"]
    sources = "".join(file.read_text() for file in files)
    unused = [code for code in ErrorCode if f"ErrorCode.{code.name}" not in sources]
    assert unused == []


def test_every_manifest_that_a_page_shows_is_valid(repository: Path) -> None:
    pages = [repository / "README.md", *(repository / "docs").glob("*.md")]
    shown = [text for page in pages for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)]
    manifests = [manifest for text in shown if "apiVersion:" in text for manifest in parse(text)]
    assert "shop-sessions" in {manifest.name for manifest in manifests}


def test_every_dependency_has_its_reason(repository: Path) -> None:
    project = (repository / "pyproject.toml").read_text()
    listed = re.search(r"\ndependencies = \[(.*?)\]", project, re.DOTALL)
    assert listed is not None
    page = (repository / "ARCHITECTURE.md").read_text()
    _, _, reasons = page.partition("## Dependencies")
    for name in re.findall(r'"([a-z0-9-]+)', listed[1]):
        assert name in reasons, name


def test_links_between_the_documents_lead_somewhere(repository: Path) -> None:
    readmes = [path for folder in ("deploy", "examples", "sdk") for path in (repository / folder).rglob("README.md")]
    ours = [path for path in readmes if "node_modules" not in path.parts]
    assert len(ours) >= 5
    for page in [*repository.glob("*.md"), *repository.glob("docs/*.md"), *ours]:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_that_the_readme_shows_exists(repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    shown = set(re.findall(r"behest (up|down|apply|get|keys|prices|ledger|sim|proxy)\b", readme))
    assert shown <= set(command_line.COMMANDS)
    assert app.__doc__
