"""The real sidecar in a container, confined as Kubernetes' `restricted` standard confines pods."""

import json
import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from behest_proxy.cli.preflight import free_port
from behest_proxy.identity.keys import SigningKey
from images.containers import START_S, Container, Containers, Image
from stack import Stack, wait_until

ROOT = Path(__file__).resolve().parents[2]
COMPRESSED_BYTES_MAX = 110 * 1024 * 1024
QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]


@contextmanager
def sidecar(
    containers: Containers, stack: Stack, folder: Path, *, user: str = "65532:65532", **settings: str
) -> Generator[tuple[Container, Stack, float]]:
    """The sidecar in a container beside the stack's own: the container, the stack seen through it, its start in s."""
    uid = int(user.partition(":")[0])
    state = folder / "state"
    state.mkdir(mode=0o700)
    os.chown(state, uid, uid)
    # In the only folder that the container sees; Kubernetes mounts a Secret elsewhere.
    key = state / "signing.pem"
    key.write_bytes(stack.signing_key.private_pem())
    os.chown(key, uid, uid)
    key.chmod(0o400)
    port, admin_port = free_port(0), free_port(0)
    environment = {
        "BEHEST_DATABASE_URL": stack.dsn,
        "BEHEST_SIGNING_KEY_FILE": "/var/run/behest/signing.pem",
        "BEHEST_JOURNAL_DIR": "/var/run/behest/journal",
        "BEHEST_BIND": f"127.0.0.1:{port}",
        "BEHEST_ADMIN_BIND": f"127.0.0.1:{admin_port}",
        **settings,
    }
    started_s = time.monotonic()
    with containers.running("proxy", environment=environment, state=state, user=user) as container:

        def is_ready() -> bool:
            assert container.runner.poll() is None, container.log.read_text()
            try:
                return httpx.get(f"http://127.0.0.1:{admin_port}/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, timeout_s=START_S, what="the sidecar's start in a container")
        start_s = time.monotonic() - started_s
        yield container, replace(stack, base_url=f"http://127.0.0.1:{port}"), start_s


def resident_mib(container: Container) -> float:
    """The memory of the sidecar, as the kernel counts it."""
    return int(container.status("VmRSS").split()[0]) / 1024


@pytest.fixture
def place(folder: Path, request: pytest.FixtureRequest) -> Path:
    """A folder that containers can enter."""
    made = folder / str(request.node.name).partition("[")[0][-40:]
    made.mkdir(exist_ok=True)
    made.chmod(0o711)
    return made


def test_the_image_is_what_its_configuration_says(image: Image) -> None:
    assert image.config["User"] == "65532:65532"
    assert image.config["Entrypoint"] == ["behest"]
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.version"].count(".") == 2
    assert image.layers == 1
    print(f"\nimage: {image.compressed_bytes / 2**20:.1f} MiB compressed, built in {image.build_s:.0f} s")
    assert image.compressed_bytes < COMPRESSED_BYTES_MAX


def test_nothing_in_the_image_installs_or_compiles(containers: Containers) -> None:
    found = containers.python(
        "import importlib.util, json, shutil\n"
        "modules = [m for m in ('pip', 'setuptools', 'wheel', 'ensurepip') if importlib.util.find_spec(m)]\n"
        "programs = [p for p in ('pip', 'pip3', 'gcc', 'cc', 'make', 'git', 'curl', 'wget') if shutil.which(p)]\n"
        "print(json.dumps(modules + programs))"
    )
    assert json.loads(found) == []


def test_everything_that_is_imported_is_compiled_already(containers: Containers) -> None:
    found = containers.python(
        "import json, os, sys\n"
        "import behest_operator.command, behest_operator.webhook_server\n"
        "import behest_proxy.app.gateway, behest_proxy.cli.up\n"
        "files = [m.__cached__ for m in list(sys.modules.values()) if getattr(m, '__cached__', None)]\n"
        "print(json.dumps([name for name in files if not os.path.exists(name)]))"
    )
    assert json.loads(found) == []


def test_certificate_authorities_and_time_zones_are_there(containers: Containers) -> None:
    found = containers.python(
        "import ssl, zoneinfo; zoneinfo.ZoneInfo('Europe/Berlin')\n"
        "print(ssl.create_default_context().cert_store_stats()['x509_ca'])"
    )
    assert int(found) > 50


@pytest.mark.parametrize("user", ["65532:65532", "1000650000:0", "12345:12345"])
def test_every_command_starts_as_anybody(containers: Containers, user: str) -> None:
    assert containers.output("--version", user=user).startswith("behest ")
    for command in ("proxy", "operator", "webhook", "sim"):
        assert f"behest {command}" in containers.output(command, "--help", user=user)


def test_a_metered_stream_goes_through_a_confined_container(containers: Containers, stack: Stack, place: Path) -> None:
    with sidecar(containers, stack, place) as (container, inside, start_s):
        assert container.status("Uid").split() == ["65532"] * 4
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(container.status(name), 16) == 0, name
        assert container.status("NoNewPrivs") == "1"
        assert container.status("Seccomp") == "2"
        assert " ro," in Path(f"/proc/{container.pid}/mounts").read_text().splitlines()[0]
        project = replace(stack.project(), stack=inside)
        project.wait_until_served()
        with openai.OpenAI(base_url=inside.base_url + "/v1", api_key=project.mint(), max_retries=0) as client:
            chunks = list(
                client.chat.completions.create(
                    model="gpt-4o-mini",
                    messages=QUESTION,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"sim": {"output_tokens": 200}},
                )
            )
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 200
        (row,) = project.settled()
        assert (row["outcome"], row["source"], row["output_tokens"]) == ("completed", "provider", 200)
        memory = resident_mib(container)
        # Another vocabulary, which is loaded with the first of its models.
        with openai.OpenAI(base_url=inside.base_url + "/v1", api_key=project.mint(), max_retries=0) as client:
            client.chat.completions.create(model="gpt-4", messages=QUESTION, extra_body={"sim": {"output_tokens": 5}})
        both = resident_mib(container)
        print(f"\nready after {start_s:.2f} s, {memory:.0f} MiB resident, {both:.0f} MiB with two vocabularies")
        values = yaml.safe_load((ROOT / "deploy" / "helm" / "behest" / "values.yaml").read_text())
        requested = values["sidecar"]["resources"]["requests"]["memory"]
        assert both < int(requested.removesuffix("Mi")), "a node reserves what a sidecar really uses"
        container.tell_to_end()
        assert container.runner.wait(90) == 0, container.log.read_text()
    assert "Traceback" not in container.log.read_text()
    assert sorted(path.name for path in (place / "state").iterdir()) == ["journal", "signing.pem"]


def test_it_runs_as_a_user_that_nobody_knows(containers: Containers, stack: Stack, place: Path) -> None:
    with sidecar(containers, stack, place, user="1000650000:0") as (container, inside, _):
        project = replace(stack.project(), stack=inside)
        project.wait_until_served()
        with openai.OpenAI(base_url=inside.base_url + "/v1", api_key=project.mint(), max_retries=0) as client:
            answer = client.chat.completions.create(
                model="gpt-4o-mini", messages=QUESTION, extra_body={"sim": {"output_tokens": 5}}
            )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        assert len(project.settled()) == 1
    assert "Traceback" not in container.log.read_text()


@pytest.mark.parametrize("command", ["proxy", "ledger keep", "ledger migrate --wait 60", "sim"])
def test_the_first_process_ends_when_it_is_told_while_it_starts(
    containers: Containers, place: Path, command: str
) -> None:
    # The kernel gives the first process of a container no default action: a SIGTERM that nothing catches does nothing.
    state = place / command.replace(" ", "-")
    state.mkdir()
    (state / "signing.pem").write_bytes(SigningKey.generate().private_pem())
    for path in (state, state / "signing.pem"):
        os.chown(path, 65532, 65532)
    environment = {
        "BEHEST_DATABASE_URL": "postgresql://nobody:there@127.0.0.1:1/nothing",
        "BEHEST_SIGNING_KEY_FILE": "/var/run/behest/signing.pem",
    }
    with containers.running(*command.split(), environment=environment, state=state) as container:
        term = 1 << (signal.SIGTERM - 1)
        wait_until(lambda: int(container.status("SigCgt"), 16) & term, what="a handler of SIGTERM")
        container.tell_to_end()
        assert container.runner.wait(90) in (0, 143), container.log.read_text()
