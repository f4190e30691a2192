"""What `behest up` prints when everything runs: addresses, and commands that work as they are pasted."""

import importlib.util
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from behest_proxy.cli.loopback import proxied
from behest_proxy.cli.terminal import Terminal, own_command, shown_path


@dataclass(frozen=True)
class Welcome:
    """What the text is made of."""

    base_url: str
    admin_url: str
    model: str
    token_file: Path
    certificate: Path | None
    started_in_s: float


def curl_command(welcome: Welcome, *, here: Path, environment: Mapping[str, str]) -> str:
    """A command that streams an answer; every line from the first column, so that it can be pasted."""
    token = shlex.quote(shown_path(welcome.token_file, here))
    trust = "" if welcome.certificate is None else f" --cacert {shlex.quote(shown_path(welcome.certificate, here))}"
    message = {"role": "user", "content": "Tell me a story."}
    body = json.dumps({"model": welcome.model, "stream": True, "messages": [message]}, separators=(",", ":"))
    return "\n".join(
        (
            f"{_loopback(environment)}curl -N{trust} {welcome.base_url}/v1/chat/completions \\",
            f'  -H "Authorization: Bearer $(cat {token})" \\',
            '  -H "Content-Type: application/json" \\',
            f"  -d '{body}'",
        )
    )


def python_command(welcome: Welcome, *, here: Path, environment: Mapping[str, str]) -> str:
    """The same with the `openai` package, as a here-document."""
    python = _python(here)
    trust = ""
    if welcome.certificate is not None:
        trust = f"SSL_CERT_FILE={shlex.quote(shown_path(welcome.certificate, here))} "
    return f"""\
{_loopback(environment)}{trust}{python} - <<'END'
from pathlib import Path
from openai import OpenAI

token = Path({json.dumps(shown_path(welcome.token_file, here))}).read_text().strip()
client = OpenAI(base_url="{welcome.base_url}/v1", api_key=token)
question = [{{"role": "user", "content": "Tell me a story."}}]
stream = client.chat.completions.create(model="{welcome.model}", messages=question, stream=True)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
print()
END"""


def _python(here: Path) -> str:
    """The Python that runs us, by its plain name where there is one: .venv/bin/python."""
    running = Path(sys.executable)
    plain = running.with_name("python")
    return shlex.quote(shown_path(plain if plain.exists() and plain.samefile(running) else running, here))


def _loopback(environment: Mapping[str, str]) -> str:
    """Where a proxy is configured, clients would ask it for 127.0.0.1."""
    return "no_proxy=127.0.0.1 " if proxied(environment) else ""


def greet(terminal: Terminal, welcome: Welcome, *, environment: Mapping[str, str], here: Path) -> None:
    """Print it all."""
    terminal.line()
    terminal.line(terminal.bold(f"Behest is ready ({welcome.started_in_s:.1f} s)"))
    terminal.line(f"  OpenAI base URL   {terminal.paint(welcome.base_url + '/v1', '36')}")
    terminal.line(f"  what is spent     {welcome.admin_url}/")
    terminal.line()
    terminal.line(terminal.dim(f"# A stream, from another terminal in {here}:"))
    terminal.line(curl_command(welcome, here=here, environment=environment))
    terminal.line()
    terminal.line(terminal.dim("# The same with the openai package:"))
    if importlib.util.find_spec("openai") is None:
        terminal.line(terminal.dim(f"# (not installed here: {_python(here)} -m pip install openai)"))
    terminal.line(python_command(welcome, here=here, environment=environment))
    terminal.line()
    terminal.line(terminal.dim("# Who spends what, live:"))
    terminal.line(f"{own_command(here)} ledger top")
    terminal.line()
    terminal.line(terminal.dim("The token above is good for an hour. Ctrl-C stops everything and keeps the data."))
