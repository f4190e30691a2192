"""`behest sim` as a process: it says where it listens, serves, and ends when it is told to."""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from behest_proxy.cli import sim
from behest_proxy.sim.behaviour import behaviour_help

PROGRAM = """
import argparse, sys
from behest_proxy.cli import sim
parser = argparse.ArgumentParser()
sim.add_parser(parser.add_subparsers())
arguments = parser.parse_args(sys.argv[1:])
sys.exit(arguments.run(arguments))
"""


def arguments_of(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sim.add_parser(parser.add_subparsers())
    return parser.parse_args(["sim", *words])


def wait_for_port(port_file: Path, process: "subprocess.Popen[str]") -> int:
    for _ in range(3_000):
        if port_file.exists():
            return int(port_file.read_text())
        assert process.poll() is None
        time.sleep(0.01)
    raise AssertionError("no port was written")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_listens_until_it_is_told_to_end(number: signal.Signals, tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    command = [sys.executable, "-c", PROGRAM, "sim", "--port-file", str(port_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = wait_for_port(port_file, process)
            assert process.stdout is not None
            address = f"http://127.0.0.1:{port}/v1"
            assert process.stdout.readline() == f"behest sim: simulated OpenAI API at {address}\n"
            body = {"model": "m", "messages": [{"role": "user"}], "stream": True}
            stall = {"x-sim": '{"stall_after_chunks": 1}'}
            with httpx.stream("POST", f"{address}/chat/completions", json=body, headers=stall) as answer:
                assert answer.status_code == 200
                process.send_signal(number)
                assert process.wait(20) == 0
        finally:
            process.kill()


def test_it_refuses_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--recordings", str(tmp_path / "none")],
        ["--tls-key", str(tmp_path / "key")],
        ["--tls-cert", str(tmp_path / "certificate")],
        ["--host", "192.0.2.1"],
    ):
        arguments = arguments_of(*words)
        assert arguments.run(arguments) == 1
        assert capsys.readouterr().err.startswith("behest sim: ")


@pytest.mark.parametrize("port", ["70000", "-1", "http"])
def test_a_port_that_is_none_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments_of("--port", port)
    assert "--port" in capsys.readouterr().err


def test_help_names_every_member() -> None:
    table = sim.behaviour_table()
    assert all(f"  {row.name}: {row.values} (default {row.default})" in table for row in behaviour_help())


def test_every_member_is_documented() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "simulator.md").read_text(encoding="utf-8")
    for row in behaviour_help():
        assert f"| `{row.name}` | {row.values} | `{row.default}` | {row.meaning} |" in page, row.name
