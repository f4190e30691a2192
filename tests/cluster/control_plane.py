"""A real Kubernetes control plane of one run: etcd and kube-apiserver on loopback, and kubectl and helm to speak to it.

There is no kubelet and no controller manager: nobody starts pods, and nobody makes the things that controllers make.
What a test needs of those it makes itself, so that it is seen (`ControlPlane.namespace` makes the service account).
"""

import contextlib
import datetime as dt
import ipaddress
import json
import os
import ssl
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from behest_proxy.cli.preflight import free_port
from cluster.binaries import Programs, programs
from cluster.routes import Routes, proxied

_numbers = count(1)
_START_S = 180.0
_OURS = "/apis/behest.ai/v1alpha1"
_COLLECTIONS = {
    "configmap": ("/api/v1", "configmaps"),
    "event": ("/api/v1", "events"),
    "pod": ("/api/v1", "pods"),
    "secret": ("/api/v1", "secrets"),
    "service": ("/api/v1", "services"),
    "deployment": ("/apis/apps/v1", "deployments"),
    "statefulset": ("/apis/apps/v1", "statefulsets"),
    "project": (_OURS, "projects"),
    "upstream": (_OURS, "upstreams"),
    "tier": (_OURS, "tiers"),
    "budget": (_OURS, "budgets"),
}
"""What tests poll: each kubectl costs a tenth of a second of a CPU, a call of the API a thousandth."""
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "userGroups": ["system:serviceaccounts"]}, {"level": "None"}],
}


class CommandFailed(AssertionError):
    """kubectl or helm ended with an error; the message is what it said."""


@dataclass(frozen=True)
class ControlPlane:
    """A running control plane."""

    url: str
    folder: Path
    kubeconfig: Path
    """Of a cluster administrator."""
    certificate_authority: Path
    programs: Programs
    routes: Routes
    """What stands behind Services that the API server calls."""
    client: httpx.Client
    """The API server itself, as the administrator."""

    def kubectl(self, *arguments: str, stdin: str | None = None, kubeconfig: Path | None = None) -> str:
        """Run kubectl and return what it prints. Raises `CommandFailed`."""
        return self._run(self.programs.kubectl, arguments, stdin, kubeconfig)

    def helm(self, *arguments: str, stdin: str | None = None) -> str:
        """Run helm and return what it prints. Raises `CommandFailed`."""
        return self._run(self.programs.helm, arguments, stdin, None)

    def apply(self, *documents: dict[str, Any] | str, namespace: str | None = None) -> str:
        """`kubectl apply` of manifests, given as text or objects."""
        text = "\n---\n".join(item if isinstance(item, str) else json.dumps(item) for item in documents)
        where = ["--namespace", namespace] if namespace else []
        return self.kubectl("apply", *where, "--filename", "-", stdin=text)

    def get(self, kind: str, name: str, namespace: str | None = None) -> dict[str, Any]:
        """One object as the API server has it. Raises `CommandFailed` where there is none."""
        if kind in _COLLECTIONS and namespace is not None:
            answer = self.client.get(f"{self.path(kind, namespace)}/{name}")
            if answer.status_code != 200:
                raise CommandFailed(f"get {kind} {name}: {answer.text}")
            there: dict[str, Any] = answer.json()
            return there
        where = ["--namespace", namespace] if namespace else []
        found: dict[str, Any] = json.loads(self.kubectl("get", kind, name, *where, "--output", "json"))
        return found

    def items(self, kind: str, namespace: str | None = None) -> list[dict[str, Any]]:
        """The objects of one of the kinds that are polled, in a namespace or in all."""
        found: list[dict[str, Any]] = self.client.get(self.path(kind, namespace)).raise_for_status().json()["items"]
        return found

    @staticmethod
    def path(kind: str, namespace: str | None = None) -> str:
        """Where the objects of one of the kinds that are polled are."""
        group, collection = _COLLECTIONS[kind]
        return f"{group}/namespaces/{namespace}/{collection}" if namespace else f"{group}/{collection}"

    def namespace(self, prefix: str = "t", labels: dict[str, str] | None = None) -> str:
        """A new namespace with the service account that a controller manager would make."""
        name = f"{prefix}-{os.getpid()}-{next(_numbers)}"
        self.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels or {}}},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}},
        )
        return name

    def route(self, service: str, namespace: str, port: int) -> None:
        """Let connections of the API server to a Service arrive at a port of this machine."""
        spec = self.get("service", service, namespace)["spec"]
        self.routes.add(f"{spec['clusterIP']}:{spec['ports'][0]['port']}", port)

    def kubeconfig_of(self, service_account: str, namespace: str) -> Path:
        """A kubeconfig with a token of a service account: what a pod under it may do."""
        token = self.kubectl("create", "token", service_account, "--namespace", namespace, "--duration", "2h").strip()
        path = self.folder / f"{namespace}-{service_account}.kubeconfig"
        _write_kubeconfig(path, self.url, self.certificate_authority, {"token": token}, namespace)
        return path

    def administrator(self) -> Path:
        """A kubeconfig of somebody who may do everything, by a token: for those that cannot show a certificate."""
        binding = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "administrator"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [{"kind": "ServiceAccount", "name": "administrator", "namespace": "default"}],
        }
        account = {"name": "administrator", "namespace": "default"}
        self.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account}, binding)
        return self.kubeconfig_of("administrator", "default")

    def audited(self, service_account: str, namespace: str) -> list[dict[str, Any]]:
        """What a service account has asked for so far: events of the API server's audit log, the oldest first."""
        user = f"system:serviceaccount:{namespace}:{service_account}"
        # The last line may still be in the making.
        lines = (self.folder / "audit.log").read_text().split("\n")[:-1]
        return [event for line in lines if (event := json.loads(line))["user"]["username"] == user]

    def _run(self, program: Path, arguments: tuple[str, ...], stdin: str | None, kubeconfig: Path | None) -> str:
        home = self.folder / "home"
        done = subprocess.run(
            [str(program), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=180,
            env={
                "PATH": os.environ.get("PATH", ""),
                "HOME": str(home),
                "KUBECONFIG": str(kubeconfig or self.kubeconfig),
                "NO_PROXY": "127.0.0.1",
            },
        )
        if done.returncode != 0:
            raise CommandFailed(f"{program.name} {' '.join(arguments)}: {done.stderr.strip()}\n{done.stdout.strip()}")
        return done.stdout


@contextmanager
def running_control_plane() -> Generator[ControlPlane]:
    """Start etcd and kube-apiserver; both are gone when the block ends.

    Raises `ProgramMissing` where a program cannot be had.
    """
    found = programs()
    with tempfile.TemporaryDirectory(prefix="behest-cluster-") as name, contextlib.ExitStack() as running:
        folder = Path(name)
        (folder / "home").mkdir()
        etcd_url = running.enter_context(_etcd(found.etcd, folder))
        routes = Routes()
        egress = running.enter_context(proxied(routes, folder))
        url, authority = running.enter_context(_apiserver(found.kube_apiserver, folder, etcd_url, egress))
        kubeconfig = folder / "admin.kubeconfig"
        identity = {
            "client-certificate": str(folder / "admin.crt"),
            "client-key": str(folder / "admin.key"),
        }
        _write_kubeconfig(kubeconfig, url, authority, identity, "default")
        context = ssl.create_default_context(cafile=str(authority))
        context.load_cert_chain(folder / "admin.crt", folder / "admin.key")
        client = running.enter_context(httpx.Client(base_url=url, verify=context, timeout=30, trust_env=False))
        plane = ControlPlane(
            url=url,
            folder=folder,
            kubeconfig=kubeconfig,
            certificate_authority=authority,
            programs=found,
            routes=routes,
            client=client,
        )
        _wait_until_ready(plane)
        plane.apply(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "default"}}
        )
        yield plane


@contextmanager
def _process(arguments: list[str], log: Path) -> Generator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        child = subprocess.Popen(arguments, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def _etcd(program: Path, folder: Path) -> Generator[str]:
    client, peer = (f"http://127.0.0.1:{free_port(0)}" for _ in range(2))
    arguments = [
        str(program),
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
    ]
    with _process(arguments, folder / "etcd.log"):
        yield client


@contextmanager
def _apiserver(program: Path, folder: Path, etcd_url: str, egress: Path) -> Generator[tuple[str, Path]]:
    authority = _Authority(folder)
    authority.issue("apiserver", server=True)
    authority.issue("admin", organisation="system:masters")
    signer = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    service_key = folder / "service-accounts.key"
    _write_key(service_key, signer)
    port = free_port(0)
    audit_policy = folder / "audit-policy.yaml"
    audit_policy.write_text(yaml.safe_dump(_AUDIT_POLICY))
    (folder / "audit.log").touch()
    arguments = [
        str(program),
        f"--etcd-servers={etcd_url}",
        f"--audit-policy-file={audit_policy}",
        f"--audit-log-path={folder / 'audit.log'}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        f"--secure-port={port}",
        f"--cert-dir={folder}",
        f"--tls-cert-file={folder / 'apiserver.crt'}",
        f"--tls-private-key-file={folder / 'apiserver.key'}",
        f"--client-ca-file={authority.path}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={service_key}",
        f"--service-account-signing-key-file={service_key}",
        "--service-cluster-ip-range=10.96.0.0/24",
        "--authorization-mode=RBAC",
        "--allow-privileged=true",
        "--endpoint-reconciler-type=none",
        f"--egress-selector-config-file={egress}",
    ]
    with _process(arguments, folder / "apiserver.log"):
        yield f"https://127.0.0.1:{port}", authority.path


def _wait_until_ready(plane: ControlPlane) -> None:
    deadline_s = time.monotonic() + _START_S
    while True:
        try:
            plane.kubectl("get", "--raw", "/readyz")
            plane.get("namespace", "default")
            return
        except CommandFailed as error:
            if time.monotonic() > deadline_s:
                log = (plane.folder / "apiserver.log").read_text()[-3000:]
                raise AssertionError(f"the API server is not ready: {error}\n{log}") from None
            time.sleep(0.1)


class _Authority:
    """A certificate authority of one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "behest test")])
        self.path = folder / "ca.crt"
        certificate = (
            _builder(self._name, self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, organisation: str | None = None, server: bool = False) -> None:
        """Write `<name>.crt` and `<name>.key`."""
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
        if organisation is not None:
            attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation))
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = _builder(x509.Name(attributes), self._name, key.public_key()).add_extension(
            x509.ExtendedKeyUsage([usage]), critical=False
        )
        if server:
            names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        (self._folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        _write_key(self._folder / f"{name}.key", key)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=2))
    )


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _write_kubeconfig(path: Path, url: str, authority: Path, identity: dict[str, str], namespace: str) -> None:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": url, "certificate-authority": str(authority)}}],
        "users": [{"name": "user", "user": identity}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user", "namespace": namespace}}],
        "current-context": "test",
    }
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(document))
