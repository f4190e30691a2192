"""The demo: its manifests are valid, its secrets are made once, and what it prints can be pasted."""

import json
import re
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from behest_ledger.configuration.manifests import parse
from behest_proxy.cli import demo
from behest_proxy.cli.folder import DataFolder
from behest_proxy.cli.loopback import no_proxy, proxied
from behest_proxy.cli.welcome import Welcome, curl_command, python_command


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    folder = DataFolder(tmp_path / "with space" / ".behest")
    folder.create()
    return folder


@pytest.mark.parametrize("variable", [None, "OPENAI_API_KEY"])
def test_the_manifests_are_valid(variable: str | None) -> None:
    found = parse(demo.manifests("http://127.0.0.1:1234/v1", variable))
    assert [(type(manifest).__name__, manifest.metadata.name) for manifest in found] == [
        ("Project", "demo"),
        ("Upstream", "demo"),
        ("Budget", "demo-sessions"),
    ]


def test_the_api_key_is_made_once(folder: DataFolder) -> None:
    key = demo.api_key(folder)
    assert re.fullmatch(r"behest_sk_live_[0-9a-f]{32}", key)
    assert demo.api_key(folder) == key


def test_the_signing_key_is_rsa_2048_and_private(folder: DataFolder) -> None:
    path = demo.signing_key(folder)
    made = path.read_bytes()
    key = load_pem_private_key(made, None)
    assert isinstance(key, rsa.RSAPrivateKey)
    assert key.key_size == 2048
    assert path.stat().st_mode & 0o777 == 0o600
    assert demo.signing_key(folder).read_bytes() == made


def test_the_certificate_is_for_this_machine_and_kept(folder: DataFolder) -> None:
    certificate_path, key_path = demo.certificate(folder)
    certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert "127.0.0.1" in map(str, names.get_values_for_type(x509.IPAddress))
    assert key_path.stat().st_mode & 0o777 == 0o600
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate_path, key_path)
    before = certificate_path.read_bytes()
    assert demo.certificate(folder)[0].read_bytes() == before


def welcome(folder: DataFolder, *, certificate: bool = False) -> Welcome:
    return Welcome(
        base_url="http://127.0.0.1:8080",
        admin_url="http://127.0.0.1:8081",
        model=demo.MODEL,
        token_file=folder.keys / "token",
        certificate=folder.keys / "tls.crt" if certificate else None,
        started_in_s=1.0,
    )


@pytest.mark.parametrize("certificate", [False, True])
def test_the_curl_command_says_what_it_should_when_a_shell_reads_it(folder: DataFolder, certificate: bool) -> None:
    (folder.keys / "token").write_text("the-token\n")
    here = folder.path.parent
    command = curl_command(welcome(folder, certificate=certificate), here=here, environment={})
    script = "curl() { printf '%s\\n' \"$@\"; }\n" + command
    lines = subprocess.run(["sh", "-c", script], cwd=here, capture_output=True, text=True, check=True).stdout
    arguments = lines.splitlines()
    assert "http://127.0.0.1:8080/v1/chat/completions" in arguments
    assert "Authorization: Bearer the-token" in arguments
    assert json.loads(arguments[-1])["stream"] is True
    assert ("--cacert" in arguments) is certificate
    assert max(map(len, command.splitlines())) <= 110


def test_the_python_command_is_a_whole_script(folder: DataFolder) -> None:
    command = python_command(welcome(folder, certificate=True), here=Path("/"), environment={})
    script = f"cat <<'OUTER'\n{command}\nOUTER\n"
    assert subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == command + "\n"
    body = command.split("<<'END'\n", 1)[1].removesuffix("END")
    compile(body, "snippet", "exec")
    assert str(Path(sys.executable).parent.relative_to("/")) in command


def test_a_proxy_of_the_environment_is_kept_away_from_the_loopback(folder: DataFolder) -> None:
    environment = {"HTTPS_PROXY": "http://proxy:3128"}
    assert proxied(environment)
    assert not proxied({})
    assert not proxied({**environment, "no_proxy": "example.com,127.0.0.1"})
    assert no_proxy("example.com") == "example.com,127.0.0.1,localhost,::1"
    for text in (
        curl_command(welcome(folder), here=folder.path, environment=environment),
        python_command(welcome(folder), here=folder.path, environment=environment),
    ):
        assert text.startswith("no_proxy=127.0.0.1 ")
