"""The documents say what the code does."""

import inspect
import re
from pathlib import Path

from behest_ledger.configuration.manifests import parse
from behest_proxy import app, errors, provider_errors
from behest_proxy.cli import main as command_line
from behest_proxy.errors import ShownError


def _shown_errors() -> list[type[ShownError]]:
    return [
        found
        for module in (errors, provider_errors)
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, ShownError) and found is not ShownError
    ]


def test_every_error_is_on_the_errors_page(repository: Path) -> None:
    page = (repository / "docs" / "errors.md").read_text()
    for error in _shown_errors():
        assert f"| {error.status} | `{error.code}` |" in page, error


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
    for page in [*repository.glob("*.md"), *repository.glob("docs/*.md"), repository / "sdk" / "python" / "README.md"]:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_that_the_readme_shows_exists(repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    shown = set(re.findall(r"behest (up|down|apply|get|keys|prices|ledger|sim|proxy)\b", readme))
    assert shown <= set(command_line.COMMANDS)
    assert app.__doc__
