"""The Compose file: every command, argument, variable, secret and file in it exists."""

import asyncio
import os
import re
import shutil
import stat
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import yaml

from behest_ledger.configuration.kinds import Tier, UpstreamSpec
from behest_ledger.configuration.manifests import parse
from behest_ledger.configuration.tiers import BUILTIN
from behest_ledger.store.pool import connect
from behest_ledger.store.roles import session_tenants
from behest_proxy.app.settings import Settings
from behest_proxy.cli import main as command_line
from behest_proxy.cli.database import DSN_FILE_VARIABLE
from behest_proxy.cli.roles import dsn_of_role

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy" / "compose"
FILE: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
OURS = sorted(name for name, service in SERVICES.items() if "BEHEST_IMAGE" in service["image"])


def parsed(arguments: list[str]) -> Any:
    """The arguments as the command itself reads them. Raises `UserError` for one that it does not know."""
    module = command_line._load(arguments[0])  # pyright: ignore[reportPrivateUsage]
    parser = command_line.Parser(prog="behest")
    module.add_parser(parser.add_subparsers(dest="command", required=True))
    return parser.parse_args(arguments)


@pytest.mark.parametrize("name", OURS)
def test_every_command_and_argument_exists(name: str) -> None:
    assert parsed(SERVICES[name]["command"]).command == SERVICES[name]["command"][0]


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_read_by_its_command(name: str) -> None:
    given = set(SERVICES[name].get("environment", {}))
    settings = {f"BEHEST_{field.name.upper()}" for field in fields(Settings)}
    command = SERVICES[name]["command"][0]
    assert given <= (settings if command == "proxy" else set() if command == "sim" else {DSN_FILE_VARIABLE})


@pytest.mark.parametrize("name", OURS)
def test_every_container_of_ours_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in service, "the image says it"


def test_every_secret_is_declared_used_and_mounted_where_it_is_read() -> None:
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == set(FILE["secrets"])
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if str(value).startswith("/run/secrets/"):
                assert value.removeprefix("/run/secrets/") in service["secrets"], f"{name}: {variable}"
            else:
                # What ends with _ENV names variables, and holds none.
                assert not re.search("PASSWORD|KEY(?!_ENV$)|DATABASE_URL", variable), f"{name}: {variable} is no file"


def test_every_volume_is_declared_and_every_file_is_there() -> None:
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            assert (COMPOSE / source).exists() if source.startswith(".") else source in FILE["volumes"], mount


def test_whoever_waits_for_an_end_waits_for_one_that_comes() -> None:
    for service in SERVICES.values():
        for other, condition in service.get("depends_on", {}).items():
            if condition["condition"] == "service_completed_successfully":
                assert SERVICES[other]["restart"] in ("on-failure", "no"), f"{other} never ends"
            else:
                assert "healthcheck" in SERVICES[other]


def test_the_images_are_those_of_the_chart() -> None:
    values = yaml.safe_load((ROOT / "deploy" / "helm" / "behest" / "values.yaml").read_text())
    version = yaml.safe_load((ROOT / "deploy" / "helm" / "behest" / "Chart.yaml").read_text())["appVersion"]
    assert f"{values['image']['repository']}:{version}" in SERVICES["gateway"]["image"]
    assert values["database"]["trial"]["image"] in SERVICES["postgres"]["image"]


def test_every_service_has_a_limit_of_memory_as_in_the_chart() -> None:
    values = yaml.safe_load((ROOT / "deploy" / "helm" / "behest" / "values.yaml").read_text())
    limits = {name: service["mem_limit"].replace("m", "Mi").replace("g", "Gi") for name, service in SERVICES.items()}
    resources = {"postgres": values["database"]["trial"]["resources"], "gateway": values["gateway"]["resources"]}
    for name, limit in limits.items():
        assert limit == resources.get(name, values["operator"]["resources"])["limits"]["memory"], name


def test_the_demo_is_valid_and_finds_its_simulator() -> None:
    specs = [item.spec for item in parse((COMPOSE / "demo.yaml").read_text())]
    (upstream,) = (spec for spec in specs if isinstance(spec, UpstreamSpec))
    command = SERVICES["simulator"]["command"]
    assert upstream.base_url == f"http://simulator:{command[command.index('--port') + 1]}/v1"


def test_the_built_in_tiers_are_in_the_demo_and_on_the_page_as_behest_up_writes_them() -> None:
    page = (ROOT / "docs" / "budgets.md").read_text()
    shown = "\n---\n".join(text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "apiVersion:" in text)
    for text in ((COMPOSE / "demo.yaml").read_text(), shown):
        assert {item.name: item.spec for item in parse(text) if isinstance(item, Tier)} == BUILTIN


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_secrets_are_made_once_and_work(tmp_path: Path) -> None:
    from behest_ledger.sealing import key_from_text
    from behest_proxy.identity.keys import SigningKey

    shutil.copy(COMPOSE / "secrets.sh", tmp_path)
    made = tmp_path / "secrets"
    texts: list[dict[str, str]] = []
    for _ in range(2):
        subprocess.run([str(tmp_path / "secrets.sh")], check=True, capture_output=True, timeout=60)
        texts.append({path.name: path.read_text() for path in made.iterdir()})
    assert texts[0] == texts[1]
    assert set(texts[0]) == {Path(secret["file"]).name for secret in FILE["secrets"].values()}
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    key_from_text(texts[0]["master-key"].strip())
    SigningKey.load(texts[0]["signing-key.pem"].encode())
    role = SERVICES["grant"]["command"][3]
    assert (
        texts[0]["gateway-database-url"]
        == f"postgresql://{role}:{texts[0]['gateway-password'].strip()}@postgres:5432/behest\n"
    )
    assert f"CREATE ROLE {role} LOGIN" in (COMPOSE / "gateway-login.sh").read_text()


@pytest.mark.skipif(
    shutil.which("psql") is None, reason="psql is not installed (Debian: apt install postgresql-client)"
)
def test_the_gateways_login_is_made_and_may_be_granted_again(database: str, tmp_path: Path) -> None:
    server = urlsplit(database)
    password = tmp_path / "gateway-password"
    password.write_text('it\'s a "password"\n')
    script = (COMPOSE / "gateway-login.sh").read_text().replace("/run/secrets/gateway-password", str(password))
    environment = {
        "PATH": os.environ["PATH"],
        "PGHOST": str(server.hostname),
        "PGPORT": str(server.port),
        "PGPASSWORD": str(server.password),
        "POSTGRES_USER": str(server.username),
        "POSTGRES_DB": server.path[1:],
    }
    subprocess.run(["sh", "-c", script], env=environment, check=True, timeout=60)
    try:
        for _ in range(2):
            assert command_line.main([*SERVICES["grant"]["command"], "--database-url", database]) == 0
        login = dsn_of_role(database, SERVICES["grant"]["command"][3], quote(password.read_text().strip()))
        assert asyncio.run(tenants_of(login)) is None
    finally:
        assert command_line.main(["ledger", "role", "drop", "behest_gateway", "--database-url", database]) == 0


async def tenants_of(dsn: str) -> tuple[str, ...] | None:
    """For whom a login acts; None: for everybody."""
    connection = await connect(dsn)
    try:
        return await session_tenants(connection)
    finally:
        await connection.close()


def has_compose() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_compose(), reason="docker compose is not installed")
def test_compose_reads_its_file(tmp_path: Path) -> None:
    subprocess.run(
        ["docker", "compose", "--file", str(COMPOSE / "compose.yaml"), "--profile", "demo", "config", "--quiet"],
        check=True,
        timeout=60,
    )
