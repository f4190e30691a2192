"""The sidecar's settings: each one documented, each one read from its variable, each error naming it."""

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import behest_proxy.app.settings as module
from behest_proxy.app.settings import Settings, SettingsError, from_environment
from behest_proxy.cli.proxy import edge_limits
from behest_proxy.edge.limits import EdgeLimits

REQUIRED = {"BEHEST_DATABASE_URL": "postgresql://localhost/behest", "BEHEST_SIGNING_KEY_FILE": "/keys/signing.pem"}
NAMES = [field.name for field in fields(Settings)]


def variable_of(name: str) -> str:
    return "BEHEST_" + name.upper()


def kind_of(name: str) -> str:
    return str(next(field.type for field in fields(Settings) if field.name == name))


def sample_of(name: str) -> tuple[str, Any]:
    """A text for the variable and the value that it means."""
    kind = kind_of(name)
    if "Path" in kind:
        return "/some/file", Path("/some/file")
    if "int" in kind:
        return "123456", 123456
    if "float" in kind:
        return "4.5", 4.5
    if "Literal" in kind:
        # Not the first choice, which may be the default.
        text = kind.partition("[")[2].rpartition("]")[0].split(",")[-1].strip("' \"")
        return text, text
    if name == "trusted_proxies":
        return "10.0.0.0/8", "10.0.0.0/8"
    text = {"pod_bind": "127.0.0.1:1", "workload_labels": "{}", "provider_key_env": "*"}.get(name, "some text")
    return text, text


def documented() -> set[str]:
    """The fields with a docstring right below them."""
    tree = ast.parse(inspect.getsource(module))
    (settings,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    found: set[str] = set()
    for field, below in zip(settings.body, settings.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found.add(field.target.id)
    return found


def test_every_setting_is_documented() -> None:
    assert documented() == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_read_from_its_variable(name: str) -> None:
    text, value = sample_of(name)
    partners = {variable_of(other): "/pair" for other in NAMES if other.startswith("tls_")} if "tls_" in name else {}
    if name == "pod_bind":
        partners = {f"BEHEST_WORKLOAD_{part}": "x" for part in ("NAMESPACE", "NAME", "PROJECT")}
    settings = from_environment({**REQUIRED, **partners, variable_of(name): f" {text} "})
    assert getattr(settings, name) == value


def test_blank_is_the_same_as_not_set() -> None:
    blank = {variable_of(name): " " for name in NAMES if variable_of(name) not in REQUIRED}
    assert from_environment({**REQUIRED, **blank}) == from_environment(REQUIRED)


@pytest.mark.parametrize("variable", sorted(REQUIRED))
def test_a_missing_setting_is_named_with_its_meaning(variable: str) -> None:
    with pytest.raises(SettingsError, match=rf"{variable} is not set: the "):
        from_environment({name: text for name, text in REQUIRED.items() if name != variable})


NUMBERS = [name for name in NAMES if kind_of(name).find("int") >= 0 or kind_of(name).find("float") >= 0]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["many", "1,5", "10MB"])
def test_a_malformed_number_is_named(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=variable_of(name)):
        from_environment({**REQUIRED, variable_of(name): text})


def test_a_choice_that_is_none_is_named_with_those_that_are() -> None:
    with pytest.raises(SettingsError, match="BEHEST_DATABASE_POOLER must be one of none, transaction, session"):
        from_environment({**REQUIRED, "BEHEST_DATABASE_POOLER": "pgbouncer"})


@pytest.mark.parametrize("name", ["tls_cert_file", "tls_key_file"])
def test_half_of_a_pair_is_an_error_that_names_both(name: str) -> None:
    with pytest.raises(SettingsError, match="BEHEST_TLS_CERT_FILE and BEHEST_TLS_KEY_FILE"):
        from_environment({**REQUIRED, variable_of(name): "/pair"})


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(variable_of(name), raising=False)
    for variable, text in REQUIRED.items():
        monkeypatch.setenv(variable, text)
    assert from_environment() == from_environment(REQUIRED)


def test_a_holder_that_would_die_between_two_renewals_is_refused() -> None:
    with pytest.raises(SettingsError, match="BEHEST_HOLDER_TTL_S must be at least 3"):
        from_environment({**REQUIRED, "BEHEST_HOLDER_TTL_S": "2"})


WORKLOAD = {"BEHEST_WORKLOAD_NAMESPACE": "demo", "BEHEST_WORKLOAD_NAME": "web", "BEHEST_WORKLOAD_PROJECT": "shop"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"BEHEST_POD_BIND": "0.0.0.0:8079"}, "BEHEST_POD_BIND must be on loopback"),
        ({"BEHEST_POD_BIND": "127.0.0.1:8079", "BEHEST_WORKLOAD_PROJECT": ""}, "BEHEST_WORKLOAD_PROJECT is not set"),
        ({"BEHEST_WORKLOAD_LABELS": "[1]"}, "BEHEST_WORKLOAD_LABELS must be a JSON object of strings"),
        ({"BEHEST_DATA_KEY_FILE": "/a", "BEHEST_MASTER_KEY_FILE": "/b"}, "exclude each other"),
        ({"BEHEST_PROVIDER_KEY_ENV": "OPENAI_API_KEY"}, "BEHEST_PROVIDER_KEY_ENV: entry 1 must end with"),
        ({"BEHEST_DATABASE_URL": "", "BEHEST_DATABASE_URL_FILE": "/no/such"}, "BEHEST_DATABASE_URL_FILE: /no/such"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_named(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        from_environment({**REQUIRED, **WORKLOAD, **changes})


def test_a_workload_without_a_namespace_in_its_project_means_its_own() -> None:
    found = from_environment({**REQUIRED, **WORKLOAD, "BEHEST_WORKLOAD_LABELS": '{"app": "web"}'}).workload
    assert found is not None
    assert (found.project_id, found.qualified_name, found.labels) == ("demo/shop", "demo/web", {"app": "web"})


def test_the_database_url_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://mounted/behest\n")
    environment = {**REQUIRED, "BEHEST_DATABASE_URL": "", "BEHEST_DATABASE_URL_FILE": str(tmp_path / "url")}
    assert from_environment(environment).database_url == "postgresql://mounted/behest"


EDGE = [name for name in NAMES if name.startswith("edge_")]


@pytest.mark.parametrize("name", EDGE)
@pytest.mark.parametrize("text", ["0", "-1"])
def test_a_limit_of_the_edge_that_would_let_nobody_in_is_refused(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"{variable_of(name)} must be above 0"):
        from_environment({**REQUIRED, variable_of(name): text})


def test_each_limit_of_the_edge_is_one_of_its_limits() -> None:
    given = {variable_of(name): str(1000 + number) for number, name in enumerate(EDGE)}
    limits = edge_limits(from_environment({**REQUIRED, **given}))
    assert set(range(1000, 1000 + len(EDGE))) <= set(vars(limits).values())
    assert edge_limits(from_environment(REQUIRED)) == EdgeLimits()


def test_each_limit_of_the_edge_is_documented_with_its_default(repository: Path) -> None:
    page = (repository / "docs" / "behind-a-proxy.md").read_text()
    shown = dict(re.findall(r"\| `(BEHEST_[A-Z_]+)`: [^|]+ \| (\d+) \|", page))
    defaults = from_environment(REQUIRED)
    assert shown.keys() >= {variable_of(name) for name in EDGE}
    for variable, text in shown.items():
        assert float(text) == getattr(defaults, variable.removeprefix("BEHEST_").lower()), variable
