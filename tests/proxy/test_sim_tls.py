"""The simulator over TLS: ALPN offers both protocols on its one port."""

import asyncio
import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from behest_proxy.sim.server import SimServer


def write_certificate(path: Path) -> None:
    """A certificate for 127.0.0.1 by itself, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "behest-sim")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(pem) + private)


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
def test_alpn_chooses_the_protocol(protocol: str, tmp_path: Path) -> None:
    certificate = tmp_path / "certificate.pem"
    write_certificate(certificate)

    async def main() -> None:
        trust = ssl.create_default_context(cafile=str(certificate))
        async with (
            SimServer(tls_cert=certificate) as sim,
            httpx.AsyncClient(verify=trust, http2=protocol == "HTTP/2", base_url=sim.base_url) as client,
        ):
            assert sim.base_url.startswith("https://")
            body = {"model": "m", "messages": [{"role": "user"}], "stream": True}
            answer = await client.post("/chat/completions", json=body)
            assert answer.http_version == protocol
            assert answer.text.endswith("data: [DONE]\n\n")

    asyncio.run(main())
