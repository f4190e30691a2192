"""The demo that `behest up` sets up: its secrets, its manifests, and the steps that write them to the ledger."""

import base64
import datetime as dt
import ipaddress
import json
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from behest_proxy.cli.folder import DataFolder, write_whole
from behest_proxy.cli.roles import dsn_of_role

TENANT = "demo"
NAMESPACE = "default"
PROJECT = "demo"
PROJECT_ID = f"{NAMESPACE}/{PROJECT}"
MODEL = "gpt-4o-mini"
"""The project's default model, and the one of the examples."""

PAGES = ["http://localhost:5173", "http://127.0.0.1:5173"]
"""Origins of pages that may call the demo from a browser: where `examples/chat` and Vite serve on this machine."""

_CERTIFICATE_DAYS = 30


@dataclass
class Demo:
    """What the steps need to know, and what the last of them finds out."""

    dsn: str
    upstream_url: str
    upstream_key_env: str | None
    api_key: str
    sidecar_role: str = "behest_sidecar"
    """The name of the sidecar's own database role."""
    sidecar_password: str = ""
    sidecar_dsn: str | None = None
    """With that login; None: it could not be made, and the sidecar has to take `dsn`."""
    note: str | None = None
    """For the person, such as why."""


def manifests(upstream_url: str, upstream_key_env: str | None) -> str:
    """The demo's configuration, in the form that `behest apply -f` reads."""
    # JSON strings are YAML strings: nothing in an address can break the document.
    credentials = f"  credentials: {{env: {json.dumps(upstream_key_env)}}}\n" if upstream_key_env else ""
    return f"""\
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: {PROJECT}, namespace: {NAMESPACE}}}
spec:
  tenant: {TENANT}
  defaultModel: {MODEL}
  allowedOrigins: {json.dumps(PAGES)}
---
apiVersion: behest.ai/v1alpha1
kind: Upstream
metadata: {{name: demo, namespace: {NAMESPACE}}}
spec:
  baseURL: {json.dumps(upstream_url)}
{credentials}  protocol: Auto
  models: [{{name: {MODEL}}}, {{name: gpt-4o}}, {{name: gpt-4.1-mini}}, {{name: o4-mini}}, {{name: "*"}}]
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: demo-sessions, namespace: {NAMESPACE}}}
spec:
  scope: {{project: {PROJECT}}}
  per: [session]
  limit: {{amount: "1.00", currency: USD}}
  window: {{period: Day, timeZone: UTC}}
  enforcement: Hard
  alertThresholds: [50, 80, 100]
"""


# The steps, in their order. Each may be repeated on every start.


async def migrate(demo: Demo) -> None:
    """Bring the ledger's schema to this version."""
    from behest_ledger.store.migrate import migrate as migrate_ledger

    await migrate_ledger(demo.dsn)


async def configure(demo: Demo) -> None:
    """Write the manifests."""
    from behest_ledger.store.configuration import apply_text

    await apply_text(demo.dsn, manifests(demo.upstream_url, demo.upstream_key_env), default_tenant=TENANT)


async def give_tiers(demo: Demo) -> None:
    """Write the tiers that published clients know by number, unless there are tiers already: those are somebody's."""
    from behest_ledger.configuration.tiers import builtin_tiers
    from behest_ledger.store.configuration import apply_manifests, load_configuration
    from behest_ledger.store.pool import connect

    connection = await connect(demo.dsn)
    try:
        known = (await load_configuration(connection, None)).tiers
        if not known.get((TENANT, NAMESPACE)):
            await apply_manifests(connection, builtin_tiers(NAMESPACE), default_tenant=TENANT)
    finally:
        await connection.close()


async def price(demo: Demo) -> None:
    """Store the price book that this installation brings, unless it ever was: what somebody chose since then stays."""
    from behest_ledger.prices.snapshot import compile_package_book
    from behest_ledger.store.pool import connect
    from behest_ledger.store.prices import list_versions, store_book

    connection = await connect(demo.dsn)
    try:
        book = compile_package_book()
        if book.version not in {stored.version for stored in await list_versions(connection)}:
            await store_book(connection, book, effective_from=dt.datetime.now(dt.UTC))
    finally:
        await connection.close()


async def register_key(demo: Demo) -> None:
    """Make the API key known; the ledger keeps only its hashes."""
    from behest_ledger.store.identity import register_api_key

    await register_api_key(
        demo.dsn, tenant_id=TENANT, project_id=PROJECT_ID, key=demo.api_key, role="admin", name="demo"
    )


async def give_role(demo: Demo) -> None:
    """Make the sidecar a database role that acts for all tenants and changes no table: only the keeper is the owner."""
    from behest_ledger.store.errors import LedgerError
    from behest_ledger.store.pool import connect
    from behest_ledger.store.roles import create_role

    owner = await connect(demo.dsn)
    own = dsn_of_role(demo.dsn, demo.sidecar_role, demo.sidecar_password)
    try:
        await create_role(owner, demo.sidecar_role, tenants=None, password=demo.sidecar_password, renew=True)
        await (await connect(own)).close()  # a server may well refuse a login that it let us make
    except LedgerError as error:
        demo.note = f"the sidecar uses the database role that was given, it cannot have its own: {error}"
    else:
        demo.sidecar_dsn = own
    finally:
        await owner.close()


STEPS: tuple[tuple[str, Callable[[Demo], Awaitable[None]]], ...] = (
    ("schema", migrate),
    ("prices", price),
    ("project, budget, upstream", configure),
    ("tiers", give_tiers),
    ("API key", register_key),
    ("the sidecar's role", give_role),
)


# Secrets: made once, kept in <data folder>/keys


def api_key(folder: DataFolder) -> str:
    """The demo's API key, `behest_sk_live_` and 32 hexadecimal digits."""
    return folder.secret("api-key", f"behest_sk_live_{secrets.token_hex(16)}")


def sidecar_login(folder: DataFolder) -> tuple[str, str]:
    """Name and password of the sidecar's database role. Roles are the whole server's, so each folder has its own."""
    name = folder.secret("sidecar-role", f"behest_up_{secrets.token_hex(4)}")
    return name, folder.secret("sidecar-password", secrets.token_hex(24))


def master_key(folder: DataFolder) -> Path:
    """The key out of which those of tenants come: under them projects' own keys for providers are sealed."""
    folder.secret("master-key", base64.b64encode(secrets.token_bytes(32)).decode())
    return folder.keys / "master-key"


def signing_key(folder: DataFolder) -> Path:
    """The RSA key (2048 bits, PKCS #8 PEM) that signs the tokens."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    path = folder.keys / "signing.pem"
    if not path.exists():
        key = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_whole(path, pem.decode("ascii"))
    return path


def certificate(folder: DataFolder) -> tuple[Path, Path]:
    """A throw-away certificate for localhost and 127.0.0.1, and its key; made anew in its last week."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    certificate_path, key_path = folder.keys / "tls.crt", folder.keys / "tls.key"
    now = dt.datetime.now(dt.UTC)
    if certificate_path.exists() and key_path.exists():
        old = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        if old.not_valid_after_utc - now > dt.timedelta(days=7):
            return certificate_path, key_path
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "behest on this machine")])
    names = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=_CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_whole(key_path, pem.decode("ascii"))
    write_whole(certificate_path, made.public_bytes(serialization.Encoding.PEM).decode("ascii"), mode=0o644)
    return certificate_path, key_path
