"""The settings of operator and webhook: each read from its variable, each error naming it."""

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from behest_operator.settings import OperatorSettings, SettingsError, WebhookSettings, help_text, read
from behest_operator.webhook_server import template_in

URL = "postgresql://owner@db/behest"
REQUIRED = {"BEHEST_DATABASE_URL": URL, "BEHEST_MASTER_KEY_FILE": "/etc/key"}
BOTH: list[type[msgspec.Struct]] = [OperatorSettings, WebhookSettings]


def test_without_more_than_it_needs_everything_has_a_default() -> None:
    found = OperatorSettings.read(REQUIRED)
    assert (found.database_url, found.sidecar_url) == (URL, URL)
    assert (found.webhook, found.namespaces, found.log_level, found.policy) == (None, (), "info", "checkpoint")


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("SIDECAR_DATABASE_URL", "postgres://pooler/behest", "postgres://pooler/behest"),
        ("NAMESPACES", "a, b,,c ", ("a", "b", "c")),
        ("GRACE_HOURS", "0.5", 0.5),
        ("POLICY", "hold", "hold"),
        ("LOG_LEVEL", "debug", "debug"),
        ("LIVENESS_BIND", "[::]:1", "[::]:1"),
    ],
)
def test_each_is_read_from_its_variable(variable: str, text: str, value: Any) -> None:
    found = OperatorSettings.read({**REQUIRED, f"BEHEST_{variable}": text})
    assert getattr(found, variable.lower()) == value


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("DATABASE_URL", "host=db", "is not a PostgreSQL URL"),
        ("SIDECAR_DATABASE_URL", "mysql://db", "is not a PostgreSQL URL"),
        ("GRACE_HOURS", "a day", "is not a number from 0 to 10000"),
        ("GRACE_HOURS", "-1", "is not a number from 0 to 10000"),
        ("GRACE_HOURS", "nan", "is not a number from 0 to 10000"),
        ("POLICY", "free", "is not one of checkpoint, hold"),
        ("LOG_LEVEL", "INFO", "is not one of debug, info, warning, error"),
        ("LIVENESS_BIND", "8081", "is not host:port"),
        ("DATABASE_URL_FILE", "/nowhere", "cannot be read"),
        ("WEBHOOK_CONFIGURATION", "behest", "BEHEST_WEBHOOK_NAMESPACE is not set"),
        ("GATEWAY_SECRET", "behest-gateway-login", "belong together"),
    ],
)
def test_each_mistake_names_its_variable(variable: str, text: str, says: str) -> None:
    environment = {**REQUIRED, f"BEHEST_{variable}": text}
    if variable == "DATABASE_URL_FILE":
        del environment["BEHEST_DATABASE_URL"]
    with pytest.raises(SettingsError) as caught:
        OperatorSettings.read(environment)
    assert f"BEHEST_{variable}" in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("variable", ["BEHEST_DATABASE_URL", "BEHEST_SIDECAR_DATABASE_URL", "BEHEST_DATABASE_URL_FILE"])
def test_a_url_that_is_none_is_not_told(variable: str, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("postgres//owner:secret@db/behest")
    text = str(file) if variable.endswith("_FILE") else file.read_text()
    environment = {**REQUIRED, variable: text}
    if variable.endswith("_FILE"):
        del environment["BEHEST_DATABASE_URL"]
    with pytest.raises(SettingsError, match="_DATABASE_URL: what it holds is not a PostgreSQL URL") as caught:
        OperatorSettings.read(environment)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("missing", list(REQUIRED))
def test_what_it_needs_is_named_with_its_meaning(missing: str) -> None:
    environment = {name: text for name, text in REQUIRED.items() if name != missing}
    with pytest.raises(SettingsError, match=f"{missing} is not set: .{{10}}"):
        OperatorSettings.read(environment)


def test_the_ledger_and_the_master_key_come_from_mounted_files(tmp_path: Path) -> None:
    url, key = tmp_path / "url", tmp_path / "key"
    environment = {"BEHEST_DATABASE_URL_FILE": str(url), "BEHEST_MASTER_KEY_FILE": str(key)}
    url.write_text(f"{URL}\n")
    key.write_text(base64.b64encode(bytes(32)).decode() + "\n")
    found = OperatorSettings.read(environment)
    assert (found.database_url, found.master_key()) == (URL, bytes(32))
    for text in ("", "short", base64.b64encode(bytes(31)).decode()):
        key.write_text(text)
        with pytest.raises(SettingsError, match=r"BEHEST_MASTER_KEY_FILE: .*key"):
            found.master_key()
    url.write_text("no url")
    with pytest.raises(SettingsError, match="BEHEST_DATABASE_URL"):
        OperatorSettings.read(environment)


def test_the_webhook_has_its_parts() -> None:
    names = {"CONFIGURATION": "c", "NAMESPACE": "n", "SECRET": "s", "SERVICE": "v"}
    found = OperatorSettings.read({**REQUIRED, **{f"BEHEST_WEBHOOK_{name}": text for name, text in names.items()}})
    assert found.webhook is not None
    assert found.webhook.hosts[0] == "v.n.svc"


@pytest.mark.parametrize("kind", BOTH)
def test_help_has_every_variable_and_its_default(kind: type[msgspec.Struct]) -> None:
    text = help_text(kind)
    for field in msgspec.structs.fields(kind):
        assert f"\n  BEHEST_{field.name.upper()}\n" in text
        if not field.required and field.default:
            assert f"(default: {field.default})" in text


@pytest.mark.parametrize(("program", "says"), [("operator", "MASTER_KEY_FILE"), ("webhook", "INJECTION_TEMPLATE")])
def test_a_mistake_ends_the_process_with_one_line(program: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-m", "behest_proxy.cli.main", program], env={}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"behest {program}: BEHEST_{says} is not set: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"), [("{", "truncated"), ('{"image": 1}', "image"), ('{"image": "a", "imege": "b"}', "imege")]
)
def test_a_template_with_a_mistake_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "template.json"
    with pytest.raises(SettingsError, match=r"BEHEST_INJECTION_TEMPLATE: .* cannot be read"):
        template_in(str(path))
    path.write_text(text)
    with pytest.raises(SettingsError, match=f"BEHEST_INJECTION_TEMPLATE: .*{says}"):
        template_in(str(path))


def test_the_webhook_is_read_alike() -> None:
    found = read(WebhookSettings, {"BEHEST_INJECTION_TEMPLATE": "/t", "BEHEST_WEBHOOK_BIND": "127.0.0.1:1"})
    assert (found.injection_template, found.webhook_bind) == ("/t", "127.0.0.1:1")
    with pytest.raises(SettingsError, match="BEHEST_WEBHOOK_PROBE_BIND: 'x' is not host:port"):
        read(WebhookSettings, {"BEHEST_INJECTION_TEMPLATE": "/t", "BEHEST_WEBHOOK_PROBE_BIND": "x"})
