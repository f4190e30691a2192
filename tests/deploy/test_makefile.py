"""The Makefile on machines that are not well: it finds a Python that works and names what is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

_GOOD = """#!/bin/sh
# A stand-in for Python: it makes a "virtual environment" whose programs only tell what they were asked.
case "$*" in
  "-c import ensurepip"*) exit {ensurepip} ;;
  "-c import sys; print"*) echo 3.11 ;;
  -c*) exit 0 ;;
  --version) echo "Python {name}" ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python
    printf '#!/bin/sh\\necho behest "$@"\\n' > .venv/bin/behest; chmod +x .venv/bin/behest ;;
  "-m pip install"*) echo "pip: $*" >> pip.log; exit {pip} ;;
  *) echo "python $*" ;;
esac
"""
_BROKEN = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"


class Machine:
    """A folder with the Makefile, and a PATH of its own."""

    def __init__(self, path: Path) -> None:
        self.checkout = path / "a checkout"
        self.checkout.mkdir()
        self.path = path / "bin"
        self.path.mkdir()
        (self.checkout / "sdk" / "python").mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "sdk/python/pyproject.toml"):
            shutil.copy(ROOT / name, self.checkout / name)
        for name in ("sh", "make", "rm", "mkdir", "cp", "touch", "cat", "chmod", "awk", "echo"):
            found = shutil.which(name)
            assert found is not None
            (self.path / name).symlink_to(found)

    def program(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def python(self, name: str, *, ensurepip: bool = True, pip: int = 0) -> None:
        self.program(name, _GOOD.format(name=name, ensurepip=0 if ensurepip else 1, pip=pip))

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.path / "make"), *arguments],
            cwd=self.checkout,
            env={"PATH": str(self.path), "HOME": "", **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    @property
    def installations(self) -> list[str]:
        log = self.checkout / "pip.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.partition(" -e ")[2].partition(" ")[0] for line in lines]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_help_is_the_default_and_names_every_target(machine: Machine) -> None:
    shown = machine.make()
    assert shown.returncode == 0
    for target in ("up", "down", "test", "check", "bench"):
        assert f"  make {target} " in shown.stdout


def test_a_shim_that_exists_and_fails_is_passed_over(machine: Machine) -> None:
    machine.program("python3.13", _BROKEN)
    machine.python("python3.11")
    result = machine.make("up", "ARGS=--port 9000")
    assert (result.returncode, result.stderr) == (0, "")
    assert "Making .venv with Python python3.11" in result.stdout
    assert result.stdout.splitlines()[-1] == "behest up --port 9000"


def test_the_newest_python_that_can_make_an_environment_is_taken(machine: Machine) -> None:
    machine.python("python3.13", ensurepip=False)
    machine.python("python3.12")
    machine.python("python3.11")
    assert "Making .venv with Python python3.12" in machine.make("up").stdout


def test_no_python_is_named_with_the_cure(machine: Machine) -> None:
    machine.program("python3", _BROKEN)
    result = machine.make("up")
    assert result.returncode != 0
    assert "no Python 3.11 or newer was found (too old or broken: python3)" in result.stderr
    assert "apt install python3 python3-venv" in result.stderr


def test_a_missing_venv_module_is_named_with_the_cure(machine: Machine) -> None:
    machine.python("python3", ensurepip=False)
    result = machine.make("up")
    assert result.returncode != 0
    assert "python3 has no venv module; install it: apt install python3-venv (or python3.11-venv)" in result.stderr


def test_python_may_be_named(machine: Machine) -> None:
    machine.python("python3.13")
    machine.python("mine")
    assert "with Python mine" in machine.make("up", "PYTHON=mine").stdout
    shutil.rmtree(machine.checkout / ".venv")
    assert "with Python mine" in machine.make("up", PYTHON="mine").stdout


def test_packages_are_installed_again_only_when_the_project_file_changed(machine: Machine) -> None:
    machine.python("python3")
    for _ in range(2):
        assert machine.make("up").returncode == 0
    assert machine.installations == [".[embedded,demo]"]
    later = (machine.checkout / ".venv" / ".installed-up").stat().st_mtime + 5
    os.utime(machine.checkout / "pyproject.toml", (later, later))
    assert machine.make("test").returncode == 0
    assert machine.installations == [".[embedded,demo]", ".[dev]"]


def test_tests_run_isolated_from_the_working_folder(machine: Machine) -> None:
    machine.python("python3")
    *_, command = machine.make("test", "ARGS=-k budget").stdout.splitlines()
    assert command.startswith("python -Im pytest ")
    assert command.endswith(" -k budget")


def test_the_chat_runs_on_the_client_as_it_is_now(machine: Machine) -> None:
    for folder in ("sdk/typescript", "examples/chat/node_modules"):
        (machine.checkout / folder).mkdir(parents=True)
    for folder in ("sdk/typescript", "examples/chat"):
        (machine.checkout / folder / "package-lock.json").write_text("{}")
    machine.program("npm", '#!/bin/sh\necho "npm $1 $2 in ${PWD##*/}"\n')
    machine.program("node", '#!/bin/sh\necho "node $1 in ${PWD##*/}"\n')
    built = ["npm run --silent in typescript", "node server.mjs in chat"]
    first, again = (machine.make("chat") for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert first.stdout.splitlines()[1:] == ["npm ci --silent in typescript", "npm ci --silent in chat", *built]
    assert again.stdout.splitlines() == built


def test_a_failing_network_is_named_and_tried_again_next_time(machine: Machine) -> None:
    machine.python("python3", pip=1)
    for _ in range(2):
        result = machine.make("up")
        assert result.returncode != 0
        assert "check the network and its proxy" in result.stderr
    assert len(machine.installations) == 2


def test_an_environment_made_by_hand_is_used(machine: Machine) -> None:
    machine.python("python3")
    subprocess.run(
        [machine.path / "python3", "-m", "venv", ".venv"],
        cwd=machine.checkout,
        env={"PATH": str(machine.path)},
        check=True,
    )
    assert "Making .venv" not in machine.make("up").stdout


def test_a_moved_or_broken_environment_is_made_anew(machine: Machine) -> None:
    machine.python("python3")
    machine.make("up")
    (machine.checkout / ".venv" / ".made").write_text("/somewhere/else\n")
    assert ".venv was moved: making it anew." in machine.make("up").stdout
    (machine.checkout / ".venv" / "bin" / "python").write_text(_BROKEN)
    assert "no working Python 3.11 or newer: making it anew." in machine.make("up").stdout
    assert len(machine.installations) == 3


def test_down_before_anything_was_installed_is_no_error(machine: Machine) -> None:
    result = machine.make("down")
    assert (result.returncode, result.stdout) == (0, "Nothing was ever started here.\n")
