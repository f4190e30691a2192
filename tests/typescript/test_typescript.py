"""The TypeScript SDK: its own checks and tests, and the same clients against a running gateway."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stack import Project, Stack
from typescript.packages import install, run

# Told apart by what the guide leaves out: the types of the openai package ask for a model.
MODEL_IS_MISSING = "Property 'model' is missing in type '{ messages: Msg[]; stream: true; }'"


@pytest.fixture(scope="module")
def sdk(repository: Path) -> Path:
    """The SDK's folder with its packages, built."""
    folder = install(repository / "sdk" / "typescript")
    run(["npm", "run", "build"], folder)
    return folder


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project()


@pytest.fixture(scope="module")
def environment(stack: Stack, project: Project) -> dict[str, str]:
    poor = stack.project(limit_usd="0.0001")
    return {"BEHEST_BASE_URL": stack.base_url, "BEHEST_KEY": project.api_key, "POOR_KEY": poor.api_key}


def test_its_types_are_right(sdk: Path) -> None:
    run(["npm", "run", "check"], sdk)


def test_its_own_tests_pass(sdk: Path) -> None:
    run(["npm", "test"], sdk)


def test_the_guides_snippets_have_right_types_on_our_client(sdk: Path) -> None:
    run(["node", "test/live/compose.mjs", "behest"], sdk)
    run(["npx", "tsc", "-p", "test/live/.made/behest"], sdk)


def test_the_guides_snippets_lack_nothing_but_the_model_on_the_openai_package(sdk: Path) -> None:
    run(["node", "test/live/compose.mjs", "openai"], sdk)
    done = subprocess.run(
        ["npx", "tsc", "--pretty", "false", "-p", "test/live/.made/openai"], cwd=sdk, capture_output=True, text=True
    )
    errors = [line.strip() for line in done.stdout.splitlines() if ": error " in line]
    assert [line.partition("(")[0].rpartition("/")[2] for line in errors] == [
        "basic_stream.ts",
        "cancel.tsx",
        "reconnect.ts",
    ]
    assert done.stdout.count(MODEL_IS_MISSING) == 3


@pytest.mark.parametrize("client", ["behest", "openai"])
def test_the_guides_snippets_run(sdk: Path, environment: dict[str, str], client: str) -> None:
    run(["node", "test/live/compose.mjs", client], sdk)
    arguments = ["npx", "vitest", "run", "--config", "vitest.live.config.ts", "test/live/guide.test.tsx"]
    run(arguments, sdk, {**environment, "CLIENT": client})


def test_it_works_against_the_gateway(sdk: Path, environment: dict[str, str]) -> None:
    arguments = ["npx", "vitest", "run", "--config", "vitest.live.config.ts", "test/live/client.test.ts"]
    run(arguments, sdk, environment)


def test_other_peoples_clients_work_unmodified(sdk: Path, environment: dict[str, str]) -> None:
    arguments = ["npx", "vitest", "run", "--config", "vitest.live.config.ts", "test/live/others.test.ts"]
    run(arguments, sdk, environment)


def _packed(folder: Path, into: Path) -> dict[str, Any]:
    """What npm makes of a folder: its `filename` in `into`, and its `files`."""
    said = json.loads(run(["npm", "pack", "--json", "--ignore-scripts", f"--pack-destination={into}"], folder))
    (package,) = said if isinstance(said, list) else said.values()
    return dict(package)


def test_what_is_packed_can_be_installed_and_runs_the_guides_server_snippet(
    sdk: Path, repository: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    package = _packed(sdk, tmp_path)
    names = {entry["path"] for entry in package["files"]}
    assert {"README.md", "LICENSE", "dist/index.js", "dist/index.d.ts", "dist/react/index.js"} <= names
    assert not [name for name in names if name.startswith(("test", "node_modules"))]
    (tmp_path / "package.json").write_text('{"type": "module", "private": true}')
    # The one package that it asks for is here already: how the registry does today is not the question.
    marked = _packed(sdk / "node_modules" / "marked", tmp_path)
    files = [str(tmp_path / one["filename"]) for one in (package, marked)]
    run(["npm", "install", "--offline", "--no-audit", "--no-fund", "--ignore-scripts", *files], tmp_path)
    assert not (tmp_path / "node_modules" / "react").exists(), "React is for those who use it"
    snippet = (repository / "tests" / "typescript" / "guide" / "server.ts").read_text()
    names_of_the_reader = 'const messages = [{ role: "user", content: "Hello" }];\nconst user_id = "packed";\n'
    (tmp_path / "server.mjs").write_text(names_of_the_reader + snippet + "console.log(out);\n")
    assert run(["node", "server.mjs"], tmp_path, environment).startswith("This is simulated text")
